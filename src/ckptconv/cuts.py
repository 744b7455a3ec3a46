"""How a stored tensor is cut over tensor-parallel ranks, in Megatron's words.

A cut says, for the message keys that one stored tensor holds, which rectangle of which key lies where on which rank.
Joining and cutting use the same rectangles. Pure: shapes in, rectangles out.

Source: Megatron-LM `core/tensor_parallel/layers.py` (column = dim 0, row = dim 1 of [out, in]), `core/transformer/
mlp.py` (gated fc1: every rank holds [W_t; V_t]), `core/transformer/attention.py` (qkv by query group).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckptconv.errors import LayoutError
from ckptconv.lazy import Shape, matrix
from ckptconv.ops import Tile
from ckptconv.spec import ModelSpec


class Cut:
    """Base. `keys` shapes are those of the message tensors that one stored tensor holds, in its order."""

    #: every rank holds the same bytes
    replicated = False
    #: some rectangles of a key lie on several ranks, the same on all of them
    repeated = False

    def shape(self, keys: Sequence[Shape], tp: int) -> Shape:
        """Shape of one rank's part, as tiles see it."""
        raise NotImplementedError

    def stored(self, keys: Sequence[Shape], tp: int) -> Shape:
        """The same elements in the shape that a file has them in."""
        return self.shape(keys, tp)

    def tiles(self, keys: Sequence[Shape], index: int, tp: int) -> list[Tile]:
        """Rectangles of key number `index`; `part` is the rank."""
        raise NotImplementedError

    def check(self, name: str, keys: Sequence[Shape], tp: int, spec: ModelSpec) -> None:
        """Raise LayoutError when `tp` does not divide what is cut."""

    def blanks(self, keys: Sequence[Shape], tp: int) -> list[Tile]:
        """Rectangles of parts that hold nothing of any key, and zeros: the tiles of an imaginary zero key."""
        return []


@dataclass(frozen=True)
class Replicated(Cut):
    """The whole on every rank."""

    replicated = True

    def shape(self, keys: Sequence[Shape], tp: int) -> Shape:
        return keys[0]

    def tiles(self, keys: Sequence[Shape], index: int, tp: int) -> list[Tile]:
        rows, cols = matrix(keys[0])
        return [Tile(rank, 0, 0, 0, 0, rows, cols) for rank in range(tp)]


