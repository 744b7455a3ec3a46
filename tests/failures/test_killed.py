"""Either process killed by any signal at any moment: the other ends too, and nothing is half done."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import (
    FIRST,
    LAST,
    MIDDLE,
    Run,
    Tree,
    check_incomplete,
    finished,
    inside,
    load,
    other,
    run,
    tree,
    untouched,
    words,
)

#: The middle is when one file of the target is complete and others are not.
MOMENTS = {"first": (FIRST, ""), "middle": (MIDDLE, "finished:1,"), "last": (LAST, "finished:1,")}
LOADER = ("signal:SIGTERM", "signal:SIGINT", "group:SIGINT")
SAVER = ("saver:SIGTERM", "saver:SIGKILL")
SAID = {"signal:SIGTERM": "SIGTERM", "signal:SIGINT": "interrupted", "group:SIGINT": "interrupted"}
Sources = dict[str, Path]


def at(moment: str, deed: str) -> tuple[str, ...]:
    number, before = MOMENTS[moment]
    return ("--at", number, "--deeds", before + deed)


@pytest.mark.parametrize(("deed", "moment"), [
    *((deed, "middle") for deed in (*LOADER, *SAVER)),
    ("signal:SIGTERM", "first"), ("saver:SIGKILL", "first"), ("group:SIGINT", "last"), ("saver:SIGTERM", "last"),
])  # fmt: skip
def test_a_fresh_target(deed: str, moment: str, sources: Sources, tmp_path: Path) -> None:
    source, target = sources["hf"], tmp_path / "out"
    before = untouched(source)
    ended = run(*words("megatron_mcore", source, target, *at(moment, deed))).failed(SAID.get(deed, "saver"))
    check_incomplete(target)
    assert untouched(source) == before
    assert ended.seconds < 8
    assert target.exists() == bool(finished(target)) or deed == "saver:SIGKILL"
    if moment == "middle":
        ended.failed("--resume")
        inside(*words("megatron_mcore", source, target)).failed("--resume", "--overwrite", code=2)


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_loader_killed_for_good(moment: str, sources: Sources, tmp_path: Path) -> None:
    ended = run(*words("megatron_mcore", sources["hf"], tmp_path / "out", *at(moment, "signal:SIGKILL")))
    assert ended.code == -signal.SIGKILL
    assert "resource_tracker" not in ended.err  # nothing is left to it
    check_incomplete(tmp_path / "out")
    if moment == "middle":
        ended.failed("--resume")  # the saver speaks for it
        assert finished(tmp_path / "out")


@pytest.mark.parametrize("deed", ["group:SIGINT", "saver:SIGKILL"])
def test_the_hf_saver(deed: str, sources: Sources, tmp_path: Path) -> None:
    target = tmp_path / "out"
    run(*words("hf", sources["megatron_mcore"], target, *at("middle", deed))).failed()
    check_incomplete(target)
    assert finished(target)


@pytest.mark.parametrize(("saver", "deed", "moment"), [
    ("megatron_mcore", "signal:SIGKILL", "middle"), ("megatron_mcore", "saver:SIGKILL", "last"),
    ("megatron_mcore", "signal:SIGTERM", "last"), ("hf", "group:SIGINT", "middle"), ("hf", "saver:SIGKILL", "last"),
])  # fmt: skip
def test_an_older_output_stays(
    saver: str, deed: str, moment: str, sources: Sources, tmp_path: Path,
    older: Callable[[str, Path], Tree], whole: Callable[[str], Tree],
) -> None:  # fmt: skip
    source, target = sources[other(saver)], tmp_path / "out"
    before = older(saver, target)
    assert run(*words(saver, source, target, "--overwrite", *at(moment, deed))).code != 0
    assert tree(target) == before
    load(target, saver)
    # A later success replaces it, and only it.
    inside(*words(saver, source, target, "--overwrite", loader=other(saver))).succeeded()
    assert tree(target, ()) == {**whole(saver), "notes.txt": before["notes.txt"]}


def test_after_the_last_word(sources: Sources, tmp_path: Path, whole: Callable[[str], Tree]) -> None:
    """Stopped while the saver completes its output: either all is there or nothing is taken for complete."""
    for number, pause in enumerate((0.0, 0.04, 0.1)):
        target = tmp_path / str(number)
        deeds = ("--at", LAST, "--deeds", f"touch:{target}.at")
        running = Run(words("megatron_mcore", sources["hf"], target, *deeds))
        while not Path(f"{target}.at").exists():
            time.sleep(0.002)
        time.sleep(pause)
        running.signal(signal.SIGTERM)
        ended = running.wait()
        if (target / "latest_checkpointed_iteration.txt").exists():
            assert tree(target) == whole("megatron_mcore")
        else:
            ended.failed("SIGTERM")
            check_incomplete(target, collected=True)


@pytest.mark.parametrize("pause", [0.0, 0.01, 0.03])
def test_an_impatient_user(pause: float, sources: Sources, tmp_path: Path) -> None:
    """Ctrl-C pressed six times, at any stage of cleaning up and of the interpreter's end."""
    target = tmp_path / "out"
    deeds = ("--at", LAST, "--deeds", f"touch:{tmp_path}/at,sleep:20")
    running = Run(words("megatron_mcore", sources["hf"], target, *deeds))
    while not (tmp_path / "at").exists():
        time.sleep(0.01)
    for _ in range(6):
        with contextlib.suppress(ProcessLookupError):
            running.signal(signal.SIGINT, group=True)
        time.sleep(pause)
    assert running.wait().failed("interrupted").code in (130, -signal.SIGINT)
    check_incomplete(target)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_the_saver_starts(number: signal.Signals, sources: Sources, tmp_path: Path) -> None:
    """The terminal's signal reaches a saver that has not yet set anything up."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, signal, sys, time\n"
        "if any('spawn_main' in word for word in sys.orig_argv):\n"
        f"    pathlib.Path({str(tmp_path / 'starting')!r}).touch()\n"
        f"    signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGTERM}} - {{signal.Signals({int(number)})}})\n"
        "    time.sleep(1)\n"
        "    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})\n"
    )
    target = tmp_path / "out"
    running = Run(words("megatron_mcore", sources["hf"], target, loader="hf"), path=tmp_path)
    while not (tmp_path / "starting").exists():
        time.sleep(0.005)
    running.signal(number, group=True)
    running.wait().failed("interrupted|SIGTERM")
    assert not target.exists()
