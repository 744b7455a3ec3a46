"""From messages to files: what every file-writing saver does between its plan and its small files.

A saver says which files there will be (planned to the byte) and which rectangle of which message tensor goes where
(`Route`); this module receives, pads, copies, digests, resumes and reports.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ckptconv import companions, dtypes, lazy, shares
from ckptconv.checksum import crc32, merged, whole
from ckptconv.engine import Engine, Job, Output, Target, default_threads
from ckptconv.errors import ProtocolError, SourceError, TableError, why
from ckptconv.lazy import Assembly, LazyTensor, Literal, Piece, Zeros
from ckptconv.messages import Expected, expected
from ckptconv.metadata import Metadata
from ckptconv.ops import Tile
from ckptconv.shares import Span, counted, dealt
from ckptconv.staging import Draft, Staging
from ckptconv.transport import Receiver, Wire

if TYPE_CHECKING:
    from ckptconv.containers.plan import PlannedFile

#: Messages that may be partly written when the next one is taken.
IN_FLIGHT = 3

#: The digest of a tensor that has not been read: as long as others are.
_UNKNOWN = f"crc32:{0:08x}"

PADDINGS = ("zero", "repeat", "mean")


@dataclass
class Route:
    """Where a message tensor goes: (file, slot, rectangle); `rows` is its height after vocabulary padding."""

    targets: list[tuple[str, str, Tile]] = field(default_factory=list)
    rows: int | None = None


Routes = dict[tuple[str, str], Route]


@dataclass(frozen=True)
class Build:
    """A slot whose content is not rectangles of message tensors: `make` makes it of those of one message."""

    file: str
    slot: str
    make: Callable[[dict[str, LazyTensor]], LazyTensor]


@dataclass(frozen=True)
class Plan:
    """What `write` is given: the files and what goes where."""

    files: Mapping[str, PlannedFile]
    routes: Routes
    fills: Sequence[tuple[LazyTensor, Route]]
    builds: Mapping[str, Sequence[Build]]


@dataclass
class Written:
    """What was written: bytes in all, and a digest per tensor of the stream (message -> key -> text)."""

    bytes: int
    digests: dict[str, dict[str, str]]


def write(
    receiver: Receiver, staging: Staging, plans: Mapping[str, PlannedFile], routes: Routes,
    fills: list[tuple[LazyTensor, Route]], metadata: Metadata, args: Namespace, fingerprint: dict[str, Any],
    builds: Mapping[str, Sequence[Build]] = MappingProxyType({}),
    reread: Mapping[str, Callable[[dict[str, LazyTensor]], dict[str, LazyTensor]]] = MappingProxyType({}),
) -> Written:  # fmt: skip
    """Receive the whole stream and fill the planned files under `staging`; they are complete and flushed on return.

    `fills` are tensors that no message has (zero biases), `builds` those made of a message's, by its name. `reread`,
    also by message: which tensors a reader gets back otherwise than they came, and how; their digests are of that.
    Raises CkptconvError of any kind.
    """
    order = in_order(plans, routes, builds, metadata)
    staging.begin(fingerprint, {name: plans[name].size for name in order})
    if isinstance(staging, Draft):
        staging.plan = Plan({name: plans[name] for name in order}, routes, fills, builds)
        unknown = {message.name: dict.fromkeys(message.shapes, _UNKNOWN) for message in expected(metadata.spec)}
        return Written(sum(plan.size for plan in plans.values()), unknown)
    mine = [name for name in order if staging.writers.get(name) == staging.rank]
    outputs = {name: Output(staging.path(name), plans[name]) for name in mine}
    names = {id(output): name for name, output in outputs.items()}
    for output in outputs.values():
        output.create()
    digests = Digests(metadata, staging.digests)
    digests.drop_partial()  # other processes may share them otherwise now
    bar = _Bar(sum(output.data_bytes for output in outputs.values()), args.progress)
    flight = threading.Semaphore(IN_FLIGHT)

    def finished(output: Output) -> None:
        staging.done(names[id(output)], output.plan.size, digests.runs)

    with bar, Engine(args.threads or default_threads(), finished, bar.add) as engine:
        for tensor, route in fills:
            engine.submit([Job(tensor, _targets(route, outputs), (), _nothing)])
        for want, tensors, wires in _gathered(receiver.messages(), builds):
            while not flight.acquire(timeout=0.2):
                engine.check()
            bar.name(want.name)
            jobs = []
            changed = reread[want.name](tensors) if want.name in reread else {}
            for key, tensor in {**tensors, **changed}.items():
                if (want.part_of, key) not in routes:
                    raise ProtocolError(f"message {want.name!r}: nothing is planned for {key!r}.")
                way = routes[want.part_of, key]
                spans = _counted(want, tensor, way, builds, staging)
                jobs.append(_job(want, key, tensor, way, outputs, args, spans, digests))
            for build in builds.get(want.name, ()):
                if build.file in outputs:
                    made = build.make(tensors)
                    all_of_it = Tile(0, 0, 0, 0, 0, made.rows, made.cols)
                    target = Route([(build.file, build.slot, all_of_it)])
                    jobs.append(Job(made, _targets(target, outputs), (), _nothing))

            def settle(wires: list[Wire] = wires) -> None:
                for wire in wires:
                    receiver.release(wire)
                flight.release()

            engine.submit([job for job in jobs if job.targets or job.counted], settle)
        engine.drain()
    _check_unchanged(metadata)
    digests = Digests(metadata, staging.settle(digests.runs()))
    return Written(sum(plan.size for plan in plans.values()), digests.texts() if staging.rank == 0 else {})


def shared(plan: Plan, metadata: Metadata, ranks: int, finished: Container[str]) -> list[dict[str, int]]:
    """What each of `ranks` processes would do: files, bytes written, bytes read beside headers."""
    writers = dealt({name: file.size for name, file in plan.files.items() if name not in finished}, ranks)
    found = [{"files": 0, "written": 0, "read": 0} for _ in range(ranks)]
    for name, rank in writers.items():
        found[rank]["files"] += 1
        found[rank]["written"] += plan.files[name].size
    for message in expected(metadata.spec):
        builds = [build for build in plan.builds.get(message.name, ()) if build.file in writers]
        for build in builds:
            found[writers[build.file]]["read"] += plan.files[build.file].slots[build.slot].nbytes
        others = _others(message, writers, plan.builds, ranks)
        for key, shape in message.shapes.items():
            targets = [
                (writers[file], (t.row, t.row + t.rows), (t.col, t.col + t.cols))
                for file, _, t in plan.routes[message.name, key].targets if file in writers
            ]  # fmt: skip
            width = dtypes.size_of(metadata.dtype(message.name, key))
            for rank in sorted({who for who, _, _ in targets}) or others:
                found[rank]["read"] += width * shares.read(lazy.matrix(shape), targets, others, rank)
    return found


def in_order(
    plans: Iterable[str], routes: Routes, builds: Mapping[str, Sequence[Build]], metadata: Metadata
) -> list[str]:
    """Files in the order in which the stream reaches them; those that only zeros go to come last."""
    found: dict[str, None] = {}
    for message in expected(metadata.spec):
        here = {file for key in message.shapes for file, _, _ in routes.get((message.name, key), Route()).targets}
        here |= {build.file for build in builds.get(message.name, ())}
        found |= dict.fromkeys(sorted(here - found.keys()))
    return [*found, *sorted(set(plans) - found.keys())]


class Digests:
    """Checksums of the stream's tensors, of which bytes may come in any order and from several processes."""

    def __init__(self, metadata: Metadata, runs: Mapping[str, Mapping[str, list[list[int]]]]) -> None:
        self._sizes = {
            (message.name, key): prod(shape) * dtypes.size_of(metadata.dtype(message.name, key))
            for message in expected(metadata.spec) for key, shape in message.shapes.items()
        }  # fmt: skip
        self._lock = threading.Lock()
        self._runs = {(m, key): merged(found) for m, keys in runs.items() for key, found in keys.items()}

    def known(self, message: str, key: str) -> bool:
        """Whether all of a tensor has been read."""
        return whole(self._runs.get((message, key), ()), self._sizes[message, key]) is not None

    def drop_partial(self) -> None:
        """Forget tensors that have been read in part."""
        self._runs = {one: runs for one, runs in self._runs.items() if one in self._sizes and self.known(*one)}

    def add(self, message: str, key: str, start: int, runs: list[list[int]]) -> None:
        """Note byte runs [first, end, crc], counted from `start` of the tensor."""
        with self._lock:
            moved = [[start + first, start + end, crc] for first, end, crc in runs]
            self._runs[message, key] = merged([*self._runs.get((message, key), ()), *moved])

    def runs(self) -> dict[str, dict[str, list[list[int]]]]:
        """Message -> key -> what is known."""
        with self._lock:
            found: dict[str, dict[str, list[list[int]]]] = {}
            for (message, key), runs in self._runs.items():
                found.setdefault(message, {})[key] = runs
            return found

    def texts(self) -> dict[str, dict[str, str]]:
        """Message -> key -> digest, in the order of the stream. Raises TableError when one is not known."""
        found: dict[str, dict[str, str]] = {}
        for (message, key), nbytes in self._sizes.items():
            value = whole(self._runs.get((message, key), ()), nbytes)
            if value is None:
                raise TableError(f"message {message!r}: {key!r} was not read exactly once.")
            found.setdefault(message, {})[key] = f"crc32:{value:08x}"
        return found


