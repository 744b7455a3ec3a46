"""Tables x layout: which tensor lies on which rank under which name, and what of which message is in it.

The one place where a format's table and the placement of layers meet. Loaders join along it, savers cut along it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckptconv.formats.table import Row, rows_of
from ckptconv.layout import Layout
from ckptconv.lazy import Shape
from ckptconv.messages import Expected, expected
from ckptconv.ops import Tile
from ckptconv.spec import ModelSpec


@dataclass(frozen=True)
class Placement:
    """One tensor name on one stage: what it holds and how the tensor ranks share it."""

    message: str
    keys: tuple[str, ...]
    shapes: tuple[Shape, ...]  # of the keys as stored: vocabulary padded
    row: Row
    stage: int
    name: str
    tp: int

    @property
    def part_shape(self) -> Shape:
        """Shape on one rank."""
        return self.row.cut.shape(self.shapes, self.tp)

    def tiles(self, key: str) -> list[Tile]:
        """Rectangles of `key`; `part` is the tensor rank."""
        return self.row.cut.tiles(self.shapes, self.keys.index(key), self.tp)


def _stored(shape: Shape, row: Row, padded_vocab: int) -> Shape:
    return (padded_vocab, *shape[1:]) if row.vocab else shape


def place(table: Sequence[Row], message: Expected, spec: ModelSpec, layout: Layout, padded: int) -> list[Placement]:
    """Where the tensors of one message lie."""
    last = layout.pp - 1
    if message.layer is not None:
        stage, local = layout.stage_of(message.layer)
    else:
        stage, local = (0 if message.template == "embeddings" else last), 0
    placements = []
    for row in rows_of(table, message, spec):
        if row.last_stage and layout.pp == 1:
            continue  # a tied head on the only stage is the embedding itself
        shapes = tuple(_stored(message.shapes[key], row, padded) for key in row.keys)
        where = last if row.last_stage else stage
        placements.append(
            Placement(message.name, row.keys, shapes, row, where, row.name.format(i=local), layout.tp)
        )
    return placements


def placements(table: Sequence[Row], spec: ModelSpec, layout: Layout, padded: int) -> Iterator[Placement]:
    """Every tensor of every stage, in message order. Raises LayoutError when something does not divide."""
    for message in expected(spec):
        for placement in place(table, message, spec, layout, padded):
            placement.row.cut.check(placement.name, placement.shapes, layout.tp, spec)
            yield placement
