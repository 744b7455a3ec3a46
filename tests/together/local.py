"""Several ranks in the process of the tests: each in a thread, with its own queue, saver and part of the output."""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import inprocess
from ckptconv import cli, conversion, files, together
from ckptconv.errors import CkptconvError
from ckptconv.team import Failed


class Board:
    """What the store of a rendezvous is to real processes."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}
        self.numbers: dict[str, Iterator[int]] = defaultdict(itertools.count)
        self.failure: tuple[int, str, bool] | None = None


class Team:
    """What `ckptconv.team.Team` is to a real process."""

    def __init__(self, board: Board, rank: int, ranks: int) -> None:
        self._board, self.rank, self.ranks = board, rank, ranks

    @property
    def failure(self) -> Failed | None:
        if self._board.failure is None or self._board.failure[0] == self.rank:
            return None
        rank, text, wrong = self._board.failure
        return Failed(f"rank {rank}: {text}", 1, wrong)

    def say(self, key: str, text: str = "") -> None:
        self._board.said[key] = text

    def hear(self, key: str) -> str:
        while key not in self._board.said:
            self.check()
            if self._board.failure:
                raise CkptconvError("this process has failed.")
            time.sleep(0.001)
        return self._board.said[key]

    def take(self, key: str) -> int:
        return next(self._board.numbers[key])

    def check(self) -> None:
        if self.failure:
            raise self.failure

    def fail(self, error: BaseException, wrong: bool) -> None:
        self._board.failure = self._board.failure or (self.rank, str(error), wrong)

    def ended(self) -> None:
        self.say(f"gone/{self.rank}")

    def alone(self) -> None:
        for rank in range(self.ranks):
            while rank != self.rank and f"gone/{rank}" not in self._board.said:
                time.sleep(0.001)


class Line(together.Line):
    """Asks without a pipe."""

    def __init__(self, team: Any) -> None:
        self.rank, self.ranks, self._team = team.rank, team.ranks, team

    def say(self, key: str, text: str = "") -> None:
        self._team.say(key, text)

    def hear(self, key: str) -> str:
        return str(self._team.hear(key))

    def alone(self, error: BaseException, wrong: bool) -> None:
        self._team.fail(error, wrong)


class _Saver(inprocess._Saver):
    """A saver's thread that writes a part of the output."""

    def __init__(self, plugin: Any, args: Any, team: Any = None) -> None:
        self._team = team
        super().__init__(plugin, args)

    def _run(self, plugin: Any, args: Any) -> None:
        if self._team:
            args.output = together.output(args, Line(self._team))
        super()._run(plugin, args)


def on_ranks(ranks: int, *words: object) -> list[conversion.Report]:
    """Convert on so many ranks; what each reports. Raises what the first of them fails with."""
    board, reports, errors = Board(), {}, {}

    def one(rank: int) -> None:
        member: Any = Team(board, rank, ranks)
        try:
            reports[rank] = cli._converted([str(word) for word in words], member)
        except BaseException as error:
            errors[rank] = error
            member.fail(error, True)

    files.reset()
    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    with mock.patch.object(conversion, "_Saver", _Saver):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    files.reset()
    if errors:
        raise errors[board.failure[0] if board.failure else min(errors)]
    return [reports[rank] for rank in range(ranks)]


def tree(top: Path) -> dict[str, bytes]:
    """Every file below a directory, by name."""
    return {str(path.relative_to(top)): path.read_bytes() for path in sorted(top.rglob("*")) if path.is_file()}
