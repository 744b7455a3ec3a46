"""What a checkpoint of any format is: model, sizes, layout, tensors, and what is wrong with it; weights are not loaded.

A checkpoint that a conversion would refuse is shown as far as it can be read. Of the weights only copies of the same
tensor on several ranks are read, the first rows of big ones, to compare them.
"""

from __future__ import annotations

import contextlib
import json
import logging
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptconv import commands, companions, errors
from ckptconv.commands import _shown
from ckptconv.errors import CkptconvError
from ckptconv.plugins import Plugin

if TYPE_CHECKING:
    from ckptconv.lazy import LazyTensor
    from ckptconv.metadata import Metadata
    from ckptconv.spec import ModelSpec
    from ckptconv.stream import Holdings

#: Files that may hold tensors, for a checkpoint that its loader does not open.
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this command."""
    add = parser.add_argument
    add("directory", metavar="DIR", help="the checkpoint, of any format; or a model of the Hugging Face hub")
    add("--loader", default="auto", metavar="NAME", help="what reads it (default: found from the directory)")
    add("--json", action="store_true", help="print JSON: the same, with every field of the model")


def plugins(args: Namespace) -> list[Plugin]:
    """The loader of what is named."""
    return [commands.source(args.directory, args.loader)[1]]


def run(args: Namespace) -> int:
    """Print what is there. Raises CkptconvError when nothing can be read."""
    place, plugin = commands.source(args.directory, args.loader)
    seen = look(place, plugin, args)
    print(json.dumps(seen.document(), indent=1) if args.json else "\n".join(seen.lines()))
    return 0


@dataclass
class Seen:
    """What was found. warnings: what a user should know; refused: why a conversion would not take it."""

    place: str
    loader: str
    holdings: Holdings
    metadata: Metadata | None = None
    spec: ModelSpec | None = None
    warnings: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int | None:
        """Numbers of the model, each counted once and without padding."""
        from ckptconv.messages import expected

        return sum(prod(s) for m in expected(self.spec) for s in m.shapes.values()) if self.spec else None

    def _family(self) -> str | None:
        """What the model is called, or would be written as in Hugging Face's form; None where it could not be."""
        from ckptconv import families

        with contextlib.suppress(CkptconvError):
            return (self.spec.family or families.for_spec(self.spec).name) if self.spec else None
        return None

    def document(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        tensors = [tensor for held in self.holdings.tensors.values() for tensor in held.values()]
        kinds: Counter[str] = Counter()
        for tensor in tensors:
            kinds[tensor.dtype] += tensor.nbytes
        origin = self.metadata.origin if self.metadata else None
        carried = origin.companions if origin else {}
        return {
            "place": self.place,
            "format": origin.format if origin else self.loader,
            "loader": self.loader,
            "iteration": self.metadata.iteration if self.metadata else None,
            "family": self._family(),
            "parameters": self.parameters,
            "model": self.spec.to_json() if self.spec else None,
            "files": len(origin.files) if origin else len(self.holdings.tensors),
            "bytes": sum(size for _, size, _ in origin.files) if origin else None,
            "tensor_bytes": dict(kinds.most_common()),
            "tokenizer": {
                "type": self.metadata.tokenizer_type if self.metadata else None,
                "files": [name for name in carried if companions.is_tokenizer(name)],
            },
            "layout": _shown.layout(self.holdings.shards) if self.holdings.shards else None,
            "tensors": _tensors(self.holdings),
            "left_out": [note.removeprefix("ignored ") for note in origin.notes] if origin else [],
            "warnings": self.warnings,
            "refused": self.refused,
        }

    def lines(self) -> list[str]:
        """The same for a reader."""
        found = self.document()
        rows: list[tuple[str, str]] = []

        def say(head: str, text: object, when: bool = True) -> None:
            if when:
                rows.append((head, str(text)))

        counted = self.metadata and found["format"].startswith("megatron")
        number = f", iteration {found['iteration']}" if counted else ""
        say("format", f"{found['format']}{number}: {self.place}")
        like = "" if self.spec and self.spec.family else " (as its sizes and switches say)"
        say("family", f"{found['family']}{like}" if found["family"] else "of no known family", self.spec is not None)
        for text in _shown.model(self.spec) if self.spec else ():
            say("model", text)
        say("parameters", f"{found['parameters'] or 0:,}", self.spec is not None)
        kinds, held = found["tensor_bytes"], max(1, sum(found["tensor_bytes"].values()))
        of = ", ".join(f"{kind} {100 * size / held:.3g} %" for kind, size in kinds.items())
        size = found["bytes"] if found["bytes"] is not None else held
        say("stored", f"{_shown.size(size)} in {_shown.count(found['files'], 'file')}: {of or 'no tensors'}")
        files = found["tokenizer"]["files"]
        say("tokenizer", ", ".join(files) or found["tokenizer"]["type"] or "none", self.metadata is not None)
        for text in _shown.layout_lines(found["layout"]) if found["layout"] else ():
            say("layout", text)
        for one in found["tensors"]:
            times = f" x {one['count']}" if one["count"] > 1 else ""
            say("tensors", f"{one['name']}  {one['shape']} {one['dtype']}{times}")
        for head in ("left_out", "warnings", "refused"):
            for text in found[head]:
                say(head.replace("_", " "), text)
        return _shown.table(rows)


def _tensors(holdings: Holdings) -> list[dict[str, Any]]:
    """Tensors of all ranks or files, those with the same shape and type under one name."""
    groups: dict[tuple[tuple[int, ...], str], list[str]] = {}
    order: dict[str, int] = {}
    for held in holdings.tensors.values():
        for name, tensor in held.items():
            groups.setdefault((tensor.shape, tensor.dtype), []).append(name)
            order.setdefault(name, len(order))
    found = []
    for (shape, dtype), names in groups.items():
        for name, members in errors.folded(names).items():
            found.append((order[members[0]], {
                "name": name, "count": len(members), "shape": list(shape), "dtype": dtype,
            }))  # fmt: skip
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def look(place: str, plugin: Plugin, args: Namespace) -> Seen:
    """What there is at a place. Raises CkptconvError when nothing of it can be read."""
    from ckptconv import files, incoming, stream

    files.reset()
    given = incoming.arguments(plugin, place, args)
    with _warnings() as said, errors.tolerating() as refused:
        seen: Seen | None = None
        try:
            if plugin.ours:
                looking = stream.Looking()
                plugin.run(looking, given)
                assert looking.source is not None
                source = looking.source
                seen = Seen(place, plugin.name, source.holdings(), source.metadata(), source.spec)
            else:
                seen = _sent(place, plugin, given)
        except CkptconvError as error:
            refused.append(error)
        except (LookupError, ValueError, TypeError, AssertionError, AttributeError):
            if not refused:
                raise  # else it stumbled over what is missing
        if seen is None:
            seen = _bare(place, plugin, said)
        if not any(seen.holdings.tensors.values()):
            raise refused[0]
    seen.refused = list(dict.fromkeys(map(str, refused)))
    seen.warnings = [text for text in dict.fromkeys(said) if text not in seen.refused]
    return seen


def _sent(place: str, plugin: Plugin, args: Namespace) -> Seen:
    """What a loader of others sends: a message at a time is in memory, then."""
    from ckptconv import incoming
    from ckptconv.stream import Holdings

    with incoming.Stream(plugin, args) as sent:
        tensors = {m.want.name: {f"{m.want.name}/{key}": t for key, t in m.tensors.items()} for m in sent}
        return Seen(place, plugin.name, Holdings(tensors), sent.metadata, sent.metadata.spec)


def _bare(place: str, plugin: Plugin, said: list[str]) -> Seen:
    """A checkpoint that its loader does not open: the tensors of files that can be read, and its config.json."""
    from ckptconv import families
    from ckptconv.containers import msckpt, safetensors, torchzip
    from ckptconv.stream import Holdings

    top, found = Path(place), {}
    paths = [top] if top.is_file() else sorted(path for path in top.rglob("*") if path.suffix in _WEIGHTS)
    for path in paths:
        try:
            held: Any
            if path.suffix == ".safetensors":
                held = safetensors.read(path)[0]
            else:
                held = msckpt.read(path) if path.suffix == ".ckpt" and msckpt.looks(path) else torchzip.read(path)
            found[str(path.relative_to(top)) if path != top else path.name] = dict(_flat(held))
        except CkptconvError as error:
            said.append(str(error))
    spec = None
    with contextlib.suppress(CkptconvError):
        config = companions.read_config(companions.find(top))
        where = str(top / companions.CONFIG)
        spec = families.of_config(config, where).spec(config, where) if config else None
    if spec and spec.num_layers + spec.encoder_layers + spec.mtp_layers > sum(map(len, found.values())):
        spec = None  # a count that the files cannot bear out would be counted out
    return Seen(place, plugin.name, Holdings(found), None, spec)


def _flat(value: Any, above: str = "", depth: int = 0) -> Iterator[tuple[str, LazyTensor]]:
    """The tensors of nested dicts, by joined names; the optimizer's are not the model's."""
    from ckptconv.lazy import LazyTensor

    if isinstance(value, LazyTensor):
        yield above, value
    elif isinstance(value, dict) and depth < 20:
        for key, inner in value.items():
            if not str(key).startswith("optimizer"):
                yield from _flat(inner, f"{above}.{key}" if above else str(key), depth + 1)


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """What is logged as a warning, in a list instead."""

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage().removeprefix("loader: "))

    said: list[str] = []
    log, handler = logging.getLogger("ckptconv"), Kept(logging.WARNING)
    log.addHandler(handler)
    before, log.propagate = log.propagate, False
    try:
        yield said
    finally:
        log.removeHandler(handler)
        log.propagate = before
