"""Sources that are damaged, contradictory, hostile or no checkpoint at all: one error that names the file, soon."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import resource
import shutil
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import FIRST, MIDDLE, Ended, check_incomplete, inside, run, spec, tree, words

Sources = dict[str, Path]
SHARD, INDEX = "model-00001-of-00003.safetensors", "model.safetensors.index.json"
#: A checkpoint of half a megabyte needs no more address space than this, and no more beside what is there already.
MEMORY, MORE = 3 << 30, 1 << 30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Half a megabyte in 3 shards, and on 2 x 2 ranks."""
    import models

    top = tmp_path_factory.mktemp("tiny")
    model = spec(num_layers=4, hidden_size=64, ffn_hidden_size=96, num_query_groups=8, kv_channels=8, vocab_size=256)
    models.write(model, top / "hf", shard=150_000)
    flags = ("--target-tp", 2, "--target-pp", 2)
    run("--saver", "megatron_mcore", *flags, "--load-dir", top / "hf", "--save-dir", top / "mcore").succeeded()
    assert (top / "hf" / SHARD).exists()
    return {"hf": top / "hf", "megatron_mcore": top / "mcore"}


@pytest.fixture
def hf(tiny: Sources, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny["hf"], tmp_path / "source"))


@pytest.fixture
def mcore(tiny: Sources, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny["megatron_mcore"], tmp_path / "source"))


