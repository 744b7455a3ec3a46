"""Qwen1.5-MoE and Qwen2-57B-A14B: Qwen2's attention, experts beside one large gated expert that sees every token.

Source: transformers `models/qwen2_moe`. A layer is dense where `mlp_only_layers` lists it, or where its number counted
from 1 is no multiple of `decoder_sparse_step`. The router is a softmax over all experts, whose chosen scores are
divided by their sum only with `norm_topk_prob`. Absent keys mean 16 key/value heads, 60 experts of which 4 are chosen,
no division, windows (where used) on every other layer from the first to `max_window_layers` (28).
"""

from __future__ import annotations

from typing import Any

from ckptconv.families import moe, windows
from ckptconv.families.family import Config, Field, Row, derive
from ckptconv.families.llama import BASE, LAYER
from ckptconv.ops import COPY
from ckptconv.spec import ModelSpec

_M = "model.layers.{i}.mlp."


def _extra(config: Config, where: str) -> dict[str, Any]:
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    layers = windows.count(config, "num_hidden_layers", where)
    last = windows.count(config, "max_window_layers", where, 28)
    kinds = [windows.FULL if layer % 2 or layer >= last else windows.SLIDING for layer in range(layers)]
    return {"moe.layers": moe.sparse(config, where), **windows.read(config, where, window, kinds)}


def _extra_config(spec: ModelSpec) -> Config:
    return {
        **moe.sparse_config(spec),
        "use_sliding_window": spec.sliding_window is not None,
        "sliding_window": spec.sliding_window,
        "layer_types": windows.kinds(spec),
    }


QWEN2_MOE = derive(
    BASE,
    name="qwen2_moe",
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    rows=(
        Row(LAYER, ("router weight",),          (_M + "gate.weight",), COPY),
        Row(LAYER, ("shared mlp l0 weight W",), (_M + "shared_expert.gate_proj.weight",), COPY),
        Row(LAYER, ("shared mlp l0 weight V",), (_M + "shared_expert.up_proj.weight",), COPY),
        Row(LAYER, ("shared mlp l1 weight",),   (_M + "shared_expert.down_proj.weight",), COPY),
        Row(LAYER, ("shared gate weight",),     (_M + "shared_expert_gate.weight",), COPY),
        *moe.COMMON,
    ),
    variants=moe.FUSED,
    fields=(
        Field("num_query_groups", "num_key_value_heads", 16, lambda config: config.get("num_attention_heads")),
        Field("max_position_embeddings", "max_position_embeddings", 32768),
        Field("qkv_bias", "qkv_bias", True),
        Field("moe.num_experts", "num_experts", 60),
        Field("moe.topk", "num_experts_per_tok", 4),
        Field("moe.ffn_hidden_size", "moe_intermediate_size", 1408),
        Field("moe.normalize", "norm_topk_prob", False),
        Field("moe.shared_ffn_hidden_size", "shared_expert_intermediate_size", 5632),
        Field("moe.shared_gate", None, True),
    ),
    extra=_extra,
    extra_config=_extra_config,
    models="Qwen1.5-MoE, Qwen2-MoE, dense layers among those with experts included",
    verified="logits of the real megatron-core equal to transformers' at TP1, TP2, PP2, EP2, TP2 EP2; HF round "
    "trip through its files bit for bit",
)  # fmt: skip
