"""Descriptors that are kept open, and forgotten."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptconv import files


def test_a_file_forgotten_while_it_is_read_stays_open_until_it_has_been(tmp_path: Path) -> None:
    """Programs open checkpoints in several threads: one thread's look must not end another's read."""
    path = tmp_path / "weights"
    path.write_bytes(b"old")
    with files._reading.use(str(path)) as first:
        files.forget(str(path))
        os.replace(path, tmp_path / "aside")
        path.write_bytes(b"new")
        with files._reading.use(str(path)) as second:
            assert os.pread(first, 3, 0) == b"old" and os.pread(second, 3, 0) == b"new"
        assert os.pread(first, 3, 0) == b"old"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first)
    assert files.read_bytes(str(path), 0, 3) == b"new"
    files.forget(str(path))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(second)
