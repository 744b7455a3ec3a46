"""How the processes of a torchrun job share a conversion: whole files to write, and bytes to digest.

Files are dealt out in the order in which the stream reaches them, in runs of about the same number of bytes: what one
message fills lies together (the ranks of a pipeline stage, a shard), so most tensors are read by one process only.
Where several processes write parts of a tensor, each reads its part, and they share the digest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

#: Rows (or columns) [first, end) of a tensor.
Span = tuple[int, int]
T = TypeVar("T")


def dealt(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Who writes which file: `sizes` (name -> bytes) is in the order of the stream."""
    total, passed = sum(sizes.values()), 0
    found: dict[str, int] = {}
    for name, size in sizes.items():
        middle = passed + size / 2
        found[name] = min(ranks - 1, int(middle * ranks / total)) if total else 0
        passed += size
    return found


def counted(rows: int, targets: Iterable[tuple[int, Span]], others: Sequence[int], rank: int) -> list[Span]:
    """The rows of a tensor whose bytes `rank` digests: all ranks together digest every row once.

    targets: (rank, rows) of what is written, everyone's; others: the ranks that share rows which nobody writes.
    """
    spans = [(span, who) for who, span in targets]
    owners = sorted({who for (start, end), who in spans if start < min(rows, end)}) or sorted(set(others))
    if not rows:
        return [(0, 0)] if rank == owners[0] else []
    found: list[Span] = []
    for start, end, writing in _swept(rows, spans):
        sharing = sorted(set(writing)) or owners
        if rank not in sharing:
            continue
        place, length = sharing.index(rank), end - start
        first, last = (start + n * length // len(sharing) for n in (place, place + 1))
        if first == last:
            continue
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
    return found


def read(
    shape: tuple[int, int], targets: Sequence[tuple[int, Span, Span]], others: Sequence[int], rank: int
) -> int:
    """Elements of a [rows, cols] tensor that `rank` reads: what it digests whole rows of, and what it writes.

    targets: (rank, rows, columns) of what is written, everyone's; others: as in `counted`.
    """
    rows, cols = shape
    digested = counted(rows, [(who, span) for who, span, _ in targets], others, rank)
    wanted = [*((span, (0, cols)) for span in digested), *((span, part) for who, span, part in targets if who == rank)]
    return sum(
        (end - start) * (max(right for _, right in parts) - min(left for left, _ in parts))
        for start, end, parts in _swept(rows, wanted) if parts
    )  # fmt: skip


def _swept(rows: int, spans: Iterable[tuple[Span, T]]) -> Iterator[tuple[int, int, list[T]]]:
    """(first row, end, what spans have) of consecutive runs of rows that lie in the same spans; padding is left out."""
    edges, begins = {0, rows}, dict[int, list[tuple[int, T]]]()
    for (start, end), value in spans:
        if start < min(rows, end):
            edges |= {start, min(rows, end)}
            begins.setdefault(start, []).append((end, value))
    active: list[tuple[int, T]] = []
    for first, last in pairwise(sorted(edges)):
        active = [one for one in active if first < one[0]] + begins.get(first, [])
        yield first, last, [value for _, value in active]
