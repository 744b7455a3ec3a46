"""Experts, latent attention and MTP give the logits of transformers in NVIDIA's own model, at every kind of layout.

Legacy GroupedMLP goes the other way: megatron-core's own class with random weights, saved, converted, read by
transformers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import convert
from fixtures import config, logits, mtp_logits
from layouts import IDS, Fixture, case_of, cases_of, difference
from mcore import Outcome, run

if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

#: HF builds two norms of latent attention with 1e-6 whatever the config says, which costs Moonlight (1e-5) that much.
TOLERANCE = 2e-4
#: Whole matrix of layouts for one of each kind; the others at one rank and over all axes at once.
EVERY = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe")
OTHERS = (
    "qwen3", "qwen3_tied", "mixtral_window", "qwen2_moe_step", "qwen3_moe_v5", "deepseek_v2_lite", "deepseek_v3_mtp",
    "deepseek_v3_halves", "moonlight", "kimi_k2", "glm4_moe_mtp", "glm4_moe_lite",
)  # fmt: skip
LAYOUTS = [
    *((name, tp, pp, ep) for name in EVERY
      for tp, pp, ep in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2))),
    *((name, *layout) for name in OTHERS for layout in ((1, 1, 1), (2, 2, 1))),
]  # fmt: skip
#: Random models that megatron-core itself saves with legacy GroupedMLP: tp, pp, ep.
GROUPED = (
    ("mixtral", 1, 1, 1), ("qwen2_moe", 2, 1, 2), ("deepseek_v3_mtp", 1, 2, 2), ("deepseek_v3_mtp", 2, 2, 1),
)  # fmt: skip
#: What the oracle is told wrongly; then it has to notice.
WRONG: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"norm_topk_prob": True},
    "deepseek_v2": {"routed_scaling_factor": 3.0},
    "deepseek_v3": {"routed_scaling_factor": 1.0},
    "deepseek_v3 rope": {"rope_theta": 50000.0},
    "glm4_moe": {"partial_rotary_factor": 1.0},
}


@pytest.fixture(scope="module")
def outcomes(hf: Fixture, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What megatron-core makes of every conversion, by "fixture tpTppPepE" or "wrong NAME"."""
    root = tmp_path_factory.mktemp("moe")
    cases = cases_of(hf, root, LAYOUTS, WRONG)
    for name, tp, pp, ep in GROUPED:
        key = f"{name} tp{tp}pp{pp}ep{ep}"
        made = cases.get(key) or case_of(hf, root, (name, tp, pp, ep))[1]
        cases[f"{key} grouped"] = replace(made, grouped=str(root / f"{key} grouped"))
    return run(cases, tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="module")
def expected(hf: Fixture) -> Callable[[str], torch.Tensor]:
    """Logits of transformers for a fixture, computed once."""
    made: dict[str, torch.Tensor] = {}

    def get(name: str) -> torch.Tensor:
        if name not in made:
            made[name] = logits(hf(name), IDS)
        return made[name]

    return get


@pytest.mark.parametrize(("name", "tp", "pp", "ep"), LAYOUTS)
def test_logits_are_those_of_transformers(
    outcomes: dict[str, Outcome], expected: Callable[[str], torch.Tensor], name: str, tp: int, pp: int, ep: int
) -> None:
    assert difference(outcomes[f"{name} tp{tp}pp{pp}ep{ep}"], "short", expected(name)) < TOLERANCE


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_setting_is_noticed(
    outcomes: dict[str, Outcome], expected: Callable[[str], torch.Tensor], key: str
) -> None:
    assert difference(outcomes[f"wrong {key}"], "short", expected(key.split()[0])) > 100 * TOLERANCE


@pytest.mark.parametrize(("name", "tp", "pp", "ep"), GROUPED)
def test_legacy_grouped_experts_are_read(
    name: str, tp: int, pp: int, ep: int, outcomes: dict[str, Outcome], tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """What the real GroupedMLP computes, transformers computes of what was read from its files."""
    key = f"{name} tp{tp}pp{pp}ep{ep} grouped"
    outcome = outcomes[key]
    assert not outcome.error, outcome.error
    saved = next(tmp_path_factory.getbasetemp().glob(f"moe*/{key}"))
    rank = torch.load(next(saved.rglob("model_optim_rng.pt")), weights_only=False)["model"]
    assert any(name.endswith("mlp.experts.weight1") for name in rank)
    back = convert(saved, tmp_path / "hf", "hf", "--true-vocab-size", config(name)["vocab_size"])
    assert difference(outcome, "short", logits(back, IDS)) < TOLERANCE
    if "short mtp 0" in outcome.logits:
        assert difference(outcome, "short mtp 0", mtp_logits(back, IDS)) < TOLERANCE


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("name", ["deepseek_v3_mtp", "glm4_moe_mtp"])
def test_mtp_layers(name: str, tp: int, pp: int, hf: Fixture, outcomes: dict[str, Outcome]) -> None:
    found = difference(outcomes[f"{name} tp{tp}pp{pp}ep1"], "short mtp 0", mtp_logits(hf(name), IDS))
    assert found < TOLERANCE
