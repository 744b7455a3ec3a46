"""Which attention heads lie on which tensor rank of an NxDT checkpoint, and the cuts that follow.

NxDT may hold each key and value head several times (`copies`, its kv_size_multiplier or kv_replicator), so that there
are as many as tensor ranks. Copies are dealt in an order that depends on the hardware, and query heads go where their
key head is. A slot is one copy of a key head with the query heads that read it.

Source: neuronx-distributed 0.18 `modules/qkv_linear.py` and `scripts/checkpoint_converter.py`.

Legend: a query heads, g key/value heads, r = a/g, d head dim. Heads are counted as in messages: for every group its r
query heads, its key head, its value head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ckptconv.cuts import Cut
from ckptconv.errors import LayoutError
from ckptconv.lazy import Shape, matrix
from ckptconv.ops import Tile

#: Order of the copies -> (that of the slots' query heads, that of their key heads). tiled: heads 0 .. g-1, again 0 ..
#: g-1, ... (trn1); adjacent: all copies of head 0, then of head 1, ... (the trn2 runtime); upstream: what AWS's
#: converter writes for trn2, whose queries meet the wrong keys.
ORDERS = {"tiled": ("tiled", "tiled"), "adjacent": ("adjacent", "adjacent"), "upstream": ("adjacent", "tiled")}

#: (first head in a message's order, or None for zeros; heads): what follows each other on a rank.
Run = tuple[int | None, int]


@dataclass(frozen=True)
class Blocks(Cut):
    """Dim 0 (or, `columns`, the last) in blocks of `size`, chosen for each rank; None is a block of zeros."""

    ranks: tuple[tuple[Run, ...], ...]
    size: int
    columns: bool = False
    repeated: bool = False

    def shape(self, keys: Sequence[Shape], tp: int) -> Shape:
        length = self.size * sum(count for _, count in self.ranks[0])
        return (*keys[0][:-1], length) if self.columns else (length, *keys[0][1:])

    def tiles(self, keys: Sequence[Shape], index: int, tp: int) -> list[Tile]:
        return [tile for tile, first in self._all(keys) if first is not None]

    def blanks(self, keys: Sequence[Shape], tp: int) -> list[Tile]:
        return [tile for tile, first in self._all(keys) if first is None]

    def _all(self, keys: Sequence[Shape]) -> Iterable[tuple[Tile, int | None]]:
        rows, cols = matrix(keys[0])
        for rank, runs in enumerate(self.ranks):
            at = 0
            for first, count in runs:
                start, length = (first or 0) * self.size, count * self.size
                if self.columns:
                    yield Tile(rank, 0, start, 0, at, rows, length), first
                else:
                    yield Tile(rank, start, 0, at, 0, length, cols), first
                at += length


@dataclass(frozen=True)
class Heads:
    """The heads of a model on `tp` ranks. `padded`: query heads with those that are zeros, at the end of each group."""

    a: int
    g: int
    d: int
    tp: int
    copies: int = 1
    order: str = "tiled"
    padded: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "padded", self.padded or self.a)
        fits = self.tp // self.g if self.tp % self.g == 0 else None
        hint = f" A multiplier of {fits} fits (tp / kv heads)." if fits and fits != self.copies else ""
        if self.padded % self.tp:
            raise LayoutError(
                f"tp {self.tp} does not divide {self.padded} query heads. Choose one that does, or --pad-attn-heads, "
                "which needs kv replication."
            )
        if not (self.copies == 1 and self.g % self.tp == 0) and self.tp != self.g * self.copies:
            raise LayoutError(
                f"tp {self.tp} with {self.g} kv heads and kv size multiplier {self.copies}: ranks would share heads. "
                f"Either tp divides the kv heads and the multiplier is 1, or tp is kv heads x multiplier.{hint}"
            )
        if self.padded != self.a and (self.order == "upstream" or (self.a // self.g) % self.each):
            raise LayoutError(
                f"{self.a} query heads in {self.g} groups cannot be padded to {self.padded} for kv size multiplier "
                f"{self.copies}: "
                + ("upstream's converter for trn2 has no layout for that. " if self.order == "upstream" else
                   f"{self.each} heads per rank do not divide the {self.a // self.g} of a group. ")
                + "Choose another tensor parallel size."
            )  # fmt: skip

    @property
    def each(self) -> int:
        """Query heads of a slot."""
        return self.padded // (self.g * self.copies)

    def _slots(self, rank: int, order: str) -> list[tuple[int, int]]:
        """(key head, number of its copy) of the slots of a rank."""
        number = self.g * self.copies // self.tp
        slots = range(rank * number, (rank + 1) * number)
        if order == "tiled":
            return [(slot % self.g, slot // self.g) for slot in slots]
        return [divmod(slot, self.copies) for slot in slots]

    def queries(self, rank: int) -> list[int | None]:
        """Query heads of a rank, None for padding."""
        r = self.a // self.g
        heads: list[int | None] = []
        for key, copy in self._slots(rank, ORDERS[self.order][0]):
            within = range(copy * self.each, (copy + 1) * self.each)
            heads += [key * r + n if n < r else None for n in within]
        return heads

    def keys(self, rank: int) -> list[int]:
        """Key (and value) heads of a rank."""
        return [key for key, _ in self._slots(rank, ORDERS[self.order][1])]

    @cached_property
    def placed(self) -> tuple[tuple[tuple[int | None, ...], tuple[int, ...]], ...]:
        """(queries, keys) of all ranks: equal for orders that come to the same."""
        return tuple((tuple(self.queries(t)), tuple(self.keys(t))) for t in range(self.tp))

    # Heads in the order of messages

    def _query(self, head: int | None) -> int | None:
        r = self.a // self.g
        return None if head is None else head // r * (r + 2) + head % r

    def _value(self, kind: str, head: int) -> int:
        r = self.a // self.g
        return head * (r + 2) + r + (kind == "v")

    def cut(self, kinds: str, interleaved: bool = False) -> Blocks:
        """Rows of the grouped qkv that a tensor holds: `q`, `k`, `v`, all local heads of the one above those of the
        next; `interleaved`: head by head (as many of each kind)."""
        ranks = []
        for t in range(self.tp):
            own = {"q": _runs(map(self._query, self.queries(t)))} if "q" in kinds else {}
            own |= {kind: [(self._value(kind, head), 1) for head in self.keys(t)] for kind in kinds if kind != "q"}
            if interleaved:
                single = {kind: [(None if a is None else a + n, 1) for a, c in runs for n in range(c)]
                          for kind, runs in own.items()}  # fmt: skip
                ranks.append(tuple(run for runs in zip(*(single[kind] for kind in kinds), strict=True) for run in runs))
            else:
                ranks.append(tuple(run for kind in kinds for run in own[kind]))
        return Blocks(tuple(ranks), self.d, repeated=self.copies > 1 and kinds != "q")

    def columns(self) -> Blocks:
        """Columns of the attention output projection [h, a*d], in the order of the query heads."""
        return Blocks(tuple(tuple(_runs(self.queries(t))) for t in range(self.tp)), self.d, columns=True)


def _runs(heads: Iterable[int | None]) -> list[Run]:
    """Neighbours that stay neighbours, taken together."""
    runs: list[Run] = []
    for head in heads:
        if runs:
            first, count = runs[-1]
            if head == (None if first is None else first + count):
                runs[-1] = (first, count + 1)
                continue
        runs.append((head, 1))
    return runs
