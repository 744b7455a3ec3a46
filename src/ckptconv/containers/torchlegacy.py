"""Files of `torch.save` before torch 1.6 (`_use_new_zipfile_serialization=False` since): pickles, then raw storages.

Order in the file: magic number, protocol version, a dict about the system, the object, the list of storage keys, five
pickles in all; then for each key 8 bytes with the number of elements and the elements.

Source: torch 2.13 `torch/serialization.py` (`_legacy_save`, `_legacy_load`), `torch/csrc/serialization.cpp`
(`THPStorage_writeFileRaw`).
"""

from __future__ import annotations

from typing import BinaryIO

from ckptconv import dtypes
from ckptconv.containers.inert import Inert, short
from ckptconv.containers.source import Source
from ckptconv.containers.storage import Storage, storage_dtype
from ckptconv.containers.unpickle import load
from ckptconv.errors import SourceError, why

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_AGAIN = "The file is damaged or incomplete: fetch or copy it again."


def read(source: Source) -> tuple[object, list[tuple[Inert, str]]]:
    """The saved object, and the tensors in it that cannot be expressed. Raises SourceError naming the path.

    The object is unpickled twice: where the storages lie is known only behind it.
    """
    try:
        with open(source.path, "rb") as file:
            return _read(source, file)
    except OSError as error:
        raise SourceError(f"{source.path}: cannot be read: {why(error)}") from error


def _read(source: Source, file: BinaryIO) -> tuple[object, list[tuple[Inert, str]]]:
    path, size = source.path, source.size
    if load(file, size, path) != _MAGIC:
        raise SourceError(
            f"{path}: is a pickle, but not one of torch.save (it has no magic number). "
            "Is it the right file?"
        )
    protocol, system = load(file, size, path), load(file, size, path)
    if protocol != _PROTOCOL or not isinstance(system, dict):
        raise SourceError(f"{path}: has torch.save protocol {short(protocol)}, expected {_PROTOCOL}. {_AGAIN}")
    if not system.get("little_endian", True):
        raise SourceError(
            f"{path}: holds big-endian tensors, expected little-endian ones. "
            "Save it again on such a machine."
        )
    begin = file.tell()
    first = _Storages(path, None)
    load(file, size, path, first)
    keys = load(file, size, path)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise SourceError(f"{path}: the list of storages is {short(keys)}, expected a list of names. {_AGAIN}")
    places = _places(source, file, keys, first.widths)
    missing = first.widths.keys() - places.keys()
    if missing:
        raise SourceError(f"{path}: holds no data for {len(missing)} of {len(first.widths)} storages. {_AGAIN}")
    file.seek(begin)
    second = _Storages(path, places)
    return load(file, size, path, second), second.unreadable


def _places(source: Source, file: BinaryIO, keys: list[str], widths: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(offset, bytes) of each storage, from the counts that precede their data."""
    places = {}
    for key in keys:
        if key not in widths or key in places:
            raise SourceError(f"{source.path}: the storage {short(key)} is unknown or listed twice. {_AGAIN}")
        header = file.read(8)
        at, nbytes = file.tell(), int.from_bytes(header, "little") * widths[key]
        if len(header) != 8 or at + nbytes > source.size:
            raise SourceError(
                f"{source.path}: is truncated: it has {source.size} bytes, the storage {key} goes to {at + nbytes}. "
                f"{_AGAIN}"
            )
        places[key] = (at, nbytes)
        file.seek(at + nbytes)
    return places


class _Storages:
    """Persistent ids to storages. Without places (the first reading) every storage is where and as long as it says."""

    def __init__(self, path: str, places: dict[str, tuple[int, int]] | None) -> None:
        self.path, self.places = path, places
        #: Bytes of an element of each storage, which is the unit of its count in the file.
        self.widths: dict[str, int] = {}
        self.unreadable: list[tuple[Inert, str]] = []

    def __call__(self, key: object) -> object:
        if isinstance(key, tuple) and len(key) == 4 and key[0] in ("module", b"module"):
            return key[1]  # a class with its source code, which nobody needs
        if not isinstance(key, tuple) or len(key) != 6 or key[0] not in ("storage", b"storage"):
            raise TypeError(f"the persistent id {short(key)}")
        _, kind, root, _, count, view = key
        dtype = storage_dtype(kind)
        if isinstance(dtype, Inert):
            raise SourceError(
                f"{self.path}: holds a {dtype.name}, whose elements cannot be converted. "
                "Leave it out of the file."
            )
        if not isinstance(root, str) or type(count) is not int or count < 0:
            raise TypeError(f"the storage {short(root)} of {short(count)} elements")
        width = dtypes.size_of(dtype) if dtype else 1
        self.widths.setdefault(root, width)
        offset, nbytes = self.places[root] if self.places is not None else (0, count * width)
        if nbytes < count * width:
            raise SourceError(
                f"{self.path}: the storage {root} has {nbytes} bytes, its tensors need {count * width}. {_AGAIN}"
            )
        if view is not None:
            _, start, length = view
            if not all(type(value) is int and value >= 0 for value in (start, length)) or start + length > count:
                raise TypeError(f"the view {short(start)}, {short(length)} of a storage of {count} elements")
            offset, nbytes = offset + start * width, length * width
        return Storage(self.path, root, dtype, offset, nbytes, self.unreadable)