@dataclass(frozen=True)
class ColumnParallel(Cut):
    """Dim 0 in equal contiguous runs; several keys lie one below the other on every rank (gated fc1: [W_t; V_t])."""

    def shape(self, keys: Sequence[Shape], tp: int) -> Shape:
        return (sum(k[0] for k in keys) // tp, *keys[0][1:])

    def tiles(self, keys: Sequence[Shape], index: int, tp: int) -> list[Tile]:
        rows, cols = matrix(keys[index])
        above = sum(matrix(k)[0] for k in keys[:index]) // tp
        return [Tile(t, t * (rows // tp), 0, above, 0, rows // tp, cols) for t in range(tp)]

    def check(self, name: str, keys: Sequence[Shape], tp: int, spec: ModelSpec) -> None:
        for key in keys:
            if key[0] % tp:
                raise LayoutError(
                    f"{name}: {key[0]} rows do not divide by tp {tp}. Choose a tensor parallel size that divides them."
                )


@dataclass(frozen=True)
class QKVColumnParallel(ColumnParallel):
    """Dim 0 of the grouped qkv. Whole groups per rank, or (tp > g) equal runs inside groups when g divides tp."""

    def check(self, name: str, keys: Sequence[Shape], tp: int, spec: ModelSpec) -> None:
        a, g = spec.num_attention_heads, spec.num_query_groups
        if a % tp or (g % tp and tp % g):
            raise LayoutError(
                f"{name}: tp {tp} does not divide {a} attention heads in {g} query groups. tp must divide the heads, "
                "and divide the groups or be a multiple of them."
            )
        super().check(name, keys, tp, spec)


@dataclass(frozen=True)
class GroupsOfQKV(QKVColumnParallel):
    """Dim 0 of the grouped qkv, in whole groups only."""

    def check(self, name: str, keys: Sequence[Shape], tp: int, spec: ModelSpec) -> None:
        _whole_groups(name, tp, spec)
        super().check(name, keys, tp, spec)


def _whole_groups(name: str, tp: int, spec: ModelSpec) -> None:
    if spec.num_query_groups % tp:
        raise LayoutError(
            f"{name}: tp {tp} does not divide {spec.num_query_groups} query groups (kv heads), of which a rank "
            "holds whole ones. Choose a tensor parallel size that divides them."
        )


@dataclass(frozen=True)
class HeadsOfQKV(Cut):
    """Queries, keys or values of the grouped qkv as a tensor of their own [n * d, h], dim 0 in whole query groups.

    first, count: which heads of a group they are, of its r query heads, key head and value head; d: head dim; pairs:
    rows 2j and 2j + 1 of a stored head are rows j and j + d/2 of the message's (Meta's rotary order). Two rows that
    follow each other are then seen as one, whose halves are rectangles.
    """

    first: int
    count: int
    group: int  # heads of a group: r + 2
    d: int
    pairs: bool = False

    def shape(self, keys: Sequence[Shape], tp: int) -> Shape:
        rows, *rest = self.stored(keys, tp)
        return (rows // 2, 2 * matrix(keys[0])[1]) if self.pairs else (rows, *rest)

    def stored(self, keys: Sequence[Shape], tp: int) -> Shape:
        return (keys[0][0] // self.group * self.count // tp, *keys[0][1:])

    def tiles(self, keys: Sequence[Shape], index: int, tp: int) -> list[Tile]:
        cols, d = matrix(keys[0])[1], self.d
        each = keys[0][0] // (self.group * d) // tp  # groups of a rank
        tiles = []
        for number in range(each * tp * self.count):
            group, head = divmod(number, self.count)
            top = (group * self.group + self.first + head) * d
            rank, local = divmod(number, each * self.count)
            if self.pairs:
                half = d // 2
                tiles += [Tile(rank, top + n * half, 0, local * half, n * cols, half, cols) for n in (0, 1)]
            else:
                tiles.append(Tile(rank, top, 0, local * d, 0, d, cols))
        return tiles

    def check(self, name: str, keys: Sequence[Shape], tp: int, spec: ModelSpec) -> None:
        _whole_groups(name, tp, spec)


@dataclass(frozen=True)
class HeadsColumnParallel(ColumnParallel):
    """Dim 0 in whole attention heads (multi-latent projections)."""

    def check(self, name: str, keys: Sequence[Shape], tp: int, spec: ModelSpec) -> None:
        if spec.num_attention_heads % tp:
            raise LayoutError(
                f"{name}: tp {tp} does not divide {spec.num_attention_heads} attention heads. "
                "Choose a tensor parallel size that divides them."
            )


@dataclass(frozen=True)
class RowParallel(Cut):
    """The last dimension in equal contiguous runs; several keys lie side by side on every rank."""

    def shape(self, keys: Sequence[Shape], tp: int) -> Shape:
        return (*keys[0][:-1], sum(key[-1] for key in keys) // tp)

    def tiles(self, keys: Sequence[Shape], index: int, tp: int) -> list[Tile]:
        rows, cols = matrix(keys[index])
        each, left = cols // tp, sum(key[-1] for key in keys[:index]) // tp
        return [Tile(t, 0, t * each, 0, left, rows, each) for t in range(tp)]

    def check(self, name: str, keys: Sequence[Shape], tp: int, spec: ModelSpec) -> None:
        for key in keys:
            if key[-1] % tp:
                raise LayoutError(
                    f"{name}: {key[-1]} columns do not divide by tp {tp}. "
                    "Choose a tensor parallel size that divides them."
                )


REPLICATED = Replicated()
COLUMN = ColumnParallel()
GATED_COLUMN = COLUMN  # a gated fc1 is its two keys, each column parallel, one below the other
QKV_COLUMN = QKVColumnParallel()
QKV_GROUPS = GroupsOfQKV()
HEADS_COLUMN = HeadsColumnParallel()
ROW = RowParallel()
