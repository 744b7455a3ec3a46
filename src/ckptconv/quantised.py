"""Tensors stored as codes of 8 or 4 bits with one scale per block, read as numbers and made of numbers, lazily.

Sources: DeepSeek-V3 `README_WEIGHTS.md` and `inference/kernel.py` (blocks count from the first row and column, those
at the edges are smaller, a value is code * scale although the scale is called inverse); OCP Microscaling Formats 1.0
(E2M1 codes, E8M0 scales: 2 ** (byte - 127), byte 255 is NaN); gpt-oss (the first of two values is in the low four
bits). Rounding: a product is computed in float32 and rounded once, to nearest even, which is what transformers does.

Not here: which tensors are quantised and what their parts are called (families/quantised.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ckptconv import dtypes
from ckptconv.errors import SourceError, TableError, TargetError
from ckptconv.lazy import FileTensor, LazyTensor, Shape

if TYPE_CHECKING:
    import numpy as np

    from ckptconv.lazy import Matrix

    Floats = np.ndarray[Any, np.dtype[np.float32]]

Block = tuple[int, int]

#: Values worked on at once: what they need stays in a core's cache.
CHUNK = 1 << 16
#: The largest number of E4M3, and the smallest scale that is written: the smallest normal float32.
MOST, LEAST_SCALE = 448.0, 2.0**-126


@dataclass(frozen=True, slots=True)
class Coding:
    """Floating point codes: sign, `exponent` bits biased by `bias`, `mantissa` bits; `nan`: the last code is none."""

    exponent: int
    mantissa: int
    bias: int
    nan: bool

    @property
    def per_byte(self) -> int:
        return 8 // (1 + self.exponent + self.mantissa)


E4M3 = Coding(4, 3, 7, nan=True)
E2M1 = Coding(2, 1, 1, nan=False)


@cache
def _values(coding: Coding) -> Floats:
    """The number of every code."""
    import numpy as np

    half = 1 << (coding.exponent + coding.mantissa)
    code = np.arange(half)
    exponent, mantissa = code >> coding.mantissa, code & ((1 << coding.mantissa) - 1)
    whole = np.where(exponent == 0, mantissa, mantissa + (1 << coding.mantissa))
    positive = np.ldexp(whole.astype(np.float32), np.maximum(exponent, 1) - coding.bias - coding.mantissa)
    both = np.concatenate([positive, -positive]).astype(np.float32)
    if coding.nan:
        both[[half - 1, 2 * half - 1]] = np.nan
    return both


@cache
def _pairs(coding: Coding) -> Matrix:
    """The numbers of two codes, as 8 opaque bytes, by the byte or the two bytes that hold them: half the lookups."""
    import numpy as np

    one = _values(coding)
    count = len(one)
    both = np.stack([np.tile(one, count), np.repeat(one, count)], axis=-1)
    return both.view(np.uint64).reshape(-1)


def _decode(raw: Matrix, coding: Coding, out: Floats) -> None:
    """Numbers of the codes in a flat array of an even count of bytes."""
    import numpy as np

    index = raw.view(np.uint16) if coding.per_byte == 1 else raw
    # Every index is inside the table; any other mode than `raise` lets numpy write without a buffer between.
    np.take(_pairs(coding), index, out=out[: 2 * len(index)].view(np.uint64), mode="clip")


@dataclass(frozen=True, slots=True)
class Dequantised(LazyTensor):
    """[..., r, c] numbers of type `dtype`: those of `codes` times the scale of their block.

    codes: one byte each, or two in a byte: [..., r, c / 2]; scales: [..., ceil(r / block rows), ceil(c / block cols)],
    floating, or uint8 for exponents (E8M0). `name`: the scales' own, for errors. Reading raises SourceError when a
    scale is no finite number.
    """

    codes: LazyTensor
    scales: LazyTensor
    coding: Coding
    block: Block
    dtype: str
    shape: Shape
    name: str

    @property
    def band(self) -> int:
        return self.codes.band

    def read(self, out: Matrix, row: int, col: int) -> None:
        import numpy as np

        wide, per = self.block[1], self.coding.per_byte
        left, right = col - col % wide, min(self.cols, _up(col + out.shape[1], wide))
        scales = self._scales(row, out.shape[0], left, right)
        width = right - left
        step = min(out.shape[0], max(1, _up(CHUNK // width, self.band)))
        # Made once: what the allocator gives back to the system and fetches again costs more than all the rest.
        memory = np.zeros(_up(step * width // per, 2), np.uint8)
        numbers, work = np.empty((2, _up(step * width, 2)), np.float32)
        for top in range(0, out.shape[0], step):
            height = min(step, out.shape[0] - top)
            raw = memory[: height * width // per].reshape(height, width // per)
            self.codes.read(raw, row + top, left // per)
            _decode(memory, self.coding, numbers)
            values = numbers[: height * width].reshape(height, width)
            with np.errstate(over="ignore"):
                _scale(values, scales[top : top + height], wide)
                wanted = values[:, col - left : col - left + out.shape[1]]
                _round(wanted, self.dtype, work[: wanted.size].reshape(wanted.shape), out[top : top + height])

    def _scales(self, row: int, count: int, left: int, right: int) -> Floats:
        """The scales [count, blocks] of rows and columns; `left` is a multiple of the block's columns."""
        import numpy as np

        tall, wide = self.block
        height = self.shape[-2]
        rows = np.arange(row, row + count)
        index = rows // height * _blocks(height, tall) + rows % height // tall
        size = index[-1] + 1 - index[0], _blocks(right, wide) - left // wide
        raw = np.empty(size, dtypes.opaque(self.scales.dtype))
        self.scales.read(raw, int(index[0]), left // wide)
        if self.scales.dtype == "uint8":
            bad = raw == 255
            found = np.ldexp(np.float32(1), np.minimum(raw, 254).astype(np.int32) - 127)
        else:
            found = _floats(raw, self.scales.dtype)
            bad = ~np.isfinite(found)
        if bad.any():
            file = f"{self.scales.path}: " if isinstance(self.scales, FileTensor) else ""
            at = np.argwhere(bad)[0]
            place = [int(index[0] + at[0]), int(left // wide + at[1])]
            value = "NaN" if self.scales.dtype == "uint8" else found[tuple(at)]
            raise SourceError(f"{file}{self.name}: the scale at {place} is {value}, expected a finite number. "
                              "The file is damaged: fetch or copy it again.")  # fmt: skip
        result: Floats = found[index - index[0]]
        return result


def _up(number: int, step: int) -> int:
    """`number` rounded up to a multiple of `step`."""
    return -(-number // step) * step


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _scale(values: Floats, scales: Floats, wide: int) -> None:
    """Multiply [r, c] in place by [r, ceil(c / wide)]."""
    full = values.shape[1] // wide
    main = values[:, : full * wide].reshape(len(values), full, wide)  # splits the last axis: a view
    main *= scales[:, :full, None]
    if full < scales.shape[1]:
        values[:, full * wide :] *= scales[:, full:]


def _round(values: Floats, dtype: str, work: Floats, out: Matrix) -> None:
    """Numbers as opaque elements of `dtype`, rounded to nearest even; `work` is memory of their size."""
    import numpy as np

    if dtype == "float32":
        out[...] = values.view(np.uint32)
    elif dtype == "float16":
        np.copyto(out.view(np.float16), values, casting="same_kind")
    elif dtype == "bfloat16":
        bits, up = values.view(np.uint32), work.view(np.uint32)
        np.right_shift(bits, 16, out=up)
        up &= 1
        up += 0x7FFF
        up += bits  # a NaN from our table stays one: its low bits are clear
        out[...] = up.view(np.uint16)[:, 1::2]
    else:
        raise TableError(f"numbers cannot be rounded to {dtype}.")


def _floats(raw: Matrix, dtype: str) -> Floats:
    """Opaque elements of a type that float32 holds exactly, as float32."""
    import numpy as np

    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if dtype == "float16":
        return raw.view(np.float16).astype(np.float32)
    if dtype == "float32":
        return raw.view(np.float32)
    raise TableError(f"{dtype} is not read as float32.")


# Numbers to codes


@dataclass(frozen=True, slots=True)
class _OfBlocks(LazyTensor):
    """What is computed from `base` [r, c] block by block: `name` is the tensor's, for errors.

    Reading raises TargetError when a number is not finite: a scale of its block could not be.
    """

    base: LazyTensor
    block: Block
    name: str

    def _tiles(self, number: int, left: int, right: int) -> Iterator[tuple[int, Floats]]:
        """Columns of the rows that share their scales, a few blocks of them at once, each with its first column."""
        import numpy as np

        top = number * self.block[0]
        count = min(self.block[0], self.base.rows - top)
        raw = np.empty((count, right - left), dtypes.opaque(self.base.dtype))
        self.base.read(raw, top, left)
        step = _up(CHUNK // count, self.block[1])
        for start in range(0, right - left, step):
            yield left + start, _floats(raw[:, start : start + step], self.base.dtype)

    def _scales_of(self, values: Floats) -> Floats:
        """One scale per block of columns: the largest number becomes the largest code."""
        import numpy as np

        highest = np.maximum(values.max(axis=0), -values.min(axis=0))
        highest = np.maximum.reduceat(highest, np.arange(0, values.shape[1], self.block[1]))
        if not np.isfinite(highest).all():
            raise TargetError(
                f"{self.name}: holds NaN or infinite numbers, which fp8 blocks cannot. Write it without --quantize."
            )
        scales = np.maximum(highest / np.float32(MOST), np.float32(LEAST_SCALE))
        result: Floats = np.where(highest == 0, np.float32(1), scales)
        return result


@dataclass(frozen=True, slots=True)
class Fp8Scales(_OfBlocks):
    """[ceil(r / block rows), ceil(c / block cols)] float32: the largest magnitude of each block / 448, of zeros 1."""

    dtype = "float32"

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return _blocks(self.base.rows, self.block[0]), _blocks(self.base.cols, self.block[1])

    def read(self, out: Matrix, row: int, col: int) -> None:
        import numpy as np

        wide = self.block[1]
        left, right = col * wide, min(self.base.cols, (col + out.shape[1]) * wide)
        for n in range(out.shape[0]):
            for start, values in self._tiles(row + n, left, right):
                scales = self._scales_of(values).view(np.uint32)
                out[n, start // wide - col : start // wide - col + len(scales)] = scales


@dataclass(frozen=True, slots=True)
class Fp8Codes(_OfBlocks):
    """[r, c] E4M3: `base` / scale, rounded to nearest even as if computed exactly, at most 448."""

    dtype = "float8_e4m3fn"

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.base.shape

    @property
    def band(self) -> int:
        return self.block[0]

    def read(self, out: Matrix, row: int, col: int) -> None:
        tall, wide = self.block
        left, right = col - col % wide, min(self.base.cols, _up(col + out.shape[1], wide))
        for number in range(row // tall, _blocks(row + out.shape[0], tall)):
            first = number * tall
            top, bottom = max(row, first), min(row + out.shape[0], first + tall)
            for start, values in self._tiles(number, left, right):
                codes = _encode(values[top - first : bottom - first], self._scales_of(values), wide)
                begin, end = max(col, start), min(col + out.shape[1], start + codes.shape[1])
                out[top - row : bottom - row, begin - col : end - col] = codes[:, begin - start : end - start]


def _encode(values: Floats, scales: Floats, wide: int) -> Matrix:
    """E4M3 codes of values [r, c] / scales [ceil(c / wide)]."""
    import numpy as np

    divisor = np.repeat(scales, wide)[: values.shape[1]]
    ratio = values / divisor
    _untie(ratio, values, divisor)
    np.clip(ratio, -MOST, MOST, out=ratio)
    bits = ratio.view(np.uint32)
    sign = (bits >> 24).astype(np.uint8) & 0x80
    bits &= 0x7FFFFFFF
    tiny = bits < (121 << 23)  # below 2 ** -6: multiples of 2 ** -9, which are what is left of a sum with 2 ** 14
    small = (ratio + np.float32(2**14)).view(np.uint32) - np.uint32(0x46800000)
    codes = bits >> 20
    codes &= 1
    codes += 0x7FFFF
    codes += bits
    codes >>= 20
    codes -= 120 << 3  # exponent biases: 127 and 7
    np.copyto(codes, small, where=tiny)
    return codes.astype(np.uint8) | sign


def _untie(ratio: Floats, values: Floats, divisor: Floats) -> None:
    """Where a rounded ratio lies halfway between two codes and the exact one does not, move it to the right side."""
    import numpy as np

    halfway = np.flatnonzero(((ratio.view(np.uint32) & 0x7FFFF) == 0) & (ratio != 0))  # and some that are not
    if not len(halfway):
        return
    found = ratio.ravel()[halfway]
    rows, cols = np.divmod(halfway, ratio.shape[1])
    rest = values[rows, cols].astype(np.float64) - found.astype(np.float64) * divisor[cols]  # exact
    moved = np.nextafter(found, np.where(rest > 0, np.float32(np.inf), np.float32(-np.inf)))
    np.put(ratio, halfway, np.where(rest == 0, found, moved))


def rounded(base: LazyTensor, block: Block, dtype: str, name: str) -> LazyTensor:
    """`base` as it is read back after it was written as codes and scales."""
    codes, scales = Fp8Codes(base, block, name), Fp8Scales(base, block, name)
    return Dequantised(codes, scales, E4M3, block, dtype, base.shape, name)


def scales_shape(codes: Shape, block: Block) -> Shape | None:
    """[.., ceil(r / block rows), ceil(c / block cols)] for codes [.., r, c]; None when they have no such scales."""
    if len(codes) < 2 or 0 in codes:
        return None
    return (*codes[:-2], _blocks(codes[-2], block[0]), _blocks(codes[-1], block[1]))
