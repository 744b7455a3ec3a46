"""One target, written by several processes: rank 0 prepares and publishes it, the others fill their files.

Rank 0 puts its plan into the unfinished target, where all others have to find it: so it is known that they see the same
file system. Each of them compares the plan, and the headers of the source, with what it sees itself. Every process
keeps a journal of its files; rank 0 collects them when all are done.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ckptconv.checksum import crc32
from ckptconv.errors import CkptconvError, SourceError, TargetError, some, why
from ckptconv.signals import deaf
from ckptconv.staging import DAMAGED, JOURNALS, Digests, Staging, Stopped, add_digests, is_wrong, read_journal
from ckptconv.team import Failed, Team

_PLAN = "plan.json"
#: Bytes of both ends of a source file that all processes compare: safetensors and torch files keep their headers there.
EDGE = 16 << 10
#: Seconds that a network file system may take to show what another machine has written.
PATIENCE = 60.0


class Elsewhere(Stopped):
    """Another process failed, and has said so. `wrong`: there is nothing to continue."""

    def __init__(self, text: str, wrong: bool) -> None:
        super().__init__(text)
        self.wrong = wrong


class Line:
    """What a saver's process asks of the one that is in touch with the others."""

    def __init__(self, pipe: Any, rank: int, ranks: int) -> None:
        self._pipe, self.rank, self.ranks = pipe, rank, ranks
        self._asked = 0

    def _ask(self, what: str, *values: Any) -> Any:
        self._asked += 1
        try:
            self._pipe.send((self._asked, what, *values))
            while True:
                number, answer, failure = self._pipe.recv()
                if number == self._asked:  # an earlier question may have been left by a signal
                    break
        except (EOFError, OSError) as error:
            raise Stopped("the loader's process is gone.") from error
        if failure is not None:
            raise Elsewhere(*failure)
        return answer

    def say(self, key: str, text: str = "") -> None:
        """Tell all others."""
        self._ask("say", key, text)

    def hear(self, key: str) -> str:
        """What is said under `key`, when it is. Raises Elsewhere when a process failed before."""
        return str(self._ask("hear", key))

    def alone(self, error: BaseException, wrong: bool) -> None:
        """Tell all others of an error, and wait until they have stopped to write."""
        code = error.exit_code if isinstance(error, CkptconvError) else CkptconvError.exit_code
        self._ask("alone", str(error), code, wrong)


def serve(pipe: Any, team: Team) -> None:
    """Answer a saver's `Line` as long as it asks."""
    while True:
        try:
            number, what, *values = pipe.recv()
        except (EOFError, OSError):
            return
        answer, failure = None, None
        try:
            if what == "say":
                team.say(*values)
            elif what == "hear":
                answer = team.hear(*values)
            else:
                text, code, wrong = values
                team.fail(_as_error(text, code), wrong)
                team.alone()
        except CkptconvError as error:
            failure = str(error), isinstance(error, Failed) and error.wrong
        try:
            pipe.send((number, answer, failure))
        except OSError:
            return


def _as_error(text: str, code: int) -> CkptconvError:
    error = CkptconvError(text)
    error.exit_code = code
    return error


def output(args: Namespace, line: Line) -> Staging:
    """What a saver's process writes to."""
    return Part(args, line) if line.rank else First(args, line)


class First(Staging):
    """The output of rank 0: it makes, checks and publishes it."""

    def __init__(self, args: Namespace, line: Line) -> None:
        self._line, self.ranks = line, line.ranks
        super().__init__(args.save_dir, overwrite=args.overwrite, resume=args.resume)

    def begin(self, fingerprint: dict[str, Any], planned: dict[str, int]) -> None:
        """Prepare, deal out, tell the others."""
        super().begin(fingerprint, planned)
        if before := list(self.partial.glob(JOURNALS)):
            self._note(durable=True)  # the first journal has what they say
            for old in before:
                old.unlink()
        plan = {
            "fingerprint": _comparable(self._fingerprint),
            "headers": _headers(self._fingerprint),
            "files": planned,
            "finished": self.finished,
            "writers": self.writers,
            "digests": self.digests,
        }
        data = json.dumps(plan).encode()
        self.add(_PLAN, data)
        self._line.say("plan", _mark(data))

    def settle(self, digests: Digests) -> Digests:
        """Wait for the others and collect what they have done. Raises TargetError when a file is not as planned."""
        sizes, known = dict(self.finished), {message: dict(keys) for message, keys in digests.items()}
        for rank in range(1, self.ranks):
            path = self.partial / _journal(rank)
            data = _patient(path, self._line.hear(f"done/{rank}"), f"rank {rank} has written")
            finished, theirs, _ = read_journal(data)
            sizes |= finished
            add_digests(known, theirs)
        for name in self.writers:
            _wait(partial(_holds, self.partial / name, sizes.get(name)), self.partial / name, "a rank has written")
        self.finished, self.digests = sizes, known
        self._note()
        return known

    def publish(self, first: Sequence[str], last: Sequence[str], stale: Iterable[str] = ()) -> None:
        """Rename into place, then tell the others."""
        super().publish(first, last, stale)
        self._line.say("published")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        with deaf():
            if error is not None:
                with contextlib.suppress(Stopped):
                    self._line.alone(error, is_wrong(error))  # what they write is removed with the rest
                if self._begun:
                    _collect(self, JOURNALS)
            super().__exit__(kind, error, *rest)


