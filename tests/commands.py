"""What tests that convert in their own process share: the command line, and the weights it wrote.

Loader and saver both run in the process of the tests (inprocess.py says how, and what that does not show).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from inprocess import main

Weights = dict[str, torch.Tensor]


def weights_of(folder: Path) -> Weights:
    """Every tensor of a directory of safetensors files."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(found: Weights, want: Weights) -> None:
    """Assert that names, element types and bits are equal."""
    assert sorted(found) == sorted(want)
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def run(source: Path, out: Path, saver: str, *flags: object) -> int:
    """The exit code of a conversion."""
    fixed = ["--load-dir", str(source), "--save-dir", str(out), "--saver", saver, "--no-progress"]
    return main([*fixed, *flags])


def convert(source: Path, out: Path, saver: str = "hf", *flags: object) -> Path:
    """`out`, after a conversion that succeeded."""
    assert run(source, out, saver, *flags) == 0
    return out
