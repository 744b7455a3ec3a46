"""What ranks write together is what one process writes, and one of them says so."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import CASES, PATIENCE, Job, Tree, command, journals, same, stamp, stamps, torchrun, until

Sources = dict[str, Path]
Whole = Callable[[str], Tree]


@pytest.mark.parametrize(("case", "ranks", "flags"), [
    ("hf", 4, ()),
    ("megatron_dist", 2, ("--verify",)),
    ("hf whole", 2, ("--verify",)),  # more ranks than files
])  # fmt: skip
def test_ranks(
    case: str, ranks: int, flags: tuple[object, ...], sources: Sources, target: Path, whole: Whole
) -> None:
    want = whole(case)
    source = sources["megatron_mcore" if case.startswith("hf") else "hf"]
    with Job(ranks, ("--load-dir", source, "--save-dir", target, *CASES[case], *flags)) as job:
        said = job.succeeded()[0].said
    assert len(said.splitlines()) == (2 if flags else 1), said
    same(target, want)


def test_torchrun(sources: Sources, target: Path, whole: Whole, tmp_path: Path) -> None:
    """A rank is killed: with --max-restarts and --resume torchrun starts all again, and they go on."""
    want, note = whole("megatron_mcore"), tmp_path / "note"
    words = ("--load-dir", sources["hf"], "--save-dir", target, "--resume", "--verify", *CASES["megatron_mcore"])
    flags = ("--standalone", "--max-restarts", 1)
    agent = torchrun(*words, "--max-queue-size", 1, ranks=2, flags=flags, hold={1: (8, note)})
    try:
        until(lambda: note.exists() and len(journals(target)) >= 6, "no files were finished")
        kept = stamps(target)
        (rank,) = [pid for pid in workers(agent.pid) if b"RANK=1\0" in environ(pid)]
        os.kill(rank, signal.SIGSTOP)
        note.unlink()
        os.kill(rank, signal.SIGKILL)
        until(note.exists, "no restart")
        note.unlink()
        said, _ = agent.communicate(timeout=PATIENCE)
    finally:
        for pid in workers(agent.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        agent.kill()
    assert agent.returncode == 0, said
    assert said.count("hf -> megatron_mcore:") == said.count("verified: ") == 1, said
    assert {name: stamp(target / name) for name in kept} == kept
    same(target, want)


def workers(agent: int) -> list[int]:
    """The ranks that an agent has started."""
    return [pid for pid in map(int, children(agent).split()) if "-m ckptconv" in command(pid)]


def children(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return ""


def environ(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()
