"""What every loader of ours does once it knows its source: describe it, then send it whole and in order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ckptconv import metadata
from ckptconv.lazy import LazyTensor
from ckptconv.messages import Expected, expected
from ckptconv.metadata import Metadata
from ckptconv.spec import ModelSpec


class Source(Protocol):
    """A checkpoint that has been opened and checked."""

    spec: ModelSpec

    def metadata(self) -> Metadata:
        """The first message, without `dtypes`."""

    def tensors(self, message: Expected) -> dict[str, LazyTensor]:
        """The full tensors of one message, not read."""


def send(queue: Any, source: Source) -> None:
    """Send a model: metadata with the element types that differ from the model's, every message, `done`."""
    messages = [(message.name, source.tensors(message)) for message in expected(source.spec)]
    kinds: dict[str, dict[str, str]] = {}
    for name, tensors in messages:
        for key, tensor in tensors.items():
            if tensor.dtype != source.spec.dtype:
                kinds.setdefault(name, {})[key] = tensor.dtype
    queue.put(metadata.build(replace(source.metadata(), dtypes=kinds)))
    for name, tensors in messages:
        queue.put({"name": name, **tensors})
    queue.put("done")


def stamps(paths: Iterable[Path]) -> list[list[Any]]:
    """[path, bytes, mtime in ns] of files, by which a change of the source is noticed."""
    return [[str(path), (stat := path.stat()).st_size, stat.st_mtime_ns] for path in paths]
