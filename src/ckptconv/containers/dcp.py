"""Directories of `torch.distributed.checkpoint` (DCP): a pickled index `.metadata` and data files `*.distcp`.

A tensor is stored in chunks, each of them a whole `torch.save` archive somewhere in a data file; objects are stored
the same way. `read` gives lazy tensors, `plan` lays out data files whose chunks are slots, and `index` makes the
`.metadata` of what was planned.

Source: torch 2.13 `torch/distributed/checkpoint/metadata.py`, `filesystem.py` (`_StorageInfo`, `_write_item`,
`FileSystemReader.read_data`) and `default_planner.py` (`planner_data`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptconv import dtypes
from ckptconv.containers import torchzip, ziplayout
from ckptconv.containers.inert import DTypeName, Inert
from ckptconv.containers.pickling import Instance, dumps
from ckptconv.containers.plan import Slot, Write, by_name
from ckptconv.containers.unpickle import loads
from ckptconv.errors import SourceError, some, why
from ckptconv.files import read_bytes
from ckptconv.lazy import Assembly, FileTensor, LazyTensor, Piece, Shape, matrix

if TYPE_CHECKING:
    from ckptconv.lazy import Matrix

METADATA = ".metadata"
#: What Megatron writes last beside it.
FINISHED = "metadata.json"
_MODULE = "torch.distributed.checkpoint."


@dataclass(frozen=True)
class Place:
    """Where an item lies: a data file and a range of its bytes."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Tensor:
    """A stored tensor: global shape, and the chunks that make it: (offsets, sizes, place)."""

    directory: str
    key: str
    dtype: str
    shape: Shape
    chunks: tuple[tuple[Shape, Shape, Place], ...]

    def at(self, index: Sequence[int] = ()) -> LazyTensor:
        """The part at some leading indices (layer, expert), not read. Raises SourceError for missing chunks."""
        lead, shape = len(index), self.shape[len(index) :]
        rows, cols = matrix(shape)
        pieces: list[Piece] = []
        for offsets, sizes, place in self._with(tuple(index)):
            skip, below = 0, sizes
            for n, offset in zip(index, offsets, strict=False):
                below = below[1:]
                skip += (n - offset) * prod(below)
            path = str(Path(self.directory) / place.file)
            part = Part(path, place.offset, place.length, self.key, sizes, skip, self.dtype, below)
            if below == shape:
                return part
            pieces += _pieces(part, offsets[lead:], shape)
        covered = sum(piece.rows * piece.cols for piece in pieces)
        if covered != rows * cols:
            raise SourceError(
                f"{self.directory}: the chunks of {self.key} hold {covered} of {rows * cols} elements"
                + (f" of index {tuple(index)}" if index else "")
                + ". The checkpoint is incomplete: copy all of its files."
            )
        return Assembly(self.dtype, shape, tuple(pieces))

    def _with(self, index: Shape) -> Iterable[tuple[Shape, Shape, Place]]:
        """The chunks that hold elements at some leading indices."""
        for chunk in self._by_first.get(index[0], ()) if index else self.chunks:
            offsets, sizes, _ = chunk
            if all(0 <= n - o < size for n, o, size in zip(index, offsets, sizes, strict=False)):
                yield chunk

    @cached_property
    def _by_first(self) -> dict[int, list[tuple[Shape, Shape, Place]]]:
        """Chunks by the first indices they hold: there may be ten thousand, one for every expert of every layer."""
        found: dict[int, list[tuple[Shape, Shape, Place]]] = {}
        for chunk in self.chunks:
            for n in range(chunk[0][0], chunk[0][0] + chunk[1][0]):
                found.setdefault(n, []).append(chunk)
        return found


@dataclass(frozen=True, slots=True)
class Part(LazyTensor):
    """A contiguous part of a chunk, of `shape`, from its element `skip` on.

    Where in the data file that is, its archive says, which is opened when the part is first read: there may be
    a hundred thousand of them.
    """

    path: str
    offset: int
    length: int
    key: str
    sizes: Shape
    skip: int
    dtype: str
    shape: Shape

    def seen(self, shape: Shape) -> Part:
        return replace(self, shape=shape)

    def read(self, out: Matrix, row: int, col: int) -> None:
        start = _data(self.path, self.offset, self.length, self.key, self.dtype, self.sizes)
        start += self.skip * dtypes.size_of(self.dtype)
        FileTensor(self.path, start, self.dtype, self.shape).read(out, row, col)


@lru_cache(1 << 14)
def _data(path: str, offset: int, length: int, key: str, dtype: str, sizes: Shape) -> int:
    """Where in a data file the elements of a chunk begin. Raises SourceError when its archive holds something else."""
    found = torchzip.read(path, offset, length)
    if not isinstance(found, FileTensor) or found.shape != sizes or found.dtype != dtype:
        what = f"{found.dtype} {list(found.shape)}" if isinstance(found, LazyTensor) else type(found).__name__
        raise SourceError(
            f"{path}: at byte {offset} there is a {what}, but {METADATA} says {dtype} {list(sizes)} of {key}. "
            "The files are of different checkpoints, or damaged."
        )
    return found.offset


