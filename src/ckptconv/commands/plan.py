"""What a conversion would do, up to its first byte: files, mapping, memory and disk, refusals. Nothing is written.

`ckptconv plan ...` takes the flags of a conversion, of which `--dry-run` makes the same. Loader and saver are those of
the conversion: what it would refuse is refused here, with the same words and exit code.
"""

from __future__ import annotations

import json
import logging
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptconv import errors, lazy, measure, numbers
from ckptconv.commands import _shown
from ckptconv.errors import ProtocolError, UsageError
from ckptconv.plugins import Plugin

if TYPE_CHECKING:
    from ckptconv.conversion import Report
    from ckptconv.incoming import Stream
    from ckptconv.lazy import LazyTensor
    from ckptconv.messages import Expected
    from ckptconv.metadata import Metadata
    from ckptconv.ops import Tile
    from ckptconv.stream import Holdings
    from ckptconv.writing import Plan

log = logging.getLogger("ckptconv")


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of a conversion that is only planned."""
    group = parser.add_argument_group("plan")
    add = group.add_argument
    add("--dry-run", action="store_true", help="plan only, like `ckptconv plan`: files, memory, disk; write nothing")
    add("--mapping", action="store_true", help="with a plan: what of which tensor goes where, key by key")
    add("--ranks", type=numbers.positive, metavar="N", help="with a plan: what each of N ranks of torchrun would do")
    add("--json", action="store_true", help="with a plan: print JSON")


class _Offered:
    """What a saver takes in the place of a queue: the first message, behind which it plans and ends."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata

    def metadata(self) -> Metadata:
        """The first message."""
        return self._metadata


def run(args: Namespace, loader: Plugin, saver: Plugin) -> Report:
    """Print the plan. Raises whatever the conversion would, and TargetError when the disk is too small.

    The report's bytes are those that would be written, its memory an estimate; what is printed is its `saver["plan"]`.
    """
    from ckptconv import conversion, incoming, stream, writing
    from ckptconv.staging import Draft

    if not saver.ours:
        raise UsageError(f"plan: saver {saver.name} is of others: what it writes is only known when it has written it.")
    began, memory = time.monotonic(), measure.Memory()
    args.output = draft = Draft(args.save_dir, overwrite=args.overwrite, resume=args.resume)
    holdings: Holdings | None = None
    sending = loader
    if loader.ours:
        looking = stream.Looking()
        loader.run(looking, args)
        source = looking.source
        assert source is not None
        holdings = source.holdings()
        sending = replace(loader, run=lambda queue, args: stream.send(queue, source))
    with incoming.Stream(sending, args) as sent:
        metadata = sent.metadata
        saver.run(_Offered(metadata), args)
        # Loaders of others would have to read every tensor to send it.
        messages = list(_messages(sent, draft.plan)) if loader.ours else []
    needed = memory.stop() + conversion.room(args, saver) + (0 if loader.ours else 2 * _largest(metadata))
    found = {
        "loader": loader.name,
        "saver": saver.name,
        "source": {"directory": metadata.origin.directory, "bytes": sum(file[1] for file in metadata.origin.files)},
        "target": str(draft.target),
        "files": draft.files,
        "bytes": sum(draft.files.values()),
        "finished": sorted(draft.finished),
        "replaced": draft.replaced,
        "disk": {"needed": draft.needed, "free": draft.free, "writable": draft.writable},
        "memory": {"needed": needed, "available": measure.available(), "limit": args.max_memory},
        "left_out": [note.removeprefix("ignored ") for note in metadata.origin.notes],
    }
    if args.ranks:
        found["ranks"] = writing.shared(draft.plan, metadata, args.ranks, draft.finished)
    if args.mapping:
        found["mapping"] = list(_mapping(messages or _planned(metadata), draft.plan, _names(holdings)))
    print(json.dumps(found, indent=1) if args.json else "\n".join(_lines(found)))
    draft.check()
    seconds = time.monotonic() - began
    log.info("planned in %.1f s; nothing was written", seconds)
    return conversion.Report(seconds, draft.needed, needed, {"plan": found})


Messages = list[tuple["Expected", Mapping[str, "LazyTensor"]]]


def _messages(sent: Stream, plan: Plan) -> Iterator[tuple[Expected, Mapping[str, LazyTensor]]]:
    """What would be sent, every tensor of which has to be planned for. Raises ProtocolError."""
    for message in sent:
        for key in message.tensors:
            if (message.want.name, key) not in plan.routes:
                raise ProtocolError(f"message {message.want.name!r}: nothing is planned for {key!r}.")
        yield message.want, message.tensors


