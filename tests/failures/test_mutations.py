"""Changed bytes and values anywhere in a tiny checkpoint: a loader reads it, or says what is wrong; nothing else."""

from __future__ import annotations

import json
import math
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import load, run, spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptconv.errors import CkptconvError

SLOW = list(HealthCheck)
FUZZ = settings(max_examples=250, deadline=None, derandomize=True, database=None, suppress_health_check=SLOW)
INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import models

    top = tmp_path_factory.mktemp("tiny")
    model = spec(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
                 kv_channels=8, vocab_size=64)  # fmt: skip
    models.write(model, top / "hf", shard=20_000)
    assert (top / "hf" / SHARD).exists()
    flags = ("--target-tp", 2, "--target-pp", 2)
    run("--saver", "megatron_mcore", *flags, "--load-dir", top / "hf", "--save-dir", top / "mcore").succeeded()
    return {"hf": top / "hf", "megatron_mcore": top / "mcore"}


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """A reader that believes a size gets a MemoryError, not the machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def survives(directory: Path, loader: str) -> bool:
    try:
        load(directory, loader)
    except CkptconvError as error:
        assert str(directory) in str(error), error
        assert len(str(error)) < 3000
        return False
    return True


edits = st.lists(
    st.tuples(
        st.sampled_from(["replace", "replace", "replace", "insert", "remove", "cut", "bit"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=4) | st.sampled_from([b"9" * 9, b"-", b'"', b"[", b"{", b"NaN", b"\xff" * 8]),
    ),
    min_size=1, max_size=3,
)  # fmt: skip


def changed(data: bytes, changes: list[tuple[str, float, bytes]], start: int = 0, end: int | None = None) -> bytes:
    """`data` after edits between `start` and `end`."""
    end = len(data) if end is None else end
    for kind, place, piece in changes:
        at = start + int(place * (end - start))
        if kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + piece + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + len(piece) :]
        elif kind == "bit":
            data = data[:at] + bytes([data[at] ^ (1 << piece[0] % 8)]) + data[at + 1 :] if at < len(data) else data
        else:
            data = data[:at] + piece + data[at + len(piece) :]
    return data


class Altered:
    """A file that is put back after each example."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data, self._before = path, data, path.read_bytes()

    def __enter__(self) -> None:
        self._path.write_bytes(self._data)

    def __exit__(self, *rest: object) -> None:
        self._path.write_bytes(self._before)


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD])
def test_bytes_of_a_hugging_face_directory(name: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny["hf"], tmp_path / "source"))
    path = source / name
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little") if name.endswith(".safetensors") else None
    assert survives(source, "hf")

    @FUZZ
    @given(edits)
    def check(changes: list[tuple[str, float, bytes]]) -> None:
        with Altered(path, changed(data, changes, 0, end)):
            survives(source, "hf")

    check()
    assert survives(source, "hf")


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4)
    | st.sampled_from([0, 1, -1, 2**31, 10**7, 10**30, 1e308, math.nan, math.inf, "bfloat16", "llama", "default"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=3,
)  # fmt: skip
KEYS = (
    "model_type", "architectures", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act",
    "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias",
    "torch_dtype", "dtype", "sliding_window", "use_sliding_window", "partial_rotary_factor",
)  # fmt: skip
WINDOWS = ("layer_types", "max_window_layers", "sliding_window")


@pytest.mark.parametrize(("family", "keys"), [
    pytest.param("llama", KEYS, id="llama"),
    pytest.param("mistral", (*KEYS, *WINDOWS), id="mistral"),
    pytest.param("qwen2", KEYS, id="qwen2"),
    pytest.param("qwen2", WINDOWS, id="qwen2-windows"),
    pytest.param("llama", ("quantization_config",), id="quantised"),
])  # fmt: skip
def test_values_of_a_config(family: str, keys: tuple[str, ...], tiny: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny["hf"], tmp_path / "source"))
    path = source / "config.json"
    config = json.loads(path.read_text()) | {"model_type": family, "use_sliding_window": True}

    @FUZZ
    @given(st.dictionaries(st.sampled_from(keys), values, min_size=1, max_size=2))
    def check(changes: dict[str, Any]) -> None:
        with Altered(path, json.dumps(config | changes).encode()):
            survives(source, "hf")

    check()


def test_values_of_a_header(tiny: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny["hf"], tmp_path / "source"))
    path = source / SHARD
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:start])
    names = [name for name in entries if name != "__metadata__"]

    @FUZZ
    @given(st.sampled_from(names), st.sampled_from(["dtype", "shape", "data_offsets", "", "name"]), values)
    def check(name: str, part: str, value: Any) -> None:
        new = dict(entries)
        if part == "name":
            new[str(value)] = new.pop(name)
        else:
            new[name] = {**entries[name], part: value} if part else value
        text = json.dumps(new).encode()
        with Altered(path, len(text).to_bytes(8, "little") + text + raw[start:]):
            survives(source, "hf")

    check()


@pytest.mark.parametrize("rank", ["mp_rank_00_000", "mp_rank_01_001"])
def test_bytes_of_a_rank_file(rank: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny["megatron_mcore"], tmp_path / "source"))
    path = source / "iter_0000001" / rank / "model_optim_rng.pt"
    data = path.read_bytes()
    pickle = data.index(b"checkpoint_version") - 200
    ends = {"pickle": (max(pickle, 0), len(data)), "all": (0, len(data))}

    @FUZZ
    @given(edits, st.sampled_from(sorted(ends)))
    def check(changes: list[tuple[str, float, bytes]], where: str) -> None:
        with Altered(path, changed(data, changes, *ends[where])):
            survives(source, "megatron_mcore")

    check()
    assert survives(source, "megatron_mcore")


ARGS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "group_query_attention", "padded_vocab_size", "max_position_embeddings", "seq_length", "params_dtype",
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size", "normalization",
    "swiglu", "rotary_base", "rotary_percent", "use_rope_scaling", "rope_scaling_factor", "position_embedding_type",
    "untie_embeddings_and_output_weights", "add_bias_linear", "add_qkv_bias", "norm_epsilon", "vocab_size",
    "make_vocab_size_divisible_by", "tokenizer_type", "tokenizer_model", "iteration", "num_experts",
)  # fmt: skip


def test_values_of_the_args(tiny: dict[str, Path], tmp_path: Path) -> None:
    """What a pickled Namespace may say: every rank file says it, as it is written by this test."""
    import torch

    source = Path(shutil.copytree(tiny["megatron_mcore"], tmp_path / "source"))
    paths = sorted(source.rglob("*.pt"))
    roots = {path: torch.load(path, weights_only=False) for path in paths}
    (source / "iter_0000001" / "ckptconv.json").unlink()

    @settings(FUZZ, max_examples=100)
    @given(st.dictionaries(st.sampled_from(ARGS), values, min_size=1, max_size=2))
    def check(changes: dict[str, Any]) -> None:
        for path, root in roots.items():
            before = dict(vars(root["args"]))
            vars(root["args"]).update(changes)
            torch.save(root, path)
            vars(root["args"]).clear()
            vars(root["args"]).update(before)
        survives(source, "megatron_mcore")

    check()
