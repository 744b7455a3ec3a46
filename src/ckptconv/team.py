"""The processes of one torchrun job: what they tell one another, and that all of them end when one does.

They meet in the store of torchrun's rendezvous (torch.distributed), through which little text passes and no tensor. A
process that is gone says nothing, so each one counts there once a second: who stops counting is taken for dead.

Not here: who does what (shares.py), what is written when (together.py).
"""

from __future__ import annotations

import _thread
import contextlib
import itertools
import json
import logging
import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ckptconv import errors
from ckptconv.errors import CkptconvError
from ckptconv.signals import deaf

log = logging.getLogger("ckptconv")

#: Seconds after which a process that has stopped counting, or a store that does not answer, is taken for dead, and
#: those a process has to begin with it.
SILENT, LATE = 20.0, 300.0
#: Seconds that a process which fails waits for the others to have heard of it.
HEARD = 5.0
_BEAT, _POLL = 1.0, 0.1
_LEFT = "left"
_stores: list[_Store] = []
_AGENT = "torchrun stops all processes of a machine when one of them is gone: its report says which."


@dataclass(frozen=True)
class Seat:
    """Which process of how many this is, and how many there are on this machine."""

    rank: int
    ranks: int
    here: int


def seat() -> Seat | None:
    """Where torchrun has put this process; None for a process alone."""
    value = os.environ.get
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(value("WORLD_SIZE", "1")) < 2:
        return None
    return Seat(int(value("RANK", "0")), int(value("WORLD_SIZE", "1")), int(value("LOCAL_WORLD_SIZE", "1")))


class Failed(CkptconvError):
    """Another process of the job failed: the message is what that one says."""

    def __init__(self, text: str, exit_code: int, wrong: bool) -> None:
        super().__init__(text)
        self.exit_code, self.wrong = exit_code, wrong


class _Store:
    """The store of torchrun's rendezvous. A thread of its own asks it: it may never answer, and says so to nobody."""

    def __init__(self, seat: Seat) -> None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a store that is gone is told of below, in one line
        import torch.distributed

        dist: Any = torch.distributed
        try:
            self._store = next(dist.rendezvous("env://", seat.rank, seat.ranks))[0]
        except Exception as error:
            raise CkptconvError(f"the store of torchrun's rendezvous was not reached: {error}.") from error
        self._questions: queue.SimpleQueue[tuple[Callable[[Any], Any], Any]] = queue.SimpleQueue()
        self._gone = ""
        threading.Thread(target=self._answer, name="store", daemon=True).start()

    def ask(self, question: Callable[[Any], Any]) -> Any:
        """What the store answers. Raises CkptconvError when it is gone."""
        answer: queue.SimpleQueue[tuple[Any, str]] = queue.SimpleQueue()
        value, wrong = None, self._gone
        if not wrong:
            self._questions.put((question, answer))
            try:
                value, wrong = answer.get(timeout=SILENT)
            except queue.Empty:
                wrong = f"no answer for {SILENT:.0f} s"
        if wrong:
            self._gone = wrong
            raise CkptconvError(
                f"the store of torchrun's rendezvous does not answer any more ({wrong}): the job was stopped, or "
                "the machine of rank 0 is gone or not reached. --resume goes on where the job stopped."
            )
        return value

    def _answer(self) -> None:
        while True:
            question, answer = self._questions.get()
            try:
                answer.put((None, self._gone) if self._gone else (question(self._store), ""))
            except Exception as error:
                answer.put((None, next(iter(str(error).strip().splitlines()), "") or type(error).__name__))


