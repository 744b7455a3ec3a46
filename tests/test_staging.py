"""Outputs appear whole or not at all: the folder in which they are collected, and what happens to what was there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ckptconv.errors import SourceError, TargetError, UsageError
from ckptconv.staging import PARTIAL, Staging

MARK = {"source": "here", "source files": [["a", 1, 1]], "tp": 1}


def staging(target: Path, *, overwrite: bool = False, resume: bool = False) -> Staging:
    return Staging(str(target), overwrite=overwrite, resume=resume)


def fill(stage: Staging, *names: str, text: str = "new") -> None:
    """Planned files, written and noted as the engine does."""
    for name in names:
        path = Path(stage.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        stage.done(name, len(text), lambda name=name: {"embeddings": {name: [[0, 1, 0]]}})


def fail(stage: Staging, error: BaseException) -> None:
    """A run that stops when 1.bin of 1.bin and 2.bin is finished."""
    with stage:
        stage.begin(MARK, {"1.bin": 3, "2.bin": 3})
        fill(stage, "1.bin")
        raise error


def begin(stage: Staging, mark: dict[str, Any], planned: dict[str, int]) -> None:
    with stage:
        stage.begin(mark, planned)


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_that_ends_well(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staging(out) as stage:
        stage.begin(MARK, {"a/1.bin": 3, "2.bin": 3})
        fill(stage, "a/1.bin", "2.bin")
        stage.add("b/small.json", b"{}")
        stage.add("index", b"last")
        assert os.listdir(out) == [PARTIAL]
        stage.publish(["a", "2.bin", "b"], ["index"])
    assert tree(out) == {"a/1.bin": "new", "2.bin": "new", "b/small.json": "{}", "index": "last"}


def test_what_makes_it_complete_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no moment an old index with new files, or a new index with old ones."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("1.bin", "2.bin", "index", "config"):
        (out / name).write_text("old")
    seen: list[dict[str, str]] = []
    replace = os.replace

    def watched(old: Any, new: Any) -> None:
        replace(old, new)
        if PARTIAL not in str(new):
            seen.append({name: text for name, text in tree(out).items() if not name.startswith(".")})

    with staging(out, overwrite=True) as stage:
        stage.begin(MARK, {"1.bin": 3, "2.bin": 3})
        fill(stage, "1.bin", "2.bin")
        stage.add("index", b"new")
        stage.add("config", b"new")
        monkeypatch.setattr(os, "replace", watched)
        stage.publish(["1.bin", "2.bin"], ["index", "config"])
    assert seen
    for moment in seen:
        if "index" in moment or "config" in moment:
            assert len({moment.get("1.bin"), moment.get("2.bin"), moment.get("index", moment.get("config"))}) == 1, seen
    assert set(tree(out).values()) == {"new"}


@pytest.mark.parametrize("name", ["model.bin", ".hidden"])
def test_a_target_that_is_not_empty_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=f"exists and is not empty .{name}.*--overwrite"):
        staging(tmp_path)


def test_a_target_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="is a file, expected a directory"):
        staging(tmp_path / "out", overwrite=True)


def test_an_empty_target_is_fine(tmp_path: Path) -> None:
    with staging(tmp_path) as stage:
        stage.begin(MARK, {})
        stage.add("x", b"y")
        stage.publish([], ["x"])
    assert tree(tmp_path) == {"x": "y"}


def test_overwrite_replaces_what_it_writes_and_keeps_the_rest(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "9.bin").write_text("old")
    (tmp_path / "2-of-2").write_text("old")
    with staging(tmp_path, overwrite=True) as stage:
        stage.begin(MARK, {"ranks/1.bin": 3})
        fill(stage, "ranks/1.bin")
        stage.publish(["ranks"], [], ["2-of-2"])
    assert tree(tmp_path) == {"notes.txt": "mine", "ranks/1.bin": "new"}


@pytest.mark.parametrize("existed", [True, False])
def test_an_error_leaves_nothing_of_this_run(tmp_path: Path, existed: bool) -> None:
    out = tmp_path / "out"
    if existed:
        out.mkdir()
    with pytest.raises(SourceError):
        fail(staging(out), SourceError("damaged"))
    assert out.exists() == existed
    assert tree(tmp_path) == {}


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "1.bin").write_text("old")
    with pytest.raises(SourceError):
        fail(staging(tmp_path, overwrite=True), SourceError("damaged"))
    assert tree(tmp_path) == {"1.bin": "old"}


def interrupted(target: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        fail(staging(target), error)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TargetError("full"), OSError("disk")])
def test_what_was_stopped_from_outside_can_be_continued(tmp_path: Path, error: BaseException) -> None:
    interrupted(tmp_path / "out", error)
    assert "--resume" in "".join(getattr(error, "__notes__", ["--resume"]))
    with pytest.raises(UsageError, match=r"holds an interrupted conversion\. Give --resume"):
        staging(tmp_path / "out")
    with staging(tmp_path / "out", resume=True) as stage:
        stage.begin(MARK, {"1.bin": 3, "2.bin": 3})
        assert stage.finished == {"1.bin": 3}
        assert stage.digests == {"embeddings": {"1.bin": [[0, 1, 0]]}}
        fill(stage, "2.bin")
        stage.publish(["1.bin", "2.bin"], [])
    assert tree(tmp_path / "out") == {"1.bin": "new", "2.bin": "new"}


def test_nothing_finished_is_nothing_to_continue(tmp_path: Path) -> None:
    stage = staging(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), stage:
        raise KeyboardInterrupt
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ({**MARK, "source": "there"}, r"another source or other flags \(source differ"),
        ({**MARK, "tp": 2}, r"\(tp differ"),
    ],
)
def test_another_run_is_not_continued(tmp_path: Path, mark: dict[str, Any], message: str) -> None:
    interrupted(tmp_path / "out", KeyboardInterrupt())
    with pytest.raises(UsageError, match=message):
        begin(staging(tmp_path / "out", resume=True), mark, {"1.bin": 3})


def test_a_refused_resume_can_be_tried_again(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", KeyboardInterrupt())
    with pytest.raises(UsageError):
        begin(staging(tmp_path / "out", resume=True), {**MARK, "tp": 2}, {"1.bin": 3})
    with staging(tmp_path / "out", resume=True) as stage:
        stage.begin(MARK, {"1.bin": 3, "2.bin": 3})
        assert stage.finished == {"1.bin": 3}


@pytest.mark.parametrize("damage", ["gone", "short", "other plan"])
def test_a_finished_file_that_is_not_as_noted_is_done_again(tmp_path: Path, damage: str) -> None:
    interrupted(tmp_path / "out", KeyboardInterrupt())
    path = tmp_path / "out" / PARTIAL / "1.bin"
    if damage == "gone":
        path.unlink()
    elif damage == "short":
        path.write_text("n")
    with staging(tmp_path / "out", resume=True) as stage:
        stage.begin(MARK, {"1.bin": 4 if damage == "other plan" else 3, "2.bin": 3})
        assert stage.finished == {}
        stage.publish([], [])


def test_a_journal_that_cannot_be_read(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", KeyboardInterrupt())
    (tmp_path / "out" / PARTIAL / "journal.json").write_text("{")
    with pytest.raises(UsageError, match="no readable journal"):
        begin(staging(tmp_path / "out", resume=True), MARK, {})


def test_overwrite_starts_an_interrupted_run_again(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", KeyboardInterrupt())
    with staging(tmp_path / "out", overwrite=True) as stage:
        stage.begin(MARK, {"1.bin": 3})
        assert stage.finished == {}
        fill(stage, "1.bin")
        stage.publish(["1.bin"], [])
    assert tree(tmp_path / "out") == {"1.bin": "new"}


def test_resume_without_anything_to_resume_begins(tmp_path: Path) -> None:
    with staging(tmp_path / "out", resume=True) as stage:
        stage.begin(MARK, {"1.bin": 3})
        fill(stage, "1.bin")
        stage.publish(["1.bin"], [])
    assert tree(tmp_path / "out") == {"1.bin": "new"}


def test_a_disk_that_is_too_small_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    with pytest.raises(TargetError, match=r"3\.00 GB are needed and 1\.00 GB are free"):
        begin(staging(tmp_path / "out"), MARK, {"1.bin": 3 * 10**9})
    assert not (tmp_path / "out").exists()


def test_a_target_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TargetError, match="cannot be made"):
        begin(staging(tmp_path / "file" / "out"), MARK, {})


def test_a_rename_that_fails_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index").write_text("old")
    replace = os.replace

    def fails(old: Any, new: Any) -> None:
        if str(new) == str(tmp_path / "1.bin"):
            raise OSError(5, "Input/output error")
        replace(old, new)

    stage = staging(tmp_path, overwrite=True)
    stage.begin(MARK, {"1.bin": 3})
    fill(stage, "1.bin")
    stage.add("index", b"new")
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(TargetError, match=r"cannot be completed: Input/output error\."), stage:
        stage.publish(["1.bin"], ["index"])
    assert (tmp_path / "index").read_text() == "old"
    assert not (tmp_path / "1.bin").exists()


def test_a_file_system_without_locks_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuses)
    with staging(tmp_path / "out") as stage:
        stage.begin(MARK, {"1.bin": 3})
        fill(stage, "1.bin")
        stage.publish(["1.bin"], [])
    assert tree(tmp_path / "out") == {"1.bin": "new"}
