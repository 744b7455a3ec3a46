"""Layers with experts in several messages, from loaders and to savers of others, and --max-memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckptconv.errors import ProtocolError
from ckptconv.messages import Course, expected
from ckptconv.spec import ModelSpec, MoE
from inprocess import here

pytestmark = pytest.mark.timeout(120)

Hf = Callable[..., Path]
Cli = Callable[..., Any]

SPEC = ModelSpec(
    family="", num_layers=2, hidden_size=8, ffn_hidden_size=12, num_attention_heads=2, num_query_groups=2,
    kv_channels=4, vocab_size=11, max_position_embeddings=16, seq_length=16, dtype="float32",
    moe=MoE(num_experts=5, topk=2, ffn_hidden_size=6, layers=(0, 1)),
)  # fmt: skip

#: Sends the experts of every layer in slices of `--slice`, the rest as our own loader reads it, as real tensors.
LOADER = """
from ckptconv import lazy, metadata
from ckptconv.loaders.hf import _Source
from ckptconv.messages import expected

def add_arguments(parser):
    parser.add_argument("--slice", type=int, default=0)
    parser.add_argument("--skip", default="")

def load_checkpoint(queue, args):
    source = _Source(args.load_dir, None, None)
    queue.put(metadata.build(source.metadata()))
    for want in expected(source.spec):
        tensors = {key: lazy.to_torch(value) for key, value in source.tensors(want).items()}
        if not (args.slice and want.sliced):
            queue.put({"name": want.name, **tensors})
            continue
        queue.put({"name": want.name, **{k: v for k, v in tensors.items() if k not in want.sliced}})
        for start in range(0, want.num_experts, args.slice):
            stop = min(start + args.slice, want.num_experts)
            name = f"{want.name} experts {start}:{stop}"
            if args.skip != name:
                queue.put({"name": name, **{key: tensors[key][start:stop].clone() for key in want.sliced}})
    queue.put("done")
"""
#: Keeps everything it gets in one file.
SAVER = """
import os, torch

%s

def add_arguments(parser):
    pass

def save_checkpoint(queue, args):
    queue.get()
    kept = []
    while (message := queue.get()) != "done":
        kept.append((str(message.pop("name")), dict(message)))
    os.makedirs(args.save_dir)
    torch.save(kept, args.save_dir + "/kept.pt")