def _gathered(
    messages: Iterable[tuple[Expected, Wire]], builds: Mapping[str, Sequence[Build]]
) -> Iterator[tuple[Expected, dict[str, LazyTensor], list[Wire]]]:
    """Messages as they come, but a layer that came in slices whole where something is built of it."""
    wires: list[Wire] = []
    for want, wire in messages:
        wires.append(wire)
        if want.experts is None or want.part_of not in builds:
            yield want, wire.tensors, wires
        elif want.whole and want.experts.stop == want.num_experts:
            yield want.whole, _joined(want.whole, wires), wires
        else:
            continue
        wires = []


def _joined(layer: Expected, wires: Sequence[Wire]) -> dict[str, LazyTensor]:
    """The tensors of a layer from its messages."""
    tensors = dict(wires[0].tensors)
    for key in layer.sliced:
        pieces, row = [], 0
        for part in (wire.tensors[key] for wire in wires[1:]):
            pieces.append(Piece(row, 0, part.rows, part.cols, part, 0, 0))
            row += part.rows
        tensors[key] = Assembly(pieces[0].part.dtype, layer.shapes[key], tuple(pieces))
    return {key: tensors[key] for key in layer.shapes}


def _nothing(runs: list[list[int]]) -> None:
    """What is not in the stream has no digest."""


