"""torch.distributed.checkpoint directories: what torch writes is read, what is planned here torch reads."""

from __future__ import annotations

import os
import pickle
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint

from ckptconv import lazy
from ckptconv.containers import dcp
from ckptconv.containers.dcp import Chunk
from ckptconv.errors import SourceError

State = dict[str, Any]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def state() -> State:
    generator = torch.Generator().manual_seed(7)
    return {
        "decoder.weight": torch.randn(3, 4, 5, generator=generator),
        "half": torch.randn(7, 2, generator=generator).bfloat16(),
        "vector": torch.arange(6.0),
        "experts": torch.randn(2, 3, 4, 5, generator=generator),
        "byte": torch.randn(4, 8, generator=generator).to(torch.float8_e4m3fn),
        "x._extra_state/shard_0_1": [None],
    }


def by_torch(directory: Path, data: State) -> Path:
    writer = checkpoint.FileSystemWriter(directory, single_file_per_rank=True, thread_count=1)
    checkpoint.save(data, storage_writer=writer, no_dist=True)
    return directory


def chunks(data: State, splits: Mapping[str, tuple[int, ...]]) -> list[tuple[Chunk, torch.Tensor]]:
    """Every tensor in chunks of sizes `splits` (default: whole)."""
    parts = []
    for key, tensor in data.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        sizes = splits.get(key, tuple(tensor.shape))
        steps = [range(0, n, size) for n, size in zip(tensor.shape, sizes, strict=True)]
        for offsets in torch.cartesian_prod(*(torch.tensor(list(s)) for s in steps)).reshape(-1, tensor.ndim).tolist():
            part = tensor
            for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                part = part.narrow(dim, offset, min(size, tensor.shape[dim] - offset))
            name = str(tensor.dtype).removeprefix("torch.")
            parts.append((Chunk(key, name, tuple(tensor.shape), tuple(offsets), tuple(part.shape)), part))
    return parts


def by_us(directory: Path, data: State, splits: Mapping[str, tuple[int, ...]] = {}) -> Path:
    """Planned, filled and indexed, in two data files."""
    directory.mkdir()
    everything = chunks(data, splits)
    objects = {key: value for key, value in data.items() if not isinstance(value, torch.Tensor)}
    half = len(everything) // 2
    files = {}
    for name, parts, others in (("__0_0.distcp", everything[:half], objects), ("__0_1.distcp", everything[half:], {})):
        plan = dcp.plan([chunk for chunk, _ in parts], others)
        crcs = {}
        with open(directory / name, "wb") as file:
            file.truncate(plan.size)

            def write(offset: int, content: bytes, file: Any = file) -> None:
                file.seek(offset)
                file.write(content)

            for chunk, tensor in parts:
                raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                write(plan.offsets[chunk.slot.name], raw)
                crcs[chunk.slot.name] = zlib.crc32(raw)
            plan.finish(write, crcs)
        files[name] = (plan, [chunk for chunk, _ in parts], list(others))
    (directory / ".metadata").write_bytes(dcp.index(files))
    return directory


def test_what_torch_wrote(tmp_path: Path) -> None:
    data = state()
    found = dcp.read(by_torch(tmp_path / "it", data))
    assert set(found.tensors) | set(found.objects) == set(data)
    assert list(found.objects) == ["x._extra_state/shard_0_1"]
    for key, tensor in found.tensors.items():
        assert tensor.shape == tuple(data[key].shape)
        assert torch.equal(lazy.to_torch(tensor.at()).view(torch.uint8), data[key].view(torch.uint8)), key
    layers = found.tensors["experts"]
    for i in range(2):
        assert torch.equal(lazy.to_torch(layers.at((i,))), data["experts"][i])
        for e in range(3):
            assert torch.equal(lazy.to_torch(layers.at((i, e))), data["experts"][i, e])


SPLITS = {"decoder.weight": (1, 2, 5), "half": (7, 1), "vector": (4,), "experts": (1, 2, 4, 3)}


@pytest.mark.parametrize("splits", [{}, SPLITS])
def test_what_torch_reads(splits: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    data = state()
    there = by_us(tmp_path / "it", data, splits)
    into = {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None for k, v in data.items()}
    checkpoint.load(into, storage_reader=checkpoint.FileSystemReader(there), no_dist=True)
    assert into["x._extra_state/shard_0_1"] == [None]
    for key, value in data.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(into[key].view(torch.uint8), value.view(torch.uint8)), key


def test_chunks_in_every_direction(tmp_path: Path) -> None:
    data = state()
    found = dcp.read(by_us(tmp_path / "it", data, SPLITS))
    for key, tensor in found.tensors.items():
        assert torch.equal(lazy.to_torch(tensor.at()).view(torch.uint8), data[key].view(torch.uint8)), key
    for i in range(2):
        assert torch.equal(lazy.to_torch(found.tensors["experts"].at((i,))), data["experts"][i])
        assert torch.equal(lazy.to_torch(found.tensors["experts"].at((i, 2))), data["experts"][i, 2])


def test_index_as_torch_makes_it(tmp_path: Path) -> None:
    """The same classes with the same fields as torch's own pickle of the same checkpoint."""
    data = {"half": state()["half"], "x": [None]}
    ours = pickle.loads((by_us(tmp_path / "us", data) / ".metadata").read_bytes())
    theirs = pickle.loads((by_torch(tmp_path / "torch", data) / ".metadata").read_bytes())
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert set(ours.storage_data) == set(theirs.storage_data)


def test_damage_is_named(tmp_path: Path) -> None:
    there = by_torch(tmp_path / "it", state())
    data = next(there.glob("*.distcp"))
    whole = data.read_bytes()
    data.write_bytes(whole[:-10])
    with pytest.raises(SourceError, match=r"is truncated: it has \d+ bytes"):
        dcp.read(there)
    data.write_bytes(b"\0" * len(whole))
    with pytest.raises(SourceError, match=data.name):
        lazy.to_torch(dcp.read(there).tensors["half"].at())
    data.unlink()
    with pytest.raises(SourceError, match="lacks"):
        dcp.read(there)
    os.truncate(there / ".metadata", 40)
    with pytest.raises(SourceError, match="damaged"):
        dcp.read(there)
    (there / ".metadata").write_bytes(pickle.dumps({"a": 1}, 2))
    with pytest.raises(SourceError, match="is not an index"):
        dcp.read(there)
    (there / ".metadata").unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        dcp.read(there)


class _Foreign:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch /tmp/never",))


def test_an_index_runs_nothing(tmp_path: Path) -> None:
    there = by_torch(tmp_path / "it", state())
    (there / ".metadata").write_bytes(pickle.dumps(_Foreign(), 2))
    with pytest.raises(SourceError, match="refusing to unpickle"):
        dcp.read(there)


def test_missing_chunks_are_named(tmp_path: Path) -> None:
    data = state()
    there = by_us(tmp_path / "it", data, SPLITS)
    found = dcp.read(there)
    tensor = found.tensors["decoder.weight"]
    short = dcp.Tensor(tensor.directory, tensor.key, tensor.dtype, tensor.shape, tensor.chunks[1:])
    with pytest.raises(SourceError, match=r"the chunks of decoder.weight hold 10 of 20 elements of index \(0,\)"):
        short.at((0,))
    assert torch.equal(lazy.to_torch(short.at((1,))), data["decoder.weight"][1])