"""


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Plugin modules on the Python path."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "loader_slices.py").write_text(LOADER)
    (folder / "saver_slices.py").write_text(SAVER % "takes_expert_slices = True")
    (folder / "saver_whole.py").write_text(SAVER % "")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    return folder


def kept(directory: Path) -> list[tuple[str, dict[str, torch.Tensor]]]:
    loaded: list[tuple[str, dict[str, torch.Tensor]]] = torch.load(directory / "kept.pt", weights_only=True)
    return loaded


def convert(source: Path, out: Path, *flags: object, cli: Cli = here) -> None:
    result = cli("--load-dir", source, "--save-dir", out, *flags)
    assert result.returncode == 0, result.stderr[-3000:]


def weights(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    model: dict[str, torch.Tensor] = torch.load(path, weights_only=False)["model"]
    return model


def same_files(one: Path, other: Path) -> None:
    names = sorted(p.relative_to(one) for kind in ("*.pt", "*.safetensors") for p in one.rglob(kind))
    assert names
    for name in names:
        got, want = weights(other / name), weights(one / name)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want), name
    digests = [json.loads(next(d.rglob("ckptconv.json")).read_text())["digests"] for d in (one, other)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("step", [1, 2, 4])
def test_our_savers_take_slices(step: int, hf: Hf, plugins: Path, tmp_path: Path) -> None:
    source = hf("mixtral")
    flags = ("--saver", "megatron_mcore", "--target-tp", 2, "--target-ep", 2)
    convert(source, tmp_path / "direct", "--loader", "hf", *flags)
    convert(source, tmp_path / "sliced", "--loader", "slices", "--slice", step, *flags)
    same_files(tmp_path / "direct", tmp_path / "sliced")


def test_slots_built_of_a_whole_layer(hf: Hf, plugins: Path, tmp_path: Path) -> None:
    """gpt-oss stores all experts of a layer in one tensor, transposed: slices are put together first."""
    source = hf("gpt_oss")
    convert(source, tmp_path / "direct", "--loader", "hf", "--saver", "hf")
    convert(source, tmp_path / "sliced", "--loader", "slices", "--slice", 2, "--saver", "hf")
    same_files(tmp_path / "direct", tmp_path / "sliced")


@pytest.mark.parametrize("step", [0, 2])
def test_a_saver_that_has_not_said_it_gets_layers_whole(
    step: int, hf: Hf, plugins: Path, tmp_path: Path
) -> None:
    source = hf("mixtral")
    convert(source, tmp_path / "out", "--loader", "slices", "--slice", step, "--saver", "whole")
    convert(source, tmp_path / "direct", "--loader", "hf", "--saver", "whole")
    one, other = kept(tmp_path / "out"), kept(tmp_path / "direct")
    assert [name for name, _ in one] == [name for name, _ in other]
    for (name, got), (_, want) in zip(one, other, strict=True):
        assert list(got) == list(want), name
        assert all(torch.equal(got[key], want[key]) for key in want), name


def test_a_saver_that_has_said_it_gets_slices(hf: Hf, cli: Cli, plugins: Path, tmp_path: Path) -> None:
    source = hf("mixtral")
    convert(source, tmp_path / "direct", "--loader", "hf", "--saver", "whole")
    convert(source, tmp_path / "out", "--loader", "slices", "--slice", 4, "--saver", "slices", cli=cli)
    whole = dict(kept(tmp_path / "direct"))
    got = kept(tmp_path / "out")
    assert [name for name, _ in got[:4]] == [
        "embeddings", "transformer layer 0", "transformer layer 0 experts 0:4", "transformer layer 0 experts 4:6",
    ]  # fmt: skip
    assert "mlp l0 weight W" not in got[1][1]
    experts = torch.cat([tensors["mlp l1 weight"] for name, tensors in got[2:4]])
    assert torch.equal(experts, whole["transformer layer 0"]["mlp l1 weight"])


def test_a_missing_slice_is_named(hf: Hf, plugins: Path, tmp_path: Path) -> None:
    name = "transformer layer 1 experts 2:4"
    result = here("--load-dir", hf("mixtral"), "--save-dir", tmp_path / "out", "--saver", "megatron_mcore",
                  "--loader", "slices", "--slice", 2, "--skip", name)  # fmt: skip
    assert result.returncode == ProtocolError.exit_code
    assert "'transformer layer 1 experts 4:6' came where 'transformer layer 1 experts 2:j'" in result.stderr
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").rglob("*.pt"))


class TestCourse:
    def test_whole_layers(self) -> None:
        course = Course(SPEC)
        for want in expected(SPEC):
            assert course.awaited == want.name
            found = course.next(want.name, want.shapes)
            assert found == want
            course.passed(want)
        assert course.awaited is None
        assert course.next("more", []) is None

    def test_slices(self) -> None:
        course = Course(SPEC)
        layer = list(expected(SPEC))[2]
        for want in list(expected(SPEC))[:2]:
            course.passed(want)
        assert layer.sliced == ("mlp l0 weight W", "mlp l0 weight V", "mlp l1 weight")
        rest = course.next(layer.name, ["input norm weight"])
        assert rest is not None
        assert (rest.name, rest.part_of, rest.experts) == (layer.name, layer.name, range(0))
        assert not set(rest.shapes) & set(layer.sliced)
        course.passed(rest)
        for start, stop in ((0, 2), (2, 5)):
            assert course.awaited == f"{layer.name} experts {start}:..."
            part = course.next(f"{layer.name} experts {start}:{stop}", layer.sliced)
            assert part is not None
            assert part.shapes["mlp l1 weight"] == (stop - start, 8, 6)
            assert part.part_of == layer.name
            course.passed(part)
        assert course.awaited == "final norm"

    @pytest.mark.parametrize("name", ["experts 1:2", "experts 0:6", "experts 0:0", "final norm", None])
    def test_wrong_slices(self, name: str | None) -> None:
        course = Course(SPEC)
        layer = list(expected(SPEC))[2]
        for want in [*list(expected(SPEC))[:2], layer.without_experts()]:
            course.passed(want)
        wrong = f"{layer.name} {name}" if name and name.startswith("experts") else name
        with pytest.raises(ProtocolError, match=re.escape("experts 0:j' with j up to 5")):
            course.next(wrong, layer.sliced)
