"""CRC32 of runs, against zlib."""

from __future__ import annotations

import itertools
import random
import zlib

import pytest

from ckptconv import checksum

DATA = random.Random(0).randbytes(5000)


@pytest.mark.parametrize("cut", [0, 1, 7, 64, 2500, 4999, 5000])
def test_combine_is_the_checksum_of_both(cut: int) -> None:
    first, second = DATA[:cut], DATA[cut:]
    assert checksum.combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(DATA)


def test_combine_with_much_data() -> None:
    """A known value of a length that cannot be held: 2 ** 40 zero bytes are 1024 times 2 ** 30."""
    crc = zlib.crc32(bytes(1 << 20))
    for power in range(20, 24):
        crc = checksum.combine(crc, crc, 1 << power)
    assert crc == zlib.crc32(bytes(1 << 24))


@pytest.mark.parametrize("seed", range(5))
def test_runs_in_any_order_give_the_whole(seed: int) -> None:
    chance = random.Random(seed)
    edges = sorted({0, len(DATA), *(chance.randrange(len(DATA)) for _ in range(12))})
    pieces = list(itertools.pairwise(edges))
    chance.shuffle(pieces)
    runs = checksum.Runs()
    for start, end in pieces:
        runs.add(start, end - start, zlib.crc32(DATA[start:end]))
    assert checksum.whole(runs.runs, len(DATA)) == zlib.crc32(DATA)


def test_runs_that_follow_one_another_are_one() -> None:
    runs = checksum.Runs()
    for start in range(0, 50, 10):
        runs.add(start, 10, zlib.crc32(DATA[start : start + 10]))
    assert runs.runs == [[0, 50, zlib.crc32(DATA[:50])]]


@pytest.mark.parametrize(
    ("pieces", "nbytes"),
    [
        ([(0, 10), (20, 30)], 30),  # a hole
        ([(0, 10), (5, 15)], 15),  # an overlap
        ([(0, 10), (0, 10)], 10),  # twice
        ([(0, 10)], 20),  # too short
        ([(0, 10)], 5),  # too long
        ([(5, 10)], 10),  # begins late
        ([], 1),
    ],
)
def test_what_does_not_cover_has_no_checksum(pieces: list[tuple[int, int]], nbytes: int) -> None:
    runs = [[start, end, zlib.crc32(DATA[start:end])] for start, end in pieces]
    assert checksum.whole(runs, nbytes) is None


def test_nothing_has_the_checksum_of_nothing() -> None:
    assert checksum.whole([], 0) == zlib.crc32(b"")