def _pieces(part: Part, offsets: Shape, shape: Shape) -> Iterator[Piece]:
    """Where a chunk lies in a whole of `shape`: one rectangle for every index of all but its last two dimensions."""
    if len(shape) < 2:
        at = offsets[0] if offsets else 0
        yield Piece(at, 0, part.rows, 1, part, 0, 0)
        return
    high, wide = part.shape[-2:]
    for number, index in enumerate(product(*(range(size) for size in part.shape[:-2]))):
        row = 0
        for n, offset, size in zip((*index, 0), offsets[:-1], shape[:-1], strict=True):
            row = row * size + n + offset
        yield Piece(row, offsets[-1], high, wide, part, number * high, 0)


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds: tensors by key, and the keys of stored objects with their places."""

    directory: str
    tensors: dict[str, Tensor]
    objects: dict[str, Place]
    files: tuple[Path, ...]

    def object(self, key: str) -> Any:
        """A stored object (see torchzip.read). Raises SourceError."""
        place = self.objects[key]
        return torchzip.read(Path(self.directory) / place.file, place.offset, place.length)


def is_one(directory: Path) -> bool:
    """Whether a directory is meant to be one of these, of Megatron's even without its index."""
    if (directory / METADATA).is_file():
        return True
    path = directory / FINISHED
    return path.is_file() and b'"sharded_backend"' in read_bytes(str(path), 0, min(path.stat().st_size, 1 << 12))


def read(directory: Path) -> Checkpoint:
    """The index of a DCP directory. Raises SourceError: no index, damaged, a data file missing or too short."""
    path = directory / METADATA
    try:
        size = path.stat().st_size
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {why(error)} Data files say nothing without it.") from error
    root = loads(read_bytes(str(path), 0, size), str(path))
    _data.cache_clear()
    try:
        return _understood(directory, root)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise SourceError(
            f"{path}: is not an index of torch.distributed.checkpoint as torch 2 writes it ({error}). Copy it "
            "again, or save it with a torch from 2.0 on."
        ) from error


def _understood(directory: Path, root: object) -> Checkpoint:
    fields = _fields(root, "Metadata")
    places: dict[tuple[str, Shape | None], Place] = {}
    for key, value in fields["storage_data"].items():
        at, info = _fields(key, "MetadataIndex"), _fields(value, "_StorageInfo")
        if info.get("transform_descriptors"):
            what = info["transform_descriptors"]
            raise SourceError(f"{directory}: its data files are compressed ({what}). Save it again without that.")
        place = Place(_name(info["relative_path"]), _count(info["offset"]), _count(info["length"]))
        offset = at.get("offset")
        places[at["fqn"], None if offset is None else _shape(offset)] = place
    tensors, objects = {}, {}
    for key, value in fields["state_dict_metadata"].items():
        if isinstance(value, Inert) and value.name == "BytesStorageMetadata":
            objects[key] = places[key, None]
            continue
        stored = _fields(value, "TensorStorageMetadata")
        chunks = []
        for chunk in stored["chunks"]:
            one = _fields(chunk, "ChunkStorageMetadata")
            offsets, sizes = _shape(one["offsets"]), _shape(one["sizes"])
            if (key, offsets) not in places:
                raise SourceError(
                    f"{directory}: {METADATA} does not say where the chunk of {key} at {offsets} lies. "
                    "It is damaged: copy it again."
                )
            chunks.append((offsets, sizes, places[key, offsets]))
        tensors[key] = Tensor(str(directory), key, _dtype(stored["properties"]), _shape(stored["size"]), tuple(chunks))
    return Checkpoint(str(directory), tensors, objects, _files(directory, places.values()))


def _files(directory: Path, places: Iterable[Place]) -> tuple[Path, ...]:
    ends: dict[str, int] = {}
    for place in places:
        ends[place.file] = max(ends.get(place.file, 0), place.offset + place.length)
    missing = [name for name in ends if not (directory / name).is_file()]
    if missing:
        raise SourceError(f"{directory}: lacks {some(missing)} of {len(ends)} data files. Copy the missing files.")
    for name, end in ends.items():
        size = (directory / name).stat().st_size
        if size < end:
            raise SourceError(
                f"{directory / name}: is truncated: it has {size} bytes, {METADATA} says {end}. Copy it again."
            )
    return tuple(directory / name for name in sorted(ends))


def _fields(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, Inert) or value.name != name or not value.fields:
        raise TypeError(f"{value} instead of a {name}")
    return value.fields


def _name(value: object) -> str:
    if not isinstance(value, str) or "/" in value or value in ("", ".", ".."):
        raise ValueError(f"the data file {value!r}")
    return value


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"the number {value!r}")
    return value


def _shape(value: object) -> Shape:
    if not isinstance(value, (tuple, list)) or not all(type(dim) is int and dim >= 0 for dim in value):
        raise TypeError(f"the shape {value!r}")
    return tuple(value)


