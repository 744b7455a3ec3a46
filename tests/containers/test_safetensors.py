"""safetensors files against the safetensors library, in both directions, and what damaged ones are answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ckptconv import dtypes, lazy
from ckptconv.containers import safetensors
from ckptconv.containers.plan import Slot
from ckptconv.errors import SourceError, TableError


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> str:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return str(path)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    listed = [list(value) if isinstance(value, tuple) else value for value in (shape, offsets)]
    return {"dtype": dtype, "shape": listed[0], "data_offsets": listed[1]}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
        "a.weight": torch.arange(6, dtype=torch.float64).reshape(2, 1, 3),
        "half": torch.arange(5, dtype=torch.float16),
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "eight": torch.arange(4).to(torch.float8_e4m3fn),
        "wide": torch.arange(4).to(torch.uint32),
    }
    path = tmp_path / "m.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": "é"})
    read, metadata = safetensors.read(path)
    assert metadata == {"format": "pt", "note": "é"}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].shape == tuple(tensor.shape)
        same = lazy.to_torch(read[name])
        assert same.dtype == tensor.dtype
        assert lazy.as_numpy(same).tobytes() == lazy.as_numpy(tensor).tobytes()


def test_header_by_hand(tmp_path: Path) -> None:
    path = raw(tmp_path / "m", {"y": entry("U8", (3,), (8, 11)), "x": entry()}, bytes(range(11)))
    read, metadata = safetensors.read(path)
    start = 8 + int.from_bytes(Path(path).read_bytes()[:8], "little")
    assert list(read) == ["y", "x"]
    assert metadata == {}
    assert read["x"] == lazy.FileTensor(path, start, "float32", (2,))
    assert read["y"] == lazy.FileTensor(path, start + 8, "uint8", (3,))


def test_the_library_reads_what_is_planned(tmp_path: Path, written: Any) -> None:
    slots = [Slot(f"t.{name}", name, (3, 5)) for name in reversed(dtypes.BY_NAME)]
    slots += [Slot("odd é", "uint8", (3,)), Slot("s", "int64", ()), Slot("none", "float32", (0, 2))]
    plan = safetensors.plan(slots)
    data = {s.name: bytes((7 * i + len(s.name)) % 2 for i in range(s.nbytes)) for s in slots}
    path = written(tmp_path / "m.safetensors", plan, data)
    assert all(plan.offsets[s.name] % dtypes.size_of(s.dtype) == 0 for s in slots)
    assert not plan.needs_crc
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    loaded = load_file(path)
    assert loaded.keys() == {s.name for s in slots}
    for slot in slots:
        tensor = loaded[slot.name]
        assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{slot.dtype}", slot.shape)
        assert lazy.as_numpy(tensor).tobytes() == data[slot.name]


def test_plan_of_nothing(tmp_path: Path, written: Any) -> None:
    path = written(tmp_path / "m.safetensors", safetensors.plan([], {}), {})
    assert path.read_bytes() == (8).to_bytes(8, "little") + b"{}      "
    assert safetensors.read(path) == ({}, {})


@pytest.mark.parametrize(
    "slots", [
        [Slot("a", "float32", (1,)), Slot("a", "float32", (1,))],
        [Slot("__metadata__", "float32", (1,))],
        [Slot("a", "complex64", (1,))],
        [Slot("a", "float32", (-1,))],
        [Slot("\ud800", "float32", (1,))],
    ],
)  # fmt: skip
def test_plan_refuses(slots: list[Slot]) -> None:
    with pytest.raises(TableError):
        safetensors.plan(slots)


def test_plan_refuses_other_metadata() -> None:
    with pytest.raises(TableError):
        safetensors.plan([], {"format": 1})  # type: ignore[dict-item]


GOOD = bytes(8)

BAD_HEADERS: list[tuple[object, bytes, str]] = [
    ({"x": entry()}, bytes(7), r"truncated: it has \d+ bytes, its header needs \d+"),
    ({"x": entry()}, bytes(9), "accounts for only"),
    ({"x": entry("F4")}, GOOD, "type 'F4', which cannot be converted"),
    ({"x": entry("C64", (1,))}, GOOD, "cannot be converted"),
    ({"x": entry(None)}, GOOD, "type None"),
    ({"x": entry(["F32"])}, GOOD, "cannot be converted"),
    ({"x": entry(shape=2)}, GOOD, "expected a list of non-negative integers"),
    ({"x": entry(shape=[2.0])}, GOOD, "expected a list of non-negative integers"),
    ({"x": entry(shape=[True, 2])}, GOOD, "expected a list of non-negative integers"),
    ({"x": entry(shape=[-2, -1])}, GOOD, "expected a list of non-negative integers"),
    ({"x": entry(shape=[10**30, 0], offsets=[0, 0])}, b"", "expected a list of non-negative integers"),
    ({"x": entry(shape=[2**62, 2**62])}, GOOD, "a number of 127 bits|expected [0-9]+"),
    ({"x": entry(shape=[1] * 65)}, GOOD, "65 dimensions"),
    ({"x": entry(shape=[3])}, GOOD, "8 bytes of data, expected 12"),
    ({"x": entry(offsets=[0])}, GOOD, "expected two integers"),
    ({"x": entry(offsets=[0, 8.0])}, GOOD, "expected two integers"),
    ({"x": entry(offsets=[False, 8])}, GOOD, "expected two integers"),
    ({"x": entry(offsets=None)}, GOOD, "expected two integers"),
    ({"x": entry(offsets=[8, 0])}, GOOD, "from byte 8 to 0"),
    ({"x": entry(offsets=[-8, 0])}, GOOD, "from byte -8 to 0"),
    ({"x": entry(offsets=[10**4000, 10**4000 + 8])}, GOOD, "from byte a number of"),
    ({"x": entry(offsets=[4, 12])}, bytes(12), "leave a hole"),
    ({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12), "overlap"),
    ({"x": entry(), "y": entry()}, GOOD, "overlap"),
    ({"x": entry(), "y": entry(offsets=[12, 20])}, bytes(20), "leave a hole"),
    ({"x": 3}, GOOD, "expected dtype, shape and data_offsets"),
    ({"x": {"dtype": "F32"}}, GOOD, "expected dtype, shape and data_offsets"),
    ({"__metadata__": {"a": 1}}, b"", "expected an object of strings"),
    ({"__metadata__": [1]}, b"", "expected an object of strings"),
    (b'{"x": 1, "x": 2}', b"", "names a key twice: x"),
    (b'{"x": {"dtype": "F32", "dtype": "F16"}}', b"", "names a key twice: dtype"),
    (b"[]", b"", "does not start with"),
    (b" {}", b"", "does not start with"),
    (b"{", b"", "no valid JSON"),
    (b'{"x": NaN}', b"", "no valid JSON"),
    (b'{"x\xff": 1}', b"", "no valid JSON"),
    (b'{"x": ' + b"9" * 5000 + b"}", b"", "no valid JSON"),
    (b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", "no valid JSON"),
    (b'{"x":' * 200_000 + b"}" * 200_000, b"", "no valid JSON"),
]


@pytest.mark.parametrize("case", range(len(BAD_HEADERS)))
def test_bad_header(tmp_path: Path, case: int) -> None:
    header, data, message = BAD_HEADERS[case]
    path = raw(tmp_path / "m.safetensors", header, data)
    with pytest.raises(SourceError, match=message) as caught:
        safetensors.read(path)
    assert str(caught.value).startswith(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("content", "message"), [
        (b"", "has 0 bytes"),
        (b"1234567", "has 7 bytes"),
        ((100).to_bytes(8, "little") + b"{}", "its header alone needs 108"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "announces a header of 100000001 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"PK\x03\x04 and so on", "zip archive"),
    ],
)  # fmt: skip
def test_no_safetensors_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=message):
        safetensors.read(path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        safetensors.read(tmp_path / "absent")
    with pytest.raises(SourceError, match="is a directory"):
        safetensors.read(tmp_path)
    with pytest.raises(SourceError, match="cannot be read"):
        safetensors.read("nul\0byte")


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    path, other = tmp_path / "m.safetensors", tmp_path / "other"
    save_file({"x": torch.tensor([1.0])}, path)
    assert lazy.to_torch(safetensors.read(path)[0]["x"]).tolist() == [1.0]
    save_file({"x": torch.tensor([2.0])}, other)
    other.replace(path)
    assert lazy.to_torch(safetensors.read(path)[0]["x"]).tolist() == [2.0]
