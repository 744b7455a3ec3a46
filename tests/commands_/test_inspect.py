"""`ckptconv inspect`: right on every format, on files of the systems themselves, and on what a conversion refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckptconv import joining, plugins
from ckptconv.errors import folded
from ckptconv.lazy import FileTensor
from commands import convert, weights_of
from goldens import GOLDEN
from inprocess import here

#: saver -> flags, (tp, pp) that inspect has to find.
FORMATS: dict[str, tuple[tuple[object, ...], tuple[int, int] | None]] = {
    "hf": ((), None),
    "megatron_mcore": (("--target-tp", 2, "--target-pp", 2, "--target-vpp", 2), (2, 2)),
    "megatron_dist": ((), (1, 1)),
    "megatron_legacy": (("--target-tp", 2, "--target-pp", 2), (2, 2)),
    "megatron_llm": (("--target-tp", 2, "--target-pp", 2), (2, 2)),
    "megatron_gaudi": (("--target-tp", 2, "--target-pp", 2), (2, 2)),
    "nxdt": (("--tp-size", 2, "--pp-size", 2, "--hw-backend", "trn1"), (2, 2)),
    "mindspore": ((), (1, 1)),
    "meta": (("--target-tp", 2), (2, 1)),
}


def inspected(place: Path, *flags: object) -> dict[str, Any]:
    done = here("inspect", place, "--json", *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def source(hf: Callable[..., Path]) -> Path:
    return hf("llama2", vocab_size=132)


@pytest.fixture(scope="module")
def mcore(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tp 2, pp 2."""
    return convert(source, tmp_path_factory.mktemp("mcore") / "out", "megatron_mcore", "--target-tp", 2,
                   "--target-pp", 2)  # fmt: skip


@pytest.mark.parametrize("saver", FORMATS)
def test_every_format(source: Path, tmp_path: Path, saver: str) -> None:
    flags, sizes = FORMATS[saver]
    found = inspected(convert(source, tmp_path / "out", saver, *flags))
    weights = weights_of(source)
    assert found["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert found["family"] == "llama"
    assert (found["model"]["num_layers"], found["model"]["hidden_size"]) == (4, 48)
    assert found["model"]["vocab_size"] == 132
    assert found["model"]["rope"]["theta"] == 10000
    assert not found["model"]["tied"]
    assert found["refused"] == []
    assert list(found["tensor_bytes"]) == ["float32"]
    assert found["tensor_bytes"]["float32"] >= 4 * found["parameters"]
    assert "tokenizer.json" in found["tokenizer"]["files"]
    if sizes is None:
        assert sorted(name for one in found["tensors"] for name in [one["name"]]) == sorted(folded(weights))
        assert sum(one["count"] for one in found["tensors"]) == len(weights)
        return
    layout = found["layout"]
    assert (layout["tp"], layout["pp"]) == sizes
    layers = [layer for stage in layout["stages"] for chunk in stage for layer in chunk["layers"]]
    assert sorted(layers) == [0, 1, 2, 3]
    assert "embeddings" in layout["stages"][0][0]["also"]
    assert {"final norm", "output layer"} <= set(layout["stages"][-1][-1]["also"])


def test_the_map(mcore: Path) -> None:
    lines = here("inspect", mcore).stdout.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("layout"))
    assert [line[12:] for line in lines[start : start + 18]] == [
        "tp 2 pp 2",
        "stage 0: embeddings, layers 0, 1",
        "stage 1: layers 2, 3, final norm, output layer",
        "slices of tensor ranks 0..1, of one layer of each kind:",
        "  embeddings",
        "    word embeddings [256, 48]: rows 0:128 | 128:256",
        "  transformer layer 0",
        "    qkv weight [96, 48]: rows 0:48 | 48:96",
        "    dense weight [48, 48]: columns 0:24 | 24:48",
        "    mlp l0 weight W [88, 48]: rows 0:44 | 44:88",
        "    mlp l0 weight V [88, 48]: rows 0:44 | 44:88",
        "    mlp l1 weight [48, 88]: columns 0:44 | 44:88",
        "    the same on all: input norm weight, post norm weight",
        "  final norm",
        "    the same on all: weight",
        "  output layer",
        "    weight [256, 48]: rows 0:128 | 128:256",
        "embedding.word_embeddings.weight  [128, 48] float32 x 2",
    ]


def test_experts_and_their_ranks(hf: Callable[..., Path], tmp_path: Path) -> None:
    flags = ("--target-tp", 2, "--target-ep", 2)
    out = convert(hf("qwen3_moe"), tmp_path / "out", "megatron_mcore", *flags)
    found = inspected(out)
    assert found["layout"]["experts"] == [[0, 1, 2], [3, 4, 5]]
    assert found["family"] == "qwen3_moe"
    assert found["parameters"] == sum(tensor.numel() for tensor in weights_of(hf("qwen3_moe")).values())
    slices = {one["key"]: one for one in found["layout"]["slices"] if one["message"] == "transformer layer 0"}
    assert slices["mlp l1 weight"]["of_each_expert"]
    assert slices["mlp l1 weight"]["ranks"] == ["columns 0:10", "columns 10:20"]
    text = here("inspect", out).stdout
    assert "experts: 0..2 on ep 0 | 3..5 on ep 1" in text
    assert "decoder.layers.{0..3}.mlp.experts.local_experts.{0..2}.linear_fc2.weight  [48, 10] float32 x 48" in text


