"""A loader for experts as Megatron-LM ships one (loader_mixtral_hf.py at core_v0.13.0 to 0.19.0), with our savers.

It says `num_experts`, and how many a token takes only in checkpoint_args; it sends `router weight` and experts stacked.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fixtures import config
from inprocess import main

pytestmark = pytest.mark.timeout(120)

LOADER = '''
import argparse, json, types
import torch
from safetensors.torch import load_file

def add_arguments(parser):
    parser.add_argument("--tokenizer-model", default=None)

def load_checkpoint(queue, args):
    c = json.load(open(args.load_dir + "/config.json"))
    w = load_file(args.load_dir + "/model.safetensors")
    a, g, h = c["num_attention_heads"], c["num_key_value_heads"], c["hidden_size"]
    md = types.SimpleNamespace()
    md.model_type, md.num_layers, md.hidden_size, md.seq_length = "GPT", c["num_hidden_layers"], h, 4096
    md.num_attention_heads, md.max_position_embeddings = a, c["max_position_embeddings"]
    md.tokenizer_type, md.iteration, md.params_dtype, md.bert_binary_head = "Llama2Tokenizer", 1, torch.float32, False
    md.output_layer, md.position_embedding_type, md.linear_bias, md.norm_has_bias = True, "rope", False, False
    md.swiglu, md.previous_tensor_parallel_size, md.previous_pipeline_parallel_size = True, 1, 1
    md.true_vocab_size, md.make_vocab_size_divisible_by = c["vocab_size"], None
    md.consumed_train_samples = md.consumed_valid_samples = 0
    md.num_experts = c["num_local_experts"]
    md.checkpoint_args = argparse.Namespace(
        num_layers=md.num_layers, num_query_groups=g, group_query_attention=True, kv_channels=h // a,
        rotary_base=c["rope_theta"], norm_epsilon=c["rms_norm_eps"], ffn_hidden_size=c["intermediate_size"],
        num_experts=md.num_experts, moe_router_topk=c["num_experts_per_tok"], bias_gelu_fusion=False, swiglu=True,
        sequence_parallel=False, apply_query_key_layer_scaling=False)
    queue.put(md)

    def send(name, message):
        queue.put({"name": name, **message})

    send("embeddings", {"word embeddings": w["model.embed_tokens.weight"]})
    for i in range(md.num_layers):
        p = f"model.layers.{i}."
        q, k, v = (w[p + f"self_attn.{x}_proj.weight"].view(g, -1, h) for x in "qkv")
        experts = [p + f"block_sparse_moe.experts.{e}." for e in range(md.num_experts)]
        send(f"transformer layer {i}", {
            "input norm weight": w[p + "input_layernorm.weight"],
            "post norm weight": w[p + "post_attention_layernorm.weight"],
            "qkv weight": torch.cat([q, k, v], 1).reshape(-1, h),
            "dense weight": w[p + "self_attn.o_proj.weight"],
            "router weight": w[p + "block_sparse_moe.gate.weight"],
            "mlp l0 weight W": torch.stack([w[e + "w1.weight"] for e in experts]),
            "mlp l0 weight V": torch.stack([w[e + "w3.weight"] for e in experts]),
            "mlp l1 weight": torch.stack([w[e + "w2.weight"] for e in experts]),
        })
    send("final norm", {"weight": w["model.norm.weight"]})
    send("output layer", {"weight": w["lm_head.weight"]})
    queue.put("done")
'''
KEYS = ("model_type", "num_key_value_heads", "rope_theta", "rms_norm_eps", "vocab_size", "num_local_experts",
        "num_experts_per_tok", "intermediate_size")  # fmt: skip


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "loader_of_experts.py").write_text(LOADER)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return "of_experts"


def convert(source: Path, out: Path, *flags: object) -> None:
    assert main(["--load-dir", str(source), "--save-dir", str(out), "--no-progress", *map(str, flags)]) == 0


def test_their_experts_become_hugging_face_ones(hf: Callable[..., Path], loader: str, tmp_path: Path) -> None:
    source = hf("mixtral")
    convert(source, tmp_path / "hf", "--loader", loader, "--saver", "hf", "--model-type", "mixtral")
    found, want = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", source))
    assert sorted(found) == sorted(want)
    assert all(torch.equal(found[name], tensor) for name, tensor in want.items())
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {key: written[key] for key in KEYS} == {key: config("mixtral")[key] for key in KEYS}


def test_their_experts_become_megatron_ones(hf: Callable[..., Path], loader: str, tmp_path: Path) -> None:
    layout = ("--target-tp", 2, "--target-ep", 2, "--saver", "megatron_mcore")
    convert(hf("mixtral"), tmp_path / "theirs", "--loader", loader, *layout)
    convert(hf("mixtral"), tmp_path / "ours", *layout)
    paths = sorted(path.relative_to(tmp_path / "ours") for path in (tmp_path / "ours").rglob("model_optim_rng.pt"))
    assert len(paths) == 4
    for path in paths:
        theirs, ours = (torch.load(tmp_path / one / path, weights_only=False) for one in ("theirs", "ours"))
        assert sorted(theirs["model"]) == sorted(ours["model"])
        assert all(torch.equal(theirs["model"][name], tensor) for name, tensor in ours["model"].items())
        for name in ("num_experts", "moe_router_topk", "moe_layer_freq", "moe_ffn_hidden_size", "rotary_base"):
            assert getattr(theirs["args"], name) == getattr(ours["args"], name)