class Part(Staging):
    """The output of another rank: files that rank 0 prepares room for and publishes."""

    def __init__(self, args: Namespace, line: Line) -> None:
        self._line, self.rank, self.ranks = line, line.rank, line.ranks
        self.journal = _journal(line.rank)
        self._expect(args.save_dir)

    def begin(self, fingerprint: dict[str, Any], planned: dict[str, int]) -> None:
        """Wait for the plan and compare it with this process's own. Raises SourceError, TargetError."""
        self._fingerprint = json.loads(json.dumps(fingerprint))
        path = self.partial / _PLAN
        plan = json.loads(_patient(path, self._line.hear("plan"), "rank 0 has written"))
        own = _comparable(self._fingerprint)
        changed = [key for key in {**plan["fingerprint"], **own} if plan["fingerprint"].get(key) != own.get(key)]
        headers = _headers(self._fingerprint)
        there, here = (dict(one["source files"]) for one in (plan["fingerprint"], own))
        differ = [path for path in {**there, **here} if there.get(path) != here.get(path)]
        other = differ or [path for path in headers if plan["headers"].get(path) != headers[path]]
        if changed or other or plan["files"] != planned:
            what = f"in {some(other or changed)}" if other or changed else "in the files it would write"
            raise SourceError(
                f"{own['source']}: rank {self.rank} sees another checkpoint or has other flags than rank 0 "
                f"(they differ {what}). All ranks need the same flags and the same --load-dir, on a shared file system."
            )
        self.finished = dict(plan["finished"])
        self.writers = dict(plan["writers"])
        self.digests = plan["digests"]
        self._begun = True

    def settle(self, digests: Digests) -> Digests:
        """Tell rank 0 what was written."""
        self.digests = digests
        self._note(durable=True)
        self._line.say(f"done/{self.rank}", _mark((self.partial / self.journal).read_bytes()))
        return {}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        with deaf():
            if error is not None and self._begun and not self._published:
                with contextlib.suppress(TargetError):
                    self._note()
                _collect(self, "journal*.json")  # what is said of them is said of all
            super().__exit__(kind, error, *rest)

    def add(self, name: str, data: bytes) -> None:
        """Rank 0 does that."""

    def folder(self, name: str) -> None:
        """Rank 0 does that."""

    def publish(self, first: Sequence[str], last: Sequence[str], stale: Iterable[str] = ()) -> None:
        """Rank 0 does that: wait for it."""
        self._line.hear("published")
        self._published = True

    def discard(self) -> None:
        """Rank 0 does that."""


def _collect(staging: Staging, journals: str) -> None:
    """Add what journals of other processes say is finished."""
    for path in staging.partial.glob(journals):
        with contextlib.suppress(OSError, *DAMAGED):
            finished, digests, _ = read_journal(path.read_bytes())
            staging.finished |= finished
            add_digests(staging.digests, digests)


def _journal(rank: int) -> str:
    return f"journal-{rank}.json"


def _comparable(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same everywhere: machines may see another time of change."""
    files = [[path, size] for path, size, *_ in fingerprint.get("source files", ())]
    return {**fingerprint, "source files": files}


def _headers(fingerprint: Mapping[str, Any]) -> dict[str, int]:
    """Checksums of both ends of every source file. Raises SourceError."""
    found = {}
    for path, size, *_ in fingerprint.get("source files", ()):
        try:
            with open(path, "rb") as file:
                crc = crc32(file.read(EDGE))
                file.seek(max(0, size - EDGE))
                found[path] = crc32(file.read(EDGE), crc)
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {why(error)}") from error
    return found


def _mark(data: bytes) -> str:
    return f"{len(data)} {crc32(data)}"


def _patient(path: Path, mark: str, who: str) -> bytes:
    """The content of a small file that another machine has written. Raises TargetError."""
    found: list[bytes] = []

    def there() -> bool:
        try:
            found[:] = [path.read_bytes()]
        except OSError:
            return False
        return _mark(found[0]) == mark

    _wait(there, path, who)
    return found[0]


def _wait(there: Callable[[], bool], path: Path, who: str) -> None:
    end = time.monotonic() + PATIENCE
    while not there():
        if time.monotonic() > end:
            raise TargetError(
                f"{path}: is not what {who}. All ranks need the same --save-dir, on a file system that they share."
            )
        time.sleep(0.2)


def _holds(path: Path, size: int | None) -> bool:
    try:
        return os.stat(path).st_size == size
    except OSError:
        return False
