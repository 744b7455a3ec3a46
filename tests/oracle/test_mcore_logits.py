"""Converted checkpoints give the logits of transformers in NVIDIA's own model, at every layout; TE names are right.

All conversions, and then one oracle process, are started by the first test.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures import FIXTURES, logits
from inprocess import here
from mcore import EXTRA, Case, Outcome, model_settings, padded, run, transformer_settings

# importorskip would import megatron-core, which takes seconds and is wanted in the oracle's process only.
if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

Fixture = Callable[..., Path]

LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))
# The other families are in modules of their own beside this one.
NAMES = (
    "llama1", "llama2", "llama_mqa", "llama3", "llama31", "llama32", "codellama", "llama_attention_bias",
    "llama_mlp_bias", "llama_both_bias", "llama_linear_rope", "mistral", "qwen2", "qwen2_tied",
)  # fmt: skip
# The longest wavelengths make themselves felt only far from the start.
LONG = ("llama31", "llama32", "llama_linear_rope")
TOLERANCE = 1e-4
# Fixture, damage, and the input on which it shows.
NEGATIVE = (
    ("llama2", "gate and up swapped", "short"),
    ("llama2", "norms swapped", "short"),
    ("llama2", "qkv not grouped", "short"),
    ("qwen2", "qkv bias zero", "short"),
    ("codellama", "rope theta lost", "short"),
    ("mistral", "window lost", "short"),
    ("llama31", "rope factor wrong", "long"),
    ("llama32", "rope factor wrong", "long"),
)
REFUSED = (("llama2", "norm missing", "missing"), ("llama2", "bias added", "unexpected"))


def divisor(name: str) -> int:
    """One fixture is padded as Megatron pads by default, the others as little as the layout allows."""
    return 128 if name == "llama2" else 1


def token_ids(name: str) -> dict[str, list[list[int]]]:
    """Input [b, s] by name. 24 tokens are three windows of the Mistral fixture."""
    generator = torch.Generator().manual_seed(1)
    vocab = FIXTURES[name]["vocab_size"]
    sizes = {"short": (2, 24)} | ({"long": (1, 2048)} if name in LONG else {})
    return {key: torch.randint(3, vocab, size, generator=generator).tolist() for key, size in sizes.items()}


@dataclass(frozen=True)
class Converted:
    """An output directory and the run that wrote it."""

    path: Path
    result: subprocess.CompletedProcess[str]

    def check(self) -> Path:
        assert self.result.returncode == 0, f"exit code {self.result.returncode}\n{self.result.stderr[-4000:]}"
        return self.path


def padding_flag(name: str) -> tuple[object, ...]:
    return () if divisor(name) == 128 else ("--make-vocab-size-divisible-by", divisor(name))


def to_mcore(source: Path, out: Path, name: str, tp: int, pp: int, impl: str) -> Converted:
    loader = f"hf_{FIXTURES[name]['model_type']}"
    flags = ("--loader", loader, "--saver", "megatron_mcore", "--load-dir", source, "--save-dir", out)
    layout = ("--target-tp", tp, "--target-pp", pp, "--saver-transformer-impl", impl, *padding_flag(name))
    return Converted(out, here(*flags, *layout))


@pytest.fixture(scope="module")
def converted(hf: Fixture, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, int], Converted]:
    """Every fixture at every layout, with the local layer spec."""
    root = tmp_path_factory.mktemp("mcore")
    jobs = [(name, tp, pp) for name in NAMES for tp, pp in LAYOUTS]
    return {
        (name, tp, pp): to_mcore(hf(name), root / f"{name}.tp{tp}pp{pp}", name, tp, pp, "local")
        for name, tp, pp in jobs
    }


@pytest.fixture(scope="module")
def outcomes(
    hf: Fixture, converted: dict[tuple[str, int, int], Converted], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """What megatron-core makes of everything that was converted, by "fixture tpTppP" or "fixture damage"."""
    cases = {}
    for (name, tp, pp), run_of in converted.items():
        if run_of.result.returncode == 0:
            cases[f"{name} tp{tp}pp{pp}"] = Case(
                str(hf(name)), str(run_of.path), tp, pp, token_ids(name), divisor(name)
            )
    for name, damage, _ in NEGATIVE + REFUSED:
        good = cases.get(f"{name} tp1pp1")
        if good:
            cases[f"{name} {damage}"] = Case(good.hf, good.checkpoint, 1, 1, good.ids, good.divisor, damage)
    return run(cases, tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="module")
def expected(hf: Fixture) -> Callable[[str, str], torch.Tensor]:
    """`expected(fixture, input)`: logits by transformers, computed once."""
    known: dict[str, dict[str, torch.Tensor]] = {}

    def get(name: str, key: str) -> torch.Tensor:
        if name not in known:
            known[name] = {k: logits(hf(name), torch.tensor(ids)) for k, ids in token_ids(name).items()}
        return known[name][key]

    return get


def difference(outcome: Outcome, key: str, want: torch.Tensor) -> float:
    """Largest absolute difference over the real vocabulary; padding rows have no counterpart."""
    assert not outcome.error, outcome.error
    return float((outcome.logits[key][..., : want.shape[-1]] - want).abs().max())


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS, ids=lambda n: str(n))
@pytest.mark.parametrize("name", NAMES)
def test_logits(
    name: str,
    tp: int,
    pp: int,
    converted: dict[tuple[str, int, int], Converted],
    outcomes: dict[str, Outcome],
    expected: Callable[[str, str], torch.Tensor],
) -> None:
    converted[name, tp, pp].check()
    for key in token_ids(name):
        found = difference(outcomes[f"{name} tp{tp}pp{pp}"], key, expected(name, key))
        assert found < TOLERANCE, f"{name} at tp {tp} pp {pp}, {key} input: logits differ by {found:.1e}"


@pytest.mark.parametrize(("name", "damage", "key"), NEGATIVE)
def test_damage_shows(
    name: str,
    damage: str,
    key: str,
    converted: dict[tuple[str, int, int], Converted],
    outcomes: dict[str, Outcome],
    expected: Callable[[str, str], torch.Tensor],
) -> None:
    """The comparison above can fail: a mistake in one layer, or in one setting, moves the logits a hundredfold."""
    converted[name, 1, 1].check()
    assert difference(outcomes[f"{name} {damage}"], key, expected(name, key)) > 1e-2


@pytest.mark.parametrize(("name", "damage", "complaint"), REFUSED)
def test_wrong_keys_are_refused(
    name: str,
    damage: str,
    complaint: str,
    converted: dict[tuple[str, int, int], Converted],
    outcomes: dict[str, Outcome],
) -> None:
    converted[name, 1, 1].check()
    assert complaint in outcomes[f"{name} {damage}"].error


@pytest.mark.parametrize("name", NAMES)
def test_arguments(name: str, hf: Fixture, converted: dict[tuple[str, int, int], Converted]) -> None:
    """`args` in the files say what the oracle derived from config.json. A false or absent switch may be left out."""
    out = converted[name, 2, 2].check()
    c = json.loads((hf(name) / "config.json").read_text())
    transformer, model = transformer_settings(c), model_settings(c)
    copied = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
              "normalization", "add_bias_linear", "window_size")  # fmt: skip
    want = {key: transformer[key] for key in copied} | {
        # 0.16 renamed the first to the second and both are read.
        "norm_epsilon": c["rms_norm_eps"],
        "layernorm_epsilon": c["rms_norm_eps"],
        "group_query_attention": transformer["num_query_groups"] < transformer["num_attention_heads"],
        "swiglu": True,
        "position_embedding_type": "rope",
        "rotary_base": model["rotary_base"],
        "max_position_embeddings": c["max_position_embeddings"],
        "untie_embeddings_and_output_weights": not c["tie_word_embeddings"],
        "use_rope_scaling": model.get("rope_scaling", False),
        "rotary_seq_len_interpolation_factor": model.get("seq_len_interpolation_factor"),
        "vocab_size": c["vocab_size"],
        "padded_vocab_size": padded(c["vocab_size"], divisor(name), 2),
        "make_vocab_size_divisible_by": divisor(name),
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
    }
    if model.get("rope_scaling"):
        want["rope_scaling_factor"] = model["rope_scaling_factor"]
    if not transformer["add_bias_linear"]:  # which includes the qkv bias
        want["add_qkv_bias"] = transformer["add_qkv_bias"]
    if not want["group_query_attention"]:  # an MHA Namespace need not count groups
        del want["num_query_groups"], want["group_query_attention"]
    for file, checkpoint in rank_files(out):
        have = {key: vars(checkpoint["args"]).get(key) for key in want}
        wrong = {key: (have[key], value) for key, value in want.items() if (have[key] or None) != (value or None)}
        assert not wrong, f"{file}: (found, expected) by argument: {wrong}"


# Transformer Engine keeps the norm before a linear in that linear.
TE_LAYER = (
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
)
# Fixture -> what a layer has beside TE_LAYER.
TE_BIASES: dict[str, tuple[str, ...]] = {
    "llama2": (),
    "qwen2": ("self_attention.linear_qkv.bias",),
    "qwen2_tied": ("self_attention.linear_qkv.bias",),
    "llama_both_bias": (
        "mlp.linear_fc1.bias",
        "mlp.linear_fc2.bias",
        "self_attention.linear_proj.bias",
        "self_attention.linear_qkv.bias",
    ),
}
# Directory under iter_0000001 -> keys outside the layers. A tied model repeats its embedding on the last stage.
TE_OUTSIDE = {
    "mp_rank_00_000": ("embedding.word_embeddings.weight",),
    "mp_rank_01_000": ("embedding.word_embeddings.weight",),
    "mp_rank_00_001": ("decoder.final_layernorm.weight", "output_layer.weight"),
    "mp_rank_01_001": ("decoder.final_layernorm.weight", "output_layer.weight"),
}


def rank_files(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(rank directory, content of its file) of a checkpoint that ckptconv wrote."""
    assert (directory / "latest_checkpointed_iteration.txt").read_text().strip() == "1"
    files = sorted((directory / "iter_0000001").glob("*/model_optim_rng.pt"))
    assert files, f"no mp_rank files in {directory}"
    for file in files:
        assert re.fullmatch(r"mp_rank_\d\d(_\d\d\d)?", file.parent.name)
        yield file.parent.name, torch.load(file, map_location="cpu", weights_only=False)


