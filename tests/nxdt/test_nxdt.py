"""NxDT checkpoints: where every row goes, what is read back, what is refused.

Expected values: the worked example of the format's description (tables below, by hand), and what NxDT's modules
compute from the tensors of their ranks. test_nxdt_golden.py has files of AWS's own converter.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nxdt_files
import pytest
import torch
from nxdt_models import EXAMPLE, MIXTRAL, build, full, heads, rows
from safetensors.torch import save_file

from commands import convert, same, weights_of
from inprocess import here

Hf = Callable[..., Path]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nxdt") / "example")


def written(source: Path, out: Path, *flags: object) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """(tp rank, stage) -> tensors of a checkpoint converted from `source`."""
    convert(source, out, "nxdt", *flags)
    return {(int(name[19:21]), int(name[30:32])): t for name, t in nxdt_files.ranks(out / "model").items()}


def refused(source: Path, out: Path, saver: str, *flags: object) -> str:
    """What is said when nothing is written."""
    done = here("--load-dir", source, "--save-dir", out, "--saver", saver, "--no-progress", *flags)
    assert done.returncode in (2, 3, 6, 7), done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
    return done.stderr


# Where rows go

FLAGS = ("--tp_size", 4, "--pp_size", 2, "--kv_size_multiplier", 2, "--qkv_linear", "True")
#: flags -> (query heads, kv heads) of each rank
LAYOUTS = {
    ("trn1",): ([[0], [2], [1], [3]], [0, 1, 0, 1]),
    ("trn2",): ([[0], [1], [2], [3]], [0, 1, 0, 1]),
    ("trn2", "--nxdt-kv-layout", "runtime"): ([[0], [1], [2], [3]], [0, 0, 1, 1]),
}  # fmt: skip
WIDE = {
    ("trn1",): ([[0, 1], [4, 5], [2, 3], [6, 7]], [0, 1, 0, 1]),
    ("trn2",): ([[0, 1], [2, 3], [4, 5], [6, 7]], [0, 1, 0, 1]),
    ("trn2", "--nxdt-kv-layout", "runtime"): ([[0, 1], [2, 3], [4, 5], [6, 7]], [0, 0, 1, 1]),
}  # fmt: skip


@pytest.mark.parametrize("flags", LAYOUTS)
def test_worked_example(flags: tuple[str, ...], example: Path, tmp_path: Path) -> None:
    ranks, source = written(example, tmp_path / "out", *FLAGS, "--hw_backend", *flags), full(example)
    assert sorted(ranks) == sorted(itertools.product(range(4), range(2)))
    for (t, stage), tensors in ranks.items():
        ends = {0: ["model.embed_tokens.weight"], 1: ["model.norm.weight", "lm_head.weight"]}[stage]
        assert len(tensors) == 16 + len(ends) and set(ends) <= set(tensors)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                assert rows(tensors[name], source[name]) == list(range(8 * t, 8 * t + 8))
        for layer in (0, 1) if stage == 0 else (2, 3):
            prefix = f"model.layers.{layer}."
            own, whole = ({name.removeprefix(prefix): part[name] for name in part if name.startswith(prefix)}
                          for part in (tensors, source))  # fmt: skip
            queries, keys = LAYOUTS[flags]
            assert heads(own["self_attn.qkv_proj.weight_q"], whole["self_attn.q_proj.weight"], 4) == queries[t]
            for kind in "kv":
                stored = own[f"self_attn.qkv_proj.weight_{kind}"]
                assert heads(stored, whole[f"self_attn.{kind}_proj.weight"], 4) == [keys[t]]
            assert heads(own["self_attn.o_proj.weight"].T, whole["self_attn.o_proj.weight"].T, 4) == queries[t]
            gate_up = own["mlp.gate_up_proj.weight"]
            assert rows(gate_up[:6], whole["mlp.gate_proj.weight"]) == list(range(6 * t, 6 * t + 6))
            assert rows(gate_up[6:], whole["mlp.up_proj.weight"]) == list(range(6 * t, 6 * t + 6))
            assert rows(own["mlp.down_proj.weight"].T, whole["mlp.down_proj.weight"].T) == list(range(6 * t, 6 * t + 6))
            for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
                assert torch.equal(own[name], whole[name])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("flags", WIDE)
def test_two_query_heads_for_each_copy(flags: tuple[str, ...], fused: bool, tmp_path: Path) -> None:
    source = build(tmp_path / "source", hidden_size=32, num_attention_heads=8, num_hidden_layers=1)
    ranks = written(source, tmp_path / "out", "--tp-size", 4, "--kv-size-multiplier", 2, "--qkv-linear",
                    "--fuse-qkv", fused, "--hw-backend", *flags)  # fmt: skip
    whole = {kind: full(source)[f"model.layers.0.self_attn.{kind}_proj.weight"] for kind in "qkv"}
    for (t, _), tensors in ranks.items():
        prefix = "model.layers.0.self_attn.qkv_proj.weight_"
        if fused:
            parts = dict(zip("qkv", tensors[prefix + "qkv"].split([8, 4, 4]), strict=True))
        else:
            parts = {kind: tensors[prefix + kind] for kind in "qkv"}
        queries, keys = WIDE[flags]
        assert heads(parts["q"], whole["q"], 4) == queries[t]
        assert [heads(parts[kind], whole[kind], 4) for kind in "kv"] == [[keys[t]]] * 2
        # What attention needs: a query reads the key head of its own group.
        met = all(head // 4 == keys[t] for head in queries[t])
        assert met or flags == ("trn2",)


def test_four_copies_and_padded_heads(tmp_path: Path) -> None:
    source = build(tmp_path / "source", hidden_size=32, num_attention_heads=8, num_hidden_layers=1)
    name = "model.layers.0.self_attn.qkv_proj.weight_"
    flags = ("--tp-size", 8, "--kv-size-multiplier", 4, "--qkv-linear", "--hw-backend", "trn1")
    ranks = written(source, tmp_path / "out", *flags)
    q, k = (full(source)[f"model.layers.0.self_attn.{kind}_proj.weight"] for kind in "qk")
    assert [heads(ranks[t, 0][name + "q"], q, 4) for t in range(8)] == [[0], [4], [1], [5], [2], [6], [3], [7]]
    assert [heads(ranks[t, 0][name + "k"], k, 4) for t in range(8)] == [[0], [1]] * 4
    # Six query heads on eight ranks: zeros where the last copy of each group has none.
    source = build(tmp_path / "six", hidden_size=24, num_attention_heads=6, num_hidden_layers=1)
    ranks = written(source, tmp_path / "padded", *flags, "--pad-attn-heads")
    whole = full(source)
    q, o = (whole[f"model.layers.0.self_attn.{kind}_proj.weight"] for kind in "qo")
    queries = [heads(ranks[t, 0][name + "q"], q, 4) for t in range(8)]
    assert queries == [[0], [3], [1], [4], [2], [5], [-1], [-1]]
    assert [heads(ranks[t, 0]["model.layers.0.self_attn.o_proj.weight"].T, o.T, 4) for t in range(8)] == queries
    convert(tmp_path / "padded", tmp_path / "back", "hf", "--hw-backend", "trn1")
    same(weights_of(tmp_path / "back"), whole)


@pytest.mark.parametrize("layout", ["upstream", "runtime"])
def test_megatron_style(layout: str, tmp_path: Path) -> None:
    """Key names and rows of both forms of attention; the two layouts differ with several kv heads on a rank."""
    gqa = build(tmp_path / "gqa", hidden_size=32, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=3)
    mha = build(tmp_path / "mha", num_key_value_heads=4, num_hidden_layers=3)
    flags = ("--model-style", "megatron", "--tp-size", 2, "--pp-size", 2, "--nxdt-megatron-qkv-layout", layout)
    prefix = "language_model.encoder.layers.0.self_attention."
    ranks, source = written(gqa, tmp_path / "out", *flags), full(gqa)
    q, k, v = (source[f"model.layers.0.self_attn.{kind}_proj.weight"] for kind in "qkv")
    kv = torch.cat([k, v])
    want = {"upstream": [0, 1, 4, 5], "runtime": [0, 4, 1, 5]}[layout]
    assert heads(ranks[0, 0][prefix + "query.weight"], q, 4) == [0, 1, 2, 3]
    assert heads(ranks[0, 0][prefix + "key_value.weight"], kv, 4) == want
    assert heads(ranks[1, 0][prefix + "key_value.weight"], kv, 4) == [n + 2 for n in want]
    ranks, source = written(mha, tmp_path / "out_mha", *flags), full(mha)
    fused = torch.cat([source[f"model.layers.0.self_attn.{kind}_proj.weight"] for kind in "qkv"])
    want = {"upstream": [0, 1, 4, 5, 8, 9], "runtime": [0, 4, 8, 1, 5, 9]}[layout]
    assert heads(ranks[0, 0][prefix + "query_key_value.weight"], fused, 4) == want
    assert sorted(ranks[0, 0]) == sorted([
        "language_model.embedding.word_embeddings.weight",
        *(f"language_model.encoder.layers.0.{name}.weight" for name in (
            "self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h",
            "input_layernorm", "post_attention_layernorm")),
    ])  # fmt: skip
    assert {name.split("layers.")[1][0] for name in ranks[0, 1] if "layers." in name} == {"1", "2"}
    assert {"language_model.encoder.final_layernorm.weight", "language_model.output_layer.weight"} <= set(ranks[0, 1])
    for out, folder in (("out", gqa), ("out_mha", mha)):
        shutil.rmtree(tmp_path / "back", ignore_errors=True)
        convert(tmp_path / out, tmp_path / "back", "hf")
        same(weights_of(tmp_path / "back"), full(folder))


def test_virtual_stages_and_uneven_ones(tmp_path: Path) -> None:
    source = build(tmp_path / "source", num_hidden_layers=11)
    ranks = written(source, tmp_path / "out", "--tp-size", 2, "--pp-size", 3, "--virtual-pp-size", 2)
    found = [sorted({int(name.split(".")[2]) for name in ranks[0, stage] if ".layers." in name}) for stage in range(3)]
    assert found == [[0, 5, 6], [1, 2, 7, 8], [3, 4, 9, 10]]  # 1, 2, 2, 2, 2, 2: the rest goes to the last ones
    convert(tmp_path / "out", tmp_path / "back", "hf", "--virtual-pp-size", 2)
    same(weights_of(tmp_path / "back"), full(source))


def test_stages_cut_anywhere_are_read(example: Path, tmp_path: Path) -> None:
    """A trainer's pipeline_cuts: layer 1 goes to the second stage."""
    convert(example, tmp_path / "out", "nxdt", "--tp-size", 2, "--pp-size", 2)
    for t in range(2):
        files = [tmp_path / "out" / "model" / f"dp_rank_00_tp_rank_{t:02d}_pp_rank_{p:02d}.pt" for p in range(2)]
        first, second = (torch.load(file, weights_only=True) for file in files)
        moved = {name: first.pop(name) for name in list(first) if ".layers.1." in name}
        torch.save(first, files[0])
        torch.save(moved | second, files[1])
    convert(tmp_path / "out", tmp_path / "back", "hf", "--pp-size", 2)
    same(weights_of(tmp_path / "back"), full(example))


