"""Checkpoints that other systems' own tools wrote: where they are, and torch's reading of their rank files.

They are not part of the project: they are looked for in $CKPTCONV_GOLDEN or in ../shared/golden beside it.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

GOLDEN = Path(os.environ.get("CKPTCONV_GOLDEN") or Path(__file__).resolve().parents[2] / "shared" / "golden")


def golden(name: str = "") -> Path:
    """The folder of a system's files. Without it the module that asks is skipped."""
    if not (GOLDEN / name).is_dir():
        pytest.skip(f"no golden checkpoints in {GOLDEN / name} (set CKPTCONV_GOLDEN)", allow_module_level=True)
    return GOLDEN / name


class _Anything:
    """An instance of any class that is not installed, as pickled args have them."""

    def __new__(cls, *args: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = module.partition(".")[0] in ("torch", "collections", "argparse", "signal", "_codecs")
        return super().find_class(module, name) if known else type(name, (_Anything,), {})


_PICKLE = SimpleNamespace(Unpickler=_Unpickler, load=lambda file, **how: _Unpickler(file, **how).load(), __name__="any")


def read(path: Path) -> Any:
    """What torch.load reads; classes of other packages have instances that hold nothing."""
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PICKLE)