def _check_unchanged(metadata: Metadata) -> None:
    """Raise SourceError when a source file is not the one it was at the start: its bytes may be mixed."""
    for path, size, modified in metadata.origin.files:
        try:
            now = os.stat(path)
        except OSError as error:
            raise SourceError(f"{path}: went away while it was read: {why(error)}") from error
        if (now.st_size, now.st_mtime_ns) != (size, modified):
            raise SourceError(f"{path}: was changed while it was read. Convert again when nothing writes to it.")


def _counted(
    want: Expected, tensor: LazyTensor, route: Route, builds: Mapping[str, Sequence[Build]], staging: Staging
) -> list[Span]:
    """The rows of a message's tensor that this process digests; with slices of experts, those of the whole layer."""
    rows = tensor.rows * want.num_experts // len(want.experts) if want.experts else tensor.rows
    if staging.ranks == 1:
        return [(0, rows)]
    writers = staging.writers
    targets = [(writers[file], (tile.row, tile.row + tile.rows)) for file, _, tile in route.targets if file in writers]
    return counted(rows, targets, _others(want, writers, builds, staging.ranks), staging.rank)


def _others(
    want: Expected, writers: Mapping[str, int], builds: Mapping[str, Sequence[Build]], ranks: int
) -> list[int]:
    """Who digests tensors of a message of which no part is written as it is."""
    found = {writers[build.file] for build in builds.get(want.part_of, ()) if build.file in writers}
    return sorted(found) or [crc32(want.part_of.encode()) % ranks]


def _job(
    want: Expected, key: str, tensor: LazyTensor, route: Route, outputs: dict[str, Output], args: Namespace,
    spans: list[Span], digests: Digests,
) -> Job:  # fmt: skip
    """The work of one tensor: padded, with the targets that are not finished yet."""
    rows = tensor.rows
    if route.rows is not None and route.rows > tensor.shape[0]:
        tensor = padded(tensor, route.rows, args.pad_vocab)
    first, targets = 0, _targets(route, outputs)
    if want.experts:  # of each expert as many rows
        first = want.experts.start * rows // len(want.experts)
        targets = [part for target in targets if (part := _within(target, first, rows))]
        spans = [(max(0, a - first), min(rows, b - first)) for a, b in spans if a < first + rows and b > first]
    start = first * tensor.cols * dtypes.size_of(tensor.dtype)
    if digests.known(want.part_of, key):
        spans = []
    return Job(tensor, targets, spans, lambda runs: digests.add(want.part_of, key, start, runs))


