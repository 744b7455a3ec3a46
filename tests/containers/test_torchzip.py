"""torch.save files against torch itself, in both directions."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
import zlib
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptconv import dtypes, lazy
from ckptconv.containers import torchzip
from ckptconv.containers.inert import DTypeName, Inert
from ckptconv.containers.plan import Slot
from ckptconv.errors import SourceError, TableError
from goldens import GOLDEN, read


def bits(tensor: torch.Tensor) -> bytes:
    return lazy.as_numpy(tensor).tobytes() if tensor.numel() else b""


def check(ours: Any, torchs: Any, where: str = "root") -> int:
    """Compare trees; returns how many tensors were compared, bit for bit."""
    if isinstance(torchs, torch.Tensor):
        assert isinstance(ours, lazy.LazyTensor), where
        assert (f"torch.{ours.dtype}", ours.shape) == (str(torchs.dtype), tuple(torchs.shape)), where
        assert not torchs.numel() or bits(lazy.to_torch(ours)) == bits(torchs), where
        return 1
    if isinstance(torchs, Namespace):
        assert isinstance(ours, Namespace), where
        return check(vars(ours), vars(torchs), where)
    if isinstance(torchs, dict):
        assert list(ours) == list(torchs), where
        return sum(check(ours[key], torchs[key], f"{where}.{key}") for key in torchs)
    if isinstance(torchs, (list, tuple)):
        assert type(ours) is (tuple if isinstance(torchs, tuple) else list), where
        assert len(ours) == len(torchs), where
        return sum(check(one, other, f"{where}.{i}") for i, (one, other) in enumerate(zip(ours, torchs, strict=True)))
    if isinstance(torchs, torch.dtype):
        assert str(ours) == str(torchs), where
    elif type(torchs) in (str, int, float, bool, bytes, type(None)):
        assert (type(ours), ours) == (type(torchs), torchs), where
    return 0


def everything() -> dict[Any, Any]:
    big = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    tied = torch.arange(6, dtype=torch.float16).reshape(2, 3)
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).to(torch.bfloat16).state_dict()
    parameter = torch.nn.Parameter(torch.arange(3.0))
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    attributed = torch.arange(4.0)
    attributed.note = "x"  # type: ignore[attr-defined]
    return {
        "model": state,
        "bf16": torch.arange(5, dtype=torch.bfloat16),
        "int": {"64": torch.arange(3), "32": torch.arange(3, dtype=torch.int32), "bool": torch.tensor([True, False])},
        "tied": [tied, tied, tied[1]],
        "parameter": torch.nn.Parameter(torch.arange(4.0)),
        "parameter with state": parameter,
        "attributed": attributed,
        "slice": big[2:4],
        "transposed": big.t(),
        "transposed part": big[1:3].t(),
        "odd strides of 1": torch.empty_strided((1, 4), (99, 1)).copy_(big[:1]),
        "column of one": big.as_strided((4, 1), (1, 77)),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "float8": torch.arange(4).to(torch.float8_e4m3fn),
        "uint16": torch.arange(4).to(torch.uint16),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "args": Namespace(tp=2, params_dtype=torch.float32, sizes=[1, (2, 3)], none=None, yes=True, rate=1e-5),
        "iteration": 10**12,
        3: "an int key",
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_torch_writes(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "m.pt"
    saved = everything()
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    root: Any = torchzip.read(path)
    assert check(root, saved) == 23
    assert isinstance(root["model"], OrderedDict)
    assert isinstance(root["transposed"], lazy.Transposed)
    assert isinstance(root["slice"], lazy.FileTensor)
    assert root["tied"][0] == root["tied"][1]
    assert root["tied"][2].offset == root["tied"][0].offset + 6


def test_namespaces_and_stand_ins(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save(
        {
            "ns": types.SimpleNamespace(a=1),
            "device": torch.device("cuda:1"),
            "c": torch.zeros(1, 2, dtype=torch.complex64),
        },
        path,
    )
    root: Any = torchzip.read(path)
    assert root["ns"] == Namespace(a=1)
    assert str(root["device"]) == "torch.device('cuda', 1)"
    assert isinstance(root["c"], Inert)
    assert root["c"].args[2] == (1, 2)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "tensor", [
        torch.zeros(6, 4)[:, 1:3], torch.zeros(1).expand(3), torch.zeros(2, 3, 4).transpose(1, 2), torch.zeros(6)[::2],
    ],
)  # fmt: skip
def test_other_strides_are_named(tmp_path: Path, tensor: torch.Tensor, zipped: bool) -> None:
    path = tmp_path / "m.pt"
    saved = {"fine": torch.zeros(2), "layers": [Namespace(weight=tensor)]}
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SourceError, match=r"the tensor 'layers\.0\.weight' has shape .* and strides") as caught:
        torchzip.read(path)
    assert str(path) in str(caught.value)


def test_a_conjugate_bit_is_not_ignored(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    negative = torch.tensor([1 + 2j, 3 + 4j]).conj().imag
    assert negative.is_neg()
    torch.save({"x": negative.view(2)}, path)
    with pytest.raises(SourceError, match=r"'x' .*(negative|strides)"):
        torchzip.read(path)


def test_reading_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    torch.save(everything(), tmp_path / "m.pt")
    code = (
        "import sys; from ckptconv.containers import torchzip, safetensors; "
        f"torchzip.read({str(tmp_path / 'm.pt')!r}); print(*({{'torch', 'numpy'}} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


class View:
    """A storage that is part of another, as files of torch before 0.4 have them."""


def legacy_with_view(path: Path) -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, View):
                return ("storage", torch.FloatStorage, "7", "cpu", 6, ("9", 2, 3))
            return None

    class Tensor:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (View(), 1, (2,), (1,), False, OrderedDict())

    with path.open("wb") as file:
        pickle.dump(torch.serialization.MAGIC_NUMBER, file, 2)
        pickle.dump(torch.serialization.PROTOCOL_VERSION, file, 2)
        pickle.dump({"protocol_version": 1001, "little_endian": True}, file, 2)
        Pickler(file, 2).dump({"x": Tensor()})
        pickle.dump(["7"], file, 2)
        file.write((6).to_bytes(8, "little") + torch.arange(6.0).numpy().tobytes())


def test_legacy_view(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    legacy_with_view(path)
    assert torch.load(path, weights_only=False)["x"].tolist() == [3.0, 4.0]
    root: Any = torchzip.read(path)
    assert lazy.to_torch(root["x"]).tolist() == [3.0, 4.0]


def test_truncated_legacy_file(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    legacy_with_view(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(SourceError, match=str(path)):
            torchzip.read(path)


def slots_of_every_kind() -> tuple[dict[Any, Any], dict[str, bytes]]:
    kinds = {name: Slot(f"model.{name}", name, (3, 5)) for name in dtypes.BY_NAME}
    root: dict[Any, Any] = {
        "args": Namespace(tp=2, params_dtype=DTypeName("bfloat16"), sizes=[1, (2, 3), ()], none=None, yes=True),
        "model": OrderedDict(kinds),
        "empty": Slot("empty", "float32", (0, 4)),
        "scalar": Slot("scalar", "int64", ()),
        "numbers": [0, 255, 256, 65535, 65536, -1, -(2**31), 2**31, 2**40, -(2**70), 1.5, float("inf")],
        "text": "é",
        4: "int key",
    }
    slots = [*kinds.values(), root["empty"], root["scalar"]]
    return root, {s.name: bytes((7 * i + len(s.name)) % 2 for i in range(s.nbytes)) for s in slots}


@pytest.mark.parametrize("archive", ["archive", "model_optim_rng"])
def test_torch_reads_what_is_planned(tmp_path: Path, written: Any, archive: str) -> None:
    root, data = slots_of_every_kind()
    plan = torchzip.plan(root, archive)
    path = written(tmp_path / "m.pt", plan, data)
    assert plan.needs_crc
    assert all(offset % 64 == 0 for offset in plan.offsets.values())
    with zipfile.ZipFile(path) as opened:
        assert opened.testzip() is None
        names = [name.removeprefix(f"{archive}/") for name in opened.namelist()]
        assert opened.read(f"{archive}/version") == b"3\n"
        assert opened.read(f"{archive}/byteorder") == b"little"
    data_names = [f"data/{i}" for i in range(len(data))]
    assert names == ["data.pkl", "byteorder", *data_names, "version", ".data/serialization_id"]
    every: list[dict[str, Any]] = [{"weights_only": False}, {"mmap": True, "weights_only": False}, {}, {"mmap": True}]
    for options in every:
        with torch.serialization.safe_globals([Namespace]):
            loaded = torch.load(path, **options)
        assert all(loaded[key] == root[key] for key in ("numbers", "text", 4))
        assert loaded["args"] == Namespace(**{**vars(root["args"]), "params_dtype": torch.bfloat16})
        assert type(loaded["model"]) is OrderedDict
        tensors = {f"model.{k}": v for k, v in loaded["model"].items()}
        tensors |= {"empty": loaded["empty"], "scalar": loaded["scalar"]}
        for name, tensor in tensors.items():
            slot = plan.slots[name]
            assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{slot.dtype}", slot.shape)
            assert tensor.is_contiguous()
            assert bits(tensor) == data[name]
        assert check(torchzip.read(path), loaded) == len(plan.slots)


@pytest.mark.skipif(not shutil.which("unzip"), reason="unzip is not installed")
def test_unzip_finds_no_error(tmp_path: Path, written: Any) -> None:
    root, data = slots_of_every_kind()
    path = written(tmp_path / "m.pt", torchzip.plan(root), data)
    done = subprocess.run(["unzip", "-t", path], capture_output=True, text=True, check=True)
    assert "No errors detected" in done.stdout


def test_files_over_four_gigabytes(tmp_path: Path) -> None:
    """Zip64 in size and in offset, on a sparse file."""
    long = Slot("long", "bfloat16", ((5 << 29) + 1,))
    plan = torchzip.plan({"long": long, "after": Slot("after", "float32", (2,))})
    path = tmp_path / "m.pt"
    path.touch()
    os.truncate(path, plan.size)
    after = torch.tensor([1.5, 2.5])
    with path.open("r+b") as file:

        def write(offset: int, data: bytes) -> None:
            file.seek(offset)
            file.write(data)

        write(plan.offsets["after"], bits(after))
        write(plan.offsets["long"] + long.nbytes - 2, b"\x80\x3f")
        plan.finish(write, {"long": 1, "after": zlib.crc32(bits(after))})
    assert path.stat().st_size == plan.size > 5 << 30
    with zipfile.ZipFile(path) as opened:
        infos = {info.filename: info for info in opened.infolist()}
        assert opened.read("archive/data/1") == bits(after)
    assert infos["archive/data/0"].file_size == long.nbytes
    assert infos["archive/data/1"].header_offset > 1 << 32
    loaded = torch.load(path, mmap=True)
    assert loaded["after"].tolist() == [1.5, 2.5]
    assert loaded["long"].shape == long.shape
    assert loaded["long"][-1] == 1.0
    root: Any = torchzip.read(path)
    assert root["long"].offset == plan.offsets["long"]
    assert root["after"].offset == plan.offsets["after"]


def test_more_records_than_16_bits_count(tmp_path: Path, written: Any) -> None:
    count = 65_600
    plan = torchzip.plan([Slot(str(i), "uint8", (1,)) for i in range(count)])
    path = written(tmp_path / "m.pt", plan, {str(i): bytes([i % 251]) for i in range(count)})
    with zipfile.ZipFile(path) as opened:
        assert len(opened.infolist()) == count + 4
        assert opened.read(f"archive/data/{count - 1}") == bytes([(count - 1) % 251])


def test_the_same_content_gives_the_same_file(tmp_path: Path, written: Any) -> None:
    root, data = slots_of_every_kind()
    one = written(tmp_path / "one.pt", torchzip.plan(root), data).read_bytes()
    other = written(tmp_path / "other.pt", torchzip.plan(root), data).read_bytes()
    assert one == other


def test_plan_refuses() -> None:
    with pytest.raises(TableError, match="x is planned twice"):
        torchzip.plan([Slot("x", "float32", (1,)), Slot("x", "float32", (2,))])
    with pytest.raises(TableError, match="unknown element type"):
        torchzip.plan([Slot("x", "complex64", (1,))])
    with pytest.raises(TableError, match=r"root\['a'\]\[1\] is a set"):
        torchzip.plan({"a": [1, {2}]})
    with pytest.raises(TableError, match="checksum of x is missing"):
        torchzip.plan(Slot("x", "float32", (1,))).finish(lambda offset, data: None, {})


def repacked(path: Path, change: Any) -> Path:
    """`m.pt` with its records as `change(name, data)` gives them: a list of (name, data, compression)."""
    source = path / "source.pt"
    torch.save({"x": torch.arange(4.0)}, source)
    target = path / "m.pt"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            for changed, data, compression in change(name, old.read(name)):
                new.writestr(changed, data, compression)
    return target


STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


@pytest.mark.parametrize(
    ("change", "message"), [
        (lambda n, d: [(n, d, DEFLATED)], "compressed or encrypted"),
        (lambda n, d: [] if n.endswith("data/0") else [(n, d, STORED)], "has no record 'source/data/0'"),
        (lambda n, d: [] if n.endswith("data.pkl") else [(n, d, STORED)], r"0 records \*/data.pkl"),
        (lambda n, d: [(n, d, STORED), (f"b/{n.split('/')[1]}", d, STORED)], r"2 records \*/data.pkl"),
        (lambda n, d: [(n, d[:15] if n.endswith("data/0") else d, STORED)], "has 15 bytes, 4 .* need 16"),
        (lambda n, d: [(n, b"big" if n.endswith("order") else d, STORED)], "big-endian"),
        (lambda n, d: [(n.replace("version", "constants.pkl"), d, STORED)], "TorchScript"),
        (lambda n, d: [(n.replace("/", "-") + ".npy", d, STORED)], "npz"),
    ],
)  # fmt: skip
def test_archives_that_torch_did_not_write(tmp_path: Path, change: Any, message: str) -> None:
    path = repacked(tmp_path, change)
    with pytest.raises(SourceError, match=message) as caught:
        torchzip.read(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(SourceError, match="TorchScript archive"):
        torchzip.read(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_records(tmp_path: Path) -> None:
    path = repacked(tmp_path, lambda n, d: [(n, d, STORED)] * (2 if n.endswith("data/0") else 1))
    with pytest.raises(SourceError, match="the same name"):
        torchzip.read(path)


def test_damaged_local_header_and_pickle(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"x": torch.arange(4.0)}, path)
    whole = path.read_bytes()
    at = whole.index(b"m/data/0") - 30
    path.write_bytes(whole[:at] + b"PX" + whole[at + 2 :])
    with pytest.raises(SourceError, match="no local header of 'm/data/0'"):
        torchzip.read(path)
    at = whole.index(b"FloatStorage")
    path.write_bytes(whole[:at] + b"f" + whole[at + 1 :])
    with pytest.raises(SourceError, match="checksum"):
        torchzip.read(path)


@pytest.mark.parametrize("keep", [0, 1, 3, 5, 30, 0.2, 0.5, 0.9, -23, -1])
def test_truncated_archive(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "m.pt"
    torch.save({"x": torch.arange(4.0)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(SourceError, match=str(path)):
        torchzip.read(path)


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    with pytest.raises(SourceError, match="tar archive"):
        torchzip.read(path)
    for content, message in (
        (pickle.dumps({"a": 1}), "not one of torch.save"),
        (b"version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
        (b"", "it is empty"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"xyz", "no known kind"),
    ):
        path.write_bytes(content)
        with pytest.raises(SourceError, match=message):
            torchzip.read(path)


@pytest.mark.parametrize("kind", ["megatron", "gaudi", "epfl", "mindspore", "nxdt"])
def test_golden_files(kind: str) -> None:
    paths = sorted((GOLDEN / kind).rglob("*.pt"))
    if not paths:
        pytest.skip(f"no golden files under {GOLDEN / kind}: set CKPTCONV_GOLDEN")
    tensors = 0
    for path in paths:
        expected = read(path)
        tensors += check(torchzip.read(path), expected, str(path))
    assert tensors > 0
