"""Files of `torch.save`: a zip archive with a pickle and one uncompressed record per storage, read lazily.

`read` also takes the files of torch before 1.6 (torchlegacy.py); `plan` (ziplayout.py) lays out a new archive.

Source: torch 2.13 `torch/serialization.py` (`_load`, `_is_torchscript_zip`) and `caffe2/serialize/inline_container.cc`
(`PyTorchStreamReader`); PKWARE APPNOTE 6.3.9 for the local header.
"""

from __future__ import annotations

import io
import os
import zlib
from typing import TYPE_CHECKING

from ckptconv import dtypes
from ckptconv.containers import torchlegacy
from ckptconv.containers.inert import Inert, short
from ckptconv.containers.source import Source, opened
from ckptconv.containers.storage import Storage, storage_dtype
from ckptconv.containers.unpickle import loads
from ckptconv.containers.ziplayout import TorchFile, plan
from ckptconv.errors import SourceError
from ckptconv.files import read_bytes

if TYPE_CHECKING:
    from zipfile import ZipInfo

__all__ = ["TorchFile", "plan", "read"]

_LOCAL_HEADER = 30
_ENCRYPTED, _UTF8 = 0x1, 0x800
_AGAIN = "The file is damaged or incomplete: fetch or copy it again."


def read(path: str | os.PathLike[str], offset: int = 0, length: int | None = None) -> object:
    """What was saved, with lazy tensors for tensors and `inert` stand-ins for objects of unknown classes.

    offset, length: the archive is this range of the bytes of a larger file.

    Raises SourceError naming the path: no torch.save file, damaged or truncated, refers to what no checkpoint needs,
    or holds a tensor with strides that are neither contiguous nor those of a transposed matrix.
    """
    if length is not None:
        # `opened` would close the descriptor, which other threads may be reading other archives of the file with.
        source = Source(os.fspath(path), offset + length, b"")
        root, unreadable = _read_zip(source, offset, length)
        return _checked(source, root, unreadable)
    source = opened(path)
    if source.head.startswith(b"PK\x03\x04"):
        root, unreadable = _read_zip(source, 0, source.size)
    elif source.head.startswith(b"\x80"):
        root, unreadable = torchlegacy.read(source)
    else:
        raise SourceError(f"{source.path}: is not a torch.save file, it is {source.kind}. Is it the right file?")
    return _checked(source, root, unreadable)


def _checked(source: Source, root: object, unreadable: list[tuple[Inert, str]]) -> object:
    if unreadable:
        tensor, why = unreadable[0]
        raise SourceError(
            f"{source.path}: the tensor {_name_of(root, tensor)} {why}. "
            "Save it again as `tensor.contiguous()`, or drop it from the checkpoint."
        )
    return root


def _read_zip(source: Source, begin: int, size: int) -> tuple[object, list[tuple[Inert, str]]]:
    archive = _Archive(source, begin, size)
    if archive.bytes_of("byteorder", "little") != b"little":
        raise SourceError(
            f"{source.path}: holds big-endian tensors, expected little-endian ones. Save it again on such a machine."
        )
    pickle = archive.bytes_of("data.pkl")
    unreadable: list[tuple[Inert, str]] = []
    known: dict[tuple[str, str], Storage | Inert] = {}

    def storage(key: object) -> Storage | Inert:
        if not isinstance(key, tuple) or len(key) != 5 or key[0] not in ("storage", b"storage"):
            raise TypeError(f"the persistent id {short(key)}")
        _, kind, name, _, count = key
        if not isinstance(name, str) or type(count) is not int or count < 0:
            raise TypeError(f"the storage {short(name)} of {short(count)} elements")
        if (str(kind), name) not in known:
            dtype = storage_dtype(kind)
            known[str(kind), name] = dtype if isinstance(dtype, Inert) else place(name, dtype, count)
        return known[str(kind), name]

    def place(name: str, dtype: str | None, count: int) -> Storage:
        offset, size = archive.locate(f"data/{name}")
        needed = count * (dtypes.size_of(dtype) if dtype else 1)
        if size < needed:
            raise SourceError(
                f"{source.path}: the record data/{name} has {size} bytes, {count} elements of {dtype or 'one byte'} "
                f"need {needed}. {_AGAIN}"
            )
        return Storage(source.path, name, dtype, offset, size, unreadable)

    return loads(pickle, source.path, storage), unreadable


class _Section(io.RawIOBase):
    """A range of the bytes of a file, as the zip library wants to see it."""

    def __init__(self, path: str, begin: int, size: int) -> None:
        self._path, self._begin, self._size, self._at = path, begin, max(0, size), 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, self._size)[whence]
        if at < 0:
            raise OSError("a seek to before the file")
        self._at = at
        return at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        data = read_bytes(self._path, self._begin + self._at, left if size < 0 else min(size, left))
        self._at += len(data)
        return data


