"""MindSpore Transformers' parameters of a Hugging Face fixture, by index arithmetic of their own.

The rules are those of mindformers' converters (`toolkit/weight_convert`, `models/*/utils.py`): qkv fused by group or in
turn, gate and up row by row or in turn, experts transposed into one tensor, multi-latent projections apart or fused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

Weights = dict[str, torch.Tensor]

ENDS = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}
PARTS = {
    "self_attn.o_proj": "self_attention.linear_proj",
    "self_attn.q_norm": "self_attention.q_layernorm",
    "self_attn.k_norm": "self_attention.k_layernorm",
    "self_attn.q_a_proj": "self_attention.linear_q_down_proj",
    "self_attn.q_a_layernorm": "self_attention.q_layernorm",
    "self_attn.q_b_proj": "self_attention.linear_q_up_proj",
    "self_attn.kv_a_proj_with_mqa": "self_attention.linear_kv_down_proj",
    "self_attn.kv_a_layernorm": "self_attention.kv_layernorm",
    "self_attn.kv_b_proj": "self_attention.linear_kv_up_proj",
    "self_attn.q_proj": "self_attention.linear_q",
    "self_attn.k_proj": "self_attention.linear_k",
    "self_attn.v_proj": "self_attention.linear_v",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "block_sparse_moe.gate": "mlp.router",
    "mlp.gate.e_score_correction_bias": "mlp.router.expert_bias",
    "mlp.gate.": "mlp.router.",
    "shared_head.norm": "final_layernorm",
}
MLP = {".w1.": ".gating.", ".w2.": ".linear_fc2.", ".w3.": ".hidden.", ".gate_proj.": ".gating.",
       ".up_proj.": ".hidden.", ".down_proj.": ".linear_fc2."}  # fmt: skip


def split(weights: Weights, config: dict[str, Any]) -> Weights:
    """Under the names of today's models, nothing fused."""
    out = {}
    layers = config["num_hidden_layers"]
    for name, tensor in weights.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        if not match:
            out[ENDS[name]] = tensor
            continue
        layer, rest = int(match[1]), match[2]
        if rest in ("embed_tokens.weight", "shared_head.head.weight"):
            continue  # copies that a layer of multi-token prediction has in Hugging Face's files only
        if ".q_proj." in rest and "kv_lora_rank" in config:
            rest = rest.replace("self_attn.q_proj", "self_attention.linear_q_proj")
        for old, new in (PARTS | MLP if "mlp." in rest or "moe." in rest else PARTS).items():
            rest = rest.replace(old, new)
        own = ("enorm", "hnorm", "eh_proj", "final_layernorm")
        behind = f"mtp.layers.{layer - layers}." + ("" if rest.startswith(own) else "transformer_layer.")
        before = behind if layer >= layers else f"decoder.layers.{layer}."
        out[before + rest.replace("block_sparse_moe", "mlp")] = tensor
    return out


def fused(weights: Weights, config: dict[str, Any], *, fc1: str = "interleaved", qkv: str = "grouped") -> Weights:
    """As training saves it; experts in weight1 and weight2."""
    out: Weights = {}
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    loose = split(weights, config)
    for name, tensor in loose.items():
        if ".experts." in name:
            prefix = name.split(".experts.")[0] + ".experts."
            if prefix + "weight1" not in out:
                out |= experts(loose, prefix)
        elif ".linear_q." in name:
            k, v = (loose[name.replace(".linear_q.", f".linear_{letter}.")] for letter in "kv")
            out[name.replace(".linear_q.", ".linear_qkv.")] = joined(tensor, k, v, heads, groups, qkv)
        elif ".gating." in name:
            up = loose[name.replace(".gating.", ".hidden.")]
            rows = torch.stack([tensor, up], 1).flatten(0, 1) if fc1 == "interleaved" else torch.cat([tensor, up])
            out[name.replace(".gating.", ".linear_fc1.")] = rows
        elif not re.search(r"\.(linear_k|linear_v|hidden)\.", name):
            out[name] = tensor
    return out


def joined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, groups: int, how: str) -> torch.Tensor:
    """linear_qkv of rows (or elements of biases)."""
    if how == "contiguous":
        return torch.cat([q, k, v])
    d, each = q.shape[0] // heads, heads // groups
    rows = []
    for g in range(groups):
        rows += [q[g * each * d : (g + 1) * each * d], k[g * d : (g + 1) * d], v[g * d : (g + 1) * d]]
    return torch.cat(rows)


def experts(loose: Weights, prefix: str) -> Weights:
    """weight1 [e * h, 2m] and weight2 [e * m, h]."""
    count = len({name[len(prefix) :].split(".")[0] for name in loose if name.startswith(prefix)})
    first, second = [], []
    for e in range(count):
        gate, up, down = (loose[f"{prefix}{e}.{part}.weight"] for part in ("gating", "hidden", "linear_fc2"))
        first.append(torch.cat([gate, up]).T)
        second.append(down.T)
    return {prefix + "weight1": torch.cat(first), prefix + "weight2": torch.cat(second)}


def fused_latent(out: Weights) -> Weights:
    """Down projections of multi-latent attention in one tensor, and the names that go with it."""
    found: Weights = {}
    for name, tensor in out.items():
        if "linear_q_down_proj" in name:
            latent = out[name.replace("linear_q_down", "linear_kv_down")]
            found[name.replace("linear_q_down_proj", "linear_qkv")] = torch.cat([tensor, latent])
        elif "linear_kv_down_proj" not in name:
            for old, new in (("linear_q_up_proj", "linear_qb"), ("linear_kv_up_proj", "linear_kvb"),
                             ("kv_layernorm", "k_layernorm")):  # fmt: skip
                name = name.replace(old, new)
            found[name] = tensor
    return found


def older(weights: Weights) -> Weights:
    """The names of mindformers' llama before r1.6, nothing fused."""
    names = {
        "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
        "model.norm.weight": "model.norm_out.weight",
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    out = {}
    for name, tensor in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        out[name] = tensor
    return out


def save(folder: Path, weights: Weights, name: str = "model_0.safetensors") -> Path:
    """One file, as MindSpore writes it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.clone().contiguous() for key, tensor in weights.items()}, folder / name, {"format": "ms"})
    return folder


# Protocol buffers, written by hand

KINDS = {torch.float32: "Float32", torch.bfloat16: "BFloat16", torch.float16: "Float16", torch.int32: "Int32"}


def varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def entry(number: int, data: bytes) -> bytes:
    """A field of bytes."""
    return varint(number * 8 + 2) + varint(len(data)) + data


def value(tag: str, kind: str, dims: list[int], content: bytes, packed: bool = False) -> bytes:
    """A Checkpoint message with one Value."""
    shape = entry(1, b"".join(map(varint, dims))) if packed else b"".join(varint(8) + varint(n) for n in dims)
    return entry(1, entry(1, tag.encode()) + entry(2, shape + entry(2, kind.encode()) + entry(3, content)))


def raw(tensor: torch.Tensor) -> bytes:
    """The elements of a tensor."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
