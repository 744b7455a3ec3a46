"""Reversible layouts: how message tensors (the wholes) are made of stored tensors (the parts).

An op is one list of rectangles (`tiles`): reading puts the parts together along it (`assemble`), writing takes the
wholes apart along it, so no second function undoes a first. Where the stored numbers are not rectangles of the
whole's (transposed, alternating), a `View` stands between the part and the op. Pure: shapes and a ModelSpec in.

Legend: h hidden, f ffn, a query heads, g query groups, r = a/g, d head dim, e experts. Tensors are matrices as in
lazy.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from ckptconv.errors import TableError
from ckptconv.lazy import Assembly, LazyTensor, Ones, Piece, Shape, Strided, Transposed, Zeros, matrix
from ckptconv.spec import ModelSpec


@dataclass(frozen=True, slots=True)  # there are hundreds of thousands of them for a big model
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
    """Base of a family table's last column: from one or several message keys to the tensors a family stores."""

    def part_shapes(self, keys: Sequence[Shape], spec: ModelSpec) -> list[Shape]:
        """Shape of every part, given those of the keys."""
        raise NotImplementedError

    def tiles(self, keys: Sequence[Shape], index: int, spec: ModelSpec) -> list[Tile]:
        """Rectangles of key number `index`; those of all keys cover every key and every part exactly once."""
        raise NotImplementedError


@dataclass(frozen=True)
class Copy(Op):
    """One stored tensor per key, as it is."""

    def part_shapes(self, keys: Sequence[Shape], spec: ModelSpec) -> list[Shape]:
        return list(keys)

    def tiles(self, keys: Sequence[Shape], index: int, spec: ModelSpec) -> list[Tile]:
        rows, cols = matrix(keys[index])
        return [Tile(index, 0, 0, 0, 0, rows, cols)]


@dataclass(frozen=True)
class FuseQKV(Op):
    """q [a*d, h], k [g*d, h], v [g*d, h] <-> [(a+2g)*d, h], per group: r query heads, key head, value head.

    The same for biases (without h). Source: Megatron-LM `attention.py:get_query_key_value_tensors`. `joined`: the
    three are stored as one tensor, all of q above all of k above all of v.
    """

    joined: bool = False

    def part_shapes(self, keys: Sequence[Shape], spec: ModelSpec) -> list[Shape]:
        if self.joined:
            return list(keys)
        d = spec.kv_channels
        heads = (spec.num_attention_heads, spec.num_query_groups, spec.num_query_groups)
        return [(n * d, *keys[0][1:]) for n in heads]

    def tiles(self, keys: Sequence[Shape], index: int, spec: ModelSpec) -> list[Tile]:
        d, r, g, cols = spec.kv_channels, spec.heads_per_group, spec.num_query_groups, matrix(keys[0])[1]
        q, k, v = (0, 0, 0) if self.joined else (0, 1, 2)
        above = (0, g * r * d, g * (r + 1) * d) if self.joined else (0, 0, 0)
        tiles = []
        for group in range(g):
            top = group * (r + 2) * d
            tiles += [
                Tile(q, top, 0, above[0] + group * r * d, 0, r * d, cols),
                Tile(k, top + r * d, 0, above[1] + group * d, 0, d, cols),
                Tile(v, top + (r + 1) * d, 0, above[2] + group * d, 0, d, cols),
            ]
        return tiles


