"""Logits of directories, and of tensors at hand as a loader of others puts them."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ckptconv import commands, forward, lazy, metadata
from ckptconv.incoming import Stream, arguments
from ckptconv.metadata import Metadata, Origin
from ckptconv.plugins import Plugin
from ckptconv.spec import ModelSpec

Tensor = torch.Tensor
Item = dict[str, Any]

#: More tokens than the windows of the fixtures, and than the positions that rope was first made for.
IDS = torch.randint(3, 130, (24,), generator=torch.Generator().manual_seed(1)).tolist()


def result(place: Path, ids: Sequence[int] = IDS, change: Callable[[ModelSpec], ModelSpec] = lambda s: s) -> Any:
    """What is computed of a directory, whose model is taken for another by `change`."""
    _, plugin = commands.source(str(place))
    with Stream(plugin, arguments(plugin, str(place))) as stream:
        stream.metadata = replace(stream.metadata, spec=change(stream.metadata.spec))
        return forward.run(stream, ids)


def logits(place: Path, ids: Sequence[int] = IDS) -> Tensor:
    found: Tensor = result(place, ids).logits
    return found


def messages(place: Path) -> tuple[ModelSpec, list[Item]]:
    """(spec, messages with real tensors) of a directory."""
    _, plugin = commands.source(str(place))
    with Stream(plugin, arguments(plugin, str(place))) as stream:
        sent = [{"name": one.want.name, **{k: lazy.to_torch(t) for k, t in one.tensors.items()}} for one in stream]
        return stream.metadata.spec, sent


def sliced(items: Sequence[Item], count: int) -> Iterator[Item]:
    """The same messages with the experts of every layer in messages of their own, `count` in each."""
    for item in items:
        experts = {key for key in item if re.match(r"mlp l\d", key) and "router weight" in item}
        yield {key: value for key, value in item.items() if key not in experts}
        number = len(item["router weight"]) if experts else 0
        for start in range(0, number, count):
            stop = min(start + count, number)
            name = f"{item['name']} experts {start}:{stop}"
            yield {"name": name, **{key: item[key][start:stop] for key in experts}}


def of_others(spec: ModelSpec, items: Sequence[Item], head_first: bool = False) -> Tensor:
    """Logits of real tensors, put one after the other by a loader that is not ours."""

    def load(queue: Any, args: Namespace) -> None:
        queue.put(metadata.build(Metadata(spec, Origin("", ""), head_first=head_first)))
        for item in items:
            queue.put(item)
        queue.put("done")

    plugin = Plugin("loader", "mine", "mine", "a test", lambda parser: None, load, False, "")
    with Stream(plugin, arguments(plugin, "")) as stream:
        return forward.run(stream, IDS).logits
