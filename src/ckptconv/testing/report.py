"""What the kit says, and what it is said about: plugins, what they raise, what they are warned of, what they send."""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import traceback
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptconv import lazy, metadata, plugins, transport
from ckptconv.errors import CkptconvError, UsageError
from ckptconv.lazy import LazyTensor
from ckptconv.metadata import Metadata
from ckptconv.plugins import Plugin


@dataclass
class Report:
    """What was found: mistakes, things to know, and what is right."""

    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fine: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = (("ok   ", self.fine), ("note ", self.notes), ("WRONG", self.wrong))
        return "\n".join(f"{mark}  {text}" for mark, texts in kinds for text in texts)


def of_others(kind: str, name: str) -> Plugin:
    """A plugin of others. Raises UsageError."""
    plugin = plugins.find(kind, name)
    if plugin.ours:
        raise UsageError(f"{kind} {name} is built in: the project's own tests check it.")
    return plugin


@contextlib.contextmanager
def warnings(report: Report) -> Iterator[None]:
    """What is warned of belongs to the report."""
    log, handler = logging.getLogger("ckptconv"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: report.notes.append(record.getMessage())  # type: ignore[method-assign]
    before, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = before


def said(plugin: Plugin, error: BaseException) -> str:
    """An exception for a reader, with the line of the plugin it comes from."""
    if isinstance(error, CkptconvError | TimeoutError):
        return str(error)
    if isinstance(error, SystemExit):
        return f"it called exit({error.code}); see what it printed above."
    file = getattr(sys.modules.get(plugin.module), "__file__", None)
    lines = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == file]  # fmt: skip
    return f"{type(error).__name__}: {error}{f' ({lines[-1]})' if lines else ''}"


class Sink:
    """What is behind the checked endpoint: takes everything, and gives shared memory back at once."""

    def __init__(self, sums: bool = False) -> None:
        self._summing = sums
        self.metadata: Metadata | None = None
        self.returned: queue.Queue[int] = queue.Queue()
        self.notes: list[str] = []
        #: checksums of what was sent, where they are wanted: message -> key -> crc32
        self.sums: dict[str, dict[str, int]] = {}

    def put(self, item: Any, timeout: float | None = None) -> None:
        """Take metadata, a message or `done`."""
        if self.metadata is None:
            self.metadata = metadata.read(item)
        elif isinstance(item, transport.Wire):
            if self._summing:
                self.sums[item.name] = {key: _sum(tensor) for key, tensor in item.tensors.items()}
            if item.buffer is not None:
                self.returned.put(item.buffer)


def _sum(tensor: LazyTensor) -> int:
    return zlib.crc32(lazy.as_bytes(lazy.as_numpy(lazy.to_torch(tensor))))
