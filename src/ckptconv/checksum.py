"""CRC32 of data that is read in pieces and in any order.

A tensor's digest and a zip entry's checksum are the same function over the same bytes, so one pass serves both. The
combination rule is that of zlib's `crc32_combine` (polynomial arithmetic over GF(2), reflected, 0xEDB88320).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import cache

crc32 = zlib.crc32

_POLYNOMIAL = 0xEDB88320


def _multiply(a: int, b: int) -> int:
    """a * b modulo the polynomial, bit 31 being x^0."""
    product, bit = 0, 1 << 31
    while bit:
        if a & bit:
            product ^= b
        bit >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@cache
def _shift(count: int) -> int:
    """x^(8 * count): what appending `count` zero bytes multiplies a checksum by."""
    result, square = 1 << 31, 1 << 23  # x^0 and x^8
    while count:
        if count & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        count >>= 1
    return result


def combine(first: int, second: int, second_bytes: int) -> int:
    """The CRC32 of two runs of bytes one after the other, from their own."""
    return _multiply(_shift(second_bytes), first) ^ second


class Runs:
    """Checksums of runs of bytes of one object, kept as few as the order of their arrival allows."""

    def __init__(self) -> None:
        self.runs: list[list[int]] = []  # [start, end, crc]

    def add(self, start: int, nbytes: int, crc: int) -> None:
        """Account for `nbytes` bytes at `start` whose checksum is `crc`."""
        if self.runs and self.runs[-1][1] == start:
            last = self.runs[-1]
            last[1], last[2] = start + nbytes, combine(last[2], crc, nbytes)
        else:
            self.runs.append([start, start + nbytes, crc])


def merged(runs: Iterable[list[int]]) -> list[list[int]]:
    """Byte runs [start, end, crc] in order, with those that touch made one. They must not overlap."""
    found = Runs()
    for start, end, crc in sorted(runs):
        found.add(start, end - start, crc)
    return found.runs


def whole(runs: Iterable[list[int]], nbytes: int) -> int | None:
    """The CRC32 of bytes 0 to `nbytes` when `runs` cover them exactly once, else None."""
    position, crc = 0, 0
    for start, end, value in sorted(runs):
        if start != position:
            return None
        crc = combine(crc, value, end - start) if position else value
        position = end
    return crc if position == nbytes else None