def rank_states(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Rank directory -> tensors by key."""
    return {
        name: {k: v for k, v in checkpoint["model"].items() if not k.endswith(EXTRA)}
        for name, checkpoint in rank_files(directory)
    }


@pytest.fixture(scope="module")
def te(hf: Fixture, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`te(fixture)`: its TP2 PP2 conversion for Transformer Engine."""
    made: dict[str, Converted] = {}

    def get(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp("te") / name
            made[name] = to_mcore(hf(name), out, name, 2, 2, "transformer_engine")
        return made[name].check()

    return get


@pytest.mark.parametrize("name", TE_BIASES)
def test_te_keys(name: str, te: Callable[[str], Path]) -> None:
    layer = TE_LAYER + TE_BIASES[name]
    want = {
        rank: {*outside, *(f"decoder.layers.{i}.{key}" for i in range(2) for key in layer)}
        for rank, outside in TE_OUTSIDE.items()
    }
    assert {rank: set(state) for rank, state in rank_states(te(name)).items()} == want


@pytest.mark.parametrize("name", TE_BIASES)
def test_te_to_local(
    name: str, te: Callable[[str], Path], converted: dict[tuple[str, int, int], Converted], tmp_path: Path
) -> None:
    """Through the Transformer Engine names and back to local names: every tensor as in the direct conversion."""
    flags = ("--loader", "megatron_mcore", "--saver", "megatron_mcore", "--load-dir", te(name), "--save-dir", tmp_path)
    layout = ("--target-tp", 2, "--target-pp", 2, "--saver-transformer-impl", "local", *padding_flag(name))
    Converted(tmp_path, here(*flags, *layout)).check()
    have, want = rank_states(tmp_path), rank_states(converted[name, 2, 2].check())
    assert {rank: set(state) for rank, state in have.items()} == {rank: set(state) for rank, state in want.items()}
    for rank, state in want.items():
        for key, value in state.items():
            assert have[rank][key].dtype == value.dtype, f"{rank} {key}"
            assert torch.equal(have[rank][key], value), f"{rank} {key}"
