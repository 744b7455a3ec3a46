"""Writing a planned file the way the engine does, in miniature."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from ckptconv.containers.plan import PlannedFile

Written = Callable[[Path, PlannedFile, Mapping[str, bytes]], Path]


@pytest.fixture
def written() -> Written:
    """`written(path, plan, data)`: data of the slots in reverse order, then `finish`; every byte is written once."""

    def write_all(path: Path, plan: PlannedFile, data: Mapping[str, bytes]) -> Path:
        covered: list[tuple[int, int]] = []
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)

        def write(offset: int, piece: bytes) -> None:
            covered.append((offset, offset + len(piece)))
            os.pwrite(descriptor, piece, offset)

        assert set(data) == set(plan.slots) == set(plan.offsets)
        for name in reversed(list(plan.slots)):
            assert len(data[name]) == plan.slots[name].nbytes
            write(plan.offsets[name], data[name])
        crcs = {name: zlib.crc32(piece) for name, piece in data.items()} if plan.needs_crc else {}
        plan.finish(write, crcs)
        os.close(descriptor)
        at = 0
        for begin, end in sorted(covered):
            assert begin == at
            at = end
        assert path.stat().st_size == at == plan.size
        return path

    return write_all
