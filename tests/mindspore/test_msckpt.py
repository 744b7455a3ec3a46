"""MindSpore's .ckpt files against bytes put together by hand; those of MindSpore: test_mindspore_golden.py."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from msfiles import KINDS, entry, raw, value, varint

from ckptconv import files, lazy
from ckptconv.containers import msckpt
from ckptconv.errors import SourceError


def read(path: Path) -> dict[str, torch.Tensor]:
    files.reset()
    return {name: lazy.to_torch(tensor) for name, tensor in msckpt.read(path).items()}


@pytest.fixture
def matrix() -> torch.Tensor:
    return torch.arange(35, dtype=torch.float32).reshape(7, 5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", list(KINDS))
def test_element_types_and_dims(tmp_path: Path, matrix: torch.Tensor, packed: bool, dtype: torch.dtype) -> None:
    tensor = matrix.to(dtype)
    path = tmp_path / "x.ckpt"
    scalar = torch.tensor([7], dtype=torch.int32)
    path.write_bytes(
        value("a.weight", KINDS[dtype], [7, 5], raw(tensor), packed)
        + value("step", "Int32", [0], raw(scalar), packed)
        + value("note", "str", [3], b"abc", packed)
    )  # fmt: skip
    found = read(path)
    assert list(found) == ["a.weight", "step"]
    assert found["a.weight"].dtype == dtype and torch.equal(found["a.weight"], tensor)
    assert found["step"].shape == () and int(found["step"]) == 7
    assert msckpt.looks(path)


@pytest.mark.parametrize("cuts", [(10,), (3,), (1, 2, 34), (4, 5, 6, 20), (33,), (0, 10)])
def test_a_tensor_in_several_values(tmp_path: Path, matrix: torch.Tensor, cuts: tuple[int, ...]) -> None:
    """Contents break anywhere, not only between rows."""
    data, edges = raw(matrix), [0, *cuts, 35]
    path = tmp_path / "x.ckpt"
    slices = [data[4 * a : 4 * b] for a, b in itertools.pairwise(edges)]
    path.write_bytes(b"".join(value("w", "Float32", [7, 5], part) for part in slices))
    assert torch.equal(read(path)["w"], matrix)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no tensors"),
        (b"{}", "JSON"),
        (b"PK\x03\x04" + bytes(40), "zip"),
        (value("w", "Float32", [2], bytes(8)) + b"crc_num" + bytes(14), "crc_check"),
        (value("w", "Float32", [3], bytes(8)), "8 bytes, expected 12"),
        (value("w", "Float32", [2], bytes(8))[:-1], "left"),
        (value("w", "Complex64", [1], bytes(8)), "Complex64"),
        (value("w", "Float32", [2], bytes(8)) + value("w", "Float32", [3], bytes(4)), "comes twice"),
        (entry(1, entry(1, b"w") + entry(3, b"")), "map tensor"),
        (entry(1, entry(2, entry(2, b"Float32"))), "without a name"),
        (entry(1, entry(1, b"w") + entry(2, varint(8) + b"\xff" * 11)), "64 bits"),
        (value("w", "Float32", [1 << 60], bytes(8)), "shape"),
    ],
)
def test_refused(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=says) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_damage_is_an_error_or_the_same_names(tmp_path: Path, matrix: torch.Tensor) -> None:
    """Any byte may be another: never a crash, never a tensor of another size than it says."""
    whole = value("a.weight", "Float32", [7, 5], raw(matrix)) + value("b", "Float16", [3], bytes(6), packed=True)
    path, dice = tmp_path / "x.ckpt", random.Random(0)
    for _ in range(400):
        data = bytearray(whole)
        at = dice.randrange(len(data))
        data[at] = dice.randrange(256)
        del data[dice.choice((len(data), len(data), dice.randrange(len(data)))) :]
        path.write_bytes(data)
        try:
            for tensor in read(path).values():
                assert tensor.numel() * tensor.element_size() <= len(data)
        except SourceError as error:
            assert str(path) in str(error)
