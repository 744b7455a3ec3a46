"""Reversible layouts: how one message tensor (the whole) is made of several stored tensors (the parts).

An op is one list of rectangles (`tiles`): reading puts the parts together along it (`fuse`), writing takes the whole
apart along it (`split`), so no second function undoes a first. Pure: shapes and a ModelSpec in, rectangles out.

Legend: h hidden, f ffn, a query heads, g query groups, r = a/g, d head dim. Tensors are matrices as in lazy.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckptconv.errors import TableError
from ckptconv.lazy import Assembly, LazyTensor, Piece, Shape, matrix
from ckptconv.spec import ModelSpec


@dataclass(frozen=True)
class Tile:
    """The rectangle [rows, cols] at (row, col) of the whole is the one at (part_row, part_col) of part `part`."""

    part: int
    row: int
    col: int
    part_row: int
    part_col: int
    rows: int
    cols: int


class Op:
    """Base of the table's third column: from one message key to the tensors a family stores."""

    #: how many stored tensors the whole is made of
    parts = 1

    def part_shapes(self, whole: Shape, spec: ModelSpec) -> list[Shape]:
        """Shape of every part, given the whole's."""
        raise NotImplementedError

    def tiles(self, whole: Shape, spec: ModelSpec) -> list[Tile]:
        """Rectangles that cover the whole and every part exactly once."""
        raise NotImplementedError


@dataclass(frozen=True)
class Copy(Op):
    """One stored tensor, as it is."""

    def part_shapes(self, whole: Shape, spec: ModelSpec) -> list[Shape]:
        return [whole]

    def tiles(self, whole: Shape, spec: ModelSpec) -> list[Tile]:
        rows, cols = matrix(whole)
        return [Tile(0, 0, 0, 0, 0, rows, cols)]


@dataclass(frozen=True)
class FuseQKV(Op):
    """q [a*d, h], k [g*d, h], v [g*d, h] <-> [(a+2g)*d, h], per group: r query heads, key head, value head.

    The same for biases (without h). Source: Megatron-LM `attention.py:get_query_key_value_tensors`.
    """

    parts = 3

    def part_shapes(self, whole: Shape, spec: ModelSpec) -> list[Shape]:
        d = spec.kv_channels
        heads = (spec.num_attention_heads, spec.num_query_groups, spec.num_query_groups)
        return [(n * d, *whole[1:]) for n in heads]

    def tiles(self, whole: Shape, spec: ModelSpec) -> list[Tile]:
        d, r, cols = spec.kv_channels, spec.heads_per_group, matrix(whole)[1]
        tiles = []
        for group in range(spec.num_query_groups):
            top = group * (r + 2) * d
            tiles += [
                Tile(0, top, 0, group * r * d, 0, r * d, cols),
                Tile(1, top + r * d, 0, group * d, 0, d, cols),
                Tile(2, top + (r + 1) * d, 0, group * d, 0, d, cols),
            ]
        return tiles


COPY = Copy()
FUSE_QKV = FuseQKV()


def assemble(tiles: Sequence[Tile], parts: Sequence[LazyTensor], shape: Shape) -> LazyTensor:
    """The whole made of `parts` along `tiles`; a whole that is one untouched part is that part."""
    if len(tiles) == 1 and parts[tiles[0].part].shape == shape:
        return parts[tiles[0].part]
    kinds = {part.dtype for part in parts}
    if len(kinds) > 1:
        raise TableError(f"parts of one tensor have different element types: {', '.join(sorted(kinds))}")
    pieces = [Piece(t.row, t.col, t.rows, t.cols, parts[t.part], t.part_row, t.part_col) for t in tiles]
    return Assembly(kinds.pop(), shape, tuple(pieces))


def fuse(op: Op, parts: Sequence[LazyTensor], whole: Shape, spec: ModelSpec) -> LazyTensor:
    """The message tensor, from what a family stores."""
    return assemble(op.tiles(whole, spec), parts, whole)


def split(op: Op, whole: LazyTensor, spec: ModelSpec) -> list[LazyTensor]:
    """What a family stores, from the message tensor."""
    shapes = op.part_shapes(whole.shape, spec)
    tiles = op.tiles(whole.shape, spec)
    return [
        assemble([Tile(0, t.part_row, t.part_col, t.row, t.col, t.rows, t.cols) for t in tiles if t.part == n],
                 [whole], shape)
        for n, shape in enumerate(shapes)
    ]  # fmt: skip
