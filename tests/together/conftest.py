"""A source for each loader, what one process makes of it, and the place where all runs write."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launch import CASES, ROOT, Tree, tree, zygote

from ckptconv.spec import ModelSpec, Rope
from inprocess import main

sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.fixture(scope="session", autouse=True)
def _zygote() -> Iterator[None]:
    yield
    zygote.end()


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model of 12 messages and 9 MB: an HF directory of 6 shards, a Megatron one of 8 ranks."""
    import models

    spec = ModelSpec(
        family="llama", num_layers=8, hidden_size=192, ffn_hidden_size=512, num_attention_heads=8, num_query_groups=8,
        kv_channels=24, vocab_size=2048, max_position_embeddings=4096, seq_length=4096, dtype="bfloat16", rope=Rope(),
    )  # fmt: skip
    top = tmp_path_factory.mktemp("sources")
    models.write(spec, top / "hf", shard=1600 * 10**3)
    assert not main(["--load-dir", top / "hf", "--save-dir", top / "mcore", *CASES["megatron_mcore"]])
    return {"hf": top / "hf", "megatron_mcore": top / "mcore"}


@pytest.fixture(scope="session")
def _place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("together") / "out"


@pytest.fixture
def target(_place: Path) -> Iterator[Path]:
    """Where to write: always the same path, as some files hold it."""
    shutil.rmtree(_place, ignore_errors=True)
    yield _place
    shutil.rmtree(_place, ignore_errors=True)


@pytest.fixture(scope="session")
def whole(sources: dict[str, Path], _place: Path) -> Callable[[str], Tree]:
    """`whole(case)`: the files that one process makes. Call before anything is written."""
    made: dict[str, Tree] = {}

    def get(case: str) -> Tree:
        if case not in made:
            shutil.rmtree(_place, ignore_errors=True)
            source = sources["megatron_mcore" if case.startswith("hf") else "hf"]
            assert not main(["--load-dir", source, "--save-dir", _place, *CASES[case]])
            made[case] = tree(_place)
            shutil.rmtree(_place)
        return made[case]

    return get


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`disk(size)`: a file system of that size. Skips where mounting is not permitted."""
    where = tmp_path / "disk"

    def mount(size: str) -> Path:
        where.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        return where

    yield mount
    subprocess.run(["umount", "-l", where], capture_output=True)
