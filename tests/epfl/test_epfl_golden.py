"""Megatron-LLM against files that its own tools wrote, with the command lines of those tools.

`epfl/inputs/I` -> `epfl/h2m/I` by hf_to_megatron.py, `h2m/llama2_gqa` -> `m2h/llama2_gqa` by megatron_to_hf.py, and
`h2m/llama2_mha` -> `util/llama2_mha_tp2pp2` by checkpoint_util.py. Upstream's own mistakes are named where they show:
releases are always in fp32, positions come from a table of sizes, and an export has neither rope theta nor shard count.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers

from commands import convert, same, weights_of
from goldens import golden, read
from inprocess import main

GOLDEN = golden("epfl")

FILE = "model_optim_rng.pt"


def _flat(model: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in model.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield prefix + key, value


def _compare(found: Path, want: Path, dtype: torch.dtype | None = None) -> dict[str, dict[str, Any]]:
    """Every tensor of every rank under the same nested keys; returns the args of both. dtype: of all found ones."""
    ranks = sorted(path.parent.name for path in want.glob(f"*/{FILE}"))
    assert sorted(path.parent.name for path in found.glob(f"*/{FILE}")) == ranks
    for rank in ranks:
        ours, theirs = read(found / rank / FILE), read(want / rank / FILE)
        assert (ours["iteration"], ours["checkpoint_version"]) == (theirs["iteration"], theirs["checkpoint_version"])
        mine, golden = dict(_flat(ours["model"])), dict(_flat(theirs["model"]))
        assert sorted(mine) == sorted(golden)
        for name, tensor in golden.items():
            assert mine[name].dtype == (dtype or tensor.dtype)
            assert torch.equal(mine[name].float(), tensor.float()), name
    return {"ours": vars(ours["args"]), "theirs": vars(theirs["args"])}


@pytest.mark.parametrize("name", ["llama2_gqa", "llama2_mha", "falcon7"])
def test_hf_to_megatron(tmp_path: Path, name: str) -> None:
    """hf_to_megatron.py of Hugging Face weights; what the trainer starts with is beside them."""
    model = "falcon" if name == "falcon7" else "llama2"
    command = ["hf_to_megatron", model, "--size", 7, "--model-path", GOLDEN / "inputs" / name]
    assert main([*command, "--out", tmp_path / "out", "--no-progress", "--verify"]) == 0
    args = _compare(tmp_path / "out" / "release", GOLDEN / "h2m" / name / "release")
    # A table of sizes says 4096 whatever the model is.
    positions = ("max_position_embeddings", "seq_length") if model == "llama2" else ()
    expected = {key: value for key, value in args["theirs"].items() if key not in positions}
    assert {key: args["ours"].get(key, "absent") for key in expected} == expected
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "release"
    if model == "llama2":
        tokenizer = GOLDEN / "h2m" / name / "tokenizer.model"
        assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


def test_hf_to_megatron_of_meta_weights(tmp_path: Path) -> None:
    """--cache-dir holds Meta's shards. Upstream makes matrices of several shards fp32 and leaves norms bf16."""
    command = ["hf_to_megatron", "llama2", "--cache-dir", GOLDEN / "inputs" / "meta_gqa_x2", "--out", tmp_path / "out"]
    assert main([*command, "--no-progress", "--target-tp", 1]) == 0
    args = _compare(tmp_path / "out" / "release", GOLDEN / "h2m" / "meta_x2" / "release", torch.bfloat16)
    assert {key: args["ours"].get(key) for key in args["theirs"]} == args["theirs"]


def test_hf_to_megatron_of_a_cached_download(tmp_path: Path) -> None:
    """A --cache-dir that is a Hugging Face directory itself, and one that has Meta's folder of the size in it."""
    cached = ["hf_to_megatron", "llama2", "--cache_dir", GOLDEN / "inputs" / "llama2_mha", "--out", tmp_path / "hf"]
    assert main([*cached, "--no-progress"]) == 0
    _compare(tmp_path / "hf" / "release", GOLDEN / "h2m" / "llama2_mha" / "release")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "llama-2-7b").symlink_to(GOLDEN / "inputs" / "meta_gqa_x2")
    command = ["hf_to_megatron", "llama2", "--cache-dir", tmp_path / "cache", "--out", tmp_path / "meta"]
    assert main([*command, "--no-progress", "--target-tp", 1]) == 0
    _compare(tmp_path / "meta" / "release", GOLDEN / "h2m" / "meta_x2" / "release", torch.bfloat16)


