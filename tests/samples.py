"""Specs of all fixtures, and lazy tensors with known content, for laws over all families and all tables."""

from __future__ import annotations

import numpy as np
import torch

from ckptconv import families, lazy
from ckptconv.lazy import LazyTensor, Literal, Shape
from ckptconv.ops import Tile
from ckptconv.spec import ModelSpec
from fixtures import FIXTURES, config


def spec_of(name: str) -> ModelSpec:
    """The model of a fixture, as its family reads config.json."""
    data = config(name)
    return families.of_config(data, name).spec(data, name)


#: Fixture -> model.
SPECS = {name: spec_of(name) for name in FIXTURES}


def held(tensor: torch.Tensor) -> LazyTensor:
    """A lazy tensor with this content."""
    return Literal(lazy.as_numpy(tensor).tobytes(), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def counting(*shape: int, start: int = 0) -> torch.Tensor:
    """start, start + 1, ...: a wrong element is seen."""
    return start + torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)


def noise(shape: Shape, seed: int) -> torch.Tensor:
    """Any bits, not numbers a table could be neutral to."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, dtype=torch.int32)


def bits(tensor: LazyTensor) -> torch.Tensor:
    """The content of a lazy int32 tensor, read in small blocks."""
    return lazy.to_torch(tensor, block_bytes=64)


def covered(shape: Shape, rectangles: list[tuple[int, int, int, int]]) -> bool:
    """Whether rectangles (row, col, rows, cols) cover the matrix of a shape exactly once and lie inside it."""
    rows, cols = lazy.matrix(shape)
    if any(r < 0 or c < 0 or r + h > rows or c + w > cols for r, c, h, w in rectangles):
        return False
    seen = np.zeros((rows, cols), np.int32)
    for row, col, height, width in rectangles:
        seen[row : row + height, col : col + width] += 1
    return bool((seen == 1).all())


def of_whole(tile: Tile) -> tuple[int, int, int, int]:
    """The rectangle of the whole."""
    return tile.row, tile.col, tile.rows, tile.cols


def of_part(tile: Tile) -> tuple[int, int, int, int]:
    """The rectangle of the part."""
    return tile.part_row, tile.part_col, tile.rows, tile.cols
