"""Megatron-LLM: what is written computes transformers' logits in an independent forward, and comes back bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from epfl_reference import Model

from commands import convert, run, same, weights_of
from fixtures import logits
from inprocess import here

Hf = Callable[..., Path]

#: fixture -> tensor and pipeline sizes it is written in.
CASES: dict[str, tuple[tuple[int, int], ...]] = {
    "llama1": ((1, 1), (4, 2)),
    "llama2": ((1, 1), (2, 1), (1, 4)),
    "llama_mqa": ((1, 2),),
    "llama3": ((2, 2),),
    "codellama": ((2, 2),),
    "llama_linear_rope": ((1, 1),),
    "llama_both_bias": ((2, 1),),
    "llama_mlp_bias": ((1, 2),),  # the other biases are written as zeros
    "qwen2": ((1, 1),),
    "mistral": ((2, 2),),
    "falcon_7b": ((1, 1), (1, 2)),
    "falcon_40b": ((1, 1), (2, 2)),
    "falcon_11b": ((2, 1),),
    "gemma": ((1, 1), (1, 2)),
    "gpt2": ((2, 2),),
}


@pytest.mark.parametrize(("name", "tp", "pp"), [(name, *size) for name, sizes in CASES.items() for size in sizes])
def test_logits_and_back(hf: Hf, tmp_path: Path, name: str, tp: int, pp: int) -> None:
    source = hf(name)
    made = convert(source, tmp_path / "llm", "megatron_llm", "--target-tp", tp, "--target-pp", pp)
    ids = torch.randint(3, 131, (2, 8), generator=torch.Generator().manual_seed(1))
    found, want = Model(made).logits(ids), logits(source, ids)
    assert found.shape[-1] == -(-want.shape[-1] // (128 * tp)) * 128 * tp
    torch.testing.assert_close(found[..., : want.shape[-1]], want, rtol=2e-5, atol=2e-5)
    same(weights_of(convert(made, tmp_path / "back")), weights_of(source))


def test_by_way_of_megatron_core(hf: Hf, tmp_path: Path) -> None:
    """Megatron-Core has other rows, names and halves: there and back is what is written straight."""
    straight = convert(hf("mistral"), tmp_path / "straight", "megatron_llm", "--target-pp", 2)
    core = convert(straight, tmp_path / "core", "megatron_mcore", "--target-tp", 2, "--target-pp", 1)
    again = convert(core, tmp_path / "again", "megatron_llm", "--target-tp", 1, "--target-pp", 2)
    for rank in ("mp_rank_00_000", "mp_rank_00_001"):
        one, two = (torch.load(made / "release" / rank / "model_optim_rng.pt", weights_only=False)["model"]
                    ["language_model"] for made in (straight, again))  # fmt: skip
        left, right = one["encoder"], two["encoder"]
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_without_our_own_notes(hf: Hf, tmp_path: Path) -> None:
    """The args alone tell what a model is, as nobody else writes ckptconv.json and hf/config.json."""
    for name in ("llama1", "codellama", "mistral", "falcon_7b", "falcon_40b", "gemma", "llama_linear_rope"):
        made = convert(hf(name), tmp_path / name, "megatron_llm", "--target-pp", 2)
        (made / "release" / "ckptconv.json").unlink()
        for path in (made / "hf").iterdir():
            path.unlink()
        back = convert(made, tmp_path / f"{name}.back")
        same(weights_of(back), weights_of(hf(name)))
        ids = torch.arange(3, 11)[None]
        torch.testing.assert_close(logits(back, ids), logits(hf(name), ids), rtol=0, atol=0)


@pytest.mark.parametrize("dialect", ["release", "encoder"])
def test_dialects(hf: Hf, tmp_path: Path, dialect: str) -> None:
    source = hf("llama2")
    made = convert(source, tmp_path / "llm", "megatron_llm", "--dialect", dialect, "--target-tp", 2, "--target-pp", 2)
    model = torch.load(made / "release" / "mp_rank_00_000" / "model_optim_rng.pt", weights_only=False)["model"]
    parts = model["language_model"]
    assert set(parts) == {"embedding", {"release": "transformer", "encoder": "encoder"}[dialect]}
    flat = dialect == "release"
    assert set(parts["embedding"]) == {"word_embeddings.weight" if flat else "word_embeddings"}
    names = parts["transformer" if flat else "encoder"]
    assert f"layers.0.{'' if flat else 'self_'}attention.query_key_value.weight" in names
    same(weights_of(convert(made, tmp_path / "back")), weights_of(source))
    torch.testing.assert_close(Model(made).logits(torch.arange(3, 9)[None])[..., :131],
                               logits(source, torch.arange(3, 9)[None]), rtol=2e-5, atol=2e-5)  # fmt: skip


def _args(made: Path, rank: str = "mp_rank_00") -> dict[str, Any]:
    return vars(torch.load(made / "release" / rank / "model_optim_rng.pt", weights_only=False)["args"])


def test_args_of_a_restart(hf: Hf, tmp_path: Path) -> None:
    """What load_args_from_checkpoint restores and check_checkpoint_args compares, and what upstream's tools lose."""
    args = _args(convert(hf("codellama"), tmp_path / "llm", "megatron_llm", "--bf16"))
    told = {
        "num_layers": 4, "encoder_num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 88, "num_attention_heads": 4,
        "num_attention_heads_kv": 2, "kv_channels": 12, "max_position_embeddings": 16384, "seq_length": 16384,
        "rope_theta": 1e6, "layernorm_epsilon": 1e-5, "padded_vocab_size": 256, "make_vocab_size_divisible_by": 128,
        "tokenizer_type": "SentencePieceTokenizer", "position_embedding_type": "rotary", "use_rms_norm": True,
        "glu_activation": "swiglu", "tie_embed_logits": False, "parallel_attn": False, "parallel_layernorm": False,
        "use_bias": False, "sliding_window_size": None, "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1, "data_parallel_random_init": False, "consumed_train_samples": 0,
        "bf16": True, "params_dtype": torch.bfloat16, "iteration": "release", "model_name": "codellama",
    }  # fmt: skip
    assert {name: args.get(name, "absent") for name in told} == told


