"""Against what Gaudi Megatron-LM 1.24.0's own converters read and wrote.

`mlm` are in the layout that the fork's model reads, `hf`
and `mcore` are what its converters made, `inputs` the Hugging Face models behind all of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from commands import same, weights_of
from goldens import golden, read
from inprocess import here, main

HOME = golden("gaudi")

CASES = {"llama_gqa_tp2pp2ep1": ("llama_gqa", "llama2"), "mixtral_tp1pp2ep2_bins": ("mixtral", "mixtral")}
#: transformers writes them, or they follow from the vocabulary, which upstream leaves padded for Mixtral.
NOT_COMPARED = ("vocab_size", "torch_dtype", "transformers_version", "use_cache", "initializer_range", "pretraining_tp")


def run(*words: object) -> int:
    """The exit code of a command line."""
    return main(words)


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def nested_equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(nested_equal(one[k], other[k]) for k in one)
    return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("case", CASES)
def test_to_hugging_face(case: str, tmp_path: Path) -> None:
    """The converter's flags; weights are the truth's, the config upstream's, bins and args too."""
    model, kind = CASES[case]
    code = run(
        "--loader", "megatron_gaudi", "--saver", "hf", "--ckpt-dir-name", "iter_0000004",
        "--source-model-type", kind, "--target-params-dtype", "fp32", "--max-shard-size", "5GB",
        "--load-path", HOME / "mlm" / case, "--save-path", tmp_path, "--save-capacity-bins",
    )  # fmt: skip
    assert code == 0
    same(weights_of(tmp_path), {k: t.float() for k, t in weights_of(HOME / "inputs" / model).items()})
    found, want = config_of(tmp_path), config_of(HOME / "hf" / case)
    wrong = {key: (found.get(key), value) for key, value in want.items() if found.get(key) != value}
    assert not {key: pair for key, pair in wrong.items() if key not in NOT_COMPARED}
    assert found["vocab_size"] == 300 and found["torch_dtype"] == "float32"
    name = "source_megatron_args.json"
    assert json.loads((tmp_path / name).read_text()) == json.loads((HOME / "hf" / case / name).read_text())
    bins = torch.load(tmp_path / "capacity_bins.pt", weights_only=True)
    expected = HOME / "hf" / case / "capacity_bins.pt"
    assert nested_equal(bins, torch.load(expected, weights_only=True) if expected.exists() else {})


@pytest.mark.parametrize("case", CASES)
def test_tokenizer(case: str, tmp_path: Path) -> None:
    """The args name a path of where they were written; a flag says where it is now. The pieces are upstream's, and
    texts become the ids of sentencepiece itself, which upstream's tokenizer.json misses at the beginning of a text.
    """
    model, kind = CASES[case]
    flags = ("--source-model-type", kind, "--tokenizer-model", HOME / "inputs" / model / "tokenizer.model")
    assert run("--load-dir", HOME / "mlm" / case, "--save-dir", tmp_path, "--saver", "hf", *flags) == 0
    found, theirs = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (tmp_path, HOME / "hf" / case))
    assert found.get_vocab() == theirs.get_vocab()
    pieces = SentencePieceProcessor(model_file=str(HOME / "inputs" / model / "tokenizer.model"))
    for text in ("the quick brown fox", " hello  world", "caf\u00e9 123 \u4f60", "a\n\n b"):
        assert found.encode(text, add_special_tokens=False).ids == pieces.encode(text), text


def test_found_without_a_name(tmp_path: Path) -> None:
    source = HOME / "mlm" / "mixtral_tp1pp2ep2_bins"
    result = here("--load-dir", source, "--save-dir", tmp_path / "out", "--saver", "hf")
    assert result.returncode == 0 and "megatron_gaudi -> hf" in result.stderr
    same(weights_of(tmp_path / "out"), {k: t.float() for k, t in weights_of(HOME / "inputs" / "mixtral").items()})
    notes = json.loads((tmp_path / "out" / "ckptconv.json").read_text())["notes"]
    assert any("capacity bins" in note for note in notes)
    assert not (tmp_path / "out" / "capacity_bins.pt").exists()


