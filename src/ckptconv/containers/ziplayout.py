"""The layout of a `torch.save` archive, fixed before its first byte: where each record lies, then its headers.

Source: torch 2.13 `caffe2/serialize/inline_container.cc` (`getPadding`: data aligned to 64 bytes by an extra field
"FB"; the records and their order) and PKWARE APPNOTE 6.3.9 (headers, zip64). Unlike torch's writer, checksums stand in
the local headers, so no data descriptors are needed.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from ckptconv.containers.pickling import dumps
from ckptconv.containers.plan import Slot, Write, by_name
from ckptconv.errors import TableError

_ALIGNMENT = 64
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_UTF8 = 0x800
#: 1980-01-01, the first day of DOS: archives of the same model are equal byte for byte.
_DATE = 0x21
_SERIALIZATION_ID = ".data/serialization_id"


@dataclass(frozen=True)
class _Record:
    """A record: its header at byte `at`, `size` bytes of content from `data` on; `content` None is a slot."""

    name: bytes
    at: int
    data: int
    size: int
    content: bytes | None

    @property
    def wide(self) -> bool:
        return self.size >= _MAX32

    def local_header(self, crc: int) -> bytes:
        size = _MAX32 if self.wide else self.size
        extra = struct.pack("<HHQQ", 1, 16, self.size, self.size) if self.wide else b""
        extra_size = self.data - self.at - 30 - len(self.name)
        fill = extra_size - len(extra) - 4
        head = struct.pack(
            "<4sHHHHHIIIHH", b"PK\x03\x04", 45 if self.wide else 20, _UTF8, 0, 0, _DATE, crc, size, size,
            len(self.name), extra_size,
        )  # fmt: skip
        return head + self.name + extra + struct.pack("<2sH", b"FB", fill) + b"Z" * fill

    def directory_entry(self, crc: int) -> bytes:
        far = self.at >= _MAX32
        size, at = _MAX32 if self.wide else self.size, _MAX32 if far else self.at
        extra = struct.pack("<QQ", self.size, self.size) if self.wide else b""
        extra += struct.pack("<Q", self.at) if far else b""
        extra = struct.pack("<HH", 1, len(extra)) + extra if extra else b""
        version = 45 if extra else 20
        head = struct.pack(
            "<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", version, version, _UTF8, 0, 0, _DATE, crc, size, size,
            len(self.name), len(extra), 0, 0, 0, 0, at,
        )  # fmt: skip
        return head + self.name + extra


def _placed(name: str, at: int, size: int, content: bytes | None) -> _Record:
    """A record whose header begins at `at` and whose data are aligned."""
    encoded = name.encode()
    least = at + 30 + len(encoded) + 4 + (20 if size >= _MAX32 else 0)
    return _Record(encoded, at, least + -least % _ALIGNMENT, size, content)


@dataclass(frozen=True)
class TorchFile:
    """A planned torch archive (`plan.PlannedFile`)."""

    size: int
    offsets: dict[str, int]
    slots: dict[str, Slot]
    records: list[_Record]
    owners: list[str | None]
    needs_crc: bool = True

    def finish(self, write: Write, crcs: Mapping[str, int]) -> None:
        directory, names, total = [], 0, 0
        for record, owner in zip(self.records, self.owners, strict=True):
            content = record.content
            if record.name.endswith(_SERIALIZATION_ID.encode()):
                # As torch's: 40 digits made of the names and of the checksums, the same for the same content.
                content = f"{names:020d}{total:020d}".encode()
            if owner is not None and owner not in crcs:
                raise TableError(f"the checksum of {owner} is missing: it has not been written.")
            crc = crcs[owner] if owner is not None else zlib.crc32(content or b"")
            names, total = zlib.crc32(record.name, names), zlib.crc32(struct.pack("<I", crc), total)
            write(record.at, record.local_header(crc) + (content or b""))
            directory.append(record.directory_entry(crc))
        last = self.records[-1]
        write(last.data + last.size, _ending(directory, last.data + last.size))


def _ending(directory: list[bytes], at: int) -> bytes:
    """The central directory that begins at byte `at`, and the records that end the archive."""
    count, entries = len(directory), b"".join(directory)
    size, end = len(entries), b""
    if count >= _MAX16 or size >= _MAX32 or at >= _MAX32:
        end = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, at)
        end += struct.pack("<4sIQI", b"PK\x06\x07", 0, at + size, 1)
    shown = min(count, _MAX16)
    return (
        entries
        + end
        + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, shown, shown, min(size, _MAX32), min(at, _MAX32), 0)
    )


def plan(root: object, archive: str = "archive") -> TorchFile:
    """The layout of the archive that `torch.load` reads as `root`, each `Slot` in it a tensor.

    `root` is made of dict, OrderedDict, list, tuple, str, int, float, bool, None, argparse.Namespace, Slot and
    DTypeName. Raises TableError for anything else and for two slots of the same name.
    """
    pickle, in_order = dumps(root)
    slots = by_name(in_order)
    contents: list[tuple[str, int, bytes | None]] = [("data.pkl", len(pickle), pickle), ("byteorder", 6, b"little")]
    contents += [(f"data/{key}", slot.nbytes, None) for key, slot in enumerate(in_order)]
    contents += [("version", 2, b"3\n"), (_SERIALIZATION_ID, 40, None)]
    records: list[_Record] = []
    at = 0
    for name, size, content in contents:
        records.append(_placed(f"{archive}/{name}", at, size, content))
        at = records[-1].data + size
    owners = [None, None, *slots, None, None]
    offsets = {name: record.data for name, record in zip(slots, records[2:-2], strict=True)}
    directory = [record.directory_entry(0) for record in records]
    return TorchFile(at + len(_ending(directory, at)), offsets, slots, records, owners)
