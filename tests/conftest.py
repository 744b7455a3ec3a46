"""Session fixtures: tiny checkpoints on demand and the command line."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixtures import build

SOURCE = Path(__file__).resolve().parents[1] / "src"
NUMBERS = itertools.count()
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


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """`write("loader", text)`: a module of that kind (loader, saver, checkpoint_loader ...) on the Python path.

    Returns the NAME to give, which no other module of this process has had.
    """
    folder = tmp_path / "plugins"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def make(kind: str, text: str) -> str:
        name = f"t{os.getpid()}_{next(NUMBERS)}"
        (folder / f"{kind}_{name}.py").write_text(text)
        importlib.invalidate_caches()
        return name

    return make


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`cli(*arguments)`: run `python -m ckptconv` of this checkout; the result is not checked."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "ckptconv", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})

    return run
