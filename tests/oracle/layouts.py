"""Fixtures converted to many layouts for the oracle to run and to compare: what several modules share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from commands import convert
from fixtures import config
from mcore import Case, Outcome

Fixture = Callable[..., Path]
#: Fixture, tp, pp, ep.
Layout = tuple[str, int, int, int]

IDS = torch.randint(3, 130, (2, 24), generator=torch.Generator().manual_seed(1))


def case_of(hf: Fixture, root: Path, layout: Layout) -> tuple[str, Case]:
    """A fixture converted to local names: ("fixture tpTppPepE", what the oracle has to run)."""
    name, tp, pp, ep = layout
    out = convert(
        hf(name), root / f"{name} tp{tp}pp{pp}ep{ep}", "megatron_mcore", "--loader", f"hf_{config(name)['model_type']}",
        "--target-tp", tp, "--target-pp", pp, "--target-ep", ep, "--saver-transformer-impl", "local",
        "--make-vocab-size-divisible-by", 1,
    )  # fmt: skip
    return out.name, Case(str(hf(name)), str(out), tp, pp, {"short": IDS.tolist()}, 1, ep=ep)


def cases_of(
    hf: Fixture, root: Path, layouts: Sequence[Layout], wrong: Mapping[str, dict[str, Any]]
) -> dict[str, Case]:
    """Every layout by its name, and "wrong NAME": the fixture at one rank, with settings the oracle is told wrongly."""
    cases = dict(case_of(hf, root, layout) for layout in layouts)
    for key, changes in wrong.items():
        name = key.split()[0]
        told = root / f"wrong {key}"
        told.mkdir()
        (told / "config.json").write_text(json.dumps(config(name) | changes))
        good = cases[f"{name} tp1pp1ep1"]
        cases[told.name] = Case(str(told), good.checkpoint, 1, 1, good.ids, 1)
    return cases


def difference(outcome: Outcome, key: str, want: torch.Tensor) -> float:
    """Largest absolute difference over the real vocabulary; padding rows have no counterpart."""
    assert not outcome.error, outcome.error
    return float((outcome.logits[key][..., : want.shape[-1]] - want).abs().max())
