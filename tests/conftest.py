"""Session fixtures: tiny checkpoints on demand and the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixtures import build

SOURCE = Path(__file__).resolve().parents[1] / "src"
# Before torch is imported, here and in what is started: its threads spin while they wait for one another, which costs
# a model of these sizes twenty times what it takes.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`hf(name, **options)`: directory of a Hugging Face fixture, built once in a session. Do not write into it."""
    made: dict[str, Path] = {}

    def get(name: str, **options: Any) -> Path:
        key = repr((name, sorted(options.items())))
        if key not in made:
            made[key] = build(name, tmp_path_factory.mktemp("hf") / name, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`cli(*arguments)`: run `python -m ckptconv` of this checkout; the result is not checked."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "ckptconv", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})

    return run