@dataclass(frozen=True)
class FuseKV(Op):
    """k [g*d, h], v [g*d, h] <-> [2*g*d, h], per group: key head, value head (attention to an encoder).

    Source: Megatron-LM `attention.py:CrossAttention.get_query_key_value_tensors`.
    """

    def part_shapes(self, keys: Sequence[Shape], spec: ModelSpec) -> list[Shape]:
        return [(keys[0][0] // 2, *keys[0][1:])] * 2

    def tiles(self, keys: Sequence[Shape], index: int, spec: ModelSpec) -> list[Tile]:
        d, cols = spec.kv_channels, matrix(keys[0])[1]
        return [
            Tile(part, (2 * group + part) * d, 0, group * d, 0, d, cols)
            for group in range(spec.num_query_groups)
            for part in (0, 1)
        ]


@dataclass(frozen=True)
class Stack(Op):
    """Several keys in one tensor, one below the other: [gate; up]."""

    def part_shapes(self, keys: Sequence[Shape], spec: ModelSpec) -> list[Shape]:
        return [(sum(key[0] for key in keys), *keys[0][1:])]

    def tiles(self, keys: Sequence[Shape], index: int, spec: ModelSpec) -> list[Tile]:
        rows, cols = matrix(keys[index])
        return [Tile(0, 0, 0, sum(matrix(key)[0] for key in keys[:index]), 0, rows, cols)]


@dataclass(frozen=True)
class Beside(Op):
    """Several keys in one tensor, side by side in its last dimension."""

    def part_shapes(self, keys: Sequence[Shape], spec: ModelSpec) -> list[Shape]:
        return [(*keys[0][:-1], sum(key[-1] for key in keys))]

    def tiles(self, keys: Sequence[Shape], index: int, spec: ModelSpec) -> list[Tile]:
        rows, cols = matrix(keys[index])
        return [Tile(0, 0, 0, 0, sum(key[-1] for key in keys[:index]), rows, cols)]


@dataclass(frozen=True)
class PerExpert(Op):
    """Keys [e, ...]: `inner` for every expert, whose parts follow each other expert by expert."""

    inner: Op

    def part_shapes(self, keys: Sequence[Shape], spec: ModelSpec) -> list[Shape]:
        return self.inner.part_shapes([key[1:] for key in keys], spec) * keys[0][0]

    def tiles(self, keys: Sequence[Shape], index: int, spec: ModelSpec) -> list[Tile]:
        each = [key[1:] for key in keys]
        count, rows = len(self.inner.part_shapes(each, spec)), prod(keys[index][1:-1])
        one = self.inner.tiles(each, index, spec)
        return [
            replace(tile, part=expert * count + tile.part, row=expert * rows + tile.row)
            for expert in range(keys[index][0])
            for tile in one
        ]


@dataclass(frozen=True)
class EachExpert(Op):
    """Keys [e, ...]: one stored tensor [e, ...] that holds for every expert what `inner` makes its single part."""

    inner: Op

    def part_shapes(self, keys: Sequence[Shape], spec: ModelSpec) -> list[Shape]:
        (part,) = self.inner.part_shapes([key[1:] for key in keys], spec)
        return [(keys[0][0], *part)]

    def tiles(self, keys: Sequence[Shape], index: int, spec: ModelSpec) -> list[Tile]:
        each = [key[1:] for key in keys]
        (part,) = self.inner.part_shapes(each, spec)
        rows, height = matrix(each[index])[0], matrix(part)[0]
        one = self.inner.tiles(each, index, spec)
        return [
            replace(tile, row=expert * rows + tile.row, part_row=expert * height + tile.part_row)
            for expert in range(keys[index][0])
            for tile in one
        ]


@dataclass(frozen=True)
class Experts(Op):
    """A key [e, m, h] whose experts are stored as one matrix: below each other [e*m, h], or `beside`, [m, e*h]."""

    beside: bool = False

    def part_shapes(self, keys: Sequence[Shape], spec: ModelSpec) -> list[Shape]:
        experts, rows, cols = keys[0]
        return [(rows, experts * cols) if self.beside else (experts * rows, cols)]

    def tiles(self, keys: Sequence[Shape], index: int, spec: ModelSpec) -> list[Tile]:
        experts, rows, cols = keys[0]
        if not self.beside:
            return [Tile(0, 0, 0, 0, 0, experts * rows, cols)]
        return [Tile(0, e * rows, 0, 0, e * cols, rows, cols) for e in range(experts)]


@dataclass(frozen=True)
class LatentHalves(Op):
    """Rotary rows of multi-latent attention: in pairs in the key, first all firsts, then all seconds in the part.

    They lie behind the n rows without rope of every query head, or (`shared`) behind the latent of keys and values.
    """

    shared: bool = False

    def part_shapes(self, keys: Sequence[Shape], spec: ModelSpec) -> list[Shape]:
        return list(keys)

    def tiles(self, keys: Sequence[Shape], index: int, spec: ModelSpec) -> list[Tile]:
        if spec.mla is None:
            raise TableError("latent rotary rows in a model without multi-latent attention.")
        plain = spec.mla.kv_lora_rank if self.shared else spec.mla.qk_head_dim
        rope, (rows, cols) = spec.mla.qk_rope_head_dim, matrix(keys[index])
        tiles = []
        for top in range(0, rows, plain + rope):
            tiles.append(Tile(0, top, 0, top, 0, plain, cols))
            for row in range(rope):
                pair, second = divmod(row, 2)
                tiles.append(Tile(0, top + plain + row, 0, top + plain + second * (rope // 2) + pair, 0, 1, cols))
        return tiles


@dataclass(frozen=True)
class Constant(Op):
    """Keys that are stored nowhere, as each of their elements is 1 (`ones`) or 0."""

    ones: bool

    def part_shapes(self, keys: Sequence[Shape], spec: ModelSpec) -> list[Shape]:
        return []

    def tiles(self, keys: Sequence[Shape], index: int, spec: ModelSpec) -> list[Tile]:
        return []

    def whole(self, key: Shape, dtype: str) -> LazyTensor:
        """The message tensor."""
        return Ones(dtype, key) if self.ones else Zeros(dtype, key)


@dataclass(frozen=True)
class View:
    """How a stored tensor is seen by an op. Base: as it is."""

    def shape(self, seen: Shape) -> Shape:
        """Shape as stored."""
        return seen

    def seen(self, stored: LazyTensor) -> LazyTensor:
        """The stored tensor as the op sees it."""
        return stored

    def stored(self, seen: LazyTensor) -> LazyTensor:
        """The inverse of `seen`."""
        return seen


@dataclass(frozen=True)
class Transpose(View):
    """Stored as [..., in, out] where Megatron and the op have [..., out, in] (GPT-2's Conv1D, gpt-oss's experts)."""

    def shape(self, seen: Shape) -> Shape:
        return (*seen[:-2], seen[-1], seen[-2])

    def seen(self, stored: LazyTensor) -> LazyTensor:
        if len(stored.shape) == 2:
            return Transposed(stored)
        shape = self.shape(stored.shape)
        high, rows = shape[-2], stored.shape[-2]
        pieces = []
        for n in range(prod(shape[:-2])):
            each = Assembly(stored.dtype, stored.shape[-2:], (Piece(0, 0, rows, stored.cols, stored, n * rows, 0),))
            pieces.append(Piece(n * high, 0, high, shape[-1], Transposed(each), 0, 0))
        return Assembly(stored.dtype, shape, tuple(pieces))

    def stored(self, seen: LazyTensor) -> LazyTensor:
        return self.seen(seen)


@dataclass(frozen=True)
class Alternate(View):
    """The last dimension is stored as x0 y0 x1 y1 ... where the op sees x0 x1 ... y0 y1 ... (gpt-oss: gate and up)."""

    def seen(self, stored: LazyTensor) -> LazyTensor:
        half, rows = stored.cols // 2, stored.rows
        pieces = [Piece(0, n * half, rows, half, Strided(stored, n, 2), 0, 0) for n in (0, 1)]
        return Assembly(stored.dtype, stored.shape, tuple(pieces))

    def stored(self, seen: LazyTensor) -> LazyTensor:
        return Strided(seen, 0, seen.cols // 2, wrap=True)


@dataclass(frozen=True)
class RotaryPairs(View):
    """Rows of qkv heads: of the first `count` heads of every `group`, rows j and j + d/2 of a head as the op sees them
    are stored as a pair, 2j and 2j + 1 (Meta's rotary order); the other heads (values) are stored as they are seen.
    """

    count: int
    group: int
    d: int

    def seen(self, stored: LazyTensor) -> LazyTensor:
        half, cols = self.d // 2, stored.cols
        pairs = stored.seen((stored.rows // 2, 2 * cols))
        pieces: list[Piece] = []
        for head in range(stored.rows // self.d):
            top = head * self.d
            if head % self.group < self.count:
                pieces += [Piece(top + n * half, 0, half, cols, pairs, top // 2, n * cols) for n in (0, 1)]
            else:
                pieces.append(Piece(top, 0, self.d, cols, stored, top, 0))
        return Assembly(stored.dtype, stored.shape, tuple(pieces))

    def stored(self, seen: LazyTensor) -> LazyTensor:
        half, cols = self.d // 2, seen.cols
        pieces: list[Piece] = []
        for head in range(seen.rows // self.d):
            top, part, above = head * self.d, seen, head * self.d
            if head % self.group < self.count:
                halves = tuple(Piece(0, n * cols, half, cols, seen, top + n * half, 0) for n in (0, 1))
                part, above = Assembly(seen.dtype, (half, 2 * cols), halves).seen((self.d, cols)), 0
            pieces.append(Piece(top, 0, self.d, cols, part, above, 0))
        return Assembly(seen.dtype, seen.shape, tuple(pieces))


@dataclass(frozen=True)
class Then(View):
    """`first` is nearer to the stored tensor, `second` to the op."""

    first: View
    second: View

    def shape(self, seen: Shape) -> Shape:
        return self.first.shape(self.second.shape(seen))

    def seen(self, stored: LazyTensor) -> LazyTensor:
        return self.second.seen(self.first.seen(stored))

    def stored(self, seen: LazyTensor) -> LazyTensor:
        return self.first.stored(self.second.stored(seen))


PLAIN = View()
COPY = Copy()
FUSE_QKV = FuseQKV()
JOINED_QKV = FuseQKV(joined=True)
FUSE_KV = FuseKV()
STACK = Stack()
BESIDE = Beside()
PER_EXPERT = PerExpert(COPY)
EXPERTS_BELOW = Experts()
EXPERTS_BESIDE = Experts(beside=True)
TRANSPOSE = Transpose()
ALTERNATE = Alternate()
ZEROS = Constant(ones=False)
ONES = Constant(ones=True)


def assemble(tiles: Sequence[Tile], parts: Sequence[LazyTensor], shape: Shape) -> LazyTensor:
    """The whole made of `parts` along `tiles`; a whole that is one untouched part is that part."""
    if len(tiles) == 1 and parts[tiles[0].part].shape == shape:
        return parts[tiles[0].part]
    kinds = {parts[tile.part].dtype for tile in tiles}
    if len(kinds) > 1:
        raise TableError(f"parts of one tensor have different element types: {', '.join(sorted(kinds))}.")
    pieces = [Piece(t.row, t.col, t.rows, t.cols, parts[t.part], t.part_row, t.part_col) for t in tiles]
    return Assembly(kinds.pop(), shape, tuple(pieces))


def fuse(op: Op, parts: Sequence[LazyTensor], keys: Sequence[Shape], spec: ModelSpec) -> list[LazyTensor]:
    """The message tensors, from what a family stores."""
    if isinstance(op, Constant):
        return [op.whole(key, spec.dtype) for key in keys]
    return [assemble(op.tiles(keys, index, spec), parts, shape) for index, shape in enumerate(keys)]


def split(op: Op, wholes: Sequence[LazyTensor], spec: ModelSpec) -> list[LazyTensor]:
    """What a family stores, from the message tensors."""
    keys = [whole.shape for whole in wholes]
    shapes = op.part_shapes(keys, spec)
    back: list[list[Tile]] = [[] for _ in shapes]
    for index in range(len(keys)):
        for t in op.tiles(keys, index, spec):
            back[t.part].append(Tile(index, t.part_row, t.part_col, t.row, t.col, t.rows, t.cols))
    return [assemble(tiles, wholes, shape) for tiles, shape in zip(back, shapes, strict=True)]
