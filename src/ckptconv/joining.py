"""Rank files joined along a format's table: full tensors of messages from the slices that ranks hold.

What reading loaders of sharded formats share; `cutting` is the other direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ckptconv import lazy
from ckptconv.containers.rankdir import Rank
from ckptconv.errors import SourceError, looking, near, refuse, some
from ckptconv.formats.table import Row
from ckptconv.layout import Layout
from ckptconv.lazy import Assembly, LazyTensor, Piece
from ckptconv.messages import Expected, expected
from ckptconv.ops import Tile, assemble
from ckptconv.sharding import Placement, place
from ckptconv.spec import ModelSpec
from ckptconv.stream import Holdings

#: Bytes of a copy that are compared where a checkpoint is only looked at.
SAMPLE = 64 << 10


class Shards:
    """The tensors of all ranks (rank -> slot -> tensor), and where those of a model lie among them.

    spec: the model as it is stored. paths: the file of each rank, for errors. padded: rows of the vocabulary.
    """

    def __init__(
        self, tensors: Mapping[Rank, Mapping[str, LazyTensor]], paths: Mapping[Rank, Path], table: Sequence[Row],
        spec: ModelSpec, layout: Layout, padded: int,
    ) -> None:  # fmt: skip
        self._tensors, self._paths, self._table = tensors, paths, table
        self._spec, self.layout, self._padded = spec, layout, padded
        self._lacking: set[tuple[int, str]] = set()  # (stage, slot) of what is not there, where that is tolerated
        self.messages = {message.name: message for message in expected(spec)}
        self._places: dict[str, list[Placement]] = {}

    def placed(self, message: Expected) -> list[Placement]:
        """Where the tensors of a message lie."""
        if message.name not in self._places:
            self._places[message.name] = place(self._table, message, self._spec, self.layout, self._padded)
        return self._places[message.name]

    def holdings(self) -> Holdings:
        """What lies on which rank."""
        sizes = {"tp": self.layout.tp, "stage": self.layout.pp, "ep": self.layout.ep}
        names = {
            rank: ", ".join(f"{axis} {n}" for (axis, size), n in zip(sizes.items(), rank, strict=True) if size > 1)
            for rank in self._paths
        }
        return Holdings({names[rank] or path.name: self._tensors[rank] for rank, path in self._paths.items()}, self)

    def check(self) -> None:
        """Every tensor is placed, every place has its tensor, replicas are equal. Raises SourceError."""
        self._check_names()
        self._check_replicas()

    def _check_names(self) -> None:
        placed = [p for m in self.messages.values() for p in self.placed(m)]
        for rank, path in self._paths.items():
            wanted = {p.slot: p for p in placed if p.stage == rank[1] and rank[2] in p.ep_ranks}
            there = self._tensors[rank]
            missing = [name for name in wanted if name not in there]
            extra = [name for name in there if name not in wanted]
            if missing:
                refuse(SourceError(
                    f"{path}: lacks {some(missing)}; the args say a model of {self._spec.num_layers} layers on "
                    f"{self.layout.pp} stages.{near(missing[0], extra)}"
                ))  # fmt: skip
                self._lacking |= {(rank[1], name) for name in missing}
            if extra:
                refuse(SourceError(f"{path}: holds {some(extra)}, which no rule knows. They would be lost."))
            for name, placement in wanted.items():
                if name not in there:
                    continue
                placement.row.cut.check(name, placement.shapes, self.layout.tp, self._spec)
                if there[name].shape != placement.part_shape:
                    refuse(SourceError(
                        f"{path}: {name} is {list(there[name].shape)}, expected {list(placement.part_shape)} "
                        f"from the args (tp {self.layout.tp})."
                    ))  # fmt: skip
                    self._lacking.add((rank[1], name))
                first = self._tensors.get((0, rank[1], placement.ep_ranks[0]), {}).get(name, there[name])
                if there[name].dtype != first.dtype:
                    refuse(SourceError(f"{path}: {name} is {there[name].dtype}, on rank 0 it is {first.dtype}."))
                    self._lacking.add((rank[1], name))
        for _, stage, ep_rank in set(self.layout.ranks()) - set(self._paths):
            self._lacking |= {(stage, p.slot) for p in placed if p.stage == stage and ep_rank in p.ep_ranks}

    def _check_replicas(self) -> None:
        """Tensors that every rank has must be the same on all: a free check of the checkpoint's integrity."""
        for message in self.messages.values():
            for placement in self.placed(message):
                if (placement.stage, placement.slot) in self._lacking:
                    continue
                for t in range(1 if placement.row.cut.replicated else self.layout.tp):
                    self._check_equal(placement, t)
                if placement.row.cut.repeated:
                    self._check_repeats(placement)
                self._check_blanks(placement)
                if placement.row.copy:
                    self._check_copy(message, placement)

    def _check_equal(self, placement: Placement, t: int) -> None:
        """The part of tensor rank `t` on all expert ranks, or on every rank what none of them cuts."""
        first, *others = (
            (rank, self._tensors[rank][placement.slot])
            for rank in self._paths
            if rank[1] == placement.stage and rank[2] in placement.ep_ranks
            and (rank[0] == t or placement.row.cut.replicated)
        )  # fmt: skip
        for rank, tensor in others:
            if not _same(first[1], tensor):
                refuse(SourceError(
                    f"{self._paths[rank]}: {placement.slot} differs from that in {self._paths[first[0]].parent.name}, "
                    "but both ranks must hold the same. The ranks have drifted apart or are of different checkpoints."
                ))  # fmt: skip

    def _check_repeats(self, placement: Placement) -> None:
        """What several tensor ranks hold of a key that is cut (key and value heads) must be the same on all."""
        for key in placement.keys:
            first: dict[tuple[int, int], Tile] = {}
            for tile in placement.tiles(key):
                one = first.setdefault((tile.row, tile.col), tile)
                if one is tile or _same(self._piece(placement, one), self._piece(placement, tile)):
                    continue
                a, b = (self._paths[n.part, placement.stage, placement.ep_ranks[0]] for n in (one, tile))
                refuse(SourceError(
                    f"{b}: {placement.slot} differs from the copy of the same heads in {a}. Copies that were trained "
                    "apart cannot become one, or the layout is not the one that was said."
                ))  # fmt: skip

    def _check_blanks(self, placement: Placement) -> None:
        """Padding must hold zeros: anything else would be lost."""
        for tile in placement.row.cut.blanks(placement.shapes, self.layout.tp):
            if not lazy.all_zero(self._piece(placement, tile)):
                refuse(SourceError(
                    f"{self._paths[tile.part, placement.stage, placement.ep_ranks[0]]}: {placement.slot} has numbers "
                    "where it is padding, which has to be zero. They would be lost."
                ))  # fmt: skip

    def _piece(self, placement: Placement, tile: Tile) -> LazyTensor:
        """A rectangle of a rank's part."""
        part = self._part((tile.part, placement.stage, placement.ep_ranks[0]), placement)
        piece = Piece(0, 0, tile.rows, tile.cols, part, tile.part_row, tile.part_col)
        return Assembly(part.dtype, (tile.rows, tile.cols), (piece,))

    def _check_copy(self, message: Expected, placement: Placement) -> None:
        """A tensor that repeats another of the same model."""
        key = placement.keys[0]
        first = next(p for p in self.placed(message) if key in p.keys and not p.row.copy)
        if (first.stage, first.slot) in self._lacking:
            return
        for t in range(self.layout.tp):
            rank = (t, placement.stage, 0)
            one, other = self._tensors[t, first.stage, 0][first.slot], self._tensors[rank][placement.slot]
            if not _same(one, other):
                refuse(SourceError(
                    f"{self._paths[rank]}: {placement.slot} differs from {first.slot} on stage {first.stage}, but the "
                    "args of the checkpoint make them one (untie_embeddings_and_output_weights, mtp_num_layers, or the "
                    "shared norm of custom layers)."
                ))  # fmt: skip

    def joined(self, message: Expected, key: str) -> LazyTensor:
        """The full tensor of a message, not read."""
        tiles: list[Tile] = []
        parts: list[LazyTensor] = []
        taken: set[tuple[int, int]] = set()
        shape = message.shapes[key]
        for placement in self.placed(self.messages[message.name]):
            if key not in placement.keys or placement.row.copy:
                continue
            ranks = 1 if placement.row.cut.replicated else self.layout.tp
            for tile in placement.tiles(key):
                if tile.part < ranks and (tile.row, tile.col) not in taken:
                    taken.add((tile.row, tile.col))
                    tiles.append(replace(tile, part=tile.part + len(parts)))
            parts += [self._part((t, placement.stage, placement.ep_ranks[0]), placement) for t in range(ranks)]
            if placement.expert is None:
                shape = placement.shapes[placement.keys.index(key)]
        whole = assemble(tiles, parts, shape)
        rows = message.shapes[key][0]
        return whole if whole.shape[0] == rows else whole.narrow_rows(0, rows)

    def _part(self, rank: Rank, placement: Placement) -> LazyTensor:
        tensor = placement.row.view.seen(self._tensors[rank][placement.slot])
        return tensor.seen(placement.seen_shape) if placement.seen_shape != tensor.shape else tensor


def _same(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether copies are equal. Where a checkpoint is only looked at, the first rows of big ones tell."""
    if looking() and SAMPLE < one.nbytes == other.nbytes and one.shape == other.shape:
        rows = max(1, SAMPLE * one.shape[0] // one.nbytes)
        one, other = one.narrow_rows(0, rows), other.narrow_rows(0, rows)
    return lazy.equal(one, other)
