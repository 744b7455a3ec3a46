"""`ckptconv diff`: any two formats, what differs by name and by how much, and exit code 8."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from goldens import GOLDEN
from inprocess import here
from test_any_to_any import FORMATS, convert

Hf = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[1]


def diff(one: Path, other: Path, *flags: object) -> tuple[int, dict[str, Any]]:
    done = here("diff", one, other, "--json", *flags)
    assert done.returncode in (0, 8), done.stderr
    found = json.loads(done.stdout)
    assert found["equal"] == (done.returncode == 0)
    return done.returncode, found


def changed(source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None] = lambda weights: None,
            **config: object) -> Path:  # fmt: skip
    """A copy of a Hugging Face directory with other weights and settings."""
    out.mkdir()
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | config))
    return out


@pytest.mark.parametrize("saver", FORMATS)
def test_every_format_equals_what_it_was_made_of(hf: Hf, tmp_path: Path, saver: str) -> None:
    source = hf("llama2", vocab_size=132)
    made = convert(source, tmp_path / saver, saver)
    size = sum(tensor.nbytes for tensor in load_file(source / "model.safetensors").values())
    assert diff(source, made) == (0, {
        "equal": True, "compared": 31, "bytes": size, "model": [], "missing": [], "extra": [], "tensors": {},
        "notes": [],
    })  # fmt: skip


def _other(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.2.mlp.up_proj.weight"][5, 7] += 0.25
    weights["model.layers.3.self_attn.k_proj.weight"][0, 0] = 9.0


def test_one_element(hf: Hf, tmp_path: Path) -> None:
    """In whatever layout it is told: V of the MLP is up_proj, a group's key rows come after its query rows."""
    source, d = hf("llama2", vocab_size=132), 12
    other = changed(source, tmp_path / "other", _other)
    before = load_file(source / "model.safetensors")
    up = before["model.layers.2.mlp.up_proj.weight"][5, 7].double()
    after = (up.float() + 0.25).double()
    for place in (other, convert(other, tmp_path / "mcore", "megatron_mcore")):
        code, found = diff(source, place)
        assert code == 8
        assert list(found["tensors"]) == ["transformer layer 2/mlp l0 weight V", "transformer layer 3/qkv weight"]
        one, two = found["tensors"].values()
        assert (one["different"], one["elements"], one["first"]) == (1, 88 * 48, [5, 7])
        assert one["values"] == [float(up), float(after)]
        assert one["max_abs"] == float((after - up).abs())
        assert one["max_rel"] == pytest.approx(float((after - up).abs() / max(up.abs(), after.abs())), rel=1e-12)
        assert two["first"] == [2 * d, 0]
        assert two["values"][1] == 9.0
        assert found["missing"] == found["extra"] == found["model"] == []


def test_what_people_read(hf: Hf, tmp_path: Path, cli: Callable[..., Any]) -> None:
    source = hf("llama2")
    done = cli("diff", source, changed(source, tmp_path / "other", _other, rope_theta=20000.0), "--atol", "0.3")
    assert done.returncode == 8
    lines = done.stdout.splitlines()
    assert lines[0] == "model: rope.theta: 10000.0 != 20000.0"
    assert lines[1].startswith("transformer layer 3/qkv weight: 1 of 4608 elements differ, max abs ")
    assert lines[2:] == ["1 of 31 tensors, 0.4 MB differ"]
    assert "differ: 1 settings, 1 tensors. The first tensor is transformer layer 3/qkv weight." in done.stderr
    assert "Traceback" not in done.stderr


def test_element_types(hf: Hf, tmp_path: Path) -> None:
    source = hf("llama2")
    done = here("--load-dir", source, "--save-dir", tmp_path / "bf16", "--saver", "hf", "--dtype", "bf16")
    assert done.returncode == 0
    code, found = diff(source, tmp_path / "bf16")
    assert code == 8 and len(found["tensors"]) == 31
    assert {tuple(how["dtypes"]) for how in found["tensors"].values()} == {("float32", "bfloat16")}
    # Rounding to 8 significant bits is within 2 ** -8 of the larger of both.
    assert max(how["max_rel"] for how in found["tensors"].values()) <= 2**-8
    assert diff(source, tmp_path / "bf16", "--rtol", 2**-8)[0] == 0
    assert diff(source, tmp_path / "bf16", "--rtol", 2**-10)[0] == 8


def test_settings_that_differ(hf: Hf, tmp_path: Path) -> None:
    source = hf("llama2")
    other = changed(source, tmp_path / "other", rms_norm_eps=1e-6)
    assert diff(source, other) == (8, diff(source, other)[1] | {"model": ["norm_epsilon: 1e-05 != 1e-06"]})
    assert diff(source, other, "--tensors-only")[0] == 0


def test_layers_and_keys_of_one_side_only(hf: Hf, tmp_path: Path) -> None:
    short, long = hf("llama2", num_hidden_layers=2), hf("llama_attention_bias")
    code, found = diff(short, long)
    assert code == 8
    assert found["extra"][-2:] == ["transformer layer 2", "transformer layer 3"]
    assert "transformer layer 0/qkv bias" in found["extra"]
    assert "num_layers: 2 != 4" in found["model"] and "qkv_bias: False != True" in found["model"]
    assert found["missing"] == []
    assert diff(long, short)[1]["missing"] == found["extra"]


