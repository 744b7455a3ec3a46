"""How the processes of a torchrun job share a conversion: whole files to write, and bytes to digest.

Files are dealt out in the order in which the stream reaches them, in runs of about the same number of bytes: what one
message fills lies together (the ranks of a pipeline stage, a shard), so most tensors are read by one process only.
Where several processes write parts of a tensor, each reads its part, and they share the digest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

#: Rows (or columns) [first, end) of a tensor.
Span = tuple[int, int]


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
    spans = [(who, (max(0, start), min(rows, end))) for who, (start, end) in targets]
    spans = [(who, span) for who, span in spans if span[0] < span[1]]
    edges = sorted({0, rows} | {edge for _, span in spans for edge in span})
    owners = sorted({who for who, _ in spans}) or sorted(set(others))
    begins: dict[int, list[tuple[int, Span]]] = {}
    for one in spans:
        begins.setdefault(one[1][0], []).append(one)
    active: list[tuple[int, Span]] = []
    found: list[Span] = []
    for start, end in pairwise(edges):
        active = [one for one in active if start < one[1][1]] + begins.get(start, [])
        sharing = sorted({who for who, _ in active}) or owners
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
    if not rows and rank == owners[0]:
        return [(0, 0)]
    return found


def read(
    shape: tuple[int, int], targets: Sequence[tuple[int, Span, Span]], others: Sequence[int], rank: int
) -> int:
    """Elements of a [rows, cols] tensor that `rank` reads: what it digests whole rows of, and what it writes.

    targets: (rank, rows, columns) of what is written, everyone's; others: as in `counted`.
    """
    rows, cols = shape
    digested = counted(rows, [(who, span) for who, span, _ in targets], others, rank)
    own = [(span, columns) for who, span, columns in targets if who == rank]
    total = sum(end - start for start, end in digested) * cols
    edges = sorted({0, rows} | {edge for span in [*digested, *(span for span, _ in own)] for edge in span})
    begins: dict[int, list[tuple[Span, Span]]] = {}
    for one in own:
        begins.setdefault(one[0][0], []).append(one)
    active: list[tuple[Span, Span]] = []
    whole = iter([*digested, (rows, rows)])
    start, end = next(whole)
    for first, last in pairwise(edge for edge in edges if edge <= rows):
        active = [one for one in active if first < one[0][1]] + begins.get(first, [])
        while end <= first and end < rows:
            start, end = next(whole)
        if active and not start <= first < end:
            total += (last - first) * (max(c[1] for _, c in active) - min(c[0] for _, c in active))
    return total