def test_no_weights_are_read(source: Path, tmp_path: Path, mcore: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dist = convert(source, tmp_path / "dist", "megatron_dist")
    read: list[int] = []
    plain = FileTensor.read

    def counted(self: FileTensor, out: Any, row: int, col: int) -> None:
        read.append(out.nbytes)
        plain(self, out, row, col)

    monkeypatch.setattr(FileTensor, "read", counted)
    for place in (source, dist):
        inspected(place)
    assert read == []
    inspected(mcore)  # norms only: they are on both tensor ranks
    assert sum(read) == 2 * 4 * 48 * (2 * 4 + 1)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the files of other systems are not here")
@pytest.mark.parametrize("name", ["llama_gqa.tp2pp2", "llama_mha.tp4pp1", "qwen2.tp2pp2"])
def test_slices_are_those_of_megatrons_own_files(name: str) -> None:
    place = GOLDEN / "megatron" / name
    found = inspected(place)
    assert found["refused"] == []
    layout = found["layout"]
    weights = weights_of(GOLDEN / "megatron" / "hf" / name.split(".")[0])
    slices = {one["key"]: one["ranks"] for one in layout["slices"] if one["message"] == "transformer layer 0"}
    prefix = "model.layers.0."
    for rank in range(layout["tp"]):
        folder = f"mp_rank_{rank:02d}" + "_000" * (layout["pp"] > 1)
        path = place / "iter_0000001" / folder / "model_optim_rng.pt"
        model = torch.load(path, weights_only=False)["model"]
        fc1 = model["decoder.layers.0.mlp.linear_fc1.weight"]
        o_proj = model["decoder.layers.0.self_attention.linear_proj.weight"]
        kind, span = slices["mlp l0 weight V"][rank].split(" ")
        start, stop = map(int, span.split(":"))
        assert kind == "rows"
        assert torch.equal(fc1[len(fc1) // 2 :], weights[prefix + "mlp.up_proj.weight"][start:stop])
        kind, span = slices["dense weight"][rank].split(" ")
        start, stop = map(int, span.split(":"))
        assert kind == "columns"
        assert torch.equal(o_proj, weights[prefix + "self_attn.o_proj.weight"][:, start:stop])


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the files of other systems are not here")
def test_slices_are_those_of_aws_own_files() -> None:
    case = GOLDEN / "nxdt" / "cases" / "hf_gqa_tp4pp2_m2_trn1" / "nxdt"
    refused = inspected(case)  # without a config.json: files only
    assert "--config" in refused["refused"][0]
    assert refused["model"] is None
    assert refused["tensors"]
    found = inspected(case, "--config", GOLDEN / "nxdt" / "inputs" / "gqa" / "config.json", "--hw-backend", "trn1")
    assert found["refused"] == []
    heads = next(one for one in found["layout"]["slices"] if one["tensor"].endswith("weight_q"))["ranks"]
    assert heads == ["rows 0:4", "rows 16:20", "rows 4:8", "rows 20:24"]  # of two groups of two heads, k and v


def test_of_big_copies_the_first_rows_are_read(
    hf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = convert(hf("qwen3_moe"), tmp_path / "out", "megatron_mcore", "--target-ep", 2)
    monkeypatch.setattr(joining, "SAMPLE", 1000)
    path = place / "iter_0000001" / "mp_rank_00_001" / "model_optim_rng.pt"
    root = torch.load(path, weights_only=False)
    root["model"]["decoder.layers.2.self_attention.linear_proj.weight"][2] += 1
    root["model"]["decoder.layers.2.self_attention.linear_qkv.weight"][-1] += 1
    torch.save(root, path)
    found = inspected(place)["refused"]
    assert len(found) == 1
    assert "layers.2.self_attention.linear_proj.weight differs" in found[0]
    done = here("plan", "--load-dir", place, "--save-dir", tmp_path / "there", "--saver", "hf")  # compares all
    assert done.returncode == 3
    assert "layers.2.self_attention.linear_qkv.weight differs" in done.stderr


def test_no_format_is_left_out() -> None:
    assert sorted(FORMATS) == plugins.builtin("saver")


# What a conversion refuses


def copied(source: Path, out: Path) -> Path:
    return Path(shutil.copytree(source, out))


def test_a_missing_shard(hf: Callable[..., Path], tmp_path: Path) -> None:
    place = copied(hf("llama31", max_shard_size=60000), tmp_path / "in")
    shards = sorted(place.glob("*.safetensors"))
    shards[2].unlink()
    found = inspected(place)
    assert found["parameters"]
    assert found["files"] == len(shards) - 1
    assert shards[2].name in found["refused"][0]
    assert found["model"]["rope"]["kind"] == "llama3"


def test_a_damaged_shard(hf: Callable[..., Path], tmp_path: Path) -> None:
    place = copied(hf("llama31", max_shard_size=60000), tmp_path / "in")
    shard = sorted(place.glob("*.safetensors"))[2]
    os.truncate(shard, 2000)
    found = inspected(place)
    assert "truncated" in found["refused"][0]
    assert found["model"]["num_layers"] == 4
    names = {one["name"] for one in found["tensors"]}
    assert "model.embed_tokens.weight" in names
    assert "model.layers.{0..3}.mlp.down_proj.weight" in names


def test_tensors_that_nothing_uses(source: Path, tmp_path: Path) -> None:
    place = copied(source, tmp_path / "in")
    weights = load_file(place / "model.safetensors")
    from safetensors.torch import save_file

    save_file({**weights, "model.surprise": torch.zeros(3)}, place / "model.safetensors")
    found = inspected(place)
    assert "model.surprise" in found["refused"][0]
    assert found["parameters"] == sum(tensor.numel() for tensor in weights.values())


def test_no_config(source: Path, tmp_path: Path) -> None:
    place = copied(source, tmp_path / "in")
    (place / "config.json").unlink()
    found = inspected(place)
    assert found["model"] is None
    assert "config.json: missing" in found["refused"][0]
    assert sum(one["count"] for one in found["tensors"]) == len(weights_of(source))
    assert here("inspect", place).returncode == 0


def test_a_config_with_more_layers_than_could_be_counted(source: Path, tmp_path: Path) -> None:
    out = copied(source, tmp_path / "huge")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**12}))
    seen = inspected(out)
    assert seen["model"] is None and seen["tensors"]
    assert "says 1000000000000 layers" in seen["refused"][0]


def test_a_missing_rank(mcore: Path, tmp_path: Path) -> None:
    place = copied(mcore, tmp_path / "in")
    shutil.rmtree(place / "iter_0000001" / "mp_rank_01_001")
    found = inspected(place)
    assert "mp_rank_01_001" in found["refused"][0]
    assert (found["layout"]["tp"], found["layout"]["pp"]) == (2, 2)
    shutil.rmtree(place / "iter_0000001" / "mp_rank_00_000")
    found = inspected(place)  # with the first one gone nobody says what the model is
    assert found["tensors"]
    assert any("mp_rank_00_000" in text for text in found["refused"])


def test_ranks_that_have_drifted_apart(mcore: Path, tmp_path: Path) -> None:
    place = copied(mcore, tmp_path / "in")
    path = place / "iter_0000001" / "mp_rank_01_000" / "model_optim_rng.pt"
    root = torch.load(path, weights_only=False)
    root["model"]["decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"][3] += 1
    root["model"]["decoder.layers.1.surprise"] = torch.zeros(3)
    torch.save(root, path)
    found = inspected(place)
    assert len(found["refused"]) == 2
    assert "surprise" in found["refused"][0]
    assert "layers.1.self_attention.linear_qkv.layer_norm_weight differs" in found["refused"][1]
    assert found["layout"]["stages"][1][0]["layers"] == [2, 3]


def test_nothing_that_can_be_read(source: Path, tmp_path: Path) -> None:
    place = copied(source, tmp_path / "in")
    os.truncate(place / "model.safetensors", 5)
    done = here("inspect", place)
    assert done.returncode == 3
    assert "has 5 bytes" in done.stderr
    assert here("inspect", tmp_path / "nowhere").returncode == 2
    assert here("inspect", tmp_path).returncode == 2


def test_rows_in_an_order_that_no_file_tells(source: Path, tmp_path: Path) -> None:
    place = convert(source, tmp_path / "out", "mindspore")
    (place / "ckptconv.json").unlink()
    found = inspected(place)
    assert "--ms-fc1-layout is needed" in found["refused"][0]
    assert found["layout"]["stages"][0][0]["layers"] == [0, 1, 2, 3]
    assert inspected(place, "--ms-fc1-layout", "contiguous", "--ms-qkv-layout", "grouped")["refused"] == []


# Loaders of others, and a process of its own

THEIRS = """
from argparse import Namespace
from ckptconv import lazy, metadata
from ckptconv.loaders import hf
from ckptconv.messages import expected

def add_arguments(parser):
    parser.add_argument("--theirs")

def load_checkpoint(queue, args):
    source = hf.opened(args.load_dir)
    queue.put(metadata.build(source.metadata()))
    for message in expected(source.spec):
        tensors = source.tensors(message)
        queue.put({"name": message.name, **{key: lazy.to_torch(tensor) for key, tensor in tensors.items()}})
    queue.put("done")
"""


def test_a_loader_of_others(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loader_inspect_theirs.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = inspected(source, "--loader", "inspect_theirs", "--theirs", "x")
    assert found["parameters"] == sum(tensor.numel() for tensor in weights_of(source).values())
    assert {"name": "transformer layer {0..3}/qkv weight", "count": 4, "shape": [96, 48], "dtype": "float32"} in (
        found["tensors"]
    )


def test_in_a_process(cli: Callable[..., Any], mcore: Path) -> None:
    done = cli("inspect", mcore, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["layout"]["tp"] == 2
