"""There and back over the grid of layouts, through the command line; and what lies beside the weights."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ckptconv import families, verify
from ckptconv.errors import VerifyError
from ckptconv.formats import megatron_args
from fixtures import FIXTURES, config, logits
from inprocess import main
from samples import SPECS

Hf = Callable[..., Path]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
Direct = Callable[..., Path]
Weights = dict[str, torch.Tensor]

GRID = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 4), (1, 4)]
IMPLS = ("local", "transformer_engine")
ITERATION, FILE, PROVENANCE = "iter_0000001", "model_optim_rng.pt", "ckptconv.json"
TOKENIZER = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def convert(source: Path, out: Path, saver: str, *flags: object) -> Path:
    assert main(["--saver", saver, "--load-dir", str(source), "--save-dir", str(out), *map(str, flags)]) == 0
    return out


def layout(tp: int, pp: int, impl: str = "transformer_engine") -> tuple[object, ...]:
    return "--target-tp", tp, "--target-pp", pp, "--saver-transformer-impl", impl


@pytest.fixture(scope="module")
def direct(hf: Hf, tmp_path_factory: pytest.TempPathFactory) -> Direct:
    """`direct(name, tp, pp, impl)`: a fixture converted to Megatron in one step, once. Do not change it."""
    made: dict[Any, Path] = {}

    def get(name: str, tp: int, pp: int, impl: str = "transformer_engine") -> Path:
        key = (name, tp, pp, impl)
        if key not in made:
            out = tmp_path_factory.mktemp("direct") / "out"
            made[key] = convert(hf(name), out, "megatron_mcore", *layout(tp, pp, impl))
        return made[key]

    return get


def equal(found: Weights, expected: Weights) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        kind = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
        assert torch.equal(found[name].view(kind), tensor.view(kind)), name


def weights_of(folder: Path) -> Weights:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def ranks(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: torch.load(path, weights_only=False) for path in sorted(folder.rglob(FILE))}


def read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def same_directory(back: Path, source: Path) -> None:
    """Weights bit for bit, config.json with nothing lost, the other files byte for byte."""
    equal(weights_of(back), weights_of(source))
    before, after = read(source / "config.json"), read(back / "config.json")
    assert {key: after[key] for key in before} == before
    family = families.of_config(before, "")
    assert family.spec(after, "") == family.spec(before, "")
    for name in (*TOKENIZER, "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes(), name


# There and back


@pytest.mark.parametrize(
    ("name", "tp", "pp", "impl"),
    [
        *(("llama2", tp, pp, impl) for tp, pp in GRID for impl in IMPLS),
        ("qwen2_tied", 1, 1, "local"),
        ("qwen2_tied", 2, 2, "local"),
        ("qwen2_tied", 1, 4, "transformer_engine"),
    ],
)
def test_every_layout(hf: Hf, direct: Direct, tmp_path: Path, name: str, tp: int, pp: int, impl: str) -> None:
    there = direct(name, tp, pp, impl)
    assert len(ranks(there)) == tp * pp
    same_directory(convert(there, tmp_path / "back", "hf"), hf(name))


#: What Megatron cannot be told, by what it is.
REFUSED = {name: found for name, spec in SPECS.items() if (found := megatron_args.refusals(spec, tp=2))}


@pytest.mark.parametrize("name", [name for name in FIXTURES if name not in ("llama2", "qwen2_tied", *REFUSED)])
def test_every_model(hf: Hf, direct: Direct, tmp_path: Path, name: str) -> None:
    same_directory(convert(direct(name, 2, 2), tmp_path / "back", "hf"), hf(name))


@pytest.mark.parametrize("name", REFUSED)
def test_what_megatron_cannot_be_told_is_refused_with_every_reason(
    hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    flags = ("--saver", "megatron_mcore", "--load-dir", hf(name), "--save-dir", tmp_path / "out", *layout(2, 1))
    assert main(list(map(str, flags))) == 7
    said = capsys.readouterr().err
    assert all(reason in said for reason in REFUSED[name]), said
    assert "Nothing was written" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_type(hf: Hf, tmp_path: Path, dtype: str) -> None:
    there = convert(hf("qwen2", dtype=dtype), tmp_path / "there", "megatron_mcore", *layout(4, 2))
    assert all(t.dtype == getattr(torch, dtype) for root in ranks(there).values() for t in root["model"].values())
    same_directory(convert(there, tmp_path / "back", "hf"), hf("qwen2", dtype=dtype))


@pytest.mark.parametrize("tp", [2, 4])
def test_more_ranks_than_groups(hf: Hf, direct: Direct, tmp_path: Path, tp: int) -> None:
    """One kv group on two and four ranks: each has an equal run of the rows of the whole."""
    whole = ranks(direct("llama_mqa", 1, 1))["mp_rank_00"]["model"]
    name = "decoder.layers.2.self_attention.linear_qkv.weight"
    parts = [root["model"][name] for root in ranks(direct("llama_mqa", tp, 1)).values()]
    assert all(torch.equal(part, run) for part, run in zip(parts, whole[name].chunk(tp), strict=True))
    same_directory(convert(direct("llama_mqa", tp, 1), tmp_path / "back", "hf"), hf("llama_mqa"))


@pytest.mark.parametrize("name", ["llama31", *REFUSED])
def test_from_hugging_face_to_hugging_face(hf: Hf, tmp_path: Path, name: str) -> None:
    same_directory(convert(hf(name), tmp_path / "out", "hf"), hf(name))


# Megatron to Megatron


def same_ranks(found: Path, expected: Path, *, args: bool = True) -> None:
    left, right = ranks(found), ranks(expected)
    assert sorted(left) == sorted(right)
    for rank, root in right.items():
        equal(left[rank]["model"], root["model"])
        assert {k: v for k, v in left[rank].items() if k not in ("args", "model")} == {
            k: v for k, v in root.items() if k not in ("args", "model")
        }
        if args:
            one, other = vars(left[rank]["args"]).copy(), vars(root["args"]).copy()
            for side, folder in ((one, found), (other, expected)):
                assert side.pop("tokenizer_model") == str(folder / "hf")
            assert one == other


@pytest.mark.parametrize(
    ("name", "source", "target"),
    [
        ("llama2", (2, 2, "local"), (4, 4, "transformer_engine")),
        ("llama2", (4, 4, "transformer_engine"), (1, 1, "local")),
        ("llama2", (1, 4, "transformer_engine"), (2, 1, "transformer_engine")),
        ("llama2", (2, 2, "transformer_engine"), (2, 2, "local")),
        ("llama2", (2, 2, "local"), (2, 2, "transformer_engine")),
        ("qwen2_tied", (1, 1, "local"), (2, 2, "local")),
        ("qwen2_tied", (1, 4, "transformer_engine"), (1, 1, "local")),
    ],
)
def test_a_change_of_layout_equals_the_direct_conversion(
    direct: Direct, tmp_path: Path, name: str, source: tuple[int, int, str], target: tuple[int, int, str]
) -> None:
    out = convert(direct(name, *source), tmp_path / "out", "megatron_mcore", *layout(*target))
    same_ranks(out, direct(name, *target))
    for file in (*TOKENIZER, "config.json", "generation_config.json"):
        assert (out / "hf" / file).read_bytes() == (direct(name, *target) / "hf" / file).read_bytes()


def test_padding_goes_with_the_target(hf: Hf, direct: Direct, tmp_path: Path) -> None:
    """131 tokens: 256 rows for tp 1 and 2, 512 for tp 4; 132 with a divisor of 1 and tp 4. No step keeps old rows."""
    assert len(whole(direct("llama2", 2, 2), EMBEDDING)) == 256
    assert len(whole(direct("llama2", 4, 4), EMBEDDING)) == 512
    tight = convert(
        direct("llama2", 4, 4), tmp_path / "a", "megatron_mcore", *layout(4, 1), "--make-vocab-size-divisible-by", 1
    )
    assert {len(root["model"][EMBEDDING]) for root in ranks(tight).values()} == {33}
    # The divisor of the source is kept: 132 again.
    again = convert(tight, tmp_path / "b", "megatron_mcore", *layout(2, 1))
    assert {len(root["model"][HEAD]) for root in ranks(again).values()} == {66}
    assert {(root["args"].padded_vocab_size, root["args"].vocab_size) for root in ranks(again).values()} == {(132, 131)}
    same_directory(convert(again, tmp_path / "back", "hf"), hf("llama2"))


# Element types


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        (("--dtype", "bf16"), torch.bfloat16), (("--dtype", "fp16"), torch.float16),
        (("--dtype", "keep"), torch.float32), (("--bf16",), torch.bfloat16), (("--fp16",), torch.float16),
    ],
)  # fmt: skip
def test_conversion_of_types_is_torchs(hf: Hf, tmp_path: Path, flags: tuple[str, ...], dtype: torch.dtype) -> None:
    out = convert(hf("llama2"), tmp_path / "out", "hf", *flags)
    equal(weights_of(out), {name: tensor.to(dtype) for name, tensor in weights_of(hf("llama2")).items()})
    written = read(out / "config.json")
    assert written["torch_dtype"] == written["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_conversion_of_types_in_megatron(hf: Hf, direct: Direct, tmp_path: Path, dtype: str) -> None:
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    out = convert(hf("llama2", dtype="float16"), tmp_path / "out", "megatron_mcore", *layout(2, 2), "--dtype", dtype)
    for rank, root in ranks(convert(hf("llama2", dtype="float16"), tmp_path / "keep", "megatron_mcore",
                                    *layout(2, 2))).items():  # fmt: skip
        found = torch.load(out / ITERATION / rank / FILE, weights_only=False)
        equal(found["model"], {name: tensor.to(kind) for name, tensor in root["model"].items()})
        assert found["args"].params_dtype == kind
    if dtype == "fp32":  # which loses nothing
        back = convert(out, tmp_path / "back", "hf", "--fp16")
        equal(weights_of(back), weights_of(hf("llama2", dtype="float16")))


# Vocabulary padding


def whole(folder: Path, name: str) -> torch.Tensor:
    return torch.cat([root["model"][name] for root in ranks(folder).values() if name in root["model"]])


@pytest.mark.parametrize(
    ("how", "dtype"), [("zero", "float32"), ("repeat", "float32"), ("mean", "float32"), ("mean", "bfloat16")]
)
def test_what_padding_rows_hold(hf: Hf, tmp_path: Path, how: str, dtype: str) -> None:
    source = weights_of(hf("llama2", dtype=dtype))
    out = convert(
        hf("llama2", dtype=dtype), tmp_path / "out", "megatron_mcore", *layout(2, 2), "--pad-vocab", how
    )
    for there, name in ((EMBEDDING, "model.embed_tokens.weight"), (HEAD, "lm_head.weight")):
        rows = source[name]
        row = {"zero": rows[0] * 0, "repeat": rows[-1], "mean": rows.double().mean(0).to(rows.dtype)}[how]
        found = whole(out, there)
        assert torch.equal(found[:131], rows)
        assert found.shape == (256, 48)
        if how == "mean":
            torch.testing.assert_close(found[131:], row.expand(125, -1))
        else:
            assert torch.equal(found[131:], row.expand(125, -1))
    same_directory(convert(out, tmp_path / "back", "hf"), hf("llama2", dtype=dtype))


# Biases that Megatron has all or none of


def biases(folder: Path) -> set[str]:
    layer = "decoder.layers.1."
    names = {name for root in ranks(folder).values() for name in root["model"]}
    return {name.removeprefix(layer) for name in names if name.startswith(layer) and name.endswith(".bias")}


ALL_BIASES = {
    "self_attention.linear_qkv.bias", "self_attention.linear_proj.bias", "mlp.linear_fc1.bias", "mlp.linear_fc2.bias",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("llama_attention_bias", {"self_attention.linear_qkv.bias", "self_attention.linear_proj.bias"}),
        ("llama_mlp_bias", {"mlp.linear_fc1.bias", "mlp.linear_fc2.bias"}),
    ],
)
@pytest.mark.parametrize("notes", [True, False])
def test_biases_a_model_lacks_are_zeros_and_go_again(
    hf: Hf, direct: Direct, tmp_path: Path, name: str, own: set[str], notes: bool
) -> None:
    there = shutil.copytree(direct(name, 2, 2), tmp_path / "there")
    assert biases(there) == ALL_BIASES
    for root in ranks(there).values():
        for key, tensor in root["model"].items():
            if key.endswith(".bias"):
                assert bool(tensor.any()) == any(key.endswith(part) for part in own), key
    if not notes:
        (there / ITERATION / PROVENANCE).unlink()
    same_directory(convert(there, tmp_path / "back", "hf"), hf(name))


def test_a_model_without_biases_gets_none(direct: Direct) -> None:
    assert biases(direct("llama2", 2, 2)) == set()
    assert biases(direct("qwen2", 2, 2)) == {"self_attention.linear_qkv.bias"}


def train(folder: Path, rank: str, name: str, value: float) -> None:
    path = folder / ITERATION / rank / FILE
    root = torch.load(path, weights_only=False)
    root["model"][name][3] = value
    torch.save(root, path)


def test_a_zero_bias_that_was_trained_is_part_of_the_model(hf: Hf, direct: Direct, cli: Cli, tmp_path: Path) -> None:
    there = shutil.copytree(direct("llama_attention_bias", 2, 2), tmp_path / "there")
    train(there, "mp_rank_01_001", "decoder.layers.1.mlp.linear_fc1.bias", 0.5)
    run = cli("--saver", "hf", "--load-dir", there, "--save-dir", tmp_path / "back")
    assert run.returncode == 0
    assert "'mlp l0 bias W' of 'transformer layer 3' is not zero" in run.stderr
    expected = weights_of(hf("llama_attention_bias"))
    for i in range(4):
        for proj, rows in (("gate", 88), ("up", 88), ("down", 48)):
            expected[f"model.layers.{i}.mlp.{proj}_proj.bias"] = torch.zeros(rows)
    expected["model.layers.3.mlp.gate_proj.bias"][44 + 3] = 0.5  # rank 1 of 2 begins at row 44
    equal(weights_of(tmp_path / "back"), expected)
    written = read(tmp_path / "back" / "config.json")
    assert (written["attention_bias"], written["mlp_bias"]) == (True, True)
    assert written["eos_token_id"] == 2
    logits(tmp_path / "back", torch.tensor([[1, 5, 9]]))


def test_one_trained_bias_brings_the_others_of_its_switch(hf: Hf, direct: Direct, tmp_path: Path) -> None:
    """attention_bias of a Llama is q, k, v and o together."""
    there = shutil.copytree(direct("llama_mlp_bias", 1, 1), tmp_path / "there")
    train(there, "mp_rank_00", "decoder.layers.0.self_attention.linear_qkv.bias", 0.5)
    back = convert(there, tmp_path / "back", "hf")
    expected = weights_of(hf("llama_mlp_bias"))
    for i in range(4):
        for proj, rows in (("q", 48), ("k", 24), ("v", 24), ("o", 48)):
            expected[f"model.layers.{i}.self_attn.{proj}_proj.bias"] = torch.zeros(rows)
    expected["model.layers.0.self_attn.q_proj.bias"][3] = 0.5
    equal(weights_of(back), expected)
    assert read(back / "config.json")["attention_bias"] is True


# Shards


@pytest.mark.parametrize(("flag", "limit"), [("100KB", 100_000), ("40KiB", 40 << 10), ("10000", 10_000)])
def test_shards_and_their_index(hf: Hf, direct: Direct, tmp_path: Path, flag: str, limit: int) -> None:
    out = convert(direct("llama31", 2, 2), tmp_path / "out", "hf", "--max-shard-size", flag)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    index = read(out / "model.safetensors.index.json")
    place: dict[str, str] = {}
    for file in files:
        with safe_open(out / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            place |= dict.fromkeys(shard.keys(), file)
        sizes = [tensor.nbytes for tensor in load_file(out / file).values()]
        assert sum(sizes) <= limit or len(sizes) == 1
    assert index["weight_map"] == place
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights_of(hf("llama31")).values())
    same_directory(out, hf("llama31"))


def test_transformers_reads_shards(hf: Hf, tmp_path: Path) -> None:
    out = convert(hf("qwen2_tied"), tmp_path / "out", "hf", "--max-shard-size", "50KB")
    ids = torch.arange(1, 33).reshape(2, 16)
    assert torch.equal(logits(out, ids), logits(hf("qwen2_tied"), ids))


def test_one_file_needs_no_index(direct: Direct, tmp_path: Path) -> None:
    out = convert(direct("llama2", 1, 1), tmp_path / "out", "hf")
    assert (out / "model.safetensors").is_file()
    assert not (out / "model.safetensors.index.json").exists()


# Beside the weights


def crc(tensor: torch.Tensor) -> str:
    return f"crc32:{zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes()):08x}"


def test_provenance(hf: Hf, direct: Direct, tmp_path: Path) -> None:
    """Digests are of the full tensors of the messages, so they are the same on both ways."""
    source = weights_of(hf("llama2"))
    said = read(direct("llama2", 2, 2) / ITERATION / PROVENANCE)
    assert (said["tool"], said["source"]["format"]) == ("ckptconv", "hf")
    assert said["source"]["directory"] == str(hf("llama2"))
    assert said["version"]
    file = hf("llama2") / "model.safetensors"
    assert said["source"]["files"] == [[str(file), file.stat().st_size]]
    assert (said["target"]["format"], said["target"]["tp"], said["target"]["pp"]) == ("megatron_mcore", 2, 2)
    assert (said["spec"]["num_layers"], said["spec"]["vocab_size"], said["spec"]["family"]) == (4, 131, "llama")
    layer = "model.layers.3."
    q, k, v = (source[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv")
    expected = {
        "embeddings": {"word embeddings": source["model.embed_tokens.weight"]},
        "transformer layer 3": {
            "input norm weight": source[f"{layer}input_layernorm.weight"],
            "qkv weight": torch.cat([q.view(2, 24, 48), k.view(2, 12, 48), v.view(2, 12, 48)], 1).reshape(96, 48),
            "dense weight": source[f"{layer}self_attn.o_proj.weight"],
            "post norm weight": source[f"{layer}post_attention_layernorm.weight"],
            "mlp l0 weight W": source[f"{layer}mlp.gate_proj.weight"],
            "mlp l0 weight V": source[f"{layer}mlp.up_proj.weight"],
            "mlp l1 weight": source[f"{layer}mlp.down_proj.weight"],
        },
        "final norm": {"weight": source["model.norm.weight"]},
        "output layer": {"weight": source["lm_head.weight"]},
    }
    digests = {message: {key: crc(t) for key, t in keys.items()} for message, keys in expected.items()}
    assert {message: said["digests"][message] for message in expected} == digests
    assert list(said["digests"]) == ["embeddings", *(f"transformer layer {i}" for i in range(4)), "final norm",
                                     "output layer"]  # fmt: skip
    back = read(convert(direct("llama2", 2, 2), tmp_path / "back", "hf") / PROVENANCE)
    assert back["digests"] == said["digests"]
    assert back["source"]["format"] == "megatron_mcore"


@pytest.mark.parametrize(("saver", "flags"), [("megatron_mcore", layout(2, 2)), ("hf", ("--max-shard-size", "99KB"))])
def test_verify_reads_everything_back(hf: Hf, cli: Cli, tmp_path: Path, saver: str, flags: tuple[object, ...]) -> None:
    run = cli("--saver", saver, "--load-dir", hf("llama2"), "--save-dir", tmp_path / "out", "--verify", *flags)
    assert run.returncode == 0
    assert "verified: 31 tensors" in run.stderr  # embedding, 4 x 7, norm, head


@pytest.mark.parametrize(("saver", "flags"), [("megatron_mcore", layout(2, 2)), ("hf", ())])
def test_verify_finds_one_changed_byte(hf: Hf, tmp_path: Path, saver: str, flags: tuple[object, ...]) -> None:
    out = convert(hf("llama2"), tmp_path / "out", saver, *flags)
    notes = out / PROVENANCE if saver == "hf" else out / ITERATION / PROVENANCE
    digests = read(notes)["digests"]
    assert verify.verify(str(out), saver, digests, None) == 31
    row = weights_of(hf("llama2"))["lm_head.weight"][0].numpy().tobytes()
    path = next(p for p in out.rglob("*") if p.suffix in (".pt", ".safetensors") and row in p.read_bytes())
    data = bytearray(path.read_bytes())
    data[data.index(row) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerifyError, match="1 tensors differ from what was sent: output layer/weight"):
        verify.verify(str(out), saver, digests, None)


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
@pytest.mark.parametrize("saver", ["megatron_mcore", "hf"])
def test_modes_follow_the_umask(hf: Hf, tmp_path: Path, saver: str, umask: int, file: int, folder: int) -> None:
    before = os.umask(umask)
    try:
        out = convert(hf("llama2"), tmp_path / "out", saver)
    finally:
        os.umask(before)
    for path in (out, *out.rglob("*")):
        assert path.stat().st_mode & 0o777 == (folder if path.is_dir() else file), path


@pytest.mark.parametrize("saver", ["megatron_mcore", "hf"])
def test_nothing_else_is_left_behind(hf: Hf, tmp_path: Path, saver: str) -> None:
    small = {"generation_config.json", *TOKENIZER}
    expected = {
        "hf": {"model.safetensors", "config.json", PROVENANCE, *small},
        "megatron_mcore": {
            "latest_checkpointed_iteration.txt", "megatron_args.txt", f"{ITERATION}/{PROVENANCE}",
            f"{ITERATION}/mp_rank_00/{FILE}", "hf/config.json", *(f"hf/{name}" for name in small),
        },
    }  # fmt: skip
    out = convert(hf("llama2"), tmp_path / "out", saver)
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == expected[saver]


def test_the_rank_file_holds_what_megatron_reads(direct: Direct) -> None:
    out = direct("llama31", 2, 2)
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "1"
    for root in ranks(out).values():
        assert set(root) == {"args", "checkpoint_version", "iteration", "model", "num_floating_point_operations_so_far"}
        assert (root["checkpoint_version"], root["iteration"]) == (3.0, 1)
        args = root["args"]
        assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
        assert (args.rotary_base, args.use_rope_scaling, args.rope_scaling_factor) == (500000, True, 8.0)
        assert (args.num_query_groups, args.group_query_attention, args.kv_channels) == (2, True, 12)
        assert (args.padded_vocab_size, args.vocab_size) == (256, 131)
        assert (args.normalization, args.swiglu) == ("RMSNorm", True)
        assert (args.add_bias_linear, args.add_qkv_bias) == (False, False)
        assert args.norm_epsilon == args.layernorm_epsilon == 1e-5
        assert args.untie_embeddings_and_output_weights is True
        assert (args.max_position_embeddings, args.params_dtype) == (131072, torch.float32)
    path = next(iter(out.rglob(FILE)))
    torch.load(path, mmap=True, weights_only=False)


def test_the_flags_file(direct: Direct) -> None:
    lines = (direct("llama31", 2, 2) / "megatron_args.txt").read_text().splitlines()
    words = shlex.split(" ".join(line for line in lines if not line.startswith("#")))
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            assert word not in flags
            flags[word] = []
        else:
            flags[list(flags)[-1]].append(word)
    expected = {
        "--num-layers": ["4"], "--hidden-size": ["48"], "--ffn-hidden-size": ["88"], "--num-attention-heads": ["4"],
        "--group-query-attention": [], "--num-query-groups": ["2"], "--kv-channels": ["12"], "--swiglu": [],
        "--normalization": ["RMSNorm"], "--rotary-base": ["500000"], "--use-rope-scaling": [],
        "--position-embedding-type": ["rope"], "--disable-bias-linear": [],
        "--untie-embeddings-and-output-weights": [], "--tensor-model-parallel-size": ["2"],
        "--pipeline-model-parallel-size": ["2"], "--max-position-embeddings": ["131072"],
        "--tokenizer-model": [str(direct("llama31", 2, 2) / "hf")],
    }  # fmt: skip
    assert {flag: flags.get(flag) for flag in expected} == expected
    assert float(flags["--norm-epsilon"][0]) == 1e-5
    assert "--add-qkv-bias" not in flags


def test_what_the_trainer_cannot_be_told_is_said(direct: Direct) -> None:
    """llama32 has a rope scaling factor of 32."""
    assert "rope_scaling_factor=args.rope_scaling_factor" in (direct("llama32", 2, 2) / "megatron_args.txt").read_text()
    assert "rope_scaling_factor" not in (direct("llama2", 2, 2) / "megatron_args.txt").read_text()


def test_a_source_without_a_tokenizer(hf: Hf, tmp_path: Path) -> None:
    there = convert(hf("llama2", tokenizer=False), tmp_path / "there", "megatron_mcore", *layout(2, 1))
    assert {path.name for path in (there / "hf").iterdir()} == {"config.json", "generation_config.json"}
    back = convert(there, tmp_path / "back", "hf")
    equal(weights_of(back), weights_of(hf("llama2")))
    assert config("llama2").items() <= read(back / "config.json").items()


@pytest.mark.parametrize("name", FIXTURES)
def test_transformers_computes_the_same_from_what_comes_back(
    hf: Hf, direct: Direct, tmp_path: Path, name: str
) -> None:
    """The proof for the HF saver: its real consumer reads the directory and gives the very same logits."""
    ids = torch.tensor([[1, 5, 9, 17, 33, 65, 2, 1, 7, 11, 13]])
    back = convert(hf(name) if name in REFUSED else direct(name, 2, 2), tmp_path / "back", "hf")
    assert torch.equal(logits(back, ids), logits(hf(name), ids))
