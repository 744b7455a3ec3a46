"""Damaged files of every kind: read, or refused with an error that names the file; nothing else, and nothing runs."""

from __future__ import annotations

import pickle
import struct
import zlib
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckptconv import lazy
from ckptconv.containers import safetensors, torchzip
from ckptconv.containers.unpickle import loads
from ckptconv.errors import CkptconvError

FUZZ = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
NAME = "damaged.bin"


def change(data: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    """`data` after edits at relative places: replaced, inserted, removed, repeated or cut off there."""
    for kind, place, piece in edits:
        at = int(place * len(data))
        if kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + piece + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + len(piece) :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + 8] * 3 + data[at + 8 :]
        else:
            data = data[:at] + piece + data[at + len(piece) :]
    return data


numbers = st.sampled_from([b"\0", b"\xff" * 4, b"\xff" * 8, struct.pack("<Q", 1 << 40), struct.pack("<I", 1 << 31)])
edits = st.lists(
    st.tuples(
        st.sampled_from(["replace", "replace", "insert", "remove", "repeat", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.binary(min_size=1, max_size=4), numbers),
    ),
    min_size=1,
    max_size=4,
)


def tensors_of(value: Any, seen: set[int] | None = None) -> list[lazy.LazyTensor]:
    seen = set() if seen is None else seen
    if isinstance(value, lazy.LazyTensor):
        return [value]
    if id(value) in seen or not isinstance(value, (dict, list, tuple, Namespace)):
        return []
    seen.add(id(value))
    items = vars(value) if isinstance(value, Namespace) else value
    inner = items.values() if isinstance(items, dict) else items
    return [tensor for item in inner for tensor in tensors_of(item, seen)]


def survives(path: Path, data: bytes, read: Callable[[str], Any]) -> bool:
    """Whether `data` could be read; every tensor found must lie inside the file, every error must name it."""
    path.write_bytes(data)
    root, message = None, ""
    try:
        root = read(str(path))
    except CkptconvError as error:
        message = str(error)
    if message:
        assert str(path) in message
        assert len(message) < 2000
        return False
    for tensor in tensors_of(root):
        base = tensor.base if isinstance(tensor, lazy.Transposed) else tensor
        assert isinstance(base, lazy.FileTensor)
        assert base.offset >= 0
        assert not base.nbytes or base.offset + base.nbytes <= len(data)
    return True


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def samples(room: Path) -> dict[str, bytes]:
    """A small whole file of each kind."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.bfloat16)}
    save_file(tensors, room / "whole.safetensors", metadata={"format": "pt"})
    tree = {
        "model": OrderedDict(tensors),
        "t": tensors["a"].t(),
        "args": Namespace(x=1, kind=torch.float32),
        "l": [(1,)],
    }
    torch.save(tree, room / "whole.pt")
    torch.save(tree, room / "legacy.pt", _use_new_zipfile_serialization=False)
    return {name: (room / name).read_bytes() for name in ("whole.safetensors", "whole.pt", "legacy.pt")}


def test_the_samples_are_whole(room: Path, samples: dict[str, bytes]) -> None:
    assert survives(room / NAME, samples["whole.safetensors"], safetensors.read)
    assert survives(room / NAME, samples["whole.pt"], torchzip.read)
    assert survives(room / NAME, samples["legacy.pt"], torchzip.read)


@FUZZ
@given(edits=edits)
def test_safetensors(room: Path, samples: dict[str, bytes], edits: list[tuple[str, float, bytes]]) -> None:
    survives(room / NAME, change(samples["whole.safetensors"], edits), lambda path: safetensors.read(path)[0])


words = st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "F32", "BF16", "a", "b"])
scalars = st.one_of(
    st.integers(-2, 40), st.integers(), st.none(), st.booleans(), st.floats(), words, st.text(max_size=3)
)
values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=4))
)
entries = st.one_of(
    values,
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "U8", "F4"]),
            "shape": st.one_of(st.lists(st.integers(0, 4), max_size=3), values),
            "data_offsets": st.one_of(st.tuples(st.integers(0, 40), st.integers(0, 40)), values),
        }
    ),
)


@FUZZ
@given(header=st.dictionaries(st.one_of(words, st.text(max_size=3)), entries, max_size=4), length=st.integers(0, 60))
def test_safetensors_headers(room: Path, header: dict[str, Any], length: int) -> None:
    import json

    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(length)
    survives(room / NAME, data, lambda path: safetensors.read(path)[0])


@FUZZ
@given(edits=edits)
def test_zip_archives(room: Path, samples: dict[str, bytes], edits: list[tuple[str, float, bytes]]) -> None:
    survives(room / NAME, change(samples["whole.pt"], edits), torchzip.read)


@FUZZ
@given(edits=edits)
def test_zip_directories(room: Path, samples: dict[str, bytes], edits: list[tuple[str, float, bytes]]) -> None:
    """All edits in the directory at the end of the archive."""
    whole = samples["whole.pt"]
    start = whole.index(b"PK\x01\x02")
    survives(room / NAME, whole[:start] + change(whole[start:], edits), torchzip.read)


@FUZZ
@given(edits=edits)
def test_pickles_in_archives(room: Path, samples: dict[str, bytes], edits: list[tuple[str, float, bytes]]) -> None:
    """Edits of the pickle that keep its length, with the checksum put right."""
    whole = samples["whole.pt"]
    start = whole.index(b"\x80\x02}")
    size = struct.unpack("<I", whole[whole.index(b"PK\x01\x02") + 24 :][:4])[0]
    damaged = change(whole[start : start + size], edits)[:size].ljust(size, b".")
    old, new = zlib.crc32(whole[start : start + size]), zlib.crc32(damaged)
    data = whole[:start] + damaged + whole[start + size :]
    survives(room / NAME, data.replace(struct.pack("<I", old), struct.pack("<I", new)), torchzip.read)


@FUZZ
@given(edits=edits)
def test_legacy_files(room: Path, samples: dict[str, bytes], edits: list[tuple[str, float, bytes]]) -> None:
    survives(room / NAME, change(samples["legacy.pt"], edits), torchzip.read)


OPCODES = [bytes([code]) for code in range(256)]
GLOBALS = [
    b"cos\nsystem\n", b"cposix\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\nexec\n", b"cbuiltins\ngetattr\n",
    b"csubprocess\nPopen\n", b"c__builtin__\n__import__\n", b"\x8c\x02os\x8c\x06system\x93",
    b"ccollections\nOrderedDict\n", b"cargparse\nNamespace\n", b"cbuiltins\nset\n", b"cbuiltins\nbytearray\n",
    b"c_codecs\nencode\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nSize\n", b"ctorch\nFloatStorage\n",
    b"cmegatron.core.enums\nModelType\n", b"ccopyreg\n_reconstructor\n", b"ccopyreg\n__newobj_ex__\n",
    b"cfunctools\npartial\n", b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ccollections\ndefaultdict\n",
]  # fmt: skip
PIECES = [
    b"N", b"(", b")", b"]", b"}", b"t", b"\x85", b"\x86", b"\x87", b"R", b"\x81", b"\x92", b"b", b"u", b"s", b"a", b"e",
    b"0", b"1", b"2", b"o", b"Q", b"\x90", b"\x91", b"\x8f", b"q\x00", b"q\x01", b"h\x00", b"h\x01", b"\x94", b"K\x05",
    b"J\xff\xff\xff\x7f", b"X\x01\x00\x00\x00a", b"X\x07\x00\x00\x00storage", b"B\x02\x00\x00\x00ab", b"I01\n", b".",
    b"r\xff\xff\xff\xff", b"\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x40",
]  # fmt: skip


def refuses_or_reads(data: bytes) -> None:
    try:
        message = f"{NAME}: " + str(loads(data, NAME, lambda key: key))
    except CkptconvError as error:
        message = str(error)
    assert message.startswith(f"{NAME}: ")


@FUZZ
@given(pieces=st.lists(st.sampled_from(PIECES + GLOBALS), max_size=40))
def test_programs_of_pickle_opcodes(pieces: list[bytes]) -> None:
    refuses_or_reads(b"\x80\x04" + b"".join(pieces) + b".")


@FUZZ
@given(data=st.one_of(st.binary(max_size=60), st.lists(st.sampled_from(OPCODES), max_size=60).map(b"".join)))
def test_noise(room: Path, data: bytes) -> None:
    refuses_or_reads(data)
    survives(room / NAME, data, torchzip.read)
    survives(room / NAME, data, lambda path: safetensors.read(path)[0])


def attack(mark: Path) -> list[bytes]:
    """Calls that would write `mark`, as parts that edits are put between."""
    shell, code = f"touch {mark}", f"open({str(mark)!r}, 'w')"

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    return [
        b"cos\nsystem\n" + text(shell) + b"\x85R", b"cbuiltins\neval\n" + text(code) + b"\x85R",
        b"\x8c\x05posix\x8c\x06system\x93(" + text(shell) + b"tR", b"(cos\nsystem\n" + text(shell) + b"o",
        b"(" + text(shell) + b"ios\nsystem\n", b"cbuiltins\nexec\n" + text(code) + b"\x85\x81",
        b"cfunctools\npartial\ncos\nsystem\n" + text(shell) + b"\x86R)R",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN" + text(shell) + b"\x85NtR",
        b"ccopyreg\n__newobj__\ncos\nsystem\n" + text(shell) + b"\x86R",
        b"ctorch.storage\n_load_from_bytes\n" + b"B" + struct.pack("<I", 0) + b"\x85R",
        b"cbuiltins\ngetattr\n(cbuiltins\ngetattr\n(cos\n__dict__\n" + text("get") + b"tR" + text("system") + b"tR",
    ]  # fmt: skip


@FUZZ
@given(data=st.data())
def test_nothing_runs(room: Path, data: st.DataObject) -> None:
    mark = room / "ran"
    parts = attack(mark)
    program = data.draw(st.lists(st.sampled_from(parts + PIECES + GLOBALS), min_size=1, max_size=12))
    whole = b"\x80\x04" + b"".join(program) + b"."
    if data.draw(st.booleans()):
        whole = change(whole, data.draw(edits))
    refuses_or_reads(whole)
    assert not mark.exists()


def test_the_attacks_are_real(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for number in (0, 1, 2, 4):  # the others need a class, or a machine as naive as ours is not
        pickle.loads(b"\x80\x04" + attack(mark)[number] + b".")
        assert mark.exists()
        mark.unlink()
