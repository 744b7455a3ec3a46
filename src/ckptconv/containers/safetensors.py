"""safetensors files: 8 bytes of header length, a JSON header, then the data of all tensors without holes.

Source: the format description and `safetensors/src/tensor.rs` of huggingface/safetensors 0.6 (the limits, the order
of the checks and the padding of the header are those of `Metadata::validate`, `read_metadata` and `prepare`).
Shapes are in elements, offsets in bytes; those in the header count from the end of the header.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NoReturn

from ckptconv import dtypes
from ckptconv.containers.plan import Slot, Write, by_name
from ckptconv.containers.source import Source, opened
from ckptconv.errors import SourceError, TableError, some
from ckptconv.files import read_bytes
from ckptconv.lazy import FileTensor

#: The library refuses longer headers.
MAX_HEADER = 100_000_000
#: Dimensions of a tensor at most (torch's limit), and the largest of them and of the offsets.
MAX_RANK, MAX_DIM = 64, (1 << 63) - 1
_METADATA = "__metadata__"
_AGAIN = "The file is damaged or incomplete: fetch or copy it again."


def read(path: str | os.PathLike[str]) -> tuple[dict[str, FileTensor], dict[str, str]]:
    """The tensors by name in header order, and `__metadata__`. Reads the header only.

    Raises SourceError naming the path for anything that is not a complete, consistent safetensors file.
    """
    source = opened(path)
    header, start = _header(source)
    metadata = _metadata(source.path, header.pop(_METADATA, None))
    tensors = {name: _tensor(source.path, name, entry, start) for name, entry in header.items()}
    _check_cover(source, tensors, start)
    return tensors, metadata


def _header(source: Source) -> tuple[dict[str, object], int]:
    """The parsed JSON object and the offset where the data begin."""
    path, size = source.path, source.size
    if size < 8:
        raise SourceError(f"{path}: has {size} bytes, a safetensors file has at least 8. {_AGAIN}")
    length = int.from_bytes(source.head[:8], "little")
    if length > MAX_HEADER:
        raise SourceError(
            f"{path}: is not a safetensors file: it announces a header of {length} bytes, at most {MAX_HEADER} are "
            f"allowed; it is {source.kind}. Is it the right file?"
        )
    if 8 + length > size:
        raise SourceError(f"{path}: has {size} bytes, its header alone needs {8 + length}. {_AGAIN}")
    raw = read_bytes(path, 8, length)
    if not raw.startswith(b"{"):
        raise SourceError(f"{path}: the safetensors header does not start with '{{'. {_AGAIN}")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = some(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise SourceError(f"{path}: the safetensors header names a key twice: {twice}. {_AGAIN}")
        return result

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError, MemoryError) as error:
        raise SourceError(f"{path}: the safetensors header is no valid JSON ({error}). {_AGAIN}") from error
    return parsed, 8 + length


def _metadata(path: str, value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise SourceError(f"{path}: __metadata__ is {_short(value)}, expected an object of strings. {_AGAIN}")
    return value


def _tensor(path: str, name: str, entry: object, start: int) -> FileTensor:
    """The tensor of one header entry; its place in the file is checked later, with all others."""

    def bad(found: str, expected: str) -> SourceError:
        return SourceError(f"{path}: {name!r}: {found}, expected {expected}. {_AGAIN}")

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise bad(f"its header entry is {_short(entry)}", "dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    row = dtypes.BY_SAFETENSORS.get(kind) if isinstance(kind, str) else None
    if row is None:
        raise SourceError(
            f"{path}: {name!r} has elements of type {_short(kind)}, which cannot be converted "
            f"(known: {', '.join(dtypes.BY_SAFETENSORS)}). Convert it to one of these first."
        )
    if not isinstance(shape, list) or not all(type(dim) is int and 0 <= dim <= MAX_DIM for dim in shape):
        raise bad(f"its shape is {_short(shape)}", "a list of non-negative integers")
    if len(shape) > MAX_RANK:
        raise bad(f"it has {len(shape)} dimensions", f"at most {MAX_RANK}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(at) is int for at in offsets):
        raise bad(f"its data_offsets are {_short(offsets)}", "two integers")
    begin, end = offsets
    if not 0 <= begin <= end <= MAX_DIM:
        raise bad(f"its data go from byte {_short(begin)} to {_short(end)}", "a begin and a later end")
    if end - begin != prod(shape) * row.size:
        raise bad(
            f"{_short(end - begin)} bytes of data", f"{_short(prod(shape) * row.size)} for {kind} {_short(shape)}"
        )
    return FileTensor(path, start + begin, row.name, tuple(shape))


def _check_cover(source: Source, tensors: Mapping[str, FileTensor], start: int) -> None:
    """The data of the tensors, in order of their place, must fill the file from `start` to its end exactly."""
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != at:
            what = "overlap with those of another tensor" if tensor.offset < at else "leave a hole before them"
            raise SourceError(
                f"{source.path}: {name!r}: its data begin at byte {tensor.offset}, expected {at}: they {what}. {_AGAIN}"
            )
        at += tensor.nbytes
    if at > source.size:
        raise SourceError(f"{source.path}: is truncated: it has {source.size} bytes, its header needs {at}. {_AGAIN}")
    if at < source.size:
        raise SourceError(f"{source.path}: has {source.size} bytes, its header accounts for only {at}. {_AGAIN}")


def _short(value: object) -> str:
    """`value` for a message: on one line, not long, and never an error of its own."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."


@dataclass(frozen=True)
class SafetensorsFile:
    """A planned safetensors file (`plan.PlannedFile`)."""

    size: int
    offsets: dict[str, int]
    slots: dict[str, Slot]
    header: bytes
    needs_crc: bool = False

    def finish(self, write: Write, crcs: Mapping[str, int]) -> None:
        write(0, self.header)


def plan(slots: Iterable[Slot], metadata: Mapping[str, str] | None = None) -> SafetensorsFile:
    """The layout of a file with these tensors, wide elements first so that each is aligned to its element size.

    `metadata` None stands for {"format": "pt"}, which transformers asks for. Raises TableError for a repeated or
    reserved name, an unknown element type, or a header over the limit of the format.
    """
    named = by_name(slots)
    if _METADATA in named:
        raise TableError(f"a tensor cannot be called {_METADATA}: that name is reserved in safetensors files.")
    ordered = dict(sorted(named.items(), key=lambda item: -dtypes.size_of(item[1].dtype)))
    extra = {"format": "pt"} if metadata is None else dict(metadata)
    if not all(isinstance(item, str) for pair in extra.items() for item in pair):
        raise TableError(f"metadata {extra} is not text only, which is all a safetensors header can hold.")
    entries: dict[str, object] = {_METADATA: extra} if extra else {}
    begins, at = {}, 0
    for name, slot in ordered.items():
        begins[name] = at
        at += slot.nbytes
        entries[name] = {
            "dtype": dtypes.BY_NAME[slot.dtype].safetensors,
            "shape": list(slot.shape),
            "data_offsets": [begins[name], at],
        }
    try:
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise TableError(f"a tensor name is not valid text: {error}.") from error
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise TableError(f"{len(ordered)} tensors need a header of {len(text)} bytes, the limit is {MAX_HEADER}.")
    start = 8 + len(text)
    header = len(text).to_bytes(8, "little") + text
    return SafetensorsFile(start + at, {name: start + begin for name, begin in begins.items()}, ordered, header)
