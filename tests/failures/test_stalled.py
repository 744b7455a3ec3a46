"""One side stops without dying: it idles, leaves early, or leaves without a word."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from harness import MIDDLE, Run, check_incomplete, run, words

Sources = dict[str, Path]


def started(words: list[object], note: Path, path: Path | None = None) -> Run:
    running = Run(words, path=path)
    until = time.monotonic() + 20
    while not note.exists() and time.monotonic() < until:
        time.sleep(0.01)
    return running


@pytest.mark.parametrize(("at", "number"), [(0, signal.SIGINT), (3, signal.SIGTERM)])
def test_an_idle_saver(at: int, number: signal.Signals, sources: Sources, tmp_path: Path) -> None:
    """The loader waits, as it cannot know better; a signal ends both."""
    target, note = tmp_path / "out", tmp_path / "note"
    flags = ("--saver-at", at, "--saver-deed", "idle", "--saver-note", note)
    running = started(words("meddling", sources["hf"], target, *flags, loader="hf"), note)
    time.sleep(0.3)
    assert running.process.poll() is None
    running.signal(number)
    assert running.wait(5).failed(code=130).seconds < 10
    check_incomplete(target)


def test_a_deaf_saver_and_a_stopped_one(sources: Sources, tmp_path: Path) -> None:
    """One ignores SIGTERM, the other got SIGSTOP: both are killed after a grace period, which is shorter here."""
    (tmp_path / "sitecustomize.py").write_text("from ckptconv import conversion\nconversion.GRACE = 1.0\n")
    both = []
    for deed in ("deaf", "SIGSTOP"):
        target, note = tmp_path / deed, tmp_path / f"{deed}.note"
        flags = ("--saver-at", 3, "--saver-deed", deed, "--saver-note", note)
        both.append((target, started(words("meddling", sources["hf"], target, *flags, loader="hf"), note, tmp_path)))
    time.sleep(0.2)
    for _, running in both:
        running.signal(signal.SIGTERM)
    for target, running in both:
        assert running.wait(15).failed("SIGTERM", code=130).seconds > 1
        check_incomplete(target)


@pytest.mark.parametrize("at", [0, 3])
def test_a_saver_that_leaves_early(at: int, sources: Sources, tmp_path: Path) -> None:
    flags = ("--saver-at", at, "--saver-deed", "return")
    ended = run(*words("meddling", sources["hf"], tmp_path / "out", *flags, loader="hf"))
    check_incomplete(tmp_path / "out")
    ended.failed("saver meddling.*(returned|stopped|ended).*before", code=4)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_loader_that_stopped_sending(number: signal.Signals, sources: Sources, tmp_path: Path) -> None:
    target, note = tmp_path / "out", tmp_path / "note"
    deeds = ("--at", MIDDLE, "--deeds", f"touch:{note},sleep:30")
    running = started(words("megatron_mcore", sources["hf"], target, *deeds), note)
    time.sleep(0.3)
    running.signal(number)
    ended = running.wait(5)
    assert ended.code in (-signal.SIGKILL, 130)
    check_incomplete(target)


@pytest.mark.parametrize("deed", ["exit:3", "exit:0"])
def test_a_loader_that_exits(deed: str, sources: Sources, tmp_path: Path) -> None:
    run(*words("megatron_mcore", sources["hf"], tmp_path / "out", "--at", MIDDLE, "--deeds", deed))
    check_incomplete(tmp_path / "out")


def test_a_loader_with_a_bug(sources: Sources, tmp_path: Path) -> None:
    """A bug keeps its traceback; nothing else is different."""
    ended = run(*words("megatron_mcore", sources["hf"], tmp_path / "out", "--at", MIDDLE, "--deeds", "raise:oh no"))
    assert ended.code == 1
    assert ended.err.rstrip().endswith("RuntimeError: oh no")
    check_incomplete(tmp_path / "out")
