"""NxDT checkpoint files read by torch itself, independently of the product: plain ones and references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

Weights = dict[str, torch.Tensor]


class Reference:
    """Stands for torch_xla's TensorReference."""

    tid: int


def read(file: Path, base: Path | None = None) -> Weights:
    """One rank; references are followed, into the files of `base` where this rank has none of its own."""
    with torch.serialization.safe_globals([(Reference, "torch_xla.utils.serialization.TensorReference")]):
        content: dict[str, Any] = torch.load(file, weights_only=True)

    def follow(number: int) -> torch.Tensor:
        own, other = (Path(f"{path}.tensors") / f"tensor_{number}.pt" for path in (file, base or file))
        tensor: torch.Tensor = torch.load(own if own.exists() else other, weights_only=True)
        return tensor

    return {name: follow(value.tid) if isinstance(value, Reference) else value for name, value in content.items()}


def ranks(folder: Path) -> dict[str, Weights]:
    """File name -> tensors of all ranks."""
    return {file.name: read(file) for file in sorted(folder.glob("dp_rank_*.pt")) if not file.name.endswith(".info.pt")}


def listing(folder: Path) -> list[str]:
    """Every file and folder below."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
