"""What every container promises about a file that will be written: all of its layout, before its first byte.

Tensor data goes to `offsets[name]` with positional writes, in any order and from several threads; `finish` is
called once afterwards and writes everything else. Every byte of the file is either tensor data or written there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

from ckptconv import dtypes
from ckptconv.errors import TableError

Write = Callable[[int, bytes], None]


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor that will be written: its name in the file, its element type (torch's name) and its shape.

    `seen`: the shape whose matrix (see lazy.py) rectangles are counted in, where it is not `shape`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    seen: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * dtypes.size_of(self.dtype)


class PlannedFile(Protocol):
    """The finished layout of a file."""

    @property
    def size(self) -> int:
        """Bytes of the finished file."""

    @property
    def offsets(self) -> Mapping[str, int]:
        """Byte offset of each slot's data, by slot name."""

    @property
    def slots(self) -> Mapping[str, Slot]:
        """The slots by name, in the order of their data."""

    @property
    def needs_crc(self) -> bool:
        """Whether `finish` wants the CRC32 of each slot's data."""

    def finish(self, write: Write, crcs: Mapping[str, int]) -> None:
        """Write all that is not tensor data through `write(offset, data)`. Raises TableError for a missing CRC."""


def by_name(slots: Iterable[Slot]) -> dict[str, Slot]:
    """Checked slots by name. Raises TableError for a repeated name, an unknown element type or a bad shape."""
    named: dict[str, Slot] = {}
    for slot in slots:
        if slot.name in named:
            raise TableError(f"{slot.name} is planned twice for one file: each name may be written once.")
        if slot.dtype not in dtypes.BY_NAME:
            raise TableError(f"{slot.name} has the unknown element type {slot.dtype!r}.")
        if not all(type(dim) is int and dim >= 0 for dim in slot.shape):
            raise TableError(f"{slot.name} has the shape {slot.shape}, expected non-negative integers.")
        named[slot.name] = slot
    return named