def test_reshard(tmp_path: Path) -> None:
    """checkpoint_util.py, whose table of words stays as it is: 384 rows are no multiple of 128 * 2."""
    command = ["checkpoint_util", "--model_type", "llama2", "--load_dir", GOLDEN / "h2m" / "llama2_mha", "--save_dir",
               tmp_path / "out", "--target_tensor_parallel_size", 2, "--target_pipeline_parallel_size", 2]  # fmt: skip
    assert main([*command, "--no-progress", "--verify"]) == 0
    args = _compare(tmp_path / "out" / "release", GOLDEN / "util" / "llama2_mha_tp2pp2" / "release")
    restored = ("num_layers", "encoder_num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
                "num_attention_heads_kv", "kv_channels", "max_position_embeddings", "make_vocab_size_divisible_by",
                "layernorm_epsilon", "use_bias", "use_rms_norm", "glu_activation", "rope_scaling_factor", "rope_theta",
                "parallel_attn", "parallel_layernorm", "tie_embed_logits", "sliding_window_size", "lima_dropout",
                "padded_vocab_size", "tensor_model_parallel_size", "pipeline_model_parallel_size", "seq_length",
                "tokenizer_type", "world_size", "model_name", "params_dtype")  # fmt: skip
    assert {key: args["ours"][key] for key in restored} == {key: args["theirs"][key] for key in restored}


def test_reshard_back(tmp_path: Path) -> None:
    """What the trainer writes, whose args hold enums of Megatron-LLM, into one rank again."""
    back = convert(GOLDEN / "util" / "llama2_mha_tp2pp2", tmp_path / "out", "megatron_llm", "--target-tp", 1,
                   "--target-pp", 1)  # fmt: skip
    _compare(back / "release", GOLDEN / "h2m" / "llama2_mha" / "release")
    same(weights_of(convert(GOLDEN / "util" / "llama2_mha_tp2pp2", tmp_path / "hf")),
         weights_of(GOLDEN / "inputs" / "llama2_mha"))  # fmt: skip


def test_megatron_to_hf(tmp_path: Path) -> None:
    """megatron_to_hf.py with every flag, in exactly so many files; the tokenizer has the ids that upstream's has."""
    source, want = GOLDEN / "h2m" / "llama2_gqa", GOLDEN / "m2h" / "llama2_gqa"
    command = ["megatron_to_hf", "--model", "llama2", "--input_dir", source, "--output_dir", tmp_path / "out",
               "--vocab_file", source / "tokenizer.model", "--num_output_shards", 3, "--vocab_extra_ids_list",
               "<|im_start|>,<|im_end|>", "--override_special_tokens", "eos=<|im_end|>", "pad=<|im_end|>"]  # fmt: skip
    assert main([*command, "--no-progress", "--verify"]) == 0
    same(weights_of(tmp_path / "out"), weights_of(want))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    found, told = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", want))
    # Upstream leaves the ids of the model as they were, whatever the tokenizer's are.
    ids = {"bos_token_id", "eos_token_id", "transformers_version", "initializer_range", "use_cache", "pretraining_tp",
           "attention_dropout"}  # fmt: skip
    assert {key: found.get(key) for key in told.keys() - ids} == {key: told[key] for key in told.keys() - ids}
    assert (found["eos_token_id"], found["pad_token_id"], found["bos_token_id"]) == (306, 306, 1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = json.loads((want / "added_tokens.json").read_text())
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in theirs} == theirs
    names = ["<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [305, 306]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.cls_token) == ("<|im_end|>", "<|im_end|>", "<CLS>")
    text = (GOLDEN / "inputs" / "tok" / "corpus.txt").read_text()[:2000]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    assert tokenizer(text)["input_ids"] == [1, *pieces.encode(text)]


def test_megatron_to_hf_without_flags(tmp_path: Path) -> None:
    """The tokenizer.model beside a release is found; one file by default."""
    source = GOLDEN / "h2m" / "llama2_mha"
    assert main(["megatron_to_hf", "--input_dir", source, "--output_dir", tmp_path / "out", "--no-progress"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == ["model.safetensors"]
    same(weights_of(tmp_path / "out"), weights_of(GOLDEN / "inputs" / "llama2_mha"))
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) <= 384


def test_megatron_to_hf_falcon(tmp_path: Path) -> None:
    command = ["megatron_to_hf", "--model", "falcon", "--input_dir", GOLDEN / "h2m" / "falcon7"]
    assert main([*command, "--output_dir", tmp_path / "out", "--no-progress"]) == 0
    same(weights_of(tmp_path / "out"), weights_of(GOLDEN / "inputs" / "falcon7"))


def test_a_legacy_loader_does_not_take_it() -> None:
    """Its files look like Megatron-LM's own legacy ones; only one loader recognises them."""
    from ckptconv import plugins

    for folder in (*(GOLDEN / "h2m").iterdir(), *(GOLDEN / "util").iterdir()):
        assert plugins.detect(str(folder)) == "megatron_llm"
