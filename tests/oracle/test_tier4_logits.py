"""Phi-3, GLM, gpt-oss and others give the logits of transformers in NVIDIA's own model, at every layout they have."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fixtures import logits
from layouts import IDS, Fixture, cases_of, difference
from mcore import Outcome, run

if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

TOLERANCE = 1e-4
NAMES = (
    "phi3", "phi3_partial", "glm", "smollm3", "stablelm", "nemotron", "qwen2_windows", "qwen2_layer_types", "ministral",
    "olmo",
)  # fmt: skip
#: Fixture, tp, pp, ep. Experts with biases are not cut over tensor ranks.
LAYOUTS = [
    *((name, tp, pp, 1) for name in NAMES for tp, pp in ((1, 1), (2, 1), (1, 2))),
    *(("gpt_oss", 1, pp, ep) for pp, ep in ((1, 1), (2, 1), (1, 2), (2, 2))),
]
#: What the oracle is told wrongly; then it has to notice.
WRONG: dict[str, dict[str, Any]] = {
    "phi3": {"sliding_window": None},
    "phi3_partial": {"partial_rotary_factor": 1.0},
    "glm": {"partial_rotary_factor": 1.0},
    "smollm3": {"no_rope_layers": [1, 1, 1, 1]},
    "stablelm": {"layer_norm_eps": 1.0},
    "qwen2_windows": {"max_window_layers": 1},
    "ministral": {"layer_types": ["sliding_attention"] * 4},
    "gpt_oss": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "gpt_oss limit": {"swiglu_limit": 7.0},
    "gpt_oss base": {"rope_theta": 10000.0},
}


@pytest.fixture(scope="module")
def outcomes(hf: Fixture, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What megatron-core makes of every conversion, by "fixture tpTppPepE" or "wrong NAME"."""
    root = tmp_path_factory.mktemp("tier4")
    cases = cases_of(hf, root, LAYOUTS, WRONG)
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
