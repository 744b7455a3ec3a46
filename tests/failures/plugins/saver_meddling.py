"""A saver that writes what a built-in one writes, and does a deed at a message or at a rename of the publication.

--saver-at N: just before it takes message N (0 is the metadata). --rename-at N: before the Nth rename of `publish`.
The deed is a signal to itself, `idle` (reads no more), `deaf` (that, and ignores SIGTERM) or `return` (early).
"""

from __future__ import annotations

import json
import os
import signal
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ckptconv import staging
from ckptconv.savers import hf, megatron_mcore

BUILT_IN = {"hf": hf, "megatron_mcore": megatron_mcore}


class _Return(Exception):
    """Leave early."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--writes", choices=BUILT_IN, default="megatron_mcore")
    parser.add_argument("--saver-at", type=int, default=-1)
    parser.add_argument("--rename-at", type=int, default=-1)
    parser.add_argument("--saver-deed", default="SIGKILL")
    parser.add_argument("--saver-note", type=Path)
    parser.add_argument("--saver-after", type=int, default=0, help="first wait until so many files are finished")
    hf.add_arguments(parser)
    megatron_mcore.add_arguments(parser)


def save_checkpoint(queue: Any, args: Namespace) -> Any:
    if args.rename_at >= 0:
        _meddle_with_renames(args)
    try:
        return BUILT_IN[args.writes].save_checkpoint(_Queue(queue, args), args)
    except _Return:
        return None


def _do(args: Namespace) -> None:
    if args.saver_note:
        args.saver_note.touch()
    journal = Path(args.save_dir) / staging.PARTIAL / "journal.json"
    while args.saver_after and len(json.loads(journal.read_text())["finished"]) < args.saver_after:
        time.sleep(0.01)
    if args.saver_deed == "return":
        raise _Return
    if args.saver_deed == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while args.saver_deed in ("idle", "deaf"):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.Signals[args.saver_deed])


def _meddle_with_renames(args: Namespace) -> None:
    """Count the renames inside `publish` only: small files are renamed all the time."""
    publish, replace, count = staging.Staging.publish, os.replace, 0

    def counted(*names: Any) -> None:
        nonlocal count
        if count == args.rename_at:
            _do(args)
        count += 1
        replace(*names)

    def published(self: Any, *words: Any, **named: Any) -> None:
        os.replace = counted
        publish(self, *words, **named)
        os.replace = replace

    staging.Staging.publish = published  # type: ignore[method-assign]


class _Queue:
    def __init__(self, queue: Any, args: Namespace) -> None:
        self._queue, self._args = queue, args

    def metadata(self) -> Any:
        if self._args.saver_at == 0:
            _do(self._args)
        return self._queue.metadata()

    def messages(self) -> Iterator[Any]:
        messages = self._queue.messages()
        for number in range(1, 1 << 30):
            if number == self._args.saver_at:
                _do(self._args)
            item = next(messages, None)
            if item is None:
                return
            yield item

    def release(self, wire: Any) -> None:
        self._queue.release(wire)