def convert(source: Path, *flags: object, limit: float = 12, processes: bool = False) -> Ended:
    said = ("--saver", "hf", "--load-dir", source, "--save-dir", source.parent / "out", *flags)
    if processes:
        return run(*said, limit=limit, preexec=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)))
    with bounded(limit):
        return inside(*said)


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Neither longer than this nor with much more memory, in this process."""

    def late(number: int, frame: object) -> None:
        raise AssertionError(f"still running after {seconds} s")

    handler, limits = signal.signal(signal.SIGUSR2, late), resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR2))
    timer.start()
    resource.setrlimit(resource.RLIMIT_AS, (now + MORE, limits[1]))
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGUSR2, handler)


def refused(
    source: Path, name: str | Path, *said: str, flags: tuple[object, ...] = (), codes: tuple[int, ...] = (3,),
    limit: float = 12, processes: bool = False,
) -> None:  # fmt: skip
    """It was refused with a message that names the file, and nothing was made."""
    ended = convert(source, *flags, limit=limit, processes=processes).failed(*said)
    assert ended.code in codes, ended.err
    assert str(source / name) in ended.message
    assert len(ended.message) < 1500
    assert not (source.parent / "out").exists()


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps(change(data) or data))


def header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a safetensors header and its length; the data stay."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    data = json.loads(raw[8 : 8 + length])
    text = change(data)
    new = text if isinstance(text, bytes) else json.dumps(data).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])


def first(entries: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in entries.items() if name != "__metadata__")  # type: ignore[no-any-return]


def flip(path: Path, offset: int, bit: int = 1) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= bit
    path.write_bytes(raw)


# Shards


SHARDS: dict[str, Callable[[Path], Any]] = {
    "empty": lambda p: p.write_bytes(b""),
    "seven bytes": lambda p: p.write_bytes(b"1234567"),
    "cut in the header": lambda p: os.truncate(p, 100),
    "cut in the data": lambda p: os.truncate(p, p.stat().st_size - 1),
    "longer than it says": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "length of the header flipped": lambda p: flip(p, 0),
    "length of the header huge": lambda p: flip(p, 7, 0x7F),
    "brace flipped": lambda p: flip(p, 8),
    "a page": lambda p: p.write_text("<html>404</html>"),
    "deep": lambda p: header(p, lambda d: b'{"x":' * 100_000 + b"1" + b"}" * 100_000),
    "a key twice": lambda p: header(p, lambda d: (t := json.dumps(d))[:-1].encode() + b"," + t[1:].encode()),
    "NaN": lambda p: header(p, lambda d: first(d).update(shape=[math.nan, 64])),
    "negative": lambda p: header(p, lambda d: first(d).update(shape=[-256, -64])),
    "huge": lambda p: header(p, lambda d: first(d).update(shape=[1 << 62, 1 << 62])),
    "endless": lambda p: header(p, lambda d: first(d).update(shape=[10**400])),
    "offsets beyond": lambda p: header(p, lambda d: first(d).update(data_offsets=[0, 1 << 60])),
    "offsets reversed": lambda p: header(p, lambda d: first(d)["data_offsets"].reverse()),
    "shape of another": lambda p: header(p, lambda d: first(d).update(shape=[64, 256])),
    "unknown type": lambda p: header(p, lambda d: first(d).update(dtype="Q4_K")),
    "metadata of numbers": lambda p: header(p, lambda d: d.update(__metadata__={"a": 1})),
}
ABSENT: dict[str, Callable[[Path], Any]] = {
    "absent": lambda p: p.unlink(),
    "a directory": lambda p: (p.unlink(), p.mkdir()),
    "a dangling link": lambda p: (p.unlink(), p.symlink_to("nowhere")),
    "a fifo": lambda p: (p.unlink(), os.mkfifo(p)),
}


@pytest.mark.parametrize("damage", SHARDS)
def test_a_damaged_shard(damage: str, hf: Path) -> None:
    SHARDS[damage](hf / SHARD)
    refused(hf, SHARD, processes=damage in ("cut in the data", "deep"))


@pytest.mark.parametrize("damage", ABSENT)
def test_an_absent_shard(damage: str, hf: Path) -> None:
    ABSENT[damage](hf / SHARD)
    refused(hf, INDEX, "Fetch")
    (hf / INDEX).unlink()
    refused(hf, "", "1 of 3|00001-of-00003")


def test_an_absent_shard_is_named(hf: Path) -> None:
    (hf / SHARD).unlink()
    refused(hf, INDEX, SHARD)


# config.json and the index


CONFIGS: dict[str, Callable[[Path], Any]] = {
    "missing": lambda p: p.unlink(),
    "empty": lambda p: p.write_bytes(b""),
    "binary": lambda p: p.write_bytes(bytes(range(256))),
    "a list": lambda p: p.write_text("[1, 2]"),
    "a word": lambda p: p.write_text('"llama"'),
    "deep": lambda p: p.write_text("[" * 100_000 + "]" * 100_000),
    "deep inside": lambda p: p.write_text('{"model_type": "llama", "x": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "endless number": lambda p: p.write_text('{"model_type": "llama", "hidden_size": ' + "9" * 10_000 + "}"),
    "another family": lambda p: edit(p, lambda d: d.update(model_type="mamba")),
    "family is a list": lambda p: edit(p, lambda d: d.update(model_type=["llama"])),
    "quantised": lambda p: edit(p, lambda d: d.update(quantization_config={"quant_method": "gptq"})),
    "quantised, oddly": lambda p: edit(p, lambda d: d.update(quantization_config="gptq")),
    "more layers": lambda p: edit(p, lambda d: d.update(num_hidden_layers=5)),
    "fewer layers": lambda p: edit(p, lambda d: d.update(num_hidden_layers=3)),
    "another width": lambda p: edit(p, lambda d: d.update(hidden_size=128)),
    "another vocabulary": lambda p: edit(p, lambda d: d.update(vocab_size=255)),
    "heads that do not divide": lambda p: edit(p, lambda d: d.update(num_key_value_heads=3)),
    "no heads": lambda p: edit(p, lambda d: d.update(num_attention_heads=0)),
    "rope is a word": lambda p: edit(p, lambda d: d.update(rope_scaling="linear", rope_parameters="x")),
    "rope is a list": lambda p: edit(p, lambda d: d.update(rope_scaling=[1], rope_parameters=[1])),
    "rope of an unknown kind": lambda p: edit(p, lambda d: d.update(rope_scaling={"type": 7}, rope_parameters=None)),
    "type is a number": lambda p: edit(p, lambda d: d.update(torch_dtype=16, dtype=16)),
}  # fmt: skip
#: Sizes as they come from a division by zero, an overflow or a hostile hand.
ODD = {"NaN": math.nan, "Infinity": math.inf, "negative": -4, "half": 2.5, "text": "4", "list": [4], "true": True}


@pytest.mark.parametrize("damage", CONFIGS)
def test_a_damaged_config(damage: str, hf: Path) -> None:
    CONFIGS[damage](hf / "config.json")
    refused(hf, "" if "layers" in damage or "another" in damage else "config.json", codes=(3,))


@pytest.mark.parametrize(("key", "value"), [
    *(("num_hidden_layers", value) for value in ODD),
    ("hidden_size", "NaN"), ("hidden_size", "negative"), ("num_key_value_heads", "half"), ("vocab_size", "Infinity"),
])  # fmt: skip
def test_an_odd_size(key: str, value: str, hf: Path) -> None:
    edit(hf / "config.json", lambda d: d.update({key: ODD[value]}))
    refused(hf, "config.json")


def test_a_great_many_layers(hf: Path) -> None:
    edit(hf / "config.json", lambda d: d.update(num_hidden_layers=10**9))
    refused(hf, "", "layers", limit=4)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts"])
def test_a_great_many_layers_or_experts(key: str, hf: Path) -> None:
    """Lists with an entry for each would fill the memory."""
    moe = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4}
    edit(hf / "config.json", lambda d: d.update({**moe, key: 10**9}))
    refused(hf, "config.json", f"says 1000000000 {key.split('_')[-1]}", limit=4)


@pytest.mark.parametrize(("name", "value"), [
    ("num_layers", 10**6),
    ("num_layers", 10**12),
    ("num_experts", 10**9),
    ("mtp_num_layers", 10**9),
    ("expert_model_parallel_size", 10**4),
    ("num_layers", -1),
    ("num_layers", math.nan),
    ("num_layers", "4"),
    ("hidden_size", -1),
    ("kv_channels", -1),
    ("pipeline_model_parallel_size", 7),
    ("pipeline_model_parallel_size", 10**30),
    ("tensor_model_parallel_size", 10**30),
    ("params_dtype", "float99"),
])  # fmt: skip
def test_odd_args(name: str, value: Any, mcore: Path) -> None:
    import torch

    for path in mcore.rglob("*.pt"):
        root = torch.load(path, weights_only=False)
        setattr(root["args"], name, value)
        torch.save(root, path)
    (mcore / "iter_0000001" / "ckptconv.json").unlink()
    refused(mcore, "", limit=4)


INDICES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda p: p.write_bytes(b""),
    "a list": lambda p: p.write_text("[]"),
    "no map": lambda p: p.write_text("{}"),
    "map is a list": lambda p: p.write_text('{"weight_map": []}'),
    "an absent tensor": lambda p: edit(p, lambda d: d["weight_map"].update({"model.layers.9.x": SHARD})),
    "an absent shard": lambda p: edit(p, lambda d: d["weight_map"].update({"model.norm.weight": "x.safetensors"})),
    "another shard": lambda p: edit(p, lambda d: d["weight_map"].update({"model.norm.weight": SHARD})),
    "a path": lambda p: edit(p, lambda d: d["weight_map"].update({"model.norm.weight": "../../etc/passwd"})),
    "a number": lambda p: edit(p, lambda d: d["weight_map"].update({"model.norm.weight": 3})),
    "an unnamed tensor": lambda p: edit(p, lambda d: d["weight_map"].pop("model.norm.weight") and None),
    "a name with a zero byte": lambda p: edit(p, lambda d: d["weight_map"].update({"model.norm.weight": "a\0b"})),
}


@pytest.mark.parametrize("damage", INDICES)
def test_a_damaged_index(damage: str, hf: Path) -> None:
    INDICES[damage](hf / INDEX)
    refused(hf, INDEX)


def test_the_same_tensor_in_two_shards(hf: Path) -> None:
    (hf / INDEX).unlink()
    shutil.copy(hf / SHARD, hf / "model-extra.safetensors")
    refused(hf, "", "also in")


@pytest.mark.parametrize("kind", ["empty", "text files", "a file", "absent", "dangling link"])
def test_no_checkpoint(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    if kind in ("empty", "text files"):
        source.mkdir()
    if kind == "text files":
        (source / "README.md").write_text("hello")
        (source / "data.bin").write_bytes(b"\0" * 100)
    if kind == "a file":
        source.write_text("hello")
    if kind == "dangling link":
        source.symlink_to("nowhere")
    for loader in ("auto", "hf", "megatron_mcore"):
        refused(source, "", flags=("--loader", loader), codes=(2, 3))


# Megatron's rank files


def rank(mcore: Path) -> Path:
    return mcore / "iter_0000001" / "mp_rank_01_001" / "model_optim_rng.pt"


RANKS: dict[str, Callable[[Path], Any]] = {
    "empty": lambda p: p.write_bytes(b""),
    "cut in half": lambda p: os.truncate(p, p.stat().st_size // 2),
    "cut at the end": lambda p: os.truncate(p, p.stat().st_size - 1),
    "directory flipped": lambda p: flip(p, p.stat().st_size - 30, 0xFF),
    "a page": lambda p: p.write_text("<html>"),
    "a zip of something": lambda p: zipped(p, {"hello.txt": b"hello"}),
    "an empty zip": lambda p: zipped(p, {}),
    "a list": lambda p: pickled(p, [1, 2]),
    "no model": lambda p: pickled(p, {"iteration": 1}),
    "a model of text": lambda p: pickled(p, {"model": {"decoder.final_layernorm.weight": "x"}}),
    "missing": lambda p: p.unlink(),
    "no directory": lambda p: shutil.rmtree(p.parent),
    "another rank's": lambda p: shutil.copy(p.parents[1] / "mp_rank_00_000" / p.name, p),
}


def zipped(path: Path, entries: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in entries.items():
            file.writestr(name, data)


def pickled(path: Path, value: Any) -> None:
    zipped(path, archive(pickle.dumps(value, 2)))


def archive(data: bytes) -> dict[str, bytes]:
    """The records of a torch.save file without tensors."""
    return {"archive/data.pkl": data, "archive/version": b"3\n", "archive/byteorder": b"little"}


@pytest.mark.parametrize("damage", RANKS)
def test_a_damaged_rank(damage: str, mcore: Path) -> None:
    RANKS[damage](rank(mcore))
    refused(mcore, "", "mp_rank_01_001", processes=damage in ("cut in half", "a list"))


@pytest.mark.parametrize(("name", "text"), [
    ("latest_checkpointed_iteration.txt", b""),
    ("latest_checkpointed_iteration.txt", b"\xff\xfe"),
    ("latest_checkpointed_iteration.txt", b"7"),
    ("latest_checkpointed_iteration.txt", b"../iter_0000001"),
    ("latest_checkpointed_iteration.txt", b"9" * 5000),
    ("iter_0000001/ckptconv.json", b"{"),
    ("iter_0000001/ckptconv.json", b"[]"),
    ("iter_0000001/ckptconv.json", b'{"spec": 3}'),
    ("iter_0000001/ckptconv.json", b'{"spec": {"rope": {"x": 1}}}'),
], ids=lambda value: None if isinstance(value, str) else value[:20].decode("latin-1"))  # fmt: skip
def test_damaged_small_files(name: str, text: bytes, mcore: Path) -> None:
    (mcore / name).write_bytes(text)
    refused(mcore, "")


# Code in files


class _Evil:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("protocol", [0, 4])
@pytest.mark.parametrize("kind", ["zip", "bare"])
@pytest.mark.parametrize("place", ["pytorch_model.bin", "model_optim_rng.pt"])
def test_code_in_a_pickle_is_not_run(
    place: str, kind: str, protocol: int, hf: Path, mcore_and_hf: tuple[Path, Path], tmp_path: Path
) -> None:
    proof = tmp_path / "proof"
    if place == "pytorch_model.bin":
        for path in (*hf.glob("*.safetensors"), hf / INDEX):
            path.unlink()
        source, path = hf, hf / place
        data = pickle.dumps({"model.norm.weight": _Evil(proof)}, protocol)
    else:
        source = mcore_and_hf[1]
        path = rank(source)
        data = pickle.dumps({"model": {"decoder.final_layernorm.weight": _Evil(proof)}, "args": _Evil(proof)}, protocol)
    zipped(path, archive(data)) if kind == "zip" else path.write_bytes(data)
    # It would run, if it were trusted.
    pickle.load(io.BytesIO(data))
    assert proof.exists()
    proof.unlink()
    refused(source, path)
    assert not proof.exists()


@pytest.fixture
def mcore_and_hf(tiny: Sources, tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path, Path(shutil.copytree(tiny["megatron_mcore"], tmp_path / "ranks"))


# Files that change while they are read


@pytest.mark.parametrize("at", [FIRST, MIDDLE])
@pytest.mark.parametrize(("saver", "name"), [
    ("megatron_mcore", "model-00006-of-00006.safetensors"),
    ("hf", "iter_0000001/mp_rank_01_003/model_optim_rng.pt"),
])  # fmt: skip
def test_a_file_that_shrinks(saver: str, name: str, at: str, sources: Sources, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources["hf" if saver == "megatron_mcore" else "megatron_mcore"], source)
    before = tree(source)
    deeds = ("--at", at, "--deeds", f"truncate:{source / name}:5000")
    run(*words(saver, source, tmp_path / "out", *deeds)).failed(str(source / name), "truncated", code=3)
    check_incomplete(tmp_path / "out")
    assert {k: v for k, v in tree(source).items() if k != name} == {k: v for k, v in before.items() if k != name}


def test_a_file_that_is_replaced(sources: Sources, tmp_path: Path) -> None:
    """By one of the same size: what was planned is read from the one that was opened, or refused."""
    source = tmp_path / "source"
    shutil.copytree(sources["hf"], source)
    shard = source / "model-00006-of-00006.safetensors"
    deeds = ("--at", "3", "--deeds", f"grow:{shard}:{shard.stat().st_size // 65536 * 65536}")
    run(*words("megatron_mcore", source, tmp_path / "out", *deeds)).failed("changed|truncated", code=3)
