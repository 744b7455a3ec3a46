"""What ranks do not agree on, and what cannot be done on several: one clear error from each of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import CASES, ROOT, Ended, Job, Tree, journals, same, stamp, stamps, tree, until

from inprocess import main

Sources = dict[str, Path]
Whole = Callable[[str], Tree]
MCORE = CASES["megatron_mcore"]


def words(source: object, target: object, *more: object) -> list[object]:
    return ["--load-dir", source, "--save-dir", target, *MCORE, *more]


def refused(ended: list[Ended], *messages: str, code: int | None = None) -> None:
    """Every rank ended with one message, which says that."""
    for one in ended:
        one.failed(*messages, code=code)


def test_other_flags(sources: Sources, target: Path) -> None:
    with Job(2, words(sources["hf"], target), more={1: ["--target-tp", 4]}) as job:
        refused(job.wait(), "rank 1 sees another checkpoint or has other flags.*differ in tp", code=3)
    assert not target.exists()


def test_one_rank_with_a_flag_of_its_own(sources: Sources, target: Path) -> None:
    with Job(2, words(sources["hf"], target), more={1: ["--bf15"]}) as job:
        refused(job.wait(), "unknown flag --bf15.*--bf16", code=2)
    assert not target.exists()


@pytest.fixture
def others(sources: Sources, tmp_path: Path) -> Path:
    """The same model with other weights at the end: names, sizes and headers are the same."""
    copied = tmp_path / "others"
    shutil.copytree(sources["hf"], copied)
    shard = sorted(copied.glob("*.safetensors"))[-1]
    with open(shard, "r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(bytes(100))
    return copied


def test_another_source_in_the_same_place(sources: Sources, target: Path, others: Path) -> None:
    """A directory that is not shared: each machine has its own there."""
    if subprocess.run(["unshare", "-m", "mount", "--bind", others, others], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    with Job(2, words(sources["hf"], target), mounts={1: [(others, sources["hf"])]}) as job:
        ended = job.wait()
    refused(ended, "rank 1 sees another checkpoint", "differ in .*model-00006-of-00006", "shared file system", code=3)
    assert not target.exists()


def test_another_target(sources: Sources, target: Path, tmp_path: Path) -> None:
    """--save-dir is not on a shared file system."""
    more = {1: ["--save-dir", tmp_path / "mine"]}
    with Job(2, words(sources["hf"], target), more=more, constants={"together.PATIENCE": 2.0}) as job:
        refused(job.wait(), "mine/.*is not what rank 0 has written. All ranks need the same --save-dir", code=7)
    assert not (tmp_path / "mine").exists()
    assert not target.exists() or os.listdir(target) == [".ckptconv-partial"]  # rank 0 may have finished a file


def test_a_truncated_source(sources: Sources, target: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources["hf"], source)
    shard = sorted(source.glob("*.safetensors"))[-1]
    os.truncate(shard, shard.stat().st_size - 100)
    with Job(2, words(source, target)) as job:
        refused(job.wait(), f"{shard.name}", code=3)
    assert not target.exists()


def test_a_full_disk(sources: Sources, tmp_path: Path, disk: Callable[[str], Path]) -> None:
    """It fills while one rank writes; what all have finished is kept."""
    top, note = disk("16m"), tmp_path / "note"
    target, stone = top / "out", top / "stone"
    flags = ("--max-queue-size", 1)
    with Job(2, words(sources["hf"], target, *flags), hold={1: (8, note)}) as job:
        until(lambda: note.exists() and len(journals(target)) >= 6, job.said)
        free = os.statvfs(top)
        stone.write_bytes(bytes(free.f_bavail * free.f_frsize))
        note.unlink()
        ended = job.wait()
    refused(ended, "No space left on device", "6 finished files are kept", code=7)
    assert os.listdir(target) == [".ckptconv-partial"]
    stone.unlink()
    kept = stamps(target)
    assert main(words(sources["hf"], target, "--resume")) == 0
    assert {name: stamp(target / name) for name in kept} == kept


def test_a_plugin_of_others(sources: Sources, target: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    """It works in one process that torchrun has started, and is refused on several."""
    want = whole("megatron_mcore")
    monkeypatch.setenv("MEDDLING", str(ROOT / "tests" / "failures" / "plugins"))
    flags = words(sources["hf"], target, "--loader", "meddling", "--through", "hf")
    with Job(2, flags) as job:
        refused(job.wait(), "loader meddling on 2 ranks.*one process", code=2)
    assert not target.exists()
    with Job(1, flags) as job:
        job.succeeded()
    same(target, want)


def test_a_target_that_exists(sources: Sources, target: Path, whole: Whole) -> None:
    want = whole("megatron_mcore")
    (target / "iter_0000001").mkdir(parents=True)
    (target / "iter_0000001" / "old").write_text("old")
    (target / "latest_checkpointed_iteration.txt").write_text("7")
    before = tree(target)
    with Job(2, words(sources["hf"], target)) as job:
        refused(job.wait(), "exists and is not empty", "--overwrite", code=2)
    assert tree(target) == before
    with Job(2, words(sources["hf"], target, "--overwrite")) as job:
        job.succeeded()
    assert tree(target).items() >= want.items()
