"""A loader that passes on what a built-in one sends, and does a deed just before one of the messages.

Message 0 is the metadata, `last` the final word. Deeds, separated by commas, are done in order:

    signal:NAME        send it to this process        group:NAME   to this process group, as a terminal does
    saver:NAME         send it to the saver           finished:N   wait until the saver has finished N files
    truncate:PATH:N    cut a file to N bytes          grow:PATH:N  write a new file of N bytes, `all` that there are
    touch:PATH         make an empty file             rename:A:B   rename
    sleep:S            sleep                          wait:PATH    until there is such a file
    exit:N             leave without a word           raise:TEXT   fail as a bug does
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from ckptconv.loaders import hf, megatron_mcore

BUILT_IN = {"hf": hf, "megatron_mcore": megatron_mcore}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--through", choices=BUILT_IN, default="hf")
    parser.add_argument("--at", default="0")
    parser.add_argument("--deeds", default="")
    megatron_mcore.add_arguments(parser)


def load_checkpoint(queue: Any, args: Namespace) -> None:
    BUILT_IN[args.through].load_checkpoint(_Queue(queue, args), args)


class _Queue:
    def __init__(self, queue: Any, args: Namespace) -> None:
        self._queue, self._args, self._count = queue, args, 0

    def put(self, item: Any) -> None:
        here = item == "done" if self._args.at == "last" else str(self._count) == self._args.at
        for deed in self._args.deeds.split(",") if here and self._args.deeds else ():
            _do(*deed.split(":"), args=self._args)
        self._count += 1
        self._queue.put(item)


def _do(deed: str, *words: str, args: Namespace) -> None:
    if deed == "signal":
        os.kill(os.getpid(), signal.Signals[words[0]])
    elif deed == "group":
        os.killpg(0, signal.Signals[words[0]])
    elif deed == "saver":
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.Signals[words[0]])
    elif deed == "finished":
        journal = Path(args.save_dir) / ".ckptconv-partial" / "journal.json"
        while not journal.exists() or len(json.loads(journal.read_text())["finished"]) < int(words[0]):
            time.sleep(0.01)
    elif deed == "truncate":
        os.truncate(words[0], int(words[1]))
    elif deed == "grow":
        _grow(words[0], None if words[1] == "all" else int(words[1]))
    elif deed == "touch":
        Path(words[0]).touch()
    elif deed == "rename":
        os.rename(*words)
    elif deed == "sleep":
        time.sleep(float(words[0]))
    elif deed == "wait":
        while not Path(words[0]).exists():
            time.sleep(0.01)
    elif deed == "exit":
        os._exit(int(words[0]))
    elif deed == "raise":
        raise RuntimeError(words[0])
    else:
        raise ValueError(deed)


def _grow(path: str, size: int | None) -> None:
    with open(path, "wb", buffering=0) as file:
        try:
            while size is None or file.tell() < size:
                file.write(bytes(1 << 16))
        except OSError:
            for _ in range(1 << 16):  # the last incomplete piece
                try:
                    file.write(b"0" * 256)
                except OSError:
                    return
