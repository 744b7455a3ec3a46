"""A target that cannot take the output: full from the start, filled meanwhile, limited, read-only, not a directory."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import FIRST, LAST, MIDDLE, Tree, check_incomplete, finished, inside, load, run, tree, untouched, words

Sources = dict[str, Path]
Disk = Callable[[str], Path]
SAVERS = ("megatron_mcore", "hf")


def source(saver: str, sources: Sources) -> Path:
    return sources["hf" if saver == "megatron_mcore" else "megatron_mcore"]


@pytest.mark.parametrize("saver", SAVERS)
def test_too_small_from_the_start(saver: str, sources: Sources, disk: Disk) -> None:
    top = disk("9m")
    ended = inside(*words(saver, source(saver, sources), top / "out"))
    ended.failed("0.02 GB.*needed", "0.01 GB.*free", code=7)
    assert "Free space" in ended.message
    assert not list(top.iterdir())


def test_too_small_beside_an_older_output(sources: Sources, disk: Disk, older: Callable[[str, Path], Tree]) -> None:
    target = disk("16m") / "out"
    before = older("megatron_mcore", target)
    inside(*words("megatron_mcore", sources["hf"], target, "--overwrite")).failed("needed", "free", code=7)
    assert tree(target, ()) == before


@pytest.mark.parametrize(("saver", "at"), [
    ("megatron_mcore", FIRST), ("megatron_mcore", MIDDLE), ("hf", MIDDLE), ("megatron_mcore", LAST), ("hf", LAST),
])  # fmt: skip
def test_filled_meanwhile(saver: str, at: str, sources: Sources, disk: Disk, whole: Callable[[str], Tree]) -> None:
    top = disk("30m")
    target, stone = top / "out", top / "stone"
    before = untouched(source(saver, sources))
    deeds = ("--at", at, "--deeds", f"grow:{stone}:all" if at == FIRST else f"finished:1,grow:{stone}:all")
    ended = run(*words(saver, source(saver, sources), target, *deeds))
    ended.failed("No space left|needed", str(target), code=7)
    assert "Free space" in ended.message or "--resume" in ended.message
    check_incomplete(target, collected=at == LAST)
    assert untouched(source(saver, sources)) == before
    stone.unlink()
    if finished(target):
        assert "--resume" in ended.message
    if at != FIRST:
        inside(*words(saver, source(saver, sources), target, "--resume")).succeeded()
        assert tree(target, ()) == whole(saver)


def test_filled_beside_an_older_output(
    sources: Sources, disk: Disk, older: Callable[[str, Path], Tree], whole: Callable[[str], Tree]
) -> None:
    top = disk("40m")
    target = top / "out"
    before = older("megatron_mcore", target)
    deeds = ("--overwrite", "--at", MIDDLE, "--deeds", f"finished:1,grow:{top}/stone:all")
    run(*words("megatron_mcore", sources["hf"], target, *deeds)).failed("No space left", code=7)
    assert tree(target) == before
    load(target, "megatron_mcore")


@pytest.mark.parametrize("saver", SAVERS)
def test_a_limit_on_file_sizes(saver: str, sources: Sources, tmp_path: Path) -> None:
    limit = 1 << 20
    ended = run(
        *words(saver, source(saver, sources), tmp_path / "out"),
        preexec=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    ended.failed("File too large", code=7)
    check_incomplete(tmp_path / "out")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """An empty directory of a read-only file system."""
    where = tmp_path / "read-only"
    where.mkdir()
    for flags in (["--bind", where], ["-o", "remount,ro,bind"]):
        done = subprocess.run(["mount", *flags, where], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


@pytest.mark.parametrize("name", ["", "out"])
def test_read_only(name: str, sources: Sources, read_only: Path) -> None:
    inside(*words("megatron_mcore", sources["hf"], read_only / name)).failed(str(read_only), "Read-only", code=7)


def test_immutable(sources: Sources, tmp_path: Path) -> None:
    """A directory in which nobody may make anything, root included."""
    target = tmp_path / "out"
    target.mkdir()
    if subprocess.run(["chattr", "+i", target], capture_output=True).returncode:
        pytest.skip("chattr +i is not supported here")
    try:
        inside(*words("megatron_mcore", sources["hf"], target)).failed(str(target), "not permitted|denied", code=7)
    finally:
        subprocess.run(["chattr", "-i", target], check=True)


def test_a_target_under_a_file(sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    inside(*words("megatron_mcore", sources["hf"], tmp_path / "file")).failed("file", code=2)
    inside(*words("megatron_mcore", sources["hf"], tmp_path / "file" / "out")).failed("out", "Not a directory", code=7)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_target_that_cannot_be_named(sources: Sources, tmp_path: Path) -> None:
    inside(*words("megatron_mcore", sources["hf"], tmp_path / ("n" * 300))).failed("too long")


def test_other_files_are_kept(sources: Sources, tmp_path: Path, whole: Callable[[str], Tree]) -> None:
    target = tmp_path / "out"
    (target / "sub").mkdir(parents=True)
    (target / "sub" / "notes.txt").write_text("mine")
    before = tree(target, ())
    inside(*words("hf", sources["megatron_mcore"], target)).failed("sub", "--overwrite", code=2)
    assert tree(target, ()) == before
    inside(*words("hf", sources["megatron_mcore"], target, "--overwrite")).succeeded()
    assert tree(target, ()) == whole("hf") | before


def test_the_target_removed_meanwhile(sources: Sources, tmp_path: Path) -> None:
    target = tmp_path / "out"
    deeds = ("--at", MIDDLE, "--deeds", f"finished:1,rename:{target}:{tmp_path}/moved")
    run(*words("megatron_mcore", sources["hf"], target, *deeds)).failed(str(target), code=7)
    check_incomplete(tmp_path / "moved")
