"""The Hugging Face loader: every way weights lie in a directory, and what it refuses.

Expected values are put together by hand from the fixture's tensors: names and layouts of megatron.md 3.2 and 4.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures import config
from inprocess import main

Hf = Callable[..., Path]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
Weights = dict[str, torch.Tensor]

FLAGS = ("--saver", "megatron_mcore", "--saver-transformer-impl", "local", "--no-progress")
SHARD, INDEX = "model-{:05d}-of-{:05d}.safetensors", "model.safetensors.index.json"
BIN_SHARD, BIN_INDEX = "pytorch_model-{:05d}-of-{:05d}.bin", "pytorch_model.bin.index.json"


def convert(source: Path, out: Path, *flags: str) -> int:
    return main([*FLAGS, "--load-dir", str(source), "--save-dir", str(out), *flags])


def rank_file(out: Path) -> dict[str, Any]:
    path = out / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    loaded: dict[str, Any] = torch.load(path, weights_only=False)
    return loaded


def by_hand(weights: Weights, c: dict[str, Any]) -> Weights:
    """What one rank of a local Megatron model holds: qkv by group, fc1 [gate; up], the vocabulary padded with zeros."""
    a, h = c["num_attention_heads"], c["hidden_size"]
    g, d = c.get("num_key_value_heads") or a, c.get("head_dim") or h // a

    def padded(name: str) -> torch.Tensor:
        rows = weights[name]
        return torch.cat([rows, rows.new_zeros(256 - len(rows), h)])

    out = {"embedding.word_embeddings.weight": padded("model.embed_tokens.weight")}
    for i in range(c["num_hidden_layers"]):
        old, new = f"model.layers.{i}.", f"decoder.layers.{i}."
        for kind in ("weight", "bias"):
            if f"{old}self_attn.q_proj.{kind}" in weights:
                q, k, v = (weights[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv")
                rest = q.shape[1:]
                grouped = [q.reshape(g, -1, *rest), k.reshape(g, d, *rest), v.reshape(g, d, *rest)]
                out[f"{new}self_attention.linear_qkv.{kind}"] = torch.cat(grouped, 1).reshape(-1, *rest)
        out[f"{new}self_attention.linear_proj.weight"] = weights[f"{old}self_attn.o_proj.weight"]
        out[f"{new}input_layernorm.weight"] = weights[f"{old}input_layernorm.weight"]
        out[f"{new}pre_mlp_layernorm.weight"] = weights[f"{old}post_attention_layernorm.weight"]
        gate, up = weights[f"{old}mlp.gate_proj.weight"], weights[f"{old}mlp.up_proj.weight"]
        out[f"{new}mlp.linear_fc1.weight"] = torch.cat([gate, up])
        out[f"{new}mlp.linear_fc2.weight"] = weights[f"{old}mlp.down_proj.weight"]
    out["decoder.final_layernorm.weight"] = weights["model.norm.weight"]
    if not c["tie_word_embeddings"]:
        out["output_layer.weight"] = padded("lm_head.weight")
    return out


def same(found: Weights, expected: Weights) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def dump(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))


def shards(weights: Weights, count: int) -> list[Weights]:
    names = list(weights)
    return [{name: weights[name] for name in names[n::count]} for n in range(count)]


# Ways to store the same weights


def single(folder: Path, weights: Weights) -> None:
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def no_metadata(folder: Path, weights: Weights) -> None:
    save_file(weights, folder / "model.safetensors")


def odd_name(folder: Path, weights: Weights) -> None:
    save_file(weights, folder / "weights.safetensors", {"format": "pt"})


def sharded(folder: Path, weights: Weights, index: bool = True) -> None:
    place = {}
    for n, part in enumerate(shards(weights, 3), 1):
        save_file(part, folder / SHARD.format(n, 3), {"format": "pt"})
        place |= dict.fromkeys(part, SHARD.format(n, 3))
    if index:
        dump(folder / INDEX, {"metadata": {}, "weight_map": place})


def sharded_without_index(folder: Path, weights: Weights) -> None:
    sharded(folder, weights, index=False)


def pytorch(folder: Path, weights: Weights) -> None:
    torch.save(weights, folder / "pytorch_model.bin")


def legacy_pytorch(folder: Path, weights: Weights) -> None:
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def wrapped_pytorch(folder: Path, weights: Weights) -> None:
    torch.save({"state_dict": weights, "epoch": 3}, folder / "pytorch_model.bin")


def strided_pytorch(folder: Path, weights: Weights) -> None:
    """Transposed in memory, and parts of one storage."""
    both = torch.cat([weights["model.norm.weight"]] * 2)
    name = "model.layers.1.mlp.down_proj.weight"
    odd = {name: weights[name].t().contiguous().t(), "model.norm.weight": both[len(both) // 2 :]}
    torch.save(weights | odd, folder / "pytorch_model.bin")


def pytorch_shards(folder: Path, weights: Weights, index: bool = True, legacy: bool = False) -> None:
    place = {}
    for n, part in enumerate(shards(weights, 2), 1):
        torch.save(part, folder / BIN_SHARD.format(n, 2), _use_new_zipfile_serialization=not legacy)
        place |= dict.fromkeys(part, BIN_SHARD.format(n, 2))
    if index:
        dump(folder / BIN_INDEX, {"weight_map": place})


def pytorch_shards_without_index(folder: Path, weights: Weights) -> None:
    pytorch_shards(folder, weights, index=False)


def legacy_pytorch_shards(folder: Path, weights: Weights) -> None:
    pytorch_shards(folder, weights, legacy=True)


def bare(weights: Weights) -> Weights:
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def unprefixed(folder: Path, weights: Weights) -> None:
    single(folder, bare(weights))


def unprefixed_pytorch_shards(folder: Path, weights: Weights) -> None:
    pytorch_shards(folder, bare(weights))


def frequencies(folder: Path, weights: Weights) -> None:
    """As the first Llama files: one buffer per layer, and one of the later kind."""
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(4)] + ["model.rotary_emb.inv_freq"]
    single(folder, weights | {name: torch.ones(6) for name in names})


def unprefixed_frequencies(folder: Path, weights: Weights) -> None:
    names = [f"layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(4)]
    single(folder, bare(weights) | {name: torch.ones(6) for name in names})


def both_kinds(folder: Path, weights: Weights) -> None:
    """safetensors are preferred, and other formats beside them are left alone."""
    single(folder, weights)
    pytorch(folder, {name: torch.zeros_like(tensor) for name, tensor in weights.items()})
    save_file({"tok_embeddings.weight": torch.zeros(3)}, folder / "consolidated.safetensors")


def beside_consolidated(folder: Path, weights: Weights) -> None:
    sharded(folder, weights, index=False)
    save_file({"tok_embeddings.weight": torch.zeros(3)}, folder / "consolidated.safetensors")


WAYS = (
    single, no_metadata, odd_name, sharded, sharded_without_index, pytorch, legacy_pytorch, wrapped_pytorch,
    strided_pytorch, pytorch_shards, pytorch_shards_without_index, legacy_pytorch_shards, unprefixed,
    unprefixed_pytorch_shards, frequencies, unprefixed_frequencies, both_kinds, beside_consolidated,
)  # fmt: skip


def folder_of(tmp_path: Path, changes: dict[str, Any] | None = None, name: str = "llama2") -> Path:
    (tmp_path / "in").mkdir()
    dump(tmp_path / "in" / "config.json", config(name) | (changes or {}))
    return tmp_path / "in"


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_to_store_weights(hf: Hf, tmp_path: Path, way: Callable[[Path, Weights], None]) -> None:
    weights = load_file(hf("llama2") / "model.safetensors")
    folder = folder_of(tmp_path)
    way(folder, weights)
    assert convert(folder, tmp_path / "out") == 0
    same(rank_file(tmp_path / "out")["model"], by_hand(weights, config("llama2")))


@pytest.mark.parametrize("name", ["llama1", "llama_mqa", "llama32", "mistral", "qwen2", "qwen2_tied"])
def test_every_shape_of_attention(hf: Hf, tmp_path: Path, name: str) -> None:
    assert convert(hf(name), tmp_path / "out") == 0
    weights = load_file(hf(name) / "model.safetensors")
    same(rank_file(tmp_path / "out")["model"], by_hand(weights, config(name)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("way", [single, pytorch, legacy_pytorch], ids=lambda way: way.__name__)
def test_what_is_stored_counts_not_what_the_config_says(
    hf: Hf, tmp_path: Path, way: Callable[[Path, Weights], None], dtype: str
) -> None:
    weights = load_file(hf("llama2", dtype=dtype) / "model.safetensors")
    folder = folder_of(tmp_path)  # says float32
    way(folder, weights)
    assert convert(folder, tmp_path / "out") == 0
    found = rank_file(tmp_path / "out")
    same(found["model"], by_hand(weights, config("llama2")))
    assert found["args"].params_dtype == getattr(torch, dtype)
    assert (found["args"].bf16, found["args"].fp16) == (dtype == "bfloat16", dtype == "float16")


def test_tensors_keep_types_of_their_own(hf: Hf, tmp_path: Path) -> None:
    weights = load_file(hf("llama2", dtype="bfloat16") / "model.safetensors")
    weights |= {name: tensor.float() for name, tensor in weights.items() if name.endswith("norm.weight")}
    folder = folder_of(tmp_path)
    single(folder, weights)
    assert convert(folder, tmp_path / "out") == 0
    same(rank_file(tmp_path / "out")["model"], by_hand(weights, config("llama2")))


# Tied heads


def shared_pytorch(folder: Path, weights: Weights) -> None:
    """As torch.save writes a tied model: one storage for both."""
    pytorch(folder, weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})


def stored_twice(folder: Path, weights: Weights) -> None:
    single(folder, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})


def stored_twice_bare(folder: Path, weights: Weights) -> None:
    single(folder, bare(weights) | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})


@pytest.mark.parametrize("way", [single, shared_pytorch, stored_twice, stored_twice_bare], ids=lambda way: way.__name__)
def test_a_tied_head_is_not_stored(hf: Hf, tmp_path: Path, way: Callable[[Path, Weights], None]) -> None:
    weights = load_file(hf("qwen2_tied") / "model.safetensors")
    folder = folder_of(tmp_path, name="qwen2_tied")
    way(folder, weights)
    assert convert(folder, tmp_path / "out") == 0
    found = rank_file(tmp_path / "out")
    same(found["model"], by_hand(weights, config("qwen2_tied")))
    assert found["args"].untie_embeddings_and_output_weights is False


def test_a_head_that_differs_is_kept_and_said(hf: Hf, cli: Cli, tmp_path: Path) -> None:
    weights = load_file(hf("qwen2_tied") / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    folder = folder_of(tmp_path, name="qwen2_tied")
    single(folder, weights)
    run = cli(*FLAGS, "--load-dir", folder, "--save-dir", tmp_path / "out")
    assert run.returncode == 0
    assert "lm_head.weight differs from the embedding: taken as untied" in run.stderr
    found = rank_file(tmp_path / "out")
    same(found["model"], by_hand(weights, config("qwen2") | {"vocab_size": 131}))
    assert found["args"].untie_embeddings_and_output_weights is True


# Refusals


Weight = Callable[[Path, Weights], None]


def without(*names: str) -> Weight:
    return lambda folder, weights: single(folder, {k: v for k, v in weights.items() if k not in names})


def plus(**extra: torch.Tensor) -> Weight:
    return lambda folder, weights: single(folder, weights | {k.replace("__", "."): v for k, v in extra.items()})


def swapped(folder: Path, weights: Weights) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    sharded(folder, weights | {name: weights[name][:80].contiguous()})


def mixed_qkv(folder: Path, weights: Weights) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    single(folder, weights | {name: weights[name].bfloat16()})


def mixed_gate(folder: Path, weights: Weights) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    single(folder, weights | {name: weights[name].bfloat16()})


def integers(folder: Path, weights: Weights) -> None:
    single(folder, {name: tensor.to(torch.int8) for name, tensor in weights.items()})


def index_names_absent_tensor(folder: Path, weights: Weights) -> None:
    sharded(folder, weights)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.9.ghost"] = SHARD.format(2, 3)
    dump(folder / INDEX, index)


def index_lacks_tensor(folder: Path, weights: Weights) -> None:
    sharded(folder, weights)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    dump(folder / INDEX, index)


def index_moves_tensor(folder: Path, weights: Weights) -> None:
    sharded(folder, weights)
    index = json.loads((folder / INDEX).read_text())
    place = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.weight"] = SHARD.format(1 if "00001" not in place else 2, 3)
    dump(folder / INDEX, index)


def index_names_absent_file(folder: Path, weights: Weights) -> None:
    sharded(folder, weights)
    (folder / SHARD.format(3, 3)).unlink()


def index_leaves_the_directory(folder: Path, weights: Weights) -> None:
    sharded(folder, weights)
    dump(folder / INDEX, {"weight_map": dict.fromkeys(weights, "../model.safetensors")})


def index_is_empty(folder: Path, weights: Weights) -> None:
    sharded(folder, weights)
    dump(folder / INDEX, {"metadata": {}})


def index_is_no_json(folder: Path, weights: Weights) -> None:
    sharded(folder, weights)
    (folder / INDEX).write_text('{"weight_map": ')


def shard_missing_without_index(folder: Path, weights: Weights) -> None:
    sharded(folder, weights, index=False)
    (folder / SHARD.format(2, 3)).unlink()


def tensor_in_two_shards(folder: Path, weights: Weights) -> None:
    sharded(folder, weights, index=False)
    save_file(shards(weights, 3)[0] | shards(weights, 3)[1], folder / SHARD.format(1, 3))


def bin_shard_missing(folder: Path, weights: Weights) -> None:
    pytorch_shards(folder, weights)
    (folder / BIN_SHARD.format(1, 2)).unlink()


def bin_of_a_list(folder: Path, weights: Weights) -> None:
    torch.save(list(weights.values()), folder / "pytorch_model.bin")


def bin_with_other_things(folder: Path, weights: Weights) -> None:
    torch.save(weights | {"steps": 7}, folder / "pytorch_model.bin")


def truncated(folder: Path, weights: Weights) -> None:
    single(folder, weights)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(5000)


def lfs_pointer(folder: Path, weights: Weights) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def nothing(folder: Path, weights: Weights) -> None:
    pass


def adapter_only(folder: Path, weights: Weights) -> None:
    save_file(weights, folder / "adapter_model.safetensors")


REFUSED: dict[str, tuple[Weight, tuple[str, ...]]] = {
    "missing tensor": (
        without("model.layers.1.self_attn.k_proj.weight"),
        ("lacks model.layers.1.self_attn.k_proj.weight", "llama", "4 layers"),
    ),
    "missing tensors are folded": (
        without(*(f"model.layers.{i}.mlp.up_proj.weight" for i in range(4))),
        ("lacks model.layers.{0..3}.mlp.up_proj.weight",),
    ),
    "missing head": (without("lm_head.weight"), ("lacks lm_head.weight", "tie_word_embeddings")),
    "extra tensor": (
        plus(model__layers__0__self_attn__q_norm__weight=torch.ones(12)),
        ("holds model.layers.0.self_attn.q_norm.weight", "They would be lost"),
    ),
    "extra layer": (
        plus(model__layers__4__input_layernorm__weight=torch.ones(48)),
        ("holds model.layers.4.input_layernorm.weight", "4 layers"),
    ),
    "extra bias": (
        plus(model__layers__0__mlp__up_proj__bias=torch.ones(88)), ("holds model.layers.0.mlp.up_proj.bias",)
    ),
    "wrong shape": (
        swapped,
        ("of-00003.safetensors: model.layers.2.mlp.up_proj.weight is [80, 48], expected [88, 48]",
         "intermediate_size is 88", "config.json"),
    ),
    "mixed types in qkv": (
        mixed_qkv,
        ("model.layers.1.self_attn.q_proj.weight is float32", "model.layers.1.self_attn.k_proj.weight is bfloat16",
         "--dtype"),
    ),
    "only integers": (integers, ("no floating point",)),
    "index names an absent tensor": (index_names_absent_tensor, (INDEX, "model.layers.9.ghost", SHARD.format(2, 3))),
    "index lacks a tensor": (index_lacks_tensor, (INDEX, "does not name model.norm.weight")),
    "index says another file": (index_moves_tensor, (INDEX, "says that model.norm.weight is in")),
    "index names an absent file": (index_names_absent_file, (INDEX, SHARD.format(3, 3), "2 of 3 shards are there")),
    "index leaves the directory": (index_leaves_the_directory, (INDEX, "'../model.safetensors'")),
    "index is empty": (index_is_empty, (INDEX, "no weight_map")),
    "index is no json": (index_is_no_json, (INDEX, "is not JSON")),
    "shard missing without index": (shard_missing_without_index, ("shard 2 of 3 is missing",)),
    "tensor in two shards": (tensor_in_two_shards, (SHARD.format(2, 3), "is also in", SHARD.format(1, 3))),
    "bin shard missing": (bin_shard_missing, (BIN_INDEX, BIN_SHARD.format(1, 2))),
    "bin of a list": (bin_of_a_list, ("pytorch_model.bin: holds a list, expected a dict of tensors",)),
    "bin with other things": (bin_with_other_things, ("pytorch_model.bin: steps is not a tensor",)),
    "truncated": (truncated, ("model.safetensors", "truncated")),
    "lfs pointer": (lfs_pointer, ("model.safetensors", "git-lfs pointer", "git lfs pull")),
    "no weights": (nothing, ("no weights found",)),
    "adapter only": (adapter_only, ("only an adapter",)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    store, messages = REFUSED[case]
    folder = folder_of(tmp_path)
    store(folder, load_file(hf("llama2") / "model.safetensors"))
    assert convert(folder, tmp_path / "out") == 3
    said = capsys.readouterr().err
    assert said.startswith("ckptconv: error: ")
    assert all(message in said for message in messages), said
    assert str(folder) in said
    assert len(said.strip().split("\n")) <= 3
    assert not (tmp_path / "out").exists()


def test_mixed_types_where_the_target_joins_are_refused(
    hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gate and up are two tensors on the wire and in Hugging Face, one in Megatron."""
    folder = folder_of(tmp_path)
    mixed_gate(folder, load_file(hf("llama2") / "model.safetensors"))
    assert convert(folder, tmp_path / "out") == 7
    assert "--dtype" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["--saver", "hf", "--load-dir", str(folder), "--save-dir", str(tmp_path / "hf")]) == 0
    same(load_file(tmp_path / "hf" / "model.safetensors"), load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("store", [mixed_qkv, mixed_gate], ids=lambda way: way.__name__)
def test_mixed_types_are_converted_when_asked(hf: Hf, tmp_path: Path, store: Weight) -> None:
    folder = folder_of(tmp_path)
    store(folder, load_file(hf("llama2") / "model.safetensors"))
    weights = load_file(folder / "model.safetensors")
    assert convert(folder, tmp_path / "out", "--dtype", "bf16") == 0
    same(
        rank_file(tmp_path / "out")["model"],
        by_hand({name: tensor.bfloat16() for name, tensor in weights.items()}, config("llama2")),
    )


def test_no_config(hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(hf("llama2") / "model.safetensors", tmp_path / "in")
    assert convert(tmp_path / "in", tmp_path / "out") == 3
    assert "config.json: missing" in capsys.readouterr().err


@pytest.mark.parametrize(("loader", "code"), [("hf_llama", 0), ("hf_mistral", 3), ("hf_qwen2", 3)])
def test_a_pinned_loader_refuses_other_families(
    hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str], loader: str, code: int
) -> None:
    assert convert(hf("llama2"), tmp_path / "out", "--loader", loader) == code
    said = capsys.readouterr().err
    assert ("--loader hf_llama" in said) == bool(code)
    assert (tmp_path / "out").exists() == (not code)


def test_the_source_is_not_touched(hf: Hf, tmp_path: Path) -> None:
    source = hf("llama2")
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.iterdir()}
    assert convert(source, tmp_path / "out") == 0
    assert before == {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.iterdir()}