class Team:
    """This process among the others. Use as a context manager around all that it does for the job.

    failure: what another process has failed with; from then on nothing here goes on.
    """

    def __init__(self, seat: Seat) -> None:
        self.rank, self.ranks, self.here = seat.rank, seat.ranks, seat.here
        self.failure: Failed | None = None
        if not _stores:
            _stores.append(_Store(seat))
        self._store = _stores[0]
        self._greeted: dict[int, str] = {}
        self._place = self._met()
        self._told = self._noticed = False
        self._awaited = list(range(1, self.ranks)) if self.rank == 0 else []
        self._deadline = 0.0
        self._over = threading.Event()
        self._beats: dict[int, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._watch, name="team", daemon=True)

    def __enter__(self) -> Team:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        self._noticed = True
        with deaf() if error is not None else contextlib.nullcontext():
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        if error is not None:
            with contextlib.suppress(CkptconvError):
                self._look()
            self.fail(error, wrong=True)  # what it had begun, if anything, has been told of before
        self.ended()
        failure = self.failure
        try:
            if error is None:
                self._leave()
            elif failure is None or self.rank == 0:
                self.alone()  # who hears of it late would find no store any more
        finally:
            self._over.set()
            self._thread.join(timeout=_BEAT)
            with contextlib.suppress(CkptconvError):
                self.say(f"alive/{self.rank}", _LEFT)
        if error is not None:
            _report(failure or error)
        if failure is not None and error is not None and not isinstance(error, Failed):
            errors.annotate(failure, errors.notes(error))
            raise failure from None

    def _met(self) -> str:
        """Where in the store this job speaks: before a restart by torchrun an earlier one has spoken there too."""
        if self.rank == 0:
            return f"ckptconv/{self._store.ask(lambda store: store.add('ckptconv/jobs', 1))}/"
        word, end = uuid.uuid4().hex, time.monotonic() + LATE
        self._write(f"ckptconv/hello/{self.rank}", word)
        while (place := self._read(f"ckptconv/welcome/{word}")) is None:
            if time.monotonic() > end:
                raise CkptconvError(f"rank 0 has not begun within {LATE:.0f} s: is it there?")
            time.sleep(_POLL)
        return place

    def _welcome(self) -> None:
        """Tell the processes that have come where this job speaks."""
        self._awaited = [rank for rank in self._awaited if self.heard(f"alive/{rank}") is None]
        for rank in self._awaited:
            word = self._read(f"ckptconv/hello/{rank}")
            if word and word != self._greeted.get(rank):
                self._write(f"ckptconv/welcome/{word}", self._place)
                self._greeted[rank] = word

    def _read(self, key: str) -> str | None:
        found = self._store.ask(lambda store: store.get(key) if store.check([key]) else None)
        return None if found is None else found.decode()

    def _write(self, key: str, text: str) -> None:
        self._store.ask(lambda store: store.set(key, text))

    def say(self, key: str, text: str = "") -> None:
        """Tell all others. Raises CkptconvError when the store is gone."""
        self._write(self._place + key, text)

    def heard(self, key: str) -> str | None:
        """What was said under `key`, if anything was. Raises CkptconvError."""
        return self._read(self._place + key)

    def hear(self, key: str) -> str:
        """What is said under `key`, when it is. Raises Failed when a process failed before."""
        while (text := self.heard(key)) is None:
            self.check()
            if self._told:
                raise CkptconvError("this process has failed.")
            time.sleep(_POLL)
        return text

    def take(self, key: str) -> int:
        """A number that no other process gets: 0, 1, ... Raises CkptconvError."""
        return int(self._store.ask(lambda store: store.add(self._place + key, 1))) - 1

    def check(self) -> None:
        """Raise Failed when another process has failed."""
        if self.failure is not None:
            self._noticed = True
            raise self.failure

    def fail(self, error: BaseException, wrong: bool) -> None:
        """Tell all others that this process failed. `wrong`: there is nothing to continue. The first one counts."""
        if self._told or self.failure is not None:
            return
        self._told = True
        said = str(error) or ("interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__)
        if isinstance(error, KeyboardInterrupt) and str(error):  # not by a terminal
            errors.annotate(error, [_AGENT])
        text = "\n".join([said, *errors.notes(error)])
        code = error.exit_code if isinstance(error, CkptconvError) else CkptconvError.exit_code
        data = {"rank": self.rank, "host": socket.gethostname(), "text": text, "code": code, "wrong": wrong}
        with contextlib.suppress(CkptconvError):
            if self.take("failures") == 0:
                self.say("failed", json.dumps(data))

    def ended(self) -> None:
        """Tell that nothing of this process writes any more."""
        with contextlib.suppress(CkptconvError):
            self.say(f"gone/{self.rank}")

    def alone(self) -> None:
        """Wait until no other process writes any more, or for a while after the first failure was known of."""
        self._deadline = self._deadline or time.monotonic() + HEARD
        self._wait_for("gone", self._deadline)

    def _leave(self) -> None:
        """Rank 0 leaves last: the store may be its."""
        with contextlib.suppress(CkptconvError):
            self.say(f"left/{self.rank}")
        if self.rank == 0:
            self._wait_for("left", time.monotonic() + SILENT)

    def _wait_for(self, what: str, end: float) -> None:
        with contextlib.suppress(CkptconvError):
            for rank in range(self.ranks):
                while rank != self.rank and self.heard(f"{what}/{rank}") is None and time.monotonic() < end:
                    time.sleep(_POLL)

    def _watch(self) -> None:
        for beat in itertools.count():
            try:
                self.say(f"alive/{self.rank}", str(beat))
                self._welcome()
                self._look()
                if self.failure is None and not self._told:
                    self._listen()
            except CkptconvError as error:
                if not self._over.is_set():
                    self._found(Failed(str(error), error.exit_code, wrong=False))
            if self._over.wait(_POLL if self._awaited else _BEAT):
                return
            if self.failure is not None and not self._noticed:
                self._noticed = True
                _thread.interrupt_main()  # a loader that is busy elsewhere

    def _look(self) -> None:
        """See whether another process has said that it failed."""
        said = None if self.failure else self.heard("failed")
        if said is not None:
            data: dict[str, Any] = json.loads(said)
            if data["rank"] != self.rank:
                where = f"rank {data['rank']} on {data['host']}"
                self._found(Failed(f"{where}: {data['text']}", int(data["code"]), bool(data["wrong"])))

    def _listen(self) -> None:
        """Rank 0 listens for all, the others for rank 0. Raises CkptconvError when one is silent."""
        now = time.monotonic()
        for rank in range(1, self.ranks) if self.rank == 0 else [0]:
            beat = self.heard(f"alive/{rank}") or ""
            last, since = self._beats.get(rank, (None, now))
            if beat != last:
                self._beats[rank] = (beat, now)
            elif beat != _LEFT and now - since > (SILENT if beat else LATE):
                error = CkptconvError(
                    f"rank {rank} has not been heard of for {now - since:.0f} s: its process or machine is gone, or "
                    "it does not reach the others. --resume goes on where the job stopped."
                )
                self.fail(error, wrong=False)
                raise error

    def _found(self, failure: Failed) -> None:
        if self.failure is None:
            self.failure = failure


def _report(error: BaseException) -> None:
    """Leave the message where torchrun looks for it: its own report has it then."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    text = str(error) or type(error).__name__
    more = {"py_callstack": text, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError), open(path, "w") as file:
        json.dump({"message": {"message": text, "errorCode": 1, "extraInfo": more}}, file)


@contextlib.contextmanager
def joined() -> Iterator[Team | None]:
    """The job that this process is part of; None for a process alone."""
    place = seat()
    if place is None:
        yield None
        return
    with Team(place) as team:
        yield team