# Experts

def experts(tensors: list[dict[str, torch.Tensor]], x: torch.Tensor, prefix: str) -> torch.Tensor:
    """[n, e, h] that ExpertFused modules of all tensor ranks compute together, before the router weighs it.

    einsum "e...h,ehi->e...i" with gate and up side by side, then the row parallel one, summed over ranks.
    """
    total = torch.zeros(())
    for rank in tensors:
        up = torch.einsum("nh,ehi->eni", x, rank[prefix + "gate_up_proj.weight"])
        gate, value = up.chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * value
        total = total + torch.einsum("eni,eih->neh", hidden, rank[prefix + "down_proj.weight"])
    return total


@pytest.mark.parametrize("style", ["hf", "megatron"])
@pytest.mark.parametrize(("ep", "multiple"), [(1, 0), (2, 0), (2, 5)])
@pytest.mark.parametrize("xser", [False, True])
def test_experts_as_the_module_computes(style: str, ep: int, multiple: int, xser: bool, hf: Hf, tmp_path: Path) -> None:
    source = hf("mixtral", vocab_size=132)
    convert(source, tmp_path / "out", "nxdt", "--tp-size", 2, "--pp-size", 2, "--ep-size", ep, "--model-style", style,
            "--qkv-linear", "--fuse-qkv", "--i-tp-round-factor", multiple, "--save-xser", xser)  # fmt: skip
    config, want = json.loads((source / "config.json").read_text()), weights_of(source)
    name = "dp_rank_00_" + ("ep_rank_{e:02d}_" if ep > 1 else "") + "tp_rank_{t:02d}_pp_rank_00.pt"
    folder = tmp_path / "out" / "model"
    shared = folder / name.format(e=0, t=0)
    ranks = {(t, e): nxdt_files.read(folder / name.format(t=t, e=e), folder / name.format(t=t, e=0))
             for t in range(2) for e in range(ep)}  # fmt: skip
    assert len({frozenset(tensors) for tensors in ranks.values()}) == 1, shared  # all keys on every expert rank
    layer = {"hf": "model.layers.1.mlp.", "megatron": "language_model.encoder.layers.1.mlp.moe."}[style]
    x = torch.randn(3, config["hidden_size"], generator=torch.Generator().manual_seed(0))
    prefix = layer + "expert_mlps.mlp_op."
    found = torch.cat([experts([ranks[t, e] for t in range(2)], x, prefix) for e in range(ep)], 1)
    for e in range(config["num_local_experts"]):
        w1, w2, w3 = (want[f"model.layers.1.block_sparse_moe.experts.{e}.w{n}.weight"] for n in (1, 2, 3))
        expected = (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
        assert torch.allclose(found[:, e], expected, atol=1e-5)
    router = want["model.layers.1.block_sparse_moe.gate.weight"]
    assert all(torch.equal(r[layer + "router.linear_router.weight"], router) for r in ranks.values())
    convert(tmp_path / "out", tmp_path / "back", "hf", "--ep-size", ep)
    same(weights_of(tmp_path / "back"), want)


def test_experts_of_awss_mixtral_converter_are_read(tmp_path: Path) -> None:
    """It cuts [e, m, 2h] and [e, h, m] where the module has their transposes; names without mlp_op are older ones."""
    source = build(tmp_path / "source", MIXTRAL)
    convert(source, tmp_path / "out", "nxdt", "--tp-size", 2, "--qkv-linear", "--fuse-qkv")
    whole = full(source)
    for t in range(2):
        file = tmp_path / "out" / "model" / f"dp_rank_00_tp_rank_{t:02d}_pp_rank_00.pt"
        tensors = torch.load(file, weights_only=True)
        assert tensors["model.layers.0.mlp.expert_mlps.mlp_op.gate_up_proj.weight"].shape == (4, 16, 24)
        assert tensors["model.layers.0.mlp.expert_mlps.mlp_op.down_proj.weight"].shape == (4, 12, 16)
        for i in range(4):
            w1, w2, w3 = (torch.stack([whole[f"model.layers.{i}.block_sparse_moe.experts.{e}.w{n}.weight"]
                                       for e in range(4)]) for n in (1, 2, 3))  # fmt: skip
            prefix = f"model.layers.{i}.mlp.expert_mlps."
            for name in ("gate_up_proj", "down_proj"):
                del tensors[prefix + f"mlp_op.{name}.weight"]
            cut = slice(8 * t, 8 * t + 8)
            tensors[prefix + "gate_up_proj.weight"] = torch.cat([w1[:, :, cut], w3[:, :, cut]], 2)  # [4, 24, 16]
            tensors[prefix + "down_proj.weight"] = w2[:, cut].clone()  # [4, 8, 24]
        torch.save(tensors, file)
    convert(tmp_path / "out", tmp_path / "back", "hf")
    same(weights_of(tmp_path / "back"), whole)
    refused(tmp_path / "out", tmp_path / "no", "hf", "--nxdt-experts", "module")


def test_square_experts_have_to_be_told_apart(tmp_path: Path) -> None:
    source = build(tmp_path / "source", MIXTRAL, intermediate_size=16)
    convert(source, tmp_path / "out", "nxdt", "--tp-size", 1)
    (tmp_path / "out" / "ckptconv.json").unlink()
    assert "--nxdt-experts" in refused(tmp_path / "out", tmp_path / "no", "hf")
    convert(tmp_path / "out", tmp_path / "back", "hf", "--nxdt-experts", "module")
    same(weights_of(tmp_path / "back"), full(source))


# Forms of qkv, and from and to other formats

@pytest.mark.parametrize(("flags", "names"), [
    ((), ["q_proj.weight", "k_proj.weight", "v_proj.weight"]),
    (("--qkv_linear", "False"), ["q_proj.weight", "k_proj.weight", "v_proj.weight"]),
    (("--qkv_linear",), ["qkv_proj.weight_q", "qkv_proj.weight_k", "qkv_proj.weight_v"]),
    (("--qkv_linear", "true", "--fuse_qkv", "1"), ["qkv_proj.weight_qkv"]),
    (("--coalesce_qkv", "True"), ["qkv_proj.weight"]),
])  # fmt: skip
def test_forms(flags: tuple[str, ...], names: list[str], tmp_path: Path) -> None:
    source = build(tmp_path / "source", num_key_value_heads=4, num_hidden_layers=1)
    ranks = written(source, tmp_path / "out", "--tp-size", 2, *flags)
    assert [n.split("self_attn.")[1] for n in ranks[0, 0] if "self_attn" in n and "o_proj" not in n] == names
    if len(names) == 1:
        whole = torch.cat([full(source)[f"model.layers.0.self_attn.{kind}_proj.weight"] for kind in "qkv"])
        assert heads(ranks[1, 0]["model.layers.0.self_attn." + names[0]], whole, 4) == [2, 3, 6, 7, 10, 11]
    convert(tmp_path / "out", tmp_path / "back", "hf", "--verify")
    same(weights_of(tmp_path / "back"), full(source))


@pytest.mark.parametrize(("name", "tp", "flags"), [
    ("llama31", 4, ("--qkv-linear", "--kv-size-multiplier", 2, "--hw-backend", "trn1", "--save-xser")),
    ("llama31", 4, ("--qkv-linear", "--fuse-qkv", "--kv-size-multiplier", 2, "--hw-backend", "trn2",
                    "--nxdt-kv-layout", "runtime")),
    ("mistral", 2, ("--model-style", "megatron")),
    ("mixtral", 2, ("--ep-size", 2, "--save-xser")),
])  # fmt: skip
def test_through_megatron_and_back(name: str, tp: int, flags: tuple[object, ...], hf: Hf, tmp_path: Path) -> None:
    changes = {"hidden_size": 64, "vocab_size": 132} if name == "mistral" else {"vocab_size": 132}
    source = hf(name, **changes)
    convert(source, tmp_path / "nxdt", "nxdt", "--tp-size", tp, "--pp-size", 2, *flags, "--verify")
    convert(tmp_path / "nxdt", tmp_path / "mcore", "megatron_mcore", "--target-tp", 2, "--target-pp", 1,
            "--make-vocab-size-divisible-by", 1)  # fmt: skip
    convert(tmp_path / "mcore", tmp_path / "nxdt2", "nxdt", *flags, "--target-tp", tp, "--target-pp", 4)
    convert(tmp_path / "nxdt2" / "model", tmp_path / "back", "hf")
    same(weights_of(tmp_path / "back"), weights_of(source))
    for kept in ("tokenizer.model", "generation_config.json"):
        assert (tmp_path / "back" / kept).read_bytes() == (source / kept).read_bytes()
    have, want = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", source))
    assert have == want | {"dtype": "float32"}


def test_resharding(example: Path, tmp_path: Path) -> None:
    """NxDT to NxDT: --tp-size describes the source, --target-* the target; the directions of xser too."""
    flags = ("--qkv-linear", "--hw-backend", "trn1")
    convert(example, tmp_path / "one", "nxdt", "--tp-size", 4, "--kv-size-multiplier", 2, *flags)
    convert(tmp_path / "one", tmp_path / "two", "nxdt", "--tp-size", 4, "--kv-size-multiplier", 2, *flags,
            "--target-tp", 2, "--target-kv-size-multiplier", 1, "--target-pp", 2)  # fmt: skip
    convert(example, tmp_path / "want", "nxdt", "--tp-size", 2, "--pp-size", 2, "--qkv-linear")
    for name, tensors in nxdt_files.ranks(tmp_path / "want" / "model").items():
        same(nxdt_files.ranks(tmp_path / "two" / "model")[name], tensors)
    convert(tmp_path / "two", tmp_path / "xser", "nxdt", "--convert_to_xser", "--tp_size", 2, "--pp_size", 2, *flags)
    convert(tmp_path / "xser", tmp_path / "plain", "nxdt", "--convert_from_xser", "--tp_size", 2, "--pp_size", 2,
            *flags)  # fmt: skip
    assert [(tmp_path / out / "model" / "dp_rank_00_tp_rank_00_pp_rank_00.pt.info.pt").exists()
            for out in ("two", "xser", "plain")] == [False, True, False]  # fmt: skip
    for name, tensors in nxdt_files.ranks(tmp_path / "two" / "model").items():
        for out in ("xser", "plain"):
            same(nxdt_files.ranks(tmp_path / out / "model")[name], tensors)


@pytest.mark.parametrize("stored", [False, True])
def test_tied(stored: bool, tmp_path: Path) -> None:
    source = build(tmp_path / "source", tie_word_embeddings=True)
    convert(source, tmp_path / "out", "nxdt", "--tp-size", 2, "--pp-size", 2)
    for t in range(2):
        first, last = (tmp_path / "out" / "model" / f"dp_rank_00_tp_rank_{t:02d}_pp_rank_{p:02d}.pt" for p in range(2))
        head = torch.load(last, weights_only=True)
        assert torch.equal(head["lm_head.weight"], torch.load(first, weights_only=True)["model.embed_tokens.weight"])
        if not stored:  # as AWS's converter leaves it
            del head["lm_head.weight"]
            torch.save(head, last)
    convert(tmp_path / "out", tmp_path / "back", "hf")
    same(weights_of(tmp_path / "back"), full(source))


def test_vocabulary_padding(tmp_path: Path) -> None:
    source = build(tmp_path / "source", vocab_size=31)
    assert "does not divide the vocabulary of 31" in refused(source, tmp_path / "out", "nxdt", "--tp-size", 2)
    flags = ("--make-vocab-size-divisible-by", 4, "--model-style", "megatron")
    ranks = written(source, tmp_path / "out", "--tp-size", 2, *flags)
    embedding = torch.cat([ranks[t, 0]["language_model.embedding.word_embeddings.weight"] for t in range(2)])
    assert torch.equal(embedding[:31], full(source)["model.embed_tokens.weight"]) and not embedding[31:].any()
    (tmp_path / "out" / "ckptconv.json").unlink()  # config.json says it, too
    convert(tmp_path / "out", tmp_path / "back", "hf")
    same(weights_of(tmp_path / "back"), full(source))


def test_full_state_in_any_files(example: Path, tmp_path: Path) -> None:
    """Sharded, as safetensors, inside a dict: AWS's converter takes none of them."""
    whole = full(example)
    names = list(whole)
    halves = {f"pytorch_model-{n:05d}-of-00002.bin": names[n - 1 :: 2] for n in (1, 2)}
    for kind in ("bin", "safetensors", "dict"):
        (tmp_path / kind).mkdir()
        shutil.copy(example / "config.json", tmp_path / kind)
    for file, own in halves.items():
        torch.save({name: whole[name] for name in own}, tmp_path / "bin" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in halves.items() for name in own}}
    (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    save_file(whole, tmp_path / "safetensors" / "model.safetensors")
    torch.save({"model": whole}, tmp_path / "dict" / "model.pth")
    want = nxdt_files.ranks(convert(example, tmp_path / "want", "nxdt", "--tp-size", 2) / "model")
    for kind, name in (("bin", ""), ("safetensors", ""), ("safetensors", "model.safetensors"), ("dict", "model.pth")):
        out = convert(tmp_path / kind / name, tmp_path / f"out_{kind}{name}", "nxdt", "--tp-size", 2)
        for file, tensors in want.items():
            same(nxdt_files.ranks(out / "model")[file], tensors)


def test_full_state_file(example: Path, tmp_path: Path) -> None:
    """One file as AWS's converter leaves it, in the place of safetensors, and read again by its folder."""
    out = convert(example, tmp_path / "out", "hf", "--full-state-file", "--verify")
    same(torch.load(out / "checkpoint.pt", weights_only=True), full(example))
    assert not list(out.glob("*.safetensors"))
    convert(out, tmp_path / "back", "hf")
    same(weights_of(tmp_path / "back"), full(example))


# Variants of xser

def test_variants_of_references(example: Path, tmp_path: Path) -> None:
    flags = ("--tp-size", 2, "--pp-size", 2, "--save_xser", "True")
    convert(example, tmp_path / "a", "nxdt", *flags, "--verify")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for info in (tmp_path / "b" / "model").glob("*.info.pt"):
        info.unlink()
    convert(example, tmp_path / "c", "nxdt", *flags, "--nxdt-xser-layout", "inline")
    folders = list((tmp_path / "c" / "model").glob("*.tensors"))
    assert len(folders) == 4 and not any(any(folder.iterdir()) for folder in folders)
    for variant in "abc":
        convert(tmp_path / variant / "model", tmp_path / f"back_{variant}", "hf", "--load_xser", "True")
        same(weights_of(tmp_path / f"back_{variant}"), full(example))
    shutil.copytree(tmp_path / "a", tmp_path / "d")
    for tensor in (tmp_path / "d" / "model" / "dp_rank_00_tp_rank_01_pp_rank_00.pt.tensors").iterdir():
        tensor.unlink()
    text = refused(tmp_path / "d", tmp_path / "no", "hf")
    assert "17 of 17 tensors are not there" in text and "avoid_saving_lower_precision_weights" in text


def test_user_scripts_v1_files(example: Path, tmp_path: Path) -> None:
    """A dict with the model inside, every data parallel rank saved: copies of rank 0 are left out, others said."""
    convert(example, tmp_path / "out", "nxdt", "--tp-size", 2)
    for t, dp in itertools.product(range(2), range(2)):
        content = torch.load(tmp_path / "out" / "model" / f"dp_rank_00_tp_rank_{t:02d}_pp_rank_00.pt")
        folder = tmp_path / "v1" / f"tp_rank_{t:02d}_pp_rank_00_dp_rank_{dp:02d}"
        folder.mkdir(parents=True)
        torch.save({"weights": content, "optimizer": {"step": 3}}, folder / "checkpoint.pt")
    config = ("--config", example / "config.json")
    assert "--model-key" in refused(tmp_path / "v1", tmp_path / "no", "hf", *config)
    convert(tmp_path / "v1", tmp_path / "back", "hf", *config, "--model_key", "weights")
    same(weights_of(tmp_path / "back"), full(example))
    notes = json.loads((tmp_path / "back" / "ckptconv.json").read_text())["notes"]
    assert any("optimizer" in note for note in notes) and any("data parallel" in note for note in notes)


# What is refused

FORWARD = {
    "tp does not divide": (("--tp-size", 3), "tp 3"),
    "more stages than layers": (("--tp-size", 2, "--pp-size", 5), "4 layers on 5 stages"),
    "tp beyond kv heads": (("--tp-size", 4, "--qkv-linear"), "A multiplier of 2 fits"),
    "tp below kv heads x multiplier": (("--tp-size", 2, "--kv-size-multiplier", 2, "--qkv-linear", "--hw-backend",
                                        "trn1"), "multiplier"),
    "no backend": (("--tp-size", 4, "--kv-size-multiplier", 2, "--qkv-linear"), "--hw-backend trn1 or trn2"),
    "another backend": (("--hw-backend", "gpu"), "invalid choice"),
    "multiplier without its module": (("--tp-size", 4, "--kv-size-multiplier", 2, "--hw-backend", "trn1"),
                                      "--qkv-linear True"),
    "multiplier in Megatron style": (("--tp-size", 4, "--kv-size-multiplier", 2, "--model-style", "megatron"),
                                     "Megatron style has no copies"),
    "coalesced GQA": (("--tp-size", 2, "--coalesce-qkv"), "--coalesce-qkv"),
    "two directions": (("--convert-from-full-state", "--convert-to-full-state"), "contradict"),
    "the other direction": (("--convert_to_full_state",), "Change the plugins"),
    "not as many layers": (("--n_layers", 32), "--n-layers 32: the model has 4"),
    "not a boolean": (("--qkv_linear", "maybe"), "neither True nor False"),
    "no experts": (("--ep-size", 2), "no experts"),
    "no config.json there": (("--config", "/nowhere/config.json"), "/nowhere/config.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORWARD)
def test_refused_before_anything_is_written(case: str, example: Path, tmp_path: Path) -> None:
    flags, said = FORWARD[case]
    assert said in refused(example, tmp_path / "out", "nxdt", *flags)


@pytest.mark.parametrize(("name", "said"), [
    ("llama_attention_bias", "qkv_bias: True"), ("qwen3", "qk_norm: head"), ("llama32", "head dim 16"),
    ("gpt2", "learned_positions"), ("gemma2", "norm_offset"), ("qwen2_moe", "moe.shared_ffn_hidden_size"),
])  # fmt: skip
def test_models_that_nxdt_has_no_modules_for(name: str, said: str, hf: Hf, tmp_path: Path) -> None:
    assert said in refused(hf(name), tmp_path / "out", "nxdt")


BACK = {
    "tp too small": ("--tp-size", 2), "tp too large": ("--tp-size", 8), "pp too small": ("--pp-size", 1),
    "another multiplier": ("--kv-size-multiplier", 4), "another style": ("--model-style", "megatron"),
    "another backend than it was written for": ("--hw-backend", "trn2"),
    "another layout": ("--hw-backend", "trn2", "--nxdt-kv-layout", "runtime"), "layers": ("--n-layers", 5),
    "virtual stages": ("--virtual-pp-size", 2), "direction": ("--convert_from_full_state",), "ep": ("--ep_size", 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def replicated(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(example, tmp_path_factory.mktemp("nxdt") / "out", "nxdt", *FLAGS, "--hw-backend", "trn1")


@pytest.mark.parametrize("case", BACK)
def test_wrong_flags_are_refused(case: str, replicated: Path, tmp_path: Path) -> None:
    text = refused(replicated, tmp_path / "out", "hf", *BACK[case])
    assert str(BACK[case][0]).replace("_", "-") in text


def damaged(replicated: Path, out: Path, change: Callable[[Path], Any]) -> Path:
    """A copy without what we noted, changed."""
    shutil.copytree(replicated, out)
    (out / "ckptconv.json").unlink()
    change(out / "model")
    return out


def test_missing_and_mixed_files_are_refused(replicated: Path, example: Path, tmp_path: Path) -> None:
    last = "dp_rank_00_tp_rank_03_pp_rank_01.pt"
    text = refused(damaged(replicated, tmp_path / "a", lambda m: (m / last).unlink()), tmp_path / "no", "hf")
    assert last in text and "tp 4 x pp 2" in text

    def stage_gone(model: Path) -> None:
        for file in model.glob("*_pp_rank_01.pt"):
            file.unlink()

    assert "says 4 layers" in refused(damaged(replicated, tmp_path / "b", stage_gone), tmp_path / "no", "hf")
    text = refused(damaged(replicated, tmp_path / "c", lambda m: (m.parent / "checkpoint").write_text("1")),
                   tmp_path / "no", "hf")  # fmt: skip
    assert "was interrupted" in text
    config = build(tmp_path / "other", hidden_size=32, num_attention_heads=8) / "config.json"
    assert "other model" in refused(damaged(replicated, tmp_path / "d", lambda m: None), tmp_path / "no", "hf",
                                    "--config", config)  # fmt: skip
    shutil.rmtree(tmp_path / "d" / "hf")
    assert "--config" in refused(tmp_path / "d", tmp_path / "no", "hf")
    convert(tmp_path / "d", tmp_path / "back", "hf", "--config", example / "config.json", "--hw-backend", "trn1")
    same(weights_of(tmp_path / "back"), full(example))


def test_order_of_copies_is_found_from_their_values(example: Path, replicated: Path, tmp_path: Path) -> None:
    plain = damaged(replicated, tmp_path / "tiled", lambda m: None)
    assert "--hw-backend" in refused(plain, tmp_path / "no", "hf")  # tiled keys: trn1, or upstream's trn2?
    runtime = ("--hw-backend", "trn2", "--nxdt-kv-layout", "runtime")
    assert "not adjacent" in refused(plain, tmp_path / "no", "hf", *runtime)
    convert(example, tmp_path / "trn2", "nxdt", *FLAGS, *runtime)
    adjacent = damaged(tmp_path / "trn2", tmp_path / "adjacent", lambda m: None)
    assert "not tiled" in refused(adjacent, tmp_path / "no", "hf", "--hw-backend", "trn1")
    for number, flags in enumerate(((), ("--hw-backend", "trn2"))):
        convert(adjacent, tmp_path / f"back{number}", "hf", *flags)
        same(weights_of(tmp_path / f"back{number}"), full(example))


def test_copies_that_drifted_apart(replicated: Path, example: Path, tmp_path: Path) -> None:
    def drift(layer: int) -> Callable[[Path], None]:
        def change(model: Path) -> None:
            file = model / f"dp_rank_00_tp_rank_02_pp_rank_{layer // 2:02d}.pt"
            tensors = torch.load(file, weights_only=True)
            tensors[f"model.layers.{layer}.self_attn.qkv_proj.weight_v"][0, 0] += 1
            torch.save(tensors, file)

        return change

    for layer in (0, 3):
        source = damaged(replicated, tmp_path / f"in{layer}", drift(layer))
        assert "copies" in refused(source, tmp_path / "no", "hf", "--hw-backend", "trn1").lower()
        convert(source, tmp_path / f"out{layer}", "hf", "--hw-backend", "trn1", "--nxdt-kv-copies", "first")
        same(weights_of(tmp_path / f"out{layer}"), full(example))


def test_what_no_rule_knows_is_refused(replicated: Path, tmp_path: Path) -> None:
    def add(name: str, model: Path) -> None:
        file = model / "dp_rank_00_tp_rank_00_pp_rank_00.pt"
        torch.save(torch.load(file, weights_only=True) | {name: torch.ones(2)}, file)

    for number, (name, said) in enumerate({
        "model.layers.0.self_attn.qkv_proj.lora_A": "adapters", "model.layers.0.self_attn.qkv_proj.bias_q": "biases",
        "model.layers.0.mystery": "no rule knows", "model.layers.0.mlp.down_proj.scale": "quantised",
    }.items()):  # fmt: skip
        source = damaged(replicated, tmp_path / str(number), lambda model, name=name: add(name, model))  # type: ignore[misc]
        assert said in refused(source, tmp_path / "no", "hf", "--hw-backend", "trn1")
    source = damaged(replicated, tmp_path / "rope", lambda m: add("model.layers.0.self_attn.rotary_emb.inv_freq", m))
    convert(source, tmp_path / "back", "hf", "--hw-backend", "trn1")


# Training configs

YAML = """
model_source: hf
distributed_strategy:
  tensor_model_parallel_size: 4
  pipeline_model_parallel_size: 2
  virtual_pipeline_model_parallel_size: 1
  kv_replicator: 2
model:
  encoder_seq_length: 64
  max_position_embeddings: ${.encoder_seq_length}
  num_layers: 4
  hidden_size: 16
  num_attention_heads: ${model.num_layers}
  num_kv_heads: 2
  layernorm_epsilon: 1e-5
  rope_theta: 10000.0
  qkv_linear: True
"""


def test_training_config(example: Path, tmp_path: Path) -> None:
    """Its sizes, and its fuse_qkv, which is True where AWS's converter has False; read back with nothing else."""
    (tmp_path / "train.yaml").write_text(YAML)
    told = ("--nxdt_yaml_config", tmp_path / "train.yaml", "--hw-backend", "trn1")
    ranks = written(example, tmp_path / "out", *told)
    assert sorted(ranks) == sorted(itertools.product(range(4), range(2)))
    assert ranks[0, 0]["model.layers.0.self_attn.qkv_proj.weight_qkv"].shape == (12, 16)
    shutil.rmtree(tmp_path / "out" / "hf")
    (tmp_path / "out" / "ckptconv.json").unlink()
    convert(tmp_path / "out", tmp_path / "back", "hf", *told)
    same(weights_of(tmp_path / "back"), full(example))
    have = json.loads((tmp_path / "back" / "config.json").read_text())
    sizes = ("num_hidden_layers", "num_key_value_heads", "intermediate_size", "vocab_size", "max_position_embeddings")
    assert {key: have[key] for key in sizes} == {key: EXAMPLE[key] for key in sizes}
    assert have["rms_norm_eps"] == 1e-5
    (tmp_path / "train.yaml").write_text(YAML.replace("tensor_model_parallel_size: 4", "tensor_model_parallel_size: 8"))
    assert "tensor_model_parallel_size 8" in refused(tmp_path / "out", tmp_path / "no", "hf", *told)


def test_markers_of_a_trainer(example: Path, tmp_path: Path) -> None:
    convert(example, tmp_path / "out", "nxdt", "--nxdt-markers")
    assert [(tmp_path / "out" / name).read_text() for name in ("checkpoint", "done")] == ["1", "1"]
    convert(tmp_path / "out", tmp_path / "again", "nxdt")
    assert not (tmp_path / "again" / "checkpoint").exists()