def _planned(metadata: Metadata) -> Messages:
    """What a loader of others will send, as its first message says."""
    from ckptconv.messages import expected

    return [
        (m, {key: lazy.Zeros(metadata.dtype(m.name, key), shape) for key, shape in m.shapes.items()})
        for m in expected(metadata.spec)
    ]


def _largest(metadata: Metadata) -> int:
    """Bytes of the largest message."""
    return max(sum(tensor.nbytes for tensor in tensors.values()) for _, tensors in _planned(metadata))


def _names(holdings: Holdings | None) -> dict[tuple[str, int, int], str]:
    """What a place in a file of the source is called: file or rank, and name."""
    held = holdings.tensors if holdings else {}
    return {
        place: f"{where}: {name}"
        for where, tensors in held.items() for name, tensor in tensors.items() for place in lazy.places(tensor)
    }  # fmt: skip


def _mapping(messages: Messages, plan: Plan, names: Mapping[tuple[str, int, int], str]) -> Iterator[dict[str, Any]]:
    """Of every tensor of the stream where it comes from and goes to; then what is written beside these."""
    for want, tensors in messages:
        built = [{"file": build.file, "tensor": build.slot, "part": "computed from this message"}
                 for build in plan.builds.get(want.name, ())]  # fmt: skip
        for key, tensor in tensors.items():
            places = dict.fromkeys(lazy.places(tensor))
            to = _targets(plan.routes[want.name, key].targets, tensor.shape)
            yield {
                "message": want.name, "key": key, "shape": list(tensor.shape), "dtype": tensor.dtype,
                "from": list(dict.fromkeys(names.get(p) or f"{p[0]} from byte {p[1]} on" for p in places)),
                "to": to or built,
            }  # fmt: skip
    for tensor, route in plan.fills:
        yield {"message": None, "key": None, "shape": list(tensor.shape), "dtype": tensor.dtype, "from": ["zeros"],
               "to": _targets(route.targets, tensor.shape)}  # fmt: skip


def _targets(targets: list[tuple[str, str, Tile]], shape: tuple[int, ...]) -> list[dict[str, str]]:
    """Each tensor of the target once, with the part of the message's tensor that it holds."""
    tiles: dict[tuple[str, str], list[Tile]] = {}
    for file, slot, tile in targets:
        tiles.setdefault((file, slot), []).append(tile)
    return [
        {"file": file, "tensor": slot, "part": _shown.rectangles(own, shape)} for (file, slot), own in tiles.items()
    ]


def _lines(found: dict[str, Any]) -> list[str]:
    """The plan for a reader."""
    rows = [
        ("from", f"{found['source']['directory']} ({found['loader']}, {_shown.size(found['source']['bytes'])})"),
        ("to", f"{found['target']} ({found['saver']}, {_shown.size(found['bytes'])} in "
               f"{_shown.count(len(found['files']), 'file')})"),
    ]  # fmt: skip
    sizes: dict[int, list[str]] = {}
    for name, nbytes in found["files"].items():
        sizes.setdefault(nbytes, []).append(name)
    for nbytes, names in sizes.items():
        for name, members in errors.folded(names).items():
            times = f"{len(members)} x " if len(members) > 1 else ""
            rows.append(("files", f"{times + _shown.size(nbytes):>16}  {name}"))
    if found["finished"]:
        rows.append(("finished", f"{errors.some(found['finished'])} of an interrupted run"))
    if found["replaced"]:
        rows.append(("replaces", errors.some(found["replaced"], 12)))
    disk, memory = found["disk"], found["memory"]
    rows.append(("disk", f"{_shown.size(disk['needed'])} needed, {_shown.size(disk['free'])} free"))
    limit = f", --max-memory {_shown.size(memory['limit'])}" if memory["limit"] else ""
    may = min(memory["available"], memory["limit"] or memory["available"])
    short = ": NOT ENOUGH" if memory["needed"] > may else ""
    needed, available = _shown.size(memory["needed"]), _shown.size(memory["available"])
    rows.append(("memory", f"at most about {needed} needed, {available} free{limit}{short}"))
    for rank, own in enumerate(found.get("ranks", ())):
        files, written, read = _shown.count(own["files"], "file"), _shown.size(own["written"]), _shown.size(own["read"])
        rows.append(("ranks", f"rank {rank}: {files}, {written} written, {read} read"))
    rows += [("left out", note) for note in found["left_out"]]
    for one in found.get("mapping", ()):
        what = f"{one['message']} / {one['key']}" if one["message"] else "in no message"
        rows.append(("mapping", f"{what} {one['shape']} {one['dtype']}"))
        rows += [("mapping", f"  from {name}") for name in one["from"]]
        rows += [("mapping", f"  to   {to['file']}: {to['tensor']}  {to['part']}") for to in one["to"]]
    return _shown.table(rows)
