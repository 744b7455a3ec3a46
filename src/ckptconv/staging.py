"""Outputs appear complete at once or not at all.

Everything is collected under `SAVE_DIR/.ckptconv-partial/` with the names it will have. `publish` flushes it and
renames it into place: the weights first, then what makes a reader look for them (index, config, tracker). A journal
in the same place lists finished files, so that `--resume` need not redo them; a lock keeps other runs out.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ckptconv import files
from ckptconv.errors import CkptconvError, TargetError, UsageError, annotate, some, why
from ckptconv.files import PARTIAL
from ckptconv.shares import dealt
from ckptconv.signals import deaf

_REPLACED = ".ckptconv-replaced"
_JOURNAL, _LOCK = "journal.json", "lock"
#: message -> key -> byte runs [start, end, crc] that have been read
Digests = dict[str, dict[str, list[list[int]]]]
#: Files after each of which the journal is written.
_EACH = 256
#: Journals of processes beside the first.
JOURNALS = "journal-*.json"
#: What a journal that is not one raises.
DAMAGED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


class Stopped(CkptconvError):
    """The other side is gone or was stopped; what is finished can be continued, unless it was `wrong`."""

    wrong = False


class Staging:
    """One run's output. Use as a context manager: leaving it by an error removes or keeps the partial files."""

    #: which process of how many this is
    rank, ranks = 0, 1
    journal = _JOURNAL

    def __init__(self, save_dir: str, *, overwrite: bool, resume: bool) -> None:
        self._expect(save_dir)
        try:
            self._created = not os.path.lexists(self.target)
            interrupted = self.partial.is_dir()
            there = [] if self._created else sorted(set(os.listdir(self.target)) - {PARTIAL, _REPLACED})
        except NotADirectoryError as error:
            raise UsageError(f"--save-dir {save_dir}: is a file, expected a directory to be made.") from error
        except OSError as error:
            raise TargetError(f"--save-dir {save_dir}: cannot be used: {why(error)}") from error
        # An interrupted run has passed this check before: what is there now is partly its own.
        if there and not overwrite and not (resume and interrupted):
            raise UsageError(
                f"--save-dir {save_dir}: exists and is not empty ({some(there, 4)}). "
                "Give another directory, or --overwrite to replace what this conversion writes."
            )
        if interrupted and not (overwrite or resume):
            raise UsageError(
                f"--save-dir {save_dir}: holds an interrupted conversion. Give --resume to continue it with the "
                "same flags, or --overwrite to start again."
            )
        self._resume = resume and interrupted

    def _expect(self, save_dir: str) -> None:
        self.target = Path(save_dir)
        self.partial = self.target / PARTIAL
        self.finished: dict[str, int] = {}
        self.digests: Digests = {}
        #: of the files that are still to be written, which process writes each
        self.writers: dict[str, int] = {}
        self._fingerprint: Any = None
        self._noted = 0.0
        self._lock: int | None = None
        self._begun = self._published = False

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        if error is not None and self._begun and not self._published:
            if self.finished and not is_wrong(error):
                with contextlib.suppress(TargetError):
                    self._note()
                annotate(error, [
                    f"{len(self.finished)} finished files are kept in {self.partial}: run the same command with "
                    "--resume to continue, or delete that directory."
                ])  # fmt: skip
            else:
                self.discard()
        self._release()

    def discard(self) -> None:
        """Remove everything this run has made."""
        for path in self.finished:
            files.forget(self.path(path))
        shutil.rmtree(self.partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            if self._created and not os.listdir(self.target):
                self.target.rmdir()

    def begin(self, fingerprint: dict[str, Any], planned: dict[str, int]) -> None:
        """Prepare for `planned` files (name -> bytes, in the order of the stream).

        `fingerprint` says what makes two runs the same. Raises UsageError when a run to resume was another one or still
        runs, TargetError when the disk is too small.
        """
        self._fingerprint = json.loads(json.dumps(fingerprint))
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._hold()
            if self._resume:
                self._continue(planned)
            else:
                self._clear()
            self._begun = True
            free = shutil.disk_usage(self.partial).free
        except OSError as error:
            raise TargetError(f"{self.target}: cannot be made: {why(error)}") from error
        missing = {name: size for name, size in planned.items() if name not in self.finished}
        _check_room(self.target, sum(missing.values()), free)
        self.writers = dealt(missing, self.ranks)
        self._note()

    def settle(self, digests: Digests) -> Digests:
        """Wait until all processes have written their files; what all of them have read."""
        return digests

    def _hold(self) -> None:
        """Keep other runs out of this target until this process ends. Raises UsageError when one is in it."""
        self._lock = os.open(self.partial / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{self.target}: another conversion is running in it. Wait for it, or stop it.") from error
        except OSError:
            pass  # a file system without locks (Lustre and NFS may be mounted so): nobody is kept out then

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _clear(self) -> None:
        for entry in self.partial.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _continue(self, planned: dict[str, int]) -> None:
        finished, digests, old = self._journal()
        new = self._fingerprint
        if old != new:
            changed = [key for key in new if old.get(key) != new[key]]
            raise UsageError(
                f"{self.partial}: was begun with another source or other flags ({some(changed)} differ), so it "
                "cannot be resumed. Run the same command, or give --overwrite to start again."
            )
        if not new.get("source files"):
            raise UsageError(
                f"{self.partial}: the loader does not say what it reads, so nobody can know that it is the same "
                "source. Give --overwrite to start again."
            )
        for name, size in finished.items():
            path = self.partial / name
            if planned.get(name) == size and path.is_file() and path.stat().st_size == size:
                self.finished[name] = size
        self.digests = digests

    def _journal(self) -> tuple[dict[str, int], Digests, dict[str, Any]]:
        """(finished files, digests, fingerprint) of the run to continue, of all its processes. Raises UsageError."""
        files: dict[str, int] = {}
        known: Digests = {}
        try:
            for path in (self.partial / _JOURNAL, *sorted(self.partial.glob(JOURNALS))):
                finished, digests, fingerprint = read_journal(path.read_bytes())
                files |= finished
                add_digests(known, digests)
                if path.name == _JOURNAL:
                    begun = fingerprint
            return files, known, dict(begun)
        except (OSError, *DAMAGED) as error:
            raise UsageError(
                f"{self.partial}: has no readable journal, so it cannot be resumed. Give --overwrite to start again."
            ) from error

    def present(self) -> list[str]:
        """Names in the target now."""
        return os.listdir(self.target) if self.target.is_dir() else []

    def path(self, name: str) -> str:
        """Where the file called `name` (relative to the target) is collected."""
        return str(self.partial / name)

    def done(self, name: str, size: int, digests: Callable[[], Digests]) -> None:
        """Note that a file is complete and flushed, and the digests known so far."""
        self.finished[name] = size
        # The journal lists all finished files: with thousands of small ones, once a second is often enough.
        if len(self.finished) <= _EACH or time.monotonic() - self._noted > 1:
            self.digests = digests()
            self._note()

    def _note(self, durable: bool = False) -> None:
        self._noted = time.monotonic()
        text = json.dumps({"fingerprint": self._fingerprint, "finished": self.finished, "digests": self.digests})
        # Seldom flushed: what it says of files is true, they are; and each flush would make the disk wait.
        _write(self.partial / self.journal, text.encode(), durable)

    def add(self, name: str, data: bytes) -> None:
        """A small file."""
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, data)

    def folder(self, name: str) -> None:
        """A folder, which may stay empty."""
        (self.partial / name).mkdir(parents=True, exist_ok=True)

    def publish(self, first: Sequence[str], last: Sequence[str], stale: Iterable[str] = ()) -> None:
        """Rename files and folders into place: `first` in any order, then `last` in order.

        `stale` are names of an earlier output that would be taken for part of this one; they and whatever is replaced
        are set aside before the first rename and removed after the last one. Signals are ignored meanwhile; an error
        undoes the renames. Raises TargetError.
        """
        aside = self.target / _REPLACED
        moved: list[tuple[Path, Path]] = []

        def move(source: Path, target: Path) -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            moved.append((source, target))

        with deaf():
            try:
                for name in dict.fromkeys([*last[::-1], *first, *stale]):
                    if (self.target / name).exists() and (aside / name).exists():
                        _remove(self.target / name)  # of a publication that was killed; the older one is aside
                    elif (self.target / name).exists():
                        move(self.target / name, aside / name)
                for name in [*first, *last]:
                    _flush_directory((self.partial / name).parent)
                    move(self.partial / name, self.target / name)
                    if name in last:
                        _flush_directory(self.target)
                self._published = True
            except OSError as error:
                for source, target in reversed(moved):
                    os.replace(target, source)
                raise TargetError(f"{self.target}: cannot be completed: {why(error)}") from error
            _flush_directory(self.target)
            shutil.rmtree(self.partial, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)


class Draft(Staging):
    """An output that is only planned: files are counted, nothing is made. `free`: bytes on the target's disk."""

    def __init__(self, save_dir: str, *, overwrite: bool, resume: bool) -> None:
        super().__init__(save_dir, overwrite=overwrite, resume=resume)
        self.files: dict[str, int] = {}
        self.replaced: list[str] = []
        self.plan: Any = None  # what `writing.write` was given
        above = self.target.absolute()
        while not above.exists():
            above = above.parent
        self.free, self.writable = shutil.disk_usage(above).free, os.access(above, os.W_OK)

    def begin(self, fingerprint: dict[str, Any], planned: dict[str, int]) -> None:
        """Note what would be written. Raises UsageError as for a run to resume."""
        self._fingerprint = json.loads(json.dumps(fingerprint))
        if self._resume:
            self._continue(planned)
        self.files = dict(planned)

    @property
    def needed(self) -> int:
        """Bytes still to be written."""
        return sum(size for name, size in self.files.items() if name not in self.finished)

    def check(self) -> None:
        """Raise TargetError when the disk cannot take it."""
        _check_room(self.target, self.needed, self.free)
        if not self.writable:
            raise TargetError(f"{self.target}: cannot be made: Permission denied.")

    def add(self, name: str, data: bytes) -> None:
        self.files[name] = len(data)

    def folder(self, name: str) -> None:
        """It has no bytes."""

    def publish(self, first: Sequence[str], last: Sequence[str], stale: Iterable[str] = ()) -> None:
        names = dict.fromkeys([*first, *last, *stale])
        self.replaced = [name for name in names if (self.target / name).exists()]


def staged(args: Namespace) -> Staging:
    """The output of a run, as its flags have it; the one that args has where there is one."""
    output = getattr(args, "output", None)
    target = getattr(args, "work_dir", None) or args.save_dir
    return output or Staging(target, overwrite=args.overwrite, resume=args.resume)


def is_wrong(error: BaseException) -> bool:
    """Whether there is nothing to continue. What was stopped from outside (a signal, a full disk) can be continued."""
    if isinstance(error, Stopped):
        return error.wrong
    known = isinstance(error, CkptconvError) and not isinstance(error, TargetError)
    return known and type(error) is not CkptconvError


def read_journal(data: bytes) -> tuple[dict[str, int], Digests, dict[str, Any]]:
    """(finished files, digests, fingerprint). Raises what damaged JSON raises."""
    journal = json.loads(data)
    finished = {str(name): int(size) for name, size in journal["finished"].items()}
    digests = {
        str(message): {str(key): [[int(n) for n in run] for run in runs] for key, runs in keys.items()}
        for message, keys in journal["digests"].items()
    }
    if not all(len(run) == 3 for keys in digests.values() for runs in keys.values() for run in runs):
        raise ValueError("a run of bytes has a start, an end and a checksum")
    return finished, digests, dict(journal["fingerprint"])


def add_digests(known: Digests, more: Digests) -> None:
    """Add what another process has read; what both know counts once."""
    for message, keys in more.items():
        for key, runs in keys.items():
            there = known.setdefault(message, {}).setdefault(key, [])
            there += [run for run in runs if run not in there]


def _check_room(target: Path, needed: int, free: int) -> None:
    if needed > free:
        raise TargetError(
            f"{target}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free. "
            "Free space there or choose another --save-dir; nothing was written."
        )


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write(path: Path, data: bytes, durable: bool = True) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise TargetError(f"{path}: cannot be written: {why(error)}") from error


def _flush_directory(path: Path) -> None:
    """Make renames durable. Some network file systems cannot flush a directory; they keep their own order."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
