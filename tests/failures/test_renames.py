"""The moment of truth: killed between any two renames of the publication, over an older output."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Ended, Tree, check_incomplete, inside, other, run, tree, words

from ckptconv.files import PARTIAL

ASIDE = ".ckptconv-replaced"
Sources = dict[str, Path]
Older, Whole = Callable[[str, Path], Tree], Callable[[str], Tree]
#: Of the eight renames four set the older output aside and four put the new one in place.


def meddled(saver: str, source: Path, target: Path, *more: object) -> Ended:
    flags = ("--writes", saver, "--overwrite", *more)
    return run(*words("meddling", source, target, *flags, loader=other(saver)))


def next_run(saver: str, source: Path, target: Path, *more: object) -> Ended:
    flags = ("--writes", saver, "--overwrite", *more)
    return inside(*words("meddling", source, target, *flags, loader=other(saver)))


@pytest.mark.parametrize(("rename", "how"), [
    (0, "--resume"), (1, "--resume"), (2, "--overwrite"), (4, "--resume"), (5, "--overwrite"), (7, "--resume"),
])  # fmt: skip
def test_nothing_is_lost_and_the_next_run_completes(
    rename: int, how: str, sources: Sources, tmp_path: Path, older: Older, whole: Whole
) -> None:
    """The old output, or what nobody takes for complete and has every byte of the old one."""
    target = tmp_path / "out"
    old = older("megatron_mcore", target)
    meddled("megatron_mcore", sources["hf"], target, "--rename-at", rename).failed("SIGKILL", code=1)
    there = tree(target, (PARTIAL, ASIDE))
    if rename:
        check_incomplete(target, collected=True)
        assert {name: {**there, **tree(target / ASIDE)}.get(name) for name in old} == old
    else:
        assert there == old
    next_run("megatron_mcore", sources["hf"], target, how).succeeded()
    assert tree(target, ()) == {**whole("megatron_mcore"), "notes.txt": old["notes.txt"]}


@pytest.mark.parametrize("rename", [4, 12, 20])
def test_shards(rename: int, sources: Sources, tmp_path: Path, older: Older, whole: Whole) -> None:
    target = tmp_path / "out"
    old = older("hf", target)
    ended = meddled("hf", sources["megatron_mcore"], target, "--rename-at", rename)
    if ended.code:
        check_incomplete(target, collected=True)
        next_run("hf", sources["megatron_mcore"], target, "--resume").succeeded()
    assert tree(target, ()) == {**whole("hf"), "notes.txt": old["notes.txt"]}


@pytest.mark.parametrize("rename", [1, 4, 6])
def test_a_signal_that_can_be_handled(
    rename: int, sources: Sources, tmp_path: Path, older: Older, whole: Whole
) -> None:
    """It leaves the older output or the new one, never something in between."""
    target = tmp_path / "out"
    old, new = older("megatron_mcore", target), whole("megatron_mcore")
    deed = ("--saver-deed", signal.SIGTERM.name, "--rename-at", rename)
    ended = meddled("megatron_mcore", sources["hf"], target, *deed)
    there = tree(target)
    assert there in (old, {**new, "notes.txt": old["notes.txt"]})
    assert (ended.code == 0) == (there != old)


@pytest.mark.parametrize("saver", ["megatron_mcore", "hf"])
def test_two_runs_give_the_same_bytes(saver: str, sources: Sources, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        inside(*words(saver, sources[other(saver)], tmp_path / name, loader=other(saver))).succeeded()
        found.append({p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("ckptconv.json")})
    assert found[0] == found[1]