def _within(target: Target, first: int, rows: int) -> Target | None:
    """The part of a target that lies in `rows` rows from `first` on, counted from there."""
    top, bottom = max(target.row, first), min(target.row + target.rows, first + rows)
    if top >= bottom:
        return None
    return replace(target, row=top - first, slot_row=target.slot_row + top - target.row, rows=bottom - top)


def _targets(route: Route, outputs: dict[str, Output]) -> list[Target]:
    return [
        Target(outputs[name], slot, t.row, t.col, t.part_row, t.part_col, t.rows, t.cols)
        for name, slot, t in route.targets
        if name in outputs
    ]


def padded(tensor: LazyTensor, rows: int, how: str) -> LazyTensor:
    """`tensor` [v, h] with rows added below it: zeros, copies of the last row, or the mean of all rows."""
    missing, shape = rows - tensor.shape[0], (rows, *tensor.shape[1:])
    below: list[Piece] = []
    if how == "zero":
        zeros = Zeros(tensor.dtype, (missing, *tensor.shape[1:]))
        below.append(Piece(tensor.rows, 0, missing, tensor.cols, zeros, 0, 0))
    else:
        part, row = (tensor, tensor.rows - 1) if how == "repeat" else (_mean(tensor), 0)
        below += [Piece(tensor.rows + n, 0, 1, tensor.cols, part, row, 0) for n in range(missing)]
    return Assembly(tensor.dtype, shape, (Piece(0, 0, tensor.rows, tensor.cols, tensor, 0, 0), *below))


def _mean(tensor: LazyTensor) -> LazyTensor:
    """The mean row [1, h], summed in double precision and rounded once."""
    import numpy as np
    import torch

    total = torch.zeros(tensor.cols, dtype=torch.float64)
    for row, count in lazy.blocks(tensor, 8 << 20):
        block = np.empty((count, tensor.cols), dtypes.opaque(tensor.dtype))
        tensor.read(block, row, 0)
        total += lazy.as_torch(block, tensor.dtype).to(torch.float64).sum(0)
    mean = (total / tensor.rows).to(dtypes.of_torch(tensor.dtype))
    return Literal(lazy.as_numpy(mean).tobytes(), tensor.dtype, (1, tensor.cols))


def version() -> str:
    """The version of this tool, for provenance."""
    try:
        return importlib.metadata.version("ckptconv")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def fingerprint(metadata: Metadata, **flags: Any) -> dict[str, Any]:
    """What has to be the same for an interrupted run to be continued."""
    return {
        "tool": version(),
        "source": metadata.origin.directory,
        "source files": metadata.origin.files,
        "model": metadata.spec.to_json(),
        **flags,
    }


def provenance(metadata: Metadata, target: dict[str, Any], digests: dict[str, dict[str, str]]) -> bytes:
    """The provenance file: who wrote this from what, the model, and a digest of every tensor of the stream.

    A digest is the CRC32 of the full, unsharded, unpadded tensor in row-major order, so it is the same whatever the
    layout of source and target.
    """
    data = {
        "tool": "ckptconv",
        "version": version(),
        "source": {
            "format": metadata.origin.format,
            "directory": metadata.origin.directory,
            "files": [[path, size] for path, size, _ in metadata.origin.files],
            "iteration": metadata.iteration,
        },
        "target": target,
        "notes": metadata.origin.notes,
        "spec": metadata.spec.to_json(),
        "dtypes": metadata.dtypes,
        "digests": digests,
    }
    return (json.dumps(data, indent=1) + "\n").encode()


def carry(staging: Staging, metadata: Metadata) -> list[str]:
    """Keep the small files of the source beside weights of another format; the folder to publish, if there is one."""
    for name, path in metadata.origin.companions.items():
        staging.add(f"{companions.FOLDER}/{name}", Path(path).read_bytes())
    return [companions.FOLDER] if metadata.origin.companions else []


class _Bar:
    """One progress bar over bytes with the current message's name; nothing when not wanted or not a terminal."""

    def __init__(self, total: int, wanted: bool) -> None:
        self._bar: Any = None
        self._lock = threading.Lock()
        if wanted and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, smoothing=0.1)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *rest: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int) -> None:
        if self._bar is not None:
            with self._lock:
                self._bar.update(count)

    def name(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
