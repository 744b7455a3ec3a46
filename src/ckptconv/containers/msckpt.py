"""MindSpore's `.ckpt` files: tensors in protocol buffer messages, one behind the other, read lazily.

Source: MindSpore `checkpoint.proto` (Checkpoint { repeated Value value = 1 }, Value { string tag = 1; TensorProto
tensor = 2 }, TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }) and
`serialization.py` of 2.10: every Value is written as a Checkpoint of its own, tensors above 512 MiB in several with the
same tag and the dims of the whole. Contents are little-endian.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from ckptconv import dtypes
from ckptconv.containers.source import Source, opened
from ckptconv.errors import SourceError
from ckptconv.files import read_bytes
from ckptconv.lazy import Assembly, FileTensor, LazyTensor, Piece, Shape, matrix

#: `tensor_type` -> torch's name.
TYPES = {
    "Float16": "float16", "Float32": "float32", "Float64": "float64", "BFloat16": "bfloat16", "Bool": "bool",
    "Int8": "int8", "Int16": "int16", "Int32": "int32", "Int64": "int64",
    "UInt8": "uint8", "UInt16": "uint16", "UInt32": "uint32", "UInt64": "uint64",
}  # fmt: skip
_VARINT, _BYTES = 0, 2
#: Of a field's key and length, and of the fields in front of a tensor's content.
_HEAD = 4096
_AGAIN = "The file is damaged or incomplete, or encrypted (enc_key): save it again without, or copy it again."
_ENDINGS = ((b"crc", "a checksum (crc_check)"), (b"strategy", "strategies"))


@dataclass
class _Parts:
    """One tag's contents in the order they are in the file: (offset, bytes)."""

    kind: str
    shape: Shape
    runs: list[tuple[int, int]] = field(default_factory=list)