def _dtype(properties: object) -> str:
    """`TensorProperties` pickles as a tuple that begins with the dtype."""
    state = properties.state if isinstance(properties, Inert) else None
    found = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(found, DTypeName):
        raise TypeError(f"{properties} without a dtype")
    return found.name


@dataclass(frozen=True)
class Chunk:
    """A chunk that will be written: of tensor `key` (global `shape`), at `offsets`, of `sizes`."""

    key: str
    dtype: str
    shape: Shape
    offsets: Shape
    sizes: Shape
    seen: Shape | None = None

    @property
    def slot(self) -> Slot:
        """The slot of its data."""
        at = ",".join(map(str, self.offsets))
        return Slot(f"{self.key}@{at}", self.dtype, self.sizes, self.seen)


@dataclass(frozen=True)
class DataFile:
    """A planned data file (`plan.PlannedFile`): archives one behind the other, of one chunk or one object each."""

    size: int
    offsets: dict[str, int]
    slots: dict[str, Slot]
    archives: tuple[tuple[int, ziplayout.TorchFile, str | None], ...]
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    needs_crc: bool = True

    def finish(self, write: Write, crcs: Mapping[str, int]) -> None:
        for base, archive, slot in self.archives:
            archive.finish(
                lambda offset, data, base=base: write(base + offset, data),  # type: ignore[misc]
                {slot: crcs[slot]} if slot is not None else {},
            )


def plan(chunks: Sequence[Chunk], objects: Mapping[str, object]) -> DataFile:
    """The layout of one data file with these chunks and objects (plain data). Raises TableError."""
    at = 0
    offsets: dict[str, int] = {}
    archives: list[tuple[int, ziplayout.TorchFile, str | None]] = []
    places: dict[str, tuple[int, int]] = {}

    def add(name: str, archive: ziplayout.TorchFile, slot: str | None) -> None:
        nonlocal at
        archives.append((at, archive, slot))
        places[name] = (at, archive.size)
        if slot is not None:
            offsets[slot] = at + archive.offsets[slot]
        at += archive.size

    slots = by_name([chunk.slot for chunk in chunks])
    for name, slot in slots.items():
        add(name, ziplayout.plan(slot), name)
    known: dict[int, ziplayout.TorchFile] = {}  # of an empty extra state there may be ten thousands
    for key, value in objects.items():
        if id(value) not in known:
            known[id(value)] = ziplayout.plan(value)
        add(key, known[id(value)], None)
    return DataFile(at, offsets, slots, tuple(archives), places)


def index(files: Mapping[str, tuple[DataFile, Sequence[Chunk], Sequence[str]]]) -> bytes:
    """The `.metadata` of planned data files: name -> (file, its chunks, the keys of its objects)."""
    tensors: dict[str, Instance] = {}
    chunks: dict[str, list[Instance]] = {}
    storage: dict[Instance, Instance] = {}

    def stored(key: str, offsets: Shape | None, name: str, place: tuple[int, int]) -> None:
        at = {"fqn": key, "offset": None if offsets is None else _size(offsets), "index": None}
        info = {"relative_path": name, "offset": place[0], "length": place[1], "transform_descriptors": None}
        storage[Instance(f"{_MODULE}metadata", "MetadataIndex", at)] = Instance(
            f"{_MODULE}filesystem", "_StorageInfo", info
        )

    for name, (file, parts, objects) in files.items():
        for chunk in parts:
            if chunk.key not in tensors:
                chunks[chunk.key] = []
                tensors[chunk.key] = Instance(f"{_MODULE}metadata", "TensorStorageMetadata", {
                    "properties": _properties(chunk.dtype), "size": _size(chunk.shape), "chunks": chunks[chunk.key],
                })  # fmt: skip
            sizes = {"offsets": _size(chunk.offsets), "sizes": _size(chunk.sizes)}
            chunks[chunk.key].append(Instance(f"{_MODULE}metadata", "ChunkStorageMetadata", sizes))
            stored(chunk.key, chunk.offsets, name, file.places[chunk.slot.name])
        for key in objects:
            tensors[key] = Instance(f"{_MODULE}metadata", "BytesStorageMetadata", {})
            stored(key, None, name, file.places[key])
    fields = {
        "state_dict_metadata": tensors,
        "planner_data": {key: (key,) for key in tensors},
        "storage_data": storage,
        "storage_meta": None,
        "version": None,
    }
    return dumps(Instance(f"{_MODULE}metadata", "Metadata", fields))[0]


def _size(shape: Shape) -> Instance:
    return Instance("torch", "Size", None, (tuple(shape),))


def _properties(dtype: str) -> Instance:
    """dtype, layout, requires_grad, memory format (0: contiguous), pin_memory."""
    encoding = Instance(f"{_MODULE}metadata", "_MEM_FORMAT_ENCODING", None, (0,))
    layout = Instance("torch.serialization", "_get_layout", None, ("torch.strided",))
    return Instance(f"{_MODULE}metadata", "TensorProperties", (DTypeName(dtype), layout, False, encoding, False))
