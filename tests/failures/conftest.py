"""Sources of a size that can be interrupted, and what uninterrupted runs make of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import FLAGS, ROOT, Tree, other, run, spec, tree

sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model for each loader: an HF directory of 6 shards, a Megatron one of 8 ranks. Do not write there."""
    import models

    top = tmp_path_factory.mktemp("sources")
    models.write(spec(), top / "hf", shard=3 * 10**6)
    flags = ("--saver", "megatron_mcore", *FLAGS["megatron_mcore"])
    run(*flags, "--load-dir", top / "hf", "--save-dir", top / "mcore").succeeded()
    return {"hf": top / "hf", "megatron_mcore": top / "mcore"}


@pytest.fixture(scope="session")
def whole(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tree]:
    """`whole(saver)`: the files of an uninterrupted conversion by that saver, from the other format."""
    made: dict[str, Tree] = {}

    def get(saver: str) -> Tree:
        if saver not in made:
            target = tmp_path_factory.mktemp("whole") / saver
            run("--saver", saver, *FLAGS[saver], "--load-dir", sources[other(saver)], "--save-dir", target).succeeded()
            made[saver] = tree(target)
        return made[saver]

    return get


@pytest.fixture(scope="session")
def older(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Tree]:
    """`older(saver, directory)` puts a complete output of a smaller model there, and a file of the user's."""
    import models

    top = tmp_path_factory.mktemp("older")
    models.write(spec(num_layers=2, hidden_size=128, vocab_size=512), top / "source", shard=10**6)
    made: dict[str, Path] = {}

    def put(saver: str, directory: Path) -> Tree:
        if saver not in made:
            made[saver] = top / saver
            flags = ("--target-tp", 4) if saver == "megatron_mcore" else ("--max-shard-size", "500KB")
            run("--saver", saver, *flags, "--load-dir", top / "source", "--save-dir", made[saver]).succeeded()
            (made[saver] / "notes.txt").write_text("mine")
        shutil.copytree(made[saver], directory)
        return tree(directory)

    return put


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`disk(size)`: a file system of that size. Skips where mounting is not permitted."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        where = tmp_path / f"disk{len(mounted)}"
        where.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted.append(where)
        return where

    yield mount
    for where in mounted:
        subprocess.run(["umount", "-l", where], check=True)
