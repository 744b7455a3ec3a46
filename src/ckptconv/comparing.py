"""How far two tensors that have not been read are from one another: block by block, so that any size fits in memory.

Blocks are compared as bytes first, at the speed of the disk. Only where bytes differ, values are looked at, in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptconv import dtypes
from ckptconv.lazy import LazyTensor, Shape, as_torch, blocks

if TYPE_CHECKING:
    import numpy as np
    import torch

    Matrix = np.ndarray[Any, Any]

#: Bytes of a tensor that are compared at once, and elements whose values are.
BLOCK, VALUES = 1 << 20, 1 << 18

#: What works off blocks: `map`, or that of a pool of threads.
Map = Callable[[Callable[[tuple[int, int]], Any], Iterable[tuple[int, int]]], Iterable[Any]]


@dataclass(frozen=True)
class Tolerance:
    """What counts as equal: |a - b| <= atol + rtol * max(|a|, |b|), or NaN on both sides; `exact`: type and bits."""

    rtol: float = 0.0
    atol: float = 0.0
    exact: bool = True


@dataclass(frozen=True)
class Difference:
    """What differs between two tensors of one shape.

    different: elements that are not equal, of `elements`; max_abs: the largest |a - b|; max_rel: the largest
    |a - b| / max(|a|, |b|); both are NaN where a value is; first: index of the first of them, `values` what is there;
    cosine: of the angle between the tensors, seen as vectors, NaN when one is all zero.
    """

    dtypes: tuple[str, str]
    elements: int
    different: int
    max_abs: float
    max_rel: float
    first: Shape | None
    values: tuple[float, float] | None
    cosine: float

    def __str__(self) -> str:
        types = "" if self.dtypes[0] == self.dtypes[1] else f"{self.dtypes[0]} != {self.dtypes[1]}, "
        if not self.different or self.values is None:
            return f"{types}the values are equal"
        return (
            f"{types}{self.different} of {self.elements} elements differ, max abs {self.max_abs:.3g}, "
            f"max rel {self.max_rel:.3g}, cosine {self.cosine:.9f}, first at {list(self.first or ())}: "
            f"{self.values[0]:.9g} != {self.values[1]:.9g}"
        )


def compare(one: LazyTensor, other: LazyTensor, tolerance: Tolerance, run: Map = map) -> Difference | None:
    """How two tensors of the same shape differ; None when they do not. Raises SourceError for what cannot be read."""
    taller = max(one, other, key=lambda tensor: tensor.band * dtypes.size_of(tensor.dtype))
    parts = list(blocks(taller, BLOCK))
    if one.dtype == other.dtype and all(run(lambda part: _same_bytes(one, other, *part), parts)):
        return None
    # Summed in the order of the parts: the same two tensors give the same figures.
    sums = _Sums()
    for found in run(lambda part: _measured(one, other, tolerance, *part), parts):
        sums = sums.plus(found)
    if not sums.different and not (tolerance.exact and one.dtype != other.dtype):
        return None
    return Difference(
        (one.dtype, other.dtype), one.rows * one.cols, sums.different, sums.max_abs, sums.max_rel,
        None if sums.first is None else _index(sums.first, one.shape), sums.values, sums.cosine,
    )  # fmt: skip


@dataclass(frozen=True)
class _Sums:
    """What is known of a part: `first` counts elements from the start of the tensor."""

    different: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    first: int | None = None
    values: tuple[float, float] | None = None
    dot: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)

    def plus(self, later: _Sums) -> _Sums:
        """Of this part and a later one."""
        early = self if self.first is not None else later
        return _Sums(
            self.different + later.different,
            _largest(self.max_abs, later.max_abs), _largest(self.max_rel, later.max_rel),
            early.first, early.values, self.dot + later.dot,
            (self.squares[0] + later.squares[0], self.squares[1] + later.squares[1]),
        )  # fmt: skip

    @property
    def cosine(self) -> float:
        length = math.sqrt(self.squares[0]) * math.sqrt(self.squares[1])
        return self.dot / length if length else math.nan


def _largest(one: float, other: float) -> float:
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def _read(tensor: LazyTensor, row: int, count: int) -> Matrix:
    import numpy as np

    out = np.empty((count, tensor.cols), dtypes.opaque(tensor.dtype))
    tensor.read(out, row, 0)
    return out


def _same_bytes(one: LazyTensor, other: LazyTensor, row: int, count: int) -> bool:
    import numpy as np

    return np.array_equal(_read(one, row, count), _read(other, row, count))


def _measured(one: LazyTensor, other: LazyTensor, tolerance: Tolerance, row: int, count: int) -> _Sums:
    left, right = _read(one, row, count), _read(other, row, count)
    bits = left == right if tolerance.exact and one.dtype == other.dtype else None
    sums, start = _Sums(), row * one.cols
    for part in _few(left.size):
        a, b = (as_torch(side.reshape(-1)[part], tensor.dtype).double()
                for side, tensor in ((left, one), (right, other)))  # fmt: skip
        same = None if bits is None else bits.reshape(-1)[part]
        sums = sums.plus(_of(a, b, same, tolerance, start + part.start))
    return sums


def _few(elements: int) -> Iterator[slice]:
    for start in range(0, elements, VALUES):
        yield slice(start, min(start + VALUES, elements))


def _of(a: torch.Tensor, b: torch.Tensor, bits: Matrix | None, tolerance: Tolerance, start: int) -> _Sums:
    """Of elements [n] of both, in fp64; `bits`: which of them are equal, where bits decide."""
    import torch

    equal = (a == b) | (a.isnan() & b.isnan())
    apart = (a - b).abs().masked_fill(equal, 0)  # of infinities, too
    size = torch.maximum(a.abs(), b.abs())
    relative = (apart / size).masked_fill(apart == 0, 0)
    if bits is None:
        wrong = ~(equal | (apart <= tolerance.atol + tolerance.rtol * size))
        wrong |= (a.isinf() | b.isinf()) & ~equal  # rtol times infinity is no measure
    else:
        wrong = ~torch.from_numpy(bits)
    places = wrong.nonzero()
    first = int(places[0]) if len(places) else None
    return _Sums(
        len(places), float(apart.max()), float(relative.max()), None if first is None else start + first,
        None if first is None else (float(a[first]), float(b[first])),
        float(a @ b), (float(a @ a), float(b @ b)),
    )  # fmt: skip


def _index(number: int, shape: Shape) -> Shape:
    """The index of the element that is `number` elements from the start."""
    found = []
    for size in reversed(shape):
        number, place = divmod(number, size)
        found.append(place)
    return tuple(reversed(found))
