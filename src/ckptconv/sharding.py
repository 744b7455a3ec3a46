"""Tables x layout: which tensor lies on which rank under which name, and what of which message is in it.

The one place where a format's table and the placement of layers meet. Loaders join along it, savers cut along it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ckptconv.formats.table import Row, rows_of
from ckptconv.layout import Layout
from ckptconv.lazy import Shape, matrix
from ckptconv.messages import Expected, expected
from ckptconv.ops import Tile
from ckptconv.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Placement:
    """One tensor name on one stage: what it holds and how the tensor ranks share it.

    `chunk`: on which virtual stage, where the files tell them apart (`slot`). `expert`: which slice of the keys it
    holds, one expert's or that of all experts of a rank; it lies on one expert rank (`ep_rank`) only, other tensors lie
    on all of them.
    """

    message: str
    keys: tuple[str, ...]
    shapes: tuple[Shape, ...]  # of the keys, or of the expert's slices of them, as stored: vocabulary padded
    row: Row
    stage: int
    name: str
    tp: int
    ep: int
    expert: int | None = None
    ep_rank: int | None = None
    chunk: int | None = None

    @property
    def slot(self) -> str:
        """The name with the virtual stage, which alone is unique in a rank file."""
        return slot_name(self.chunk, self.name)

    @property
    def part_shape(self) -> Shape:
        """Shape on one rank, as a file has it."""
        shape = self.row.view.shape(self.row.cut.stored(self.shapes, self.tp))
        return shape[1:] if self.row.vector else shape

    @property
    def seen_shape(self) -> Shape:
        """Shape on one rank, as tiles see it: an expert's slice of a bias is one row (and see `Cut.stored`)."""
        return self.row.cut.shape(self.shapes, self.tp)

    @property
    def ep_ranks(self) -> range:
        """Expert ranks that hold the tensor."""
        return range(self.ep) if self.ep_rank is None else range(self.ep_rank, self.ep_rank + 1)

    def tiles(self, key: str) -> list[Tile]:
        """Rectangles of `key`, all experts counted; `part` is the tensor rank."""
        index = self.keys.index(key)
        tiles = self.row.cut.tiles(self.shapes, index, self.tp)
        if not self.expert:
            return tiles
        above = self.expert * matrix(self.shapes[index])[0]
        return [replace(tile, row=tile.row + above) for tile in tiles]


def slot_name(chunk: int | None, name: str) -> str:
    """What a tensor of a rank file goes by: its name, behind `model0/` where there are virtual stages."""
    return name if chunk is None else f"model{chunk}/{name}"


def _stored(shape: Shape, row: Row, padded_vocab: int) -> Shape:
    return (padded_vocab, *shape[1:]) if row.vocab else shape


def place(table: Sequence[Row], message: Expected, spec: ModelSpec, layout: Layout, padded: int) -> list[Placement]:
    """Where the tensors of one message lie."""
    first, mtp = (0, 0), layout.mtp or layout.last
    homes = {"embeddings": first, "mtp layer {i}": mtp, "final norm": layout.final_norm or layout.last}
    if message.layer is not None and message.layer < layout.num_layers:
        stage, chunk, local = layout.home_of(message.layer)
        home = stage, chunk
    else:
        home, local = homes.get(message.template, layout.last), message.index
    placements = []
    for row in rows_of(table, message, spec):
        if (row.last_stage or row.mtp_stage) and layout.pp == 1 and not row.double:
            continue  # on the only stage it is the embedding itself
        shapes = tuple(_stored(message.shapes[key], row, padded) for key in row.keys)
        stage, chunk = layout.last if row.last_stage else mtp if row.mtp_stage else home
        one = Placement(
            message.name, row.keys, shapes, row, stage, row.name, layout.tp, layout.ep,
            chunk=chunk if layout.vpp > 1 and layout.apart else None,
        )  # fmt: skip
        if row.stacked:
            name = row.name.format(i=local, n=message.layer)
            each = tuple((shape[0] // layout.ep, *shape[1:]) for shape in shapes)
            for rank in range(layout.ep):
                placements.append(replace(one, name=name, shapes=each, expert=rank, ep_rank=rank))
            continue
        if not row.expert:
            placements.append(replace(one, name=row.name.format(i=local, n=message.layer)))
            continue
        # A slice of a bias [e, m] is [m] in the file, but one row of its message tensor.
        each = tuple((1, *shape[1:]) if row.vector else shape[1:] for shape in shapes)
        for expert in range(layout.num_experts):
            rank, number = layout.expert_of(expert)
            name = row.name.format(i=local, n=message.layer, e=number, g=expert)
            placements.append(replace(one, name=name, shapes=each, expert=expert, ep_rank=rank))
    return placements


def placements(table: Sequence[Row], spec: ModelSpec, layout: Layout, padded: int) -> Iterator[Placement]:
    """Every tensor of every stage, in message order. Raises LayoutError when something does not divide."""
    for message in expected(spec):
        for placement in place(table, message, spec, layout, padded):
            placement.row.cut.check(placement.name, placement.shapes, layout.tp, spec)
            yield placement
