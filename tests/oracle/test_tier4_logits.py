"""Phi-3, GLM, gpt-oss and others give the logits of transformers in NVIDIA's own model, at every layout they have."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures import config, logits
from mcore import Case, Outcome, run

if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
Fixture = Callable[..., Path]

TOLERANCE = 1e-4
IDS = torch.randint(3, 130, (2, 24), generator=torch.Generator().manual_seed(1))
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
def outcomes(hf: Fixture, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What megatron-core makes of every conversion, by "fixture tpTppPepE" or "wrong NAME"."""
    root = tmp_path_factory.mktemp("tier4")
    sources = {name: hf(name) for name, *_ in LAYOUTS}

    def convert(job: tuple[str, int, int, int]) -> tuple[str, Case]:
        name, tp, pp, ep = job
        out = root / f"{name} tp{tp}pp{pp}ep{ep}"
        done = cli(
            "--loader", f"hf_{config(name)['model_type']}", "--saver", "megatron_mcore",
            "--load-dir", sources[name], "--save-dir", out, "--target-tp", tp, "--target-pp", pp, "--target-ep", ep,
            "--saver-transformer-impl", "local", "--make-vocab-size-divisible-by", 1,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return out.name, Case(str(sources[name]), str(out), tp, pp, {"short": IDS.tolist()}, 1, ep=ep)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cases = dict(pool.map(convert, LAYOUTS))
    for key, changes in WRONG.items():
        name = key.split()[0]
        told = root / f"wrong {key}"
        told.mkdir()
        (told / "config.json").write_text(json.dumps(config(name) | changes))
        good = cases[f"{name} tp1pp1ep1"]
        cases[told.name] = Case(str(told), good.checkpoint, 1, 1, good.ids, 1)
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


def difference(outcome: Outcome, expected: torch.Tensor) -> float:
    assert not outcome.error, outcome.error
    found = outcome.logits["short"]
    return float((found[..., : expected.shape[-1]] - expected).abs().max())


@pytest.mark.parametrize(("name", "tp", "pp", "ep"), LAYOUTS)
def test_logits_are_those_of_transformers(
    outcomes: dict[str, Outcome], expected: Callable[[str], torch.Tensor], name: str, tp: int, pp: int, ep: int
) -> None:
    assert difference(outcomes[f"{name} tp{tp}pp{pp}ep{ep}"], expected(name)) < TOLERANCE


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_setting_is_noticed(
    outcomes: dict[str, Outcome], expected: Callable[[str], torch.Tensor], key: str
) -> None:
    assert difference(outcomes[f"wrong {key}"], expected(key.split()[0])) > 100 * TOLERANCE