class _Archive:
    """The directory of the zip file, and where the bytes of each record begin."""

    def __init__(self, source: Source, begin: int, size: int) -> None:
        import zipfile

        self.path, self.begin, self.size = source.path, begin, min(size, source.size - begin)
        try:
            with zipfile.ZipFile(_Section(self.path, begin, self.size)) as archive:
                infos = archive.infolist()
        except Exception as error:  # zipfile raises some ten kinds for damaged directories, struct.error among them
            raise SourceError(
                f"{self.path}: the zip directory at its end cannot be read ({type(error).__name__}: {error}); "
                f"it has {self.size} bytes. {_AGAIN}"
            ) from error
        self.records = {info.filename: info for info in infos}
        if len(self.records) != len(infos):
            raise SourceError(f"{self.path}: two records of the zip archive have the same name. {_AGAIN}")
        self.prefix = self._find_prefix()

    def _find_prefix(self) -> str:
        found = [name for name in self.records if name.partition("/")[2] == "data.pkl"]
        if len(found) != 1:
            what = "a numpy .npz file?" if any(name.endswith(".npy") for name in self.records) else "not by torch.save"
            raise SourceError(
                f"{self.path}: is a zip archive with {len(found)} records */data.pkl, expected one ({what})."
            )
        prefix = found[0].removesuffix("data.pkl")
        if any(name == f"{prefix}constants.pkl" or name.startswith(f"{prefix}code/") for name in self.records):
            raise SourceError(
                f"{self.path}: is a TorchScript archive (torch.jit.save), which holds a program. "
                "Save the state_dict() of the module with torch.save."
            )
        return prefix

    def locate(self, record: str) -> tuple[int, int]:
        """(offset, bytes) of a record in the file. Raises SourceError when it is absent, packed or damaged."""
        info = self.records.get(self.prefix + record)
        if info is None:
            raise SourceError(f"{self.path}: has no record {self.prefix + record!r}. {_AGAIN}")
        if info.compress_type or info.compress_size != info.file_size or info.flag_bits & _ENCRYPTED:
            raise SourceError(
                f"{self.path}: the record {info.filename!r} is compressed or encrypted, torch.save stores it as it is. "
                "Was the archive packed again? Load it with torch and save it anew."
            )
        offset = info.header_offset + _LOCAL_HEADER + self._variable_length(info)
        if offset + info.file_size > self.size:
            raise SourceError(
                f"{self.path}: is truncated: the record {info.filename!r} goes to byte {offset + info.file_size}, "
                f"the file has {self.size}. {_AGAIN}"
            )
        return self.begin + offset, info.file_size

    def _variable_length(self, info: ZipInfo) -> int:
        """Bytes of name and extra field in the local header, whose lengths the directory does not know."""
        name = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437", "replace")
        end = info.header_offset + _LOCAL_HEADER + len(name)
        at, size = self.begin + info.header_offset, end - info.header_offset
        header = read_bytes(self.path, at, size) if 0 <= end <= self.size else b""
        if header[:4] != b"PK\x03\x04" or header[_LOCAL_HEADER:] != name or header[26:28] != _u16(len(name)):
            raise SourceError(
                f"{self.path}: at byte {info.header_offset} there is no local header of {info.filename!r}. {_AGAIN}"
            )
        return len(name) + int.from_bytes(header[28:30], "little")

    def bytes_of(self, record: str, default: str | None = None) -> bytes:
        """A whole (small) record, its checksum checked; `default` when there is no such record."""
        if default is not None and self.prefix + record not in self.records:
            return default.encode()
        offset, size = self.locate(record)
        data = read_bytes(self.path, offset, size)
        if zlib.crc32(data) != self.records[self.prefix + record].CRC:
            raise SourceError(f"{self.path}: the checksum of the record {record!r} is wrong. {_AGAIN}")
        return data


def _u16(value: int) -> bytes:
    return (value & 0xFFFF).to_bytes(2, "little")


def _name_of(root: object, wanted: object) -> str:
    """Where `wanted` is in the tree of dicts, lists and namespaces, as `model.layer.weight`."""
    waiting: list[tuple[str, object]] = [("", root)]
    seen = set()
    while waiting:
        name, value = waiting.pop()
        if value is wanted:
            return repr(name.lstrip("."))
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting += [(f"{name}.{key if isinstance(key, str) else short(key)}", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [(f"{name}.{index}", item) for index, item in enumerate(value)]
        elif isinstance(value, Inert):
            waiting += [(name, value.args), (name, value.state), (name, value.elements), (name, value.entries)]
        elif hasattr(value, "__dict__"):
            waiting += [(f"{name}.{key}", item) for key, item in vars(value).items()]
    return "inside a stand-in"