def looks(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as one of these, which have no signature: with a named tensor."""
    source = opened(path)
    try:
        tag = next(_values(source), ("", None))
    except SourceError:
        return False
    return bool(tag[0])


def read(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """The tensors by name in file order. Text values are left out; raises SourceError for all else it cannot read."""
    source = opened(path)
    found: dict[str, _Parts] = {}
    for tag, part in _values(source):
        if part is None:
            continue
        whole = found.setdefault(tag, part)
        if whole is not part:
            if (whole.kind, whole.shape) != (part.kind, part.shape):
                raise SourceError(f"{source.path}: {tag} comes twice, as different tensors. {_AGAIN}")
            whole.runs += part.runs
    if not found:
        raise SourceError(f"{source.path}: holds no tensors. {_AGAIN}")
    return {tag: _tensor(source.path, tag, parts) for tag, parts in found.items()}


def _tensor(path: str, tag: str, parts: _Parts) -> LazyTensor:
    """A tensor of contents that follow each other, which need not break between rows."""
    kind = TYPES.get(parts.kind)
    if kind is None:
        raise SourceError(f"{path}: {tag} has elements of type {parts.kind!r}, which cannot be converted.")
    width, (rows, cols) = dtypes.size_of(kind), matrix(parts.shape)
    held = sum(size for _, size in parts.runs)
    if held != rows * cols * width or any(size % width for _, size in parts.runs):
        raise SourceError(
            f"{path}: {tag} has {held} bytes, expected {rows * cols * width} for {kind} {list(parts.shape)}. {_AGAIN}"
        )
    if len(parts.runs) == 1:
        return FileTensor(path, parts.runs[0][0], kind, parts.shape)
    pieces, at = [], 0
    for offset, size in parts.runs:
        end = at + size // width
        while at < end:
            row, col = divmod(at, cols)
            # The rest of a row, then whole rows, then the beginning of one.
            shape = (1, min(cols - col, end - at)) if col or end - at < cols else ((end - at) // cols, cols)
            pieces.append(Piece(row, col, *shape, FileTensor(path, offset, kind, shape), 0, 0))
            at, offset = at + prod(shape), offset + prod(shape) * width
    return Assembly(kind, parts.shape, tuple(pieces))


class _Range:
    """A cursor over a message: [at, end) of a file."""

    def __init__(self, source: Source, at: int, end: int) -> None:
        self.source, self.at, self.end = source, at, end
        self._from, self._head = at, b""

    def error(self, what: str) -> SourceError:
        return SourceError(
            f"{self.source.path}: at byte {self.at}: {what}; expected the messages of a MindSpore .ckpt. {_AGAIN}"
        )

    def take(self, count: int) -> bytes:
        """The next bytes. Reads ahead, as fields are a few bytes each."""
        if count > self.end - self.at:
            raise self.error(f"{count} bytes are needed, {self.end - self.at} are left")
        start = self.at - self._from
        if start + count > len(self._head):
            self._from, start = self.at, 0
            self._head = read_bytes(self.source.path, self.at, min(max(count, _HEAD), self.source.size - self.at))
        self.at += count
        return self._head[start : start + count]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise self.error("a number of more than 64 bits")

    def fields(self) -> Iterator[tuple[int, int | _Range]]:
        """(number, value) of every field: a number, or the range of a message or text."""
        while self.at < self.end:
            number, kind = divmod(self.varint(), 8)
            if kind == _VARINT:
                yield number, self.varint()
            elif kind == _BYTES:
                size = self.varint()
                if size > self.end - self.at:
                    raise self.error(f"a field of {size} bytes, {self.end - self.at} are left")
                inner = _Range(self.source, self.at, self.at + size)
                inner._from, inner._head = self._from, self._head
                yield number, inner
                self.at = inner.end
            else:
                raise self.error(f"a field of kind {kind}")

    def text(self) -> str:
        if self.end - self.at > _HEAD:
            raise self.error(f"a name of {self.end - self.at} bytes")
        return self.take(self.end - self.at).decode("utf-8", "replace")


def _values(source: Source) -> Iterator[tuple[str, _Parts | None]]:
    """(tag, tensor) of every Value; None for a text."""
    whole = _Range(source, 0, source.size)
    while whole.at < whole.end:
        for ending, what in _ENDINGS:
            left = whole.end - whole.at
            if left < 1024 and read_bytes(source.path, whole.at, min(left, 8)).startswith(ending):
                raise whole.error(f"{what} behind the tensors, which is not read: save without")
        number, kind = divmod(whole.varint(), 8)
        if (number, kind) != (1, _BYTES):
            raise whole.error(f"field {number} of kind {kind}; it is {source.kind}")
        size = whole.varint()
        if size > whole.end - whole.at:
            raise whole.error(f"a tensor of {size} bytes, {whole.end - whole.at} are left")
        value = _Range(source, whole.at, whole.at + size)
        yield _value(value)
        whole.at = value.end


def _value(value: _Range) -> tuple[str, _Parts | None]:
    tag, part = "", None
    for number, content in value.fields():
        if number == 1 and isinstance(content, _Range):
            tag = content.text()
        elif number == 2 and isinstance(content, _Range):
            part = _part(content)
        else:
            what = "a map tensor (hash table)" if number == 3 else f"field {number} of a value"
            raise value.error(f"{what} of {tag!r}, which is not read")
    if not tag:
        raise value.error("a value without a name")
    return tag, None if part is None or part.kind == "str" else part


def _part(tensor: _Range) -> _Parts:
    dims: list[int] = []
    part = _Parts("", ())
    for number, content in tensor.fields():
        if number == 1 and isinstance(content, int):
            dims.append(content)
        elif number == 1 and isinstance(content, _Range):  # packed
            while content.at < content.end:
                dims.append(content.varint())
        elif number == 2 and isinstance(content, _Range):
            part.kind = content.text()
        elif number == 3 and isinstance(content, _Range):
            part.runs.append((content.at, content.end - content.at))
        else:
            raise tensor.error(f"field {number} of a tensor, which is not read")
    if max(dims, default=0) >= 1 << 48:
        raise tensor.error(f"a tensor of shape {dims}")
    part.shape = tuple(dims) if dims != [0] or not any(size for _, size in part.runs) else ()  # [0] is a scalar, too
    return part
