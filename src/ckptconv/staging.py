"""Outputs appear complete at once or not at all.

Everything is collected under `SAVE_DIR/.ckptconv-partial/` with the names it will have. `publish` flushes it and
renames it into place: the weights first, then what makes a reader look for them (index, config, tracker). A journal
in the same place lists finished files, so that `--resume` need not redo them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ckptconv import files
from ckptconv.errors import TargetError, UsageError, annotate, some

PARTIAL = ".ckptconv-partial"
_REPLACED = ".ckptconv-replaced"
_JOURNAL = "journal.json"


def leftovers(directory: Path) -> list[str]:
    """What a target directory already holds, other than an interrupted run of ours."""
    if not directory.is_dir():
        return []
    return sorted(entry.name for entry in directory.iterdir() if entry.name not in (PARTIAL, _REPLACED))


class Staging:
    """One run's output. Use as a context manager: leaving it by an error removes or keeps the partial files."""

    def __init__(self, save_dir: str, *, overwrite: bool, resume: bool) -> None:
        self.target = Path(save_dir)
        self.partial = self.target / PARTIAL
        self._created = not self.target.exists()
        self._overwrite = overwrite
        self._published = False
        self._begun = False
        self.finished: dict[str, Any] = {}
        self.digests: dict[str, Any] = {}
        self._fingerprint: Any = None
        if self.target.exists() and not self.target.is_dir():
            raise UsageError(f"--save-dir {save_dir}: is a file, expected a directory to be made.")
        there = leftovers(self.target)
        if there and not overwrite:
            raise UsageError(
                f"--save-dir {save_dir}: exists and is not empty ({some(there, 4)}). "
                "Give another directory, or --overwrite to replace what this conversion writes."
            )
        interrupted = self.partial.exists()
        if interrupted and not (overwrite or resume):
            raise UsageError(
                f"--save-dir {save_dir}: holds an interrupted conversion. Give --resume to continue it with the "
                "same flags, or --overwrite to start again."
            )
        self._resume = resume and interrupted

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        if kind is None or self._published or (self._resume and not self._begun):
            return  # a refused --resume leaves what it would have continued
        # What was stopped from outside (a signal, a full disk) can be continued; what was wrong cannot.
        resumable = self.finished and not (hasattr(error, "exit_code") and not isinstance(error, TargetError))
        for path in self.partial.rglob("*") if self.partial.exists() else ():
            files.forget(str(path))
        if resumable and isinstance(error, Exception | KeyboardInterrupt | SystemExit):
            annotate(error, [
                f"{len(self.finished)} finished files are kept in {self.partial}: run the same command with --resume "
                "to continue, or delete that directory."
            ])  # fmt: skip
            return
        self.discard()

    def discard(self) -> None:
        """Remove everything this run has made."""
        shutil.rmtree(self.partial, ignore_errors=True)
        if self._created and self.target.is_dir() and not any(self.target.iterdir()):
            self.target.rmdir()

    def begin(self, fingerprint: Any, planned: dict[str, int]) -> None:
        """Prepare for `planned` files (relative name -> bytes). `fingerprint` says what makes two runs the same.

        Raises UsageError when a run to resume was another one, TargetError when the disk is too small.
        """
        self._fingerprint = json.loads(json.dumps(fingerprint))
        if self._resume:
            self._continue(planned)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.partial).free
        except OSError as error:
            raise TargetError(f"{self.target}: cannot be made: {error.strerror}.") from error
        needed = sum(size for name, size in planned.items() if name not in self.finished)
        if needed > free:
            self.discard()
            raise TargetError(
                f"{self.target}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free. "
                "Free space there or choose another --save-dir; nothing was written."
            )
        self._begun = True
        self._note()

    def _continue(self, planned: dict[str, int]) -> None:
        try:
            journal = json.loads((self.partial / _JOURNAL).read_text())
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{self.partial}: has no readable journal, so it cannot be resumed. Give --overwrite to start again."
            ) from error
        if journal.get("fingerprint") != self._fingerprint:
            old, new = journal.get("fingerprint") or {}, self._fingerprint
            changed = [key for key in new if old.get(key) != new[key]]
            raise UsageError(
                f"{self.partial}: was begun with another source or other flags ({some(changed)} differ), so it "
                "cannot be resumed. Run the same command, or give --overwrite to start again."
            )
        for name, size in journal["finished"].items():
            path = self.partial / name
            if planned.get(name) == size and path.is_file() and path.stat().st_size == size:
                self.finished[name] = size
        self.digests = journal["digests"]

    def path(self, name: str) -> str:
        """Where the file called `name` (relative to the target) is collected."""
        return str(self.partial / name)

    def done(self, name: str, size: int, digests: dict[str, Any]) -> None:
        """Note that a file is complete and flushed, and the digests known so far."""
        self.finished[name] = size
        self.digests = digests
        self._note()

    def _note(self) -> None:
        text = json.dumps({"fingerprint": self._fingerprint, "finished": self.finished, "digests": self.digests})
        _write(self.partial / _JOURNAL, text.encode())

    def add(self, name: str, data: bytes) -> None:
        """A small file."""
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, data)

    def publish(self, first: Sequence[str], last: Sequence[str], stale: Iterable[str] = ()) -> None:
        """Rename files and folders into place: `first` in any order, then `last` in order.

        `stale` are names of an earlier output that would be taken for part of this one; they and whatever is replaced
        are set aside before the first rename and removed after the last one. Raises TargetError.
        """
        aside = self.target / _REPLACED
        replaced = [name for name in [*last[::-1], *first, *stale] if (self.target / name).exists()]
        try:
            for name in dict.fromkeys(replaced):
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.target / name, aside / name)
            for name in [*first, *last]:
                (self.target / name).parent.mkdir(parents=True, exist_ok=True)
                _flush_directory((self.partial / name).parent)
                os.replace(self.partial / name, self.target / name)
                if name in last:
                    _flush_directory(self.target)
            self._published = True
            _flush_directory(self.target)
            shutil.rmtree(self.partial, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)
        except OSError as error:
            raise TargetError(
                f"{self.target}: cannot be completed: {error.strerror}. What was there before is in {aside}."
            ) from error


def _write(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise TargetError(f"{path}: cannot be written: {error.strerror}.") from error


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
