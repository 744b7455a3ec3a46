"""What of which message goes into which slot of which rank file, from placements. `joining` is the other direction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from ckptconv.containers.plan import Slot
from ckptconv.containers.rankdir import Rank
from ckptconv.errors import TableError, TargetError
from ckptconv.lazy import Assembly, LazyTensor, Piece, Zeros
from ckptconv.messages import expected
from ckptconv.metadata import Metadata
from ckptconv.ops import PLAIN
from ckptconv.sharding import Placement
from ckptconv.writing import Build, Route, Routes

#: The slots of one rank: virtual stage (None where there are none) -> tensor name -> slot.
Chunks = dict[int | None, dict[str, Slot]]


def dtype_of(metadata: Metadata, placement: Placement) -> str:
    """The element type of a tensor that holds several of the stream's. Raises TargetError when they differ."""
    kinds = {metadata.dtype(placement.message, key) for key in placement.keys}
    if len(kinds) > 1:
        raise TargetError(
            f"{placement.name}: its parts {' and '.join(placement.keys)} are {' and '.join(sorted(kinds))}, but "
            "it is one tensor in the target. Give --dtype to convert all weights."
        )
    return kinds.pop()


def slots(placements: Iterable[Placement], metadata: Metadata) -> dict[tuple[int, int], Chunks]:
    """(stage, expert rank) -> what lies there; all tensor ranks hold the same shapes. Raises TargetError."""
    found: dict[tuple[int, int], Chunks] = {}
    for placement in placements:
        differs = placement.seen_shape != placement.part_shape and placement.row.view == PLAIN
        seen = placement.seen_shape if differs else None
        slot = Slot(placement.slot, dtype_of(metadata, placement), placement.part_shape, seen)
        for ep_rank in placement.ep_ranks:
            there = found.setdefault((placement.stage, ep_rank), {}).setdefault(placement.chunk, {})
            if placement.name in there:
                raise TableError(
                    f"stage {placement.stage}: {placement.name} is planned twice, expected once for each name."
                )
            there[placement.name] = slot
    return found


def ways(
    placements: Iterable[Placement], metadata: Metadata, name_of: Callable[[Rank], str]
) -> tuple[Routes, list[tuple[LazyTensor, Route]]]:
    """Routes of the stream's tensors into the files of ranks, and zeros for keys that the model lacks (biases where
    the target's linears have all or none).
    """
    sent = {m.name: m.shapes for m in expected(metadata.spec)}
    routes: Routes = {}
    fills: list[tuple[LazyTensor, Route]] = []
    for placement in placements:
        for blank in placement.row.cut.blanks(placement.shapes, placement.tp) if placement.row.view == PLAIN else ():
            zeros = Zeros(dtype_of(metadata, placement), (blank.rows, blank.cols))
            files = [name_of((blank.part, placement.stage, ep_rank)) for ep_rank in placement.ep_ranks]
            fills.append((zeros, Route([(file, placement.slot, blank) for file in files])))
        for key, shape in zip(placement.keys, placement.shapes, strict=True):
            targets = [
                (name_of((tile.part, placement.stage, ep_rank)), placement.slot, tile)
                for tile in placement.tiles(key)
                for ep_rank in placement.ep_ranks
            ]
            if key not in sent[placement.message]:
                fills.append((Zeros(dtype_of(metadata, placement), shape), Route(targets)))
                continue
            route = routes.setdefault((placement.message, key), Route())
            route.targets += targets if placement.row.view == PLAIN else []  # else `builds`
            route.rows = shape[0] if placement.row.vocab else None
    return routes, fills


def builds(placements: Iterable[Placement], name_of: Callable[[Rank], str]) -> dict[str, list[Build]]:
    """Message -> slots whose bytes are no rectangles of its tensors, as files hold them in another view."""
    found: dict[str, list[Build]] = {}
    for placement in placements:
        if placement.row.view == PLAIN:
            continue
        for rank in range(placement.tp):
            make = partial(_viewed, placement=placement, rank=rank)
            for ep_rank in placement.ep_ranks:
                file = name_of((rank, placement.stage, ep_rank))
                found.setdefault(placement.message, []).append(Build(file, placement.slot, make))
    return found


def _viewed(tensors: dict[str, LazyTensor], placement: Placement, rank: int) -> LazyTensor:
    """The part of a tensor rank as its file holds it."""
    pieces = [
        Piece(tile.part_row, tile.part_col, tile.rows, tile.cols, tensors[key], tile.row, tile.col)
        for key in placement.keys
        for tile in placement.tiles(key)
        if tile.part == rank
    ]
    dtype = pieces[0].part.dtype
    for tile in placement.row.cut.blanks(placement.shapes, placement.tp):
        if tile.part == rank:
            zeros = Zeros(dtype, (tile.rows, tile.cols))
            pieces.append(Piece(tile.part_row, tile.part_col, tile.rows, tile.cols, zeros, 0, 0))
    return placement.row.view.stored(Assembly(dtype, placement.seen_shape, tuple(pieces)))