def test_args_of_the_source_are_kept(hf: Hf, tmp_path: Path) -> None:
    """A reshard keeps what a trainer was told (dropout, dropout schedule, seed), which upstream's own reshard loses."""
    first = convert(hf("llama1"), tmp_path / "one", "megatron_llm")
    path = first / "release" / "mp_rank_00" / "model_optim_rng.pt"
    whole = torch.load(path, weights_only=False)
    vars(whole["args"]).update(hidden_dropout=0.25, lima_dropout=True, seed=77, save="elsewhere")
    torch.save(whole, path)
    args = _args(convert(first, tmp_path / "two", "megatron_llm", "--target-tp", 2), "mp_rank_01")
    assert (args["hidden_dropout"], args["lima_dropout"], args["seed"]) == (0.25, True, 77)
    assert (args["layernorm_epsilon"], args["tensor_model_parallel_size"]) == (1e-6, 2)
    assert "save" not in args


def test_flags_of_the_trainer(hf: Hf, tmp_path: Path) -> None:
    made = convert(hf("falcon_40b"), tmp_path / "llm", "megatron_llm", "--target-tp", 2)
    lines = (made / "megatron_args.txt").read_text().splitlines()
    assert {"--model_name falcon", "--parallel_attn", "--parallel_layernorm", "--num_attention_heads_kv 2",
            "--tensor_model_parallel_size 2"} <= set(lines)  # fmt: skip
    assert "--no_tie_embed_logits" not in lines


def test_other_file_layouts(hf: Hf, tmp_path: Path) -> None:
    """With a distributed optimizer the weights are in model_rng.pt; virtual stages are in model0, model1, ..."""
    source = hf("llama2")
    made = convert(source, tmp_path / "llm", "megatron_llm", "--target-tp", 2)
    for rank in ("mp_rank_00", "mp_rank_01"):
        folder = made / "release" / rank
        (folder / "model_optim_rng.pt").rename(folder / "model_rng.pt")
        (made / "release" / f"{rank}_000").mkdir()
        torch.save({"optimizer": {}}, made / "release" / f"{rank}_000" / "optim.pt")
    same(weights_of(convert(made, tmp_path / "back")), weights_of(source))

    # Four stages become two of two virtual stages each: the first holds layers 0 and 2.
    deep = convert(source, tmp_path / "pp4", "megatron_llm", "--target-pp", 4)
    paths = [deep / "release" / f"mp_rank_00_{stage:03d}" / "model_optim_rng.pt" for stage in range(4)]
    whole = [torch.load(path, weights_only=False) for path in paths]
    for stage, path in enumerate(paths):
        if stage > 1:
            shutil.rmtree(path.parent)
            continue
        args = whole[stage]["args"]
        args.pipeline_model_parallel_size, args.num_layers_per_virtual_pipeline_stage = 2, 1
        parts = {"model0": whole[stage].pop("model"), "model1": whole[2 + stage]["model"]}
        torch.save({**whole[stage], **parts}, path)
    same(weights_of(convert(deep, tmp_path / "virtual")), weights_of(source))


