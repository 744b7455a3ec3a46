"""`ckptconv plan`: it says what the conversion does, refuses what it refuses, and makes nothing."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_inspect import FORMATS, THEIRS

import ckptconv
from ckptconv import engine, errors
from ckptconv.lazy import FileTensor
from commands import convert, weights_of
from inprocess import here

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))


def planned(source: Path, out: Path, saver: str, *flags: object) -> dict[str, Any]:
    done = here("plan", "--load-dir", source, "--save-dir", out, "--saver", saver, "--json", *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def sizes(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_size for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(hf: Callable[..., Path]) -> Path:
    return hf("llama2", vocab_size=132)


# Files


@pytest.mark.parametrize("saver", FORMATS)
def test_files_are_those_of_the_conversion(source: Path, tmp_path: Path, saver: str) -> None:
    flags, _ = FORMATS[saver]
    found = planned(source, tmp_path / "out", saver, *flags)
    assert not (tmp_path / "out").exists()
    assert found["files"] == sizes(convert(source, tmp_path / "out", saver, *flags))
    assert found["bytes"] == found["disk"]["needed"] == sum(found["files"].values())


def test_files_of_what_is_quantised_sharded_and_cast(hf: Callable[..., Path], tmp_path: Path) -> None:
    source = hf("deepseek_v3")
    for number, flags in enumerate([("--quantize", "fp8"), ("--max-shard-size", "60kB", "--dtype", "bf16")]):
        out = tmp_path / str(number)
        found = planned(source, out, "hf", *flags)
        assert found["files"] == sizes(convert(source, out, "hf", *flags))


def test_the_way_back(source: Path, tmp_path: Path) -> None:
    there = convert(source, tmp_path / "there", "megatron_mcore", "--target-tp", 2)
    found = planned(there, tmp_path / "back", "hf")
    assert found["files"] == sizes(convert(there, tmp_path / "back"))
    assert "args: read for the sizes" in found["left_out"]


def test_for_a_reader(source: Path, tmp_path: Path) -> None:
    done = here("--dry-run", "--load-dir", source, "--save-dir", tmp_path / "out", "--saver", "megatron_mcore",
                "--target-tp", 2, "--target-pp", 2)  # fmt: skip
    assert done.returncode == 0
    assert re.search(r"^files +2 x +\d+ kB  iter_0000001/mp_rank_\{00\.\.01\}_000/model_optim_rng\.pt$", done.stdout,
                     re.MULTILINE)  # fmt: skip
    assert re.search(r"^disk +\d+ kB needed, .* free$", done.stdout, re.MULTILINE)
    assert re.search(r"^memory +at most about \d+ MB needed", done.stdout, re.MULTILINE)
    assert "nothing was written" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_replaced_and_what_is_finished(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, flags = tmp_path / "out", ("--max-shard-size", "100kB")
    convert(source, out, "hf")
    before = sizes(out)
    found = planned(source, out, "hf", "--overwrite", *flags)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(found["replaced"])
    assert sizes(out) == before

    shutil.rmtree(out)
    finish = engine.Output.finish

    def full(self: engine.Output) -> None:
        if "00003" in self.path:
            raise errors.TargetError("the disk is full")
        finish(self)

    monkeypatch.setattr(engine.Output, "finish", full)
    assert here("--load-dir", source, "--save-dir", out, "--saver", "hf", *flags).returncode == 7
    monkeypatch.undo()
    before = sizes(out)
    found = planned(source, out, "hf", "--resume", *flags)
    assert found["finished"]
    assert found["disk"]["needed"] == found["bytes"] - sum(found["files"][name] for name in found["finished"])
    assert sizes(out) == before


# Refusals


def test_refusals_are_those_of_the_conversion(hf: Callable[..., Path], source: Path, tmp_path: Path) -> None:
    full, broken = tmp_path / "full", tmp_path / "broken"
    full.mkdir()
    (full / "mine").touch()
    shutil.copytree(source, broken)
    (broken / "model.safetensors").unlink()
    cases: dict[int, list[tuple[object, ...]]] = {
        2: [("--load-dir", source, "--save-dir", full, "--saver", "hf"),
            ("--load-dir", tmp_path / "nowhere", "--save-dir", tmp_path / "out", "--saver", "hf"),
            ("--load-dir", source, "--save-dir", tmp_path / "out", "--saver", "hf", "--kv-channels", 7)],
        3: [("--load-dir", broken, "--save-dir", tmp_path / "out", "--saver", "hf", "--loader", "hf")],
        6: [("--load-dir", source, "--save-dir", tmp_path / "out", "--saver", "megatron_mcore", "--target-pp", 3)],
        7: [("--load-dir", hf("gemma2"), "--save-dir", tmp_path / "out", "--saver", "megatron_mcore")],
    }  # fmt: skip
    for code, commands in cases.items():
        for command in commands:
            plan, real = here("plan", *command), here(*command, "--no-progress")
            assert (plan.returncode, real.returncode) == (code, code), (command, plan.stderr, real.stderr)
            said = next(line for line in plan.stderr.splitlines() if line.startswith("ckptconv: error"))
            assert said in real.stderr
            assert plan.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    done = here("plan", "--load-dir", source, "--save-dir", tmp_path / "out", "--saver", "hf")
    assert done.returncode == 7
    assert re.search(r"^disk .* 1 kB free$", done.stdout, re.MULTILINE)
    assert "are needed and 0.00 GB are free" in done.stderr


def test_only_a_plan_has_a_mapping(source: Path, tmp_path: Path) -> None:
    done = here("--load-dir", source, "--save-dir", tmp_path / "out", "--saver", "hf", "--mapping")
    assert done.returncode == 2
    assert not (tmp_path / "out").exists()


def test_a_saver_of_others_cannot_be_planned(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "saver_plan_theirs.py").write_text("def add_arguments(p): pass\ndef save_checkpoint(q, a): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    done = here("plan", "--load-dir", source, "--save-dir", tmp_path / "out", "--saver", "plan_theirs")
    assert done.returncode == 2
    assert "saver plan_theirs is of others" in done.stderr


def test_a_loader_of_others_reads_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loader_plan_theirs.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = planned(source, tmp_path / "out", "meta", "--loader", "plan_theirs", "--mapping")
    assert found["files"] == planned(source, tmp_path / "out", "meta")["files"] | {
        "ckptconv.json": found["files"]["ckptconv.json"]
    }
    assert len(found["mapping"]) == 3 + 4 * 7


# The mapping


def test_the_mapping_is_what_is_done(source: Path, tmp_path: Path) -> None:
    flags = ("--target-tp", 2, "--target-pp", 2)
    found = planned(source, tmp_path / "out", "megatron_mcore", *flags, "--mapping")
    out = convert(source, tmp_path / "out", "megatron_mcore", *flags)
    weights = weights_of(source)
    held = {
        (str(path.relative_to(out)), name): tensor
        for path in out.rglob("*.pt")
        for name, tensor in torch.load(path, weights_only=False)["model"].items()
        if isinstance(tensor, torch.Tensor)
    }
    entries = {(one["message"], one["key"]): one for one in found["mapping"]}
    assert len(entries) == len(found["mapping"])
    assert {name for one in found["mapping"] for name in one["from"]} == {
        f"model.safetensors: {name}" for name in weights
    }
    assert {(to["file"], to["tensor"]) for one in found["mapping"] for to in one["to"]} == set(held)
    for layer in range(4):
        prefix = f"model.layers.{layer}."
        for key, name in (("dense weight", "self_attn.o_proj.weight"), ("mlp l1 weight", "mlp.down_proj.weight")):
            one = entries[f"transformer layer {layer}", key]
            assert one["from"] == [f"model.safetensors: {prefix}{name}"]
            for to in one["to"]:
                start, stop = map(int, re.fullmatch(r"columns (\d+):(\d+)", to["part"]).groups())
                assert torch.equal(held[to["file"], to["tensor"]], weights[prefix + name][:, start:stop])
        qkv = [f"model.safetensors: {prefix}self_attn.{name}_proj.weight" for name in "qkv"]
        assert sorted(entries[f"transformer layer {layer}", "qkv weight"]["from"]) == sorted(qkv)


def test_the_mapping_of_ranks_names_them(source: Path, tmp_path: Path) -> None:
    there = convert(source, tmp_path / "there", "megatron_mcore", "--target-tp", 2, "--target-pp", 2)
    command = ("plan", "--load-dir", there, "--save-dir", tmp_path / "out", "--saver", "hf", "--mapping")
    lines = [line.strip() for line in here(*command).stdout.splitlines()]
    start = lines.index("transformer layer 3 / mlp l1 weight [48, 88] float32")
    assert lines[start + 1 : start + 4] == [
        "from tp 0, stage 1: decoder.layers.1.mlp.linear_fc2.weight",
        "from tp 1, stage 1: decoder.layers.1.mlp.linear_fc2.weight",
        "to   model.safetensors: model.layers.3.mlp.down_proj.weight  all",
    ]


@pytest.mark.parametrize("saver", FORMATS)
def test_every_source_is_named(source: Path, tmp_path: Path, saver: str) -> None:
    flags, _ = FORMATS[saver]
    there = convert(source, tmp_path / "there", saver, *flags)
    found = planned(there, tmp_path / "out", "hf", "--mapping")
    assert not [name for one in found["mapping"] for name in one["from"] if "from byte" in name]
    assert all(one["to"] for one in found["mapping"])


# Big sources, and processes of their own


def test_a_big_source_takes_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("models")  # of the benchmarks
    spec = models.DEEPSEEK_V3
    moe = replace(spec.moe, layers=(0, 1, 1, 1))
    written = models.write(spec.replace(num_layers=4, moe=moe), tmp_path / "in", sparse=True)
    assert written > 90e9  # a file of holes

    def read(self: FileTensor, out: Any, row: int, col: int) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(FileTensor, "read", read)
    began = time.monotonic()
    done = here("plan", "--load-dir", tmp_path / "in", "--save-dir", tmp_path / "out", "--saver", "megatron_mcore",
                "--target-tp", 8, "--target-ep", 32, "--json")  # fmt: skip
    assert done.returncode in (0, 7), done.stderr  # 7: this disk does not hold it
    found = json.loads(done.stdout)
    assert len([name for name in found["files"] if name.endswith(".pt")]) == 256
    assert found["bytes"] > written
    assert found["memory"]["needed"] < 2 << 30
    assert time.monotonic() - began < 30
    assert not (tmp_path / "out").exists()


def test_memory_is_enough(cli: Callable[..., Any], source: Path, tmp_path: Path) -> None:
    command = ("--load-dir", source, "--save-dir", tmp_path / "out", "--saver", "megatron_mcore", "--target-tp", 2)
    plan = cli("plan", *command, "--json")
    assert plan.returncode == 0, plan.stderr
    needed = json.loads(plan.stdout)["memory"]["needed"]
    done = cli(*command)
    assert done.returncode == 0, done.stderr
    peak = int(re.search(r"peak memory (\d+) MiB", done.stderr)[1]) << 20
    assert peak <= needed <= 8 * peak


def test_from_python(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = ckptconv.convert(source, tmp_path / "out", saver="hf", dry_run=True)
    assert not (tmp_path / "out").exists()
    assert report.bytes == sum(report.saver["plan"]["files"].values())
    assert "model.safetensors" in capsys.readouterr().out
