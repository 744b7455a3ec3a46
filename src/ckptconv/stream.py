"""What every loader of ours does once it knows its source: describe it, then send it whole and in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ckptconv import metadata
from ckptconv.lazy import LazyTensor
from ckptconv.messages import Expected, expected
from ckptconv.metadata import Metadata
from ckptconv.spec import ModelSpec

if TYPE_CHECKING:
    from ckptconv.joining import Shards


@dataclass(frozen=True)
class Holdings:
    """What lies where in a source: the tensors of each file or rank by name, as stored, for who looks at it.

    shards: how ranks share the tensors of messages, where a format has ranks.
    """

    tensors: Mapping[str, Mapping[str, LazyTensor]]
    shards: Shards | None = None


class Source(Protocol):
    """A checkpoint that has been opened and checked."""

    spec: ModelSpec

    def metadata(self) -> Metadata:
        """The first message, without `dtypes`."""

    def tensors(self, message: Expected) -> dict[str, LazyTensor]:
        """The full tensors of one message, not read."""

    def holdings(self) -> Holdings:
        """What lies where. Only for who looks at a source; nothing is converted by it."""


class Looking:
    """In the place of a queue: what takes the source of a loader of ours, and nothing that it would send."""

    source: Source | None = None



def send(queue: Any, source: Source) -> None:
    """Send a model: metadata with the element types that differ from the model's, every message, `done`."""
    if isinstance(queue, Looking):
        queue.source = source
        return
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