def test_refused(hf: Hf, tmp_path: Path) -> None:
    """What Megatron-LLM cannot express, and layouts that its attention cannot run; nothing is written."""
    for name, flags, word in (
        ("llama31", (), "llama3"),
        ("falcon_rw", (), "alibi"),
        ("qwen3", (), "qk_norm"),
        ("mixtral", (), "moe"),
        ("falcon_7b", ("--target-tp", 2), "query groups"),
    ):
        fixed = ("--load-dir", hf(name), "--save-dir", tmp_path / name, "--saver", "megatron_llm", "--no-progress")
        result = here(*fixed, *flags)
        assert result.returncode in (6, 7) and word in result.stderr, (name, result.stderr)
        assert not (tmp_path / name).exists()


def test_inexact_is_kept_by_us(hf: Hf, tmp_path: Path) -> None:
    """--allow-inexact writes a scaled rope's weights; our notes keep what the args cannot say."""
    made = convert(hf("llama31"), tmp_path / "llm", "megatron_llm", "--allow-inexact", "--target-pp", 2)
    back = convert(made, tmp_path / "back")
    assert (back / "config.json").read_text().count('"llama3"')
    same(weights_of(back), weights_of(hf("llama31")))


def test_damaged_sources(hf: Hf, tmp_path: Path) -> None:
    """Ranks that have drifted apart, args of another model, a BERT, and tensors that nothing knows are refused."""
    made = convert(hf("llama2"), tmp_path / "llm", "megatron_llm", "--target-tp", 2)
    path = made / "release" / "mp_rank_01" / "model_optim_rng.pt"
    good = path.read_bytes()

    def refused(word: str, change: Callable[[Any], None]) -> None:
        whole = torch.load(path, weights_only=False)
        change(whole)
        torch.save(whole, path)
        result = here("--load-dir", made, "--save-dir", tmp_path / "no", "--saver", "hf", "--no-progress")
        assert result.returncode == 3 and word in result.stderr, result.stderr
        path.write_bytes(good)

    def encoder(whole: Any) -> Any:
        return whole["model"]["language_model"]["encoder"]

    refused("differs", lambda w: encoder(w)["layers.1.input_layernorm.weight"].add_(1))
    refused("lacks", lambda w: encoder(w).pop("layers.1.mlp.dense_4h_to_h.weight"))
    refused("no rule knows", lambda w: encoder(w).update({"layers.1.mlp.extra.weight": torch.zeros(1)}))
    refused("BERT", lambda w: w["model"]["language_model"].update(pooler={"dense": {"weight": torch.zeros(1)}}))

    path = made / "release" / "mp_rank_00" / "model_optim_rng.pt"
    good = path.read_bytes()
    refused("expected", lambda w: vars(w["args"]).update(num_attention_heads_kv=4))
    refused("use_post_ln", lambda w: vars(w["args"]).update(use_post_ln=True))


def test_gemma_of_a_fork(hf: Hf, tmp_path: Path) -> None:
    """Without our attributes --model-type gemma (or the args' model_name) tells what Gemma has."""
    source = hf("gemma")
    made = convert(source, tmp_path / "llm", "megatron_llm")
    path = made / "release" / "mp_rank_00" / "model_optim_rng.pt"
    whole = torch.load(path, weights_only=False)
    for name in ("apply_layernorm_1p", "embedding_multiplier", "approximate_gelu", "model_name"):
        delattr(whole["args"], name)
    torch.save(whole, path)
    (made / "release" / "ckptconv.json").unlink()
    for file in (made / "hf").iterdir():
        file.unlink()
    plain = convert(made, tmp_path / "plain")  # as the args have it: a tied model with an exact GeGLU, and no Gemma
    assert '"model_type": "llama"' in (plain / "config.json").read_text()
    back = convert(made, tmp_path / "back", "hf", "--model-type", "gemma")
    same(weights_of(back), weights_of(source))
    ids = torch.arange(3, 11)[None]
    torch.testing.assert_close(logits(back, ids), logits(source, ids), rtol=0, atol=0)


def test_head_dim_is_checked(hf: Hf, tmp_path: Path) -> None:
    made = convert(hf("gemma"), tmp_path / "llm", "megatron_llm", "--kv_channels", 16)
    assert run(made, tmp_path / "no", "hf", "--kv_channels", 12) == 2
    convert(made, tmp_path / "back", "hf", "--kv_channels", 16)
