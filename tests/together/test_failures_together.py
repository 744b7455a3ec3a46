"""One rank stops, by whatever: all end soon, with its message, and --resume goes on with any number of ranks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import CASES, PROMPT, SOON, Job, Tree, journals, same, stamp, stamps, tree, until

from inprocess import main

Sources = dict[str, Path]
Whole = Callable[[str], Tree]
#: Rank 1 of 2 waits before layer 6: rank 0 has finished all of its 4 files, rank 1 the first 2 of its 4.
MOMENT, FINISHED = 8, 6
SAVER = r"the saver process .megatron_mcore. was killed by SIGKILL"
GONE = r"store of torchrun's rendezvous does not answer any more.*--resume"
QUIET = r"rank 1 has not been heard of for \d+ s"


def words(sources: Sources, target: Path, *more: object) -> list[object]:
    return ["--load-dir", sources["hf"], "--save-dir", target, "--max-queue-size", 1, *CASES["megatron_mcore"], *more]


def resumed(ranks: int, sources: Sources, target: Path, want: Tree) -> None:
    """Go on with so many ranks: what is finished stays, and the whole is what one process would have made."""
    kept = stamps(target)
    assert len(kept) >= 1
    again = words(sources, target, "--resume")
    if ranks == 1:
        assert main(again) == 0
    else:
        with Job(ranks, again) as job:
            job.succeeded()
    assert {name: stamp(target / name) for name in kept} == kept
    same(target, want)


def incomplete(target: Path) -> None:
    """Nothing there looks like a checkpoint."""
    assert os.listdir(target) == [".ckptconv-partial"]


@pytest.mark.parametrize(("deeds", "messages", "ranks"), [
    ([(1, "saver", signal.SIGKILL)], {0: f"rank 1 on .*: {SAVER}", 1: SAVER}, 2),
    ([(0, "saver", signal.SIGKILL)], {0: SAVER, 1: f"rank 0 on .*: {SAVER}"}, 1),
    ([(1, "loader", signal.SIGTERM)], {0: "rank 1 on .*: stopped by SIGTERM", 1: "error: stopped by SIGTERM"}, 1),
    ([(0, "loader", signal.SIGINT), (1, "loader", signal.SIGINT)], {0: "interrupted", 1: "interrupted"}, 1),
    ([(0, "both", signal.SIGKILL)], {1: GONE}, 3),
])  # fmt: skip
def test_a_rank_stops(
    deeds: list[tuple[int, str, signal.Signals]], messages: dict[int, str], ranks: int,
    sources: Sources, target: Path, whole: Whole, tmp_path: Path,
) -> None:  # fmt: skip
    want, before, note = whole("megatron_mcore"), tree(sources["hf"]), tmp_path / "note"
    with Job(2, words(sources, target), hold={1: (MOMENT, note)}) as job:
        until(lambda: note.exists() and len(journals(target)) >= FINISHED, job.said)
        began = time.monotonic()
        for rank, who, number in deeds:
            job.signal(rank, number, who)
        ended = job.wait()
        for rank, message in messages.items():
            ended[rank].failed(message, "--resume")
            assert ended[rank].at - began < PROMPT
    incomplete(target)
    assert tree(sources["hf"]) == before
    resumed(ranks, sources, target, want)


@pytest.mark.parametrize(("rank", "message"), [(1, QUIET), (0, GONE)])
def test_a_rank_stands_still(
    rank: int, message: str, sources: Sources, target: Path, whole: Whole, tmp_path: Path
) -> None:
    """It does not die, but neither speaks nor, where it has the store, answers."""
    want, note, other = whole("megatron_mcore"), tmp_path / "note", 1 - rank
    with Job(2, words(sources, target), hold={1: (MOMENT, note)}, constants=SOON, properly=True) as job:
        until(lambda: note.exists() and len(journals(target)) >= FINISHED, job.said)
        job.signal(rank, signal.SIGSTOP, "both")
        job.ends(other).failed(message, "finished files are kept")
    incomplete(target)
    resumed(1, sources, target, want)


def test_one_process_then_several(sources: Sources, target: Path, whole: Whole, tmp_path: Path) -> None:
    want, note = whole("megatron_mcore"), tmp_path / "note"
    with Job(1, words(sources, target), hold={0: (MOMENT, note)}) as job:
        until(lambda: note.exists() and len(journals(target)) >= FINISHED, job.said)
        job.signal(0, signal.SIGTERM)
        job.wait()[0].failed("SIGTERM", "6 finished files are kept", code=130)
    resumed(3, sources, target, want)


def test_nothing_to_continue(sources: Sources, target: Path, tmp_path: Path) -> None:
    note = tmp_path / "note"
    hold = {0: (1, tmp_path / "note0"), 1: (1, note)}
    with Job(2, words(sources, target), hold=hold) as job:
        until(note.exists, job.said)
        until((target / ".ckptconv-partial" / "plan.json").exists, job.said)
        job.signal(1, signal.SIGTERM)
        for one in job.wait():
            assert "are kept" not in one.failed("stopped by SIGTERM").message
    assert not target.exists()