def test_sizes_that_differ(hf: Hf) -> None:
    code, found = diff(hf("llama2"), hf("llama2", intermediate_size=96))
    assert code == 8
    assert found["model"] == ["ffn_hidden_size: 88 != 96"]
    assert found["tensors"]["transformer layer 0/mlp l1 weight"] == "[48, 88] != [48, 96]"


def test_a_tied_model_and_one_with_an_output_layer(hf: Hf) -> None:
    code, found = diff(hf("llama2"), hf("llama2", tie_word_embeddings=True))
    assert code == 8
    assert (found["missing"], found["model"]) == (["output layer"], ["tied: False != True"])


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden checkpoints")
def test_rows_that_may_be_padding() -> None:
    """By Megatron-LM's own converter, in bf16 and without the true size of the vocabulary."""
    one, other = GOLDEN / "mindspore" / "mlm_mha_tp2pp2", GOLDEN / "mindspore" / "mha" / "hf"
    code, found = diff(one, other, "--rtol", 2**-8, "--tensors-only")
    assert (code, found["tensors"], found["compared"]) == (0, {}, 16)
    assert found["notes"] == ["A has 512 rows in its vocabulary, and nothing in it tells which are padding: the first "
                              "320 are compared"]  # fmt: skip
    assert found["model"] == ["norm_epsilon: 1e-05 != 1e-06", "rope.theta: 10000.0 != 1000000.0"]
    assert diff(other, one, "--rtol", 2**-8, "--tensors-only")[1]["notes"][0].startswith("B has 512 rows")
    assert not diff(one, other, "--rtol", 2**-8, "--true-vocab-size", 320)[1]["notes"]


# Loaders of others: they send real tensors, once and in their order.

LOADER = """
from ckptconv import lazy, metadata
from ckptconv.loaders.hf import _Source
from ckptconv.messages import expected

def add_arguments(parser):
    parser.add_argument("--slice", type=int, default=0)

def load_checkpoint(queue, args):
    source = _Source(args.load_dir, None, None)
    queue.put(metadata.build(source.metadata()))
    for want in expected(source.spec):
        tensors = {key: lazy.to_torch(value) for key, value in source.tensors(want).items()}
        if not want.sliced:
            queue.put({"name": want.name, **tensors})
            continue
        queue.put({"name": want.name, **{k: v for k, v in tensors.items() if k not in want.sliced}})
        for start in range(0, want.num_experts, args.slice):
            stop = min(start + args.slice, want.num_experts)
            part = {key: tensors[key][start:stop].clone() for key in want.sliced}
            queue.put({"name": f"{want.name} experts {start}:{stop}", **part})
    queue.put("done")
"""


@pytest.fixture
def slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "loader_in_parts.py").write_text(LOADER)
    monkeypatch.syspath_prepend(str(folder))
    return ("--slice", 3)


def test_slices_of_experts_and_a_layer_whole(hf: Hf, tmp_path: Path, slices: tuple[object, ...]) -> None:
    source = hf("mixtral")
    experts = json.loads((source / "config.json").read_text())["num_local_experts"]

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[f"model.layers.1.block_sparse_moe.experts.{experts - 1}.w2.weight"][3, 1] = 5.0

    other = changed(source, tmp_path / "other", change)
    assert diff(source, source, "--against-loader", "in_parts", *slices)[0] == 0
    for flags in (("--against-loader", "in_parts"), ("--loader", "in_parts")):
        code, found = diff(source, other, *flags, *slices)
        name, how = found["tensors"].popitem()
        first = (experts - 1) // 3 * 3
        assert (code, name) == (8, f"transformer layer 1 experts {first}:{min(first + 3, experts)}/mlp l1 weight")
        assert how["first"] == [experts - 1 - first, 3, 1] and how["values"][1] == 5.0
        assert not found["tensors"] and not found["missing"] and not found["extra"]


def test_two_loaders_of_others_are_refused_by_name(hf: Hf, slices: tuple[object, ...]) -> None:
    named = ("--loader", "in_parts", "--against-loader", "in_parts")
    done = here("diff", hf("llama2"), hf("llama2"), *named, *slices)
    assert done.returncode == 2
    assert "loaders in_parts and in_parts are both of others" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rtol", "-1"), "'-1' is no number from 0 on"),
        (("--atol", "nan"), "'nan' is no number from 0 on"),
        (("--rtool", "1"), "Did you mean '--rtol'?"),
    ],
)
def test_wrong_flags(hf: Hf, flags: tuple[str, ...], message: str) -> None:
    done = here("diff", hf("llama2"), hf("llama2"), *flags)
    assert done.returncode == 2 and message in done.stderr


def test_a_directory_that_is_not_there(hf: Hf, tmp_path: Path) -> None:
    done = here("diff", hf("llama2"), tmp_path / "gone")
    assert done.returncode == 2 and "gone: does not exist" in done.stderr
