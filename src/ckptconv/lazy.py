"""Tensors that have not been read: where their bytes lie and how they are put together.

A loader hands these out instead of tensors, a saver copies them block by block from the source files into the
target files, and nothing of a model's size is ever in memory. Everything here is plain data: it pickles in a few
bytes per tensor, which is what crosses the queue.

A tensor of any rank is seen as a matrix: `rows` = the product of all leading dimensions, `cols` = the last one; a
vector `[n]` is n rows of one column. Rectangles of such matrices (`Piece`) are the only building block: a cut over
ranks, a fused qkv, stacked experts and vocabulary padding are all lists of rectangles.

Not here: file formats (containers/), what the rectangles mean (ops.py, cuts.py), writing (engine.py).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from ckptconv import dtypes
from ckptconv.errors import TableError
from ckptconv.files import read_exactly

if TYPE_CHECKING:
    import numpy as np
    import torch

    Matrix = np.ndarray[Any, Any]

Shape = tuple[int, ...]

#: Bytes of a block of a transposed tensor: rows of it are columns of a file, and few columns cost as much as all.
TALL = 8 << 20
#: From this ratio of a row to what is wanted of it on, rows are read one by one.
FAR = 4


def matrix(shape: Shape) -> tuple[int, int]:
    """(rows, cols) of a shape: `[a, b, c]` is a*b rows of c, `[n]` is n rows of 1, `[]` is one element."""
    if len(shape) < 2:
        return prod(shape), 1
    return prod(shape[:-1]), shape[-1]


class LazyTensor:
    """Base: an element type (torch's name), a shape, and a way to read a rectangle of it."""

    __slots__ = ()

    dtype: str
    shape: Shape

    @property
    def rows(self) -> int:
        return matrix(self.shape)[0]

    @property
    def cols(self) -> int:
        return matrix(self.shape)[1]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * dtypes.size_of(self.dtype)

    @property
    def band(self) -> int:
        """Rows that cost as much to read as one of them does: blocks begin and end at multiples of it."""
        return 1

    def read(self, out: Matrix, row: int, col: int) -> None:
        """Fill `out` [r, c] (unsigned, of the element's width) with the rectangle that starts at (row, col)."""
        raise NotImplementedError

    def seen(self, shape: Shape) -> LazyTensor:
        """The same elements, row by row, in another shape."""
        if prod(shape) != prod(self.shape):
            raise TableError(f"a {type(self).__name__} of shape {list(self.shape)} cannot be seen as {list(shape)}.")
        return Reshaped(self, shape)

    def narrow_rows(self, start: int, length: int) -> LazyTensor:
        """`length` indices of the first dimension from `start` on."""
        each = self.rows // self.shape[0]
        piece = Piece(0, 0, length * each, self.cols, self, start * each, 0)
        return Assembly(self.dtype, (length, *self.shape[1:]), (piece,))


@dataclass(frozen=True, slots=True)
class FileTensor(LazyTensor):
    """Row-major elements lying in a file from byte `offset` on."""

    path: str
    offset: int
    dtype: str
    shape: Shape

    def seen(self, shape: Shape) -> FileTensor:
        return replace(self, shape=shape)

    def read(self, out: Matrix, row: int, col: int) -> None:
        import numpy as np

        width, cols = dtypes.size_of(self.dtype), self.cols
        start = self.offset + (row * cols + col) * width
        if out.shape[1] == cols:
            target = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
            read_exactly(self.path, start, as_bytes(target))
        elif cols >= FAR * out.shape[1]:
            # A narrow column of a wide tensor: most of one read over all of it would be thrown away.
            target = np.empty(out.shape, out.dtype)
            for n in range(out.shape[0]):
                read_exactly(self.path, start + n * cols * width, as_bytes(target[n]))
        else:
            # One read over all rows touched: a read per row would cost a system call each.
            span = np.empty((out.shape[0] - 1) * cols + out.shape[1], out.dtype)
            read_exactly(self.path, start, as_bytes(span))
            step = span.itemsize
            target = np.lib.stride_tricks.as_strided(span, out.shape, (cols * step, step))
        if target is not out:
            out[...] = target


@dataclass(frozen=True)
class Zeros(LazyTensor):
    """All elements zero."""

    dtype: str
    shape: Shape

    def read(self, out: Matrix, row: int, col: int) -> None:
        out[...] = 0


@dataclass(frozen=True)
class Ones(LazyTensor):
    """All elements one."""

    dtype: str
    shape: Shape

    def read(self, out: Matrix, row: int, col: int) -> None:
        import torch

        out[...] = as_numpy(torch.ones(1, dtype=dtypes.of_torch(self.dtype)))[0]


@dataclass(frozen=True)
class Literal(LazyTensor):
    """A few elements carried along (a mean row for padding): `data` holds them row-major."""

    data: bytes
    dtype: str
    shape: Shape

    def read(self, out: Matrix, row: int, col: int) -> None:
        import numpy as np

        whole = np.frombuffer(self.data, out.dtype).reshape(self.rows, self.cols)
        out[...] = whole[row : row + out.shape[0], col : col + out.shape[1]]


@dataclass(frozen=True)
class Cast(LazyTensor):
    """`base` with its values converted by torch (round to nearest even). Asked for by `--dtype`, never implicit."""

    base: LazyTensor
    dtype: str

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.base.shape

    def read(self, out: Matrix, row: int, col: int) -> None:
        import numpy as np

        raw = np.empty(out.shape, dtypes.opaque(self.base.dtype))
        self.base.read(raw, row, col)
        values = as_torch(raw, self.base.dtype).to(dtypes.of_torch(self.dtype))
        out[...] = as_numpy(values)


@dataclass(frozen=True)
class Transposed(LazyTensor):
    """`base` [r, c] seen as [c, r] (weights stored as [in, out], for example GPT-2's Conv1D)."""

    base: LazyTensor

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.base.dtype

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.base.shape[::-1]

    @property
    def band(self) -> int:
        return min(self.rows, max(1, TALL // (self.cols * dtypes.size_of(self.dtype))))

    def read(self, out: Matrix, row: int, col: int) -> None:
        self.base.read(out.T, col, row)


@dataclass(frozen=True)
class Reshaped(LazyTensor):
    """The elements of `base`, row by row, in another shape."""

    base: LazyTensor
    shape: Shape

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.base.dtype

    def read(self, out: Matrix, row: int, col: int) -> None:
        import numpy as np

        wide, start = self.base.cols, row * self.cols + col
        first = start // wide
        end = start + (out.shape[0] - 1) * self.cols + out.shape[1]
        rows = np.empty((-(-end // wide) - first, wide), out.dtype)
        self.base.read(rows, first, 0)
        flat, step = rows.reshape(-1)[start - first * wide :], out.itemsize
        out[...] = np.lib.stride_tricks.as_strided(flat, out.shape, (self.cols * step, step))


@dataclass(frozen=True)
class Strided(LazyTensor):
    """Columns `start`, `start + step`, ... of `base`; with `wrap` all of them, each next round one column further."""

    base: LazyTensor
    start: int
    step: int
    wrap: bool = False

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.base.dtype

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        cols = self.base.cols
        return self.base.shape if self.wrap else (*self.base.shape[:-1], -(-(cols - self.start) // self.step))

    def read(self, out: Matrix, row: int, col: int) -> None:
        import numpy as np

        wanted = self.start + self.step * np.arange(col, col + out.shape[1])
        if self.wrap:
            rounds = -(-self.base.cols // self.step)  # columns of one round
            number = np.arange(col, col + out.shape[1])
            wanted = self.start + self.step * (number % rounds) + number // rounds
        first = int(wanted.min())
        span = np.empty((out.shape[0], int(wanted.max()) + 1 - first), out.dtype)
        self.base.read(span, row, first)
        out[...] = span[:, wanted - first]


@dataclass(frozen=True, slots=True)
class Piece:
    """The rectangle [rows, cols] at (row, col) of a whole is the one at (part_row, part_col) of `part`."""

    row: int
    col: int
    rows: int
    cols: int
    part: LazyTensor
    part_row: int
    part_col: int


@dataclass(frozen=True)
class Assembly(LazyTensor):
    """Rectangles of other tensors that cover this one exactly once."""

    dtype: str
    shape: Shape
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        covered = sum(p.rows * p.cols for p in self.pieces)
        if covered != self.rows * self.cols:
            raise TableError(f"pieces cover {covered} of {self.rows * self.cols} elements of {list(self.shape)}.")
        for p in self.pieces:
            inside = p.row + p.rows <= self.rows and p.col + p.cols <= self.cols
            taken = p.part_row + p.rows <= p.part.rows and p.part_col + p.cols <= p.part.cols
            if not (inside and taken and p.part.dtype == self.dtype):
                raise TableError(
                    f"a piece of {p.part.dtype} {list(p.part.shape)} does not fit {self.dtype} {list(self.shape)}."
                )
        object.__setattr__(self, "pieces", tuple(sorted(self.pieces, key=lambda p: (p.row, p.col))))

    @cached_property
    def _index(self) -> tuple[list[int], int]:
        return [p.row for p in self.pieces], max(p.rows for p in self.pieces)

    @property
    def band(self) -> int:
        return max((p.part.band for p in self.pieces), default=1)

    def read(self, out: Matrix, row: int, col: int) -> None:
        starts, tallest = self._index
        last_row, last_col = row + out.shape[0], col + out.shape[1]
        first = bisect.bisect_right(starts, row - tallest)
        for p in self.pieces[first : bisect.bisect_left(starts, last_row)]:
            top, bottom = max(p.row, row), min(p.row + p.rows, last_row)
            left, right = max(p.col, col), min(p.col + p.cols, last_col)
            if top < bottom and left < right:
                view = out[top - row : bottom - row, left - col : right - col]
                p.part.read(view, p.part_row + top - p.row, p.part_col + left - p.col)


def places(tensor: LazyTensor) -> Iterator[tuple[str, int, int]]:
    """(file, byte, element from there on) of all that a tensor is made of, each as often as it is used."""
    waiting = [tensor]
    while waiting:
        one: Any = waiting.pop()
        if hasattr(one, "path"):
            yield one.path, one.offset, getattr(one, "skip", 0)
        elif isinstance(one, Assembly):
            waiting += [piece.part for piece in reversed(one.pieces)]
        else:
            parts = [getattr(one, field.name) for field in fields(one)]
            waiting += [part for part in reversed(parts) if isinstance(part, LazyTensor)]


def blocks(tensor: LazyTensor, limit: int, breaks: Sequence[int] = ()) -> Iterator[tuple[int, int]]:
    """(first row, rows) of consecutive blocks of at most `limit` bytes that end at every row of `breaks`.

    A tensor with bands has at least one of them in a block.
    """
    per_row = max(1, tensor.cols * dtypes.size_of(tensor.dtype))
    step = max(1, limit // per_row)
    step = max(tensor.band, step - step % tensor.band)
    edges = sorted({b for b in breaks if 0 < b < tensor.rows} | {tensor.rows})
    row = 0
    for edge in edges:
        while row < edge:
            count = min(step, edge - row)
            yield row, count
            row += count


def as_bytes(array: Matrix) -> memoryview:
    """The memory of a contiguous array."""
    return memoryview(array.reshape(-1).view("u1"))  # type: ignore[arg-type]


def as_torch(array: Matrix, dtype: str) -> torch.Tensor:
    """A torch view of opaque elements, as values of `dtype`."""
    import numpy as np
    import torch

    signed = array.view(np.dtype(f"i{array.itemsize}"))  # torch has no views between unsigned and float types
    return torch.from_numpy(signed).view(dtypes.of_torch(dtype))


def as_numpy(tensor: torch.Tensor) -> Matrix:
    """The elements of a CPU tensor as opaque unsigned numbers of the same width (no copy when contiguous)."""
    import torch

    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    array: Matrix = tensor.detach().contiguous().view(signed).numpy()
    return array.view(f"u{array.itemsize}")


def to_torch(tensor: LazyTensor, block_bytes: int = 8 << 20) -> torch.Tensor:
    """The tensor itself, read into fresh private memory."""
    import torch

    result = torch.empty(tensor.shape, dtype=dtypes.of_torch(tensor.dtype))
    out = as_numpy(result.reshape(tensor.rows, tensor.cols))
    for row, count in blocks(tensor, block_bytes):
        tensor.read(out[row : row + count], row, 0)
    return result


def equal(one: LazyTensor, other: LazyTensor, block_bytes: int = 4 << 20) -> bool:
    """Whether two tensors hold the same bits; read block by block."""
    import numpy as np

    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    for row, count in blocks(one, block_bytes):
        left = np.empty((count, one.cols), dtypes.opaque(one.dtype))
        right = np.empty_like(left)
        one.read(left, row, 0)
        other.read(right, row, 0)
        if not np.array_equal(left, right):
            return False
    return True


def all_zero(tensor: LazyTensor, block_bytes: int = 4 << 20) -> bool:
    """Whether every element is +0 or -0 in bits that mean zero (all bits clear)."""
    return equal(tensor, Zeros(tensor.dtype, tensor.shape), block_bytes)