@pytest.mark.parametrize("divisor", [None, 1])
def test_the_documented_command_back(divisor: int | None, tmp_path: Path) -> None:
    """README of 1.19.0, second half: the ranks are upstream's own. Upstream's saver fails on a vocabulary that has to
    be padded, so its files were written with a divisor of 1.
    """
    source = tmp_path / "hf"
    source.mkdir()
    for path in (HOME / "inputs" / "llama_gqa").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "source_megatron_args.json").write_bytes(
        (HOME / "hf" / "llama_gqa_tp2pp2ep1" / "source_megatron_args.json").read_bytes()
    )
    result = here(
        "--bf16",
        "--model-type", "GPT",
        "--loader", "llama_mistral",
        "--saver", "megatron_gaudi",
        "--loader-transformer-impl", "local",
        "--saver-transformer-impl", "transformer_engine",
        "--target-tensor-parallel-size", 2,
        "--target-pipeline-parallel-size", 2,
        "--checkpoint-type", "hf",
        "--source-margs-file", source / "source_megatron_args.json",
        "--load-dir", source,
        "--save-dir", tmp_path / "out",
        "--tokenizer-model", HOME / "inputs" / "llama_gqa" / "tokenizer.model",
        "--model-size", "llama3-70B",
        *(("--make-vocab-size-divisible-by", divisor) if divisor else ()),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    golden = HOME / "mcore" / "llama_gqa_tp2pp2_te"
    files = sorted(golden.glob("iter_*/*/model_optim_rng.pt"))
    assert len(files) == 4
    for path in files:
        want, found = read(path), read(tmp_path / "out" / path.relative_to(golden))
        tensors = {k: t for k, t in want["model"].items() if not k.endswith("_extra_state")}
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            if name in tensors and not divisor:
                assert found["model"].pop(name).shape == (256, 64)
                del tensors[name]
        same(found["model"], tensors)
        assert (found["iteration"], found["checkpoint_version"]) == (want["iteration"], want["checkpoint_version"])
        mine, theirs = vars(found["args"]), vars(want["args"])
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_query_groups", "transformer_impl",
                     "normalization", "swiglu", "position_embedding_type", "vocab_size",
                     "moe_capacity_bins_num", "moe_dynamic_hpu", "tensor_model_parallel_size"):  # fmt: skip
            assert mine[name] == theirs[name], name
        assert mine["padded_vocab_size"] == (300 if divisor else 512)
        assert mine["attention_dropout"] == 0.0 and mine["seq_length"] == 4096  # of the margs file
    told = json.loads((tmp_path / "out" / "target_megatron_args.json").read_text())
    assert told["params_dtype"] == "torch.bfloat16" and told["num_layers"] == 4


def test_bins_go_back(tmp_path: Path) -> None:
    source, flags = HOME / "mlm" / "mixtral_tp1pp2ep2_bins", ("--source-model-type", "mixtral", "--save-capacity-bins")
    assert run("--load-dir", source, "--save-dir", tmp_path / "hf", "--saver", "hf", *flags) == 0
    back = ("--loader", "mixtral_hf", "--load-dir", tmp_path / "hf", "--saver", "megatron_gaudi",
            "--load-capacity-bins", "--source-margs-file", tmp_path / "hf" / "source_megatron_args.json",
            "--target-pipeline-parallel-size", 2, "--target-expert-parallel-size", 2)  # fmt: skip
    assert run(*back, "--save-dir", tmp_path / "out") == 0
    for path in sorted(source.glob("iter_*/*/model_optim_rng.pt")):
        want = {k: t for k, t in read(path)["model"].items() if not k.endswith("_extra_state")}
        content = read(tmp_path / "out" / "iter_0000001" / path.parent.name / path.name)
        found = content["model"]
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            if name in want:  # how the padding is filled is the converter's choice
                want[name], found[name] = want[name][:300], found[name][:300]
        same(found, want)
        assert content["args"].moe_capacity_bins_num == 5
    result = here(*back, "--save-dir", tmp_path / "no", "--target-pipeline-parallel-size", 1)
    assert result.returncode == 6 and "bins are each rank's own" in result.stderr
    assert not (tmp_path / "no").exists()
