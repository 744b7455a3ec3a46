"""Qwen3-MoE (30B-A3B, 235B-A22B): Qwen3's attention, Qwen2-MoE's experts without the shared one.

Source: transformers `models/qwen3_moe`. transformers 5 calls `num_experts` `num_local_experts` in config.json. Absent
keys mean 4 key/value heads, 128 experts of which 8 are chosen, scores not divided by their sum, no window; a window is
on every layer.
"""

from __future__ import annotations

from typing import Any

from ckptconv.families import moe
from ckptconv.families.family import Config, Field, Row, derive
from ckptconv.families.gemma import QK_NORM
from ckptconv.families.llama import BASE, LAYER
from ckptconv.ops import COPY
from ckptconv.spec import ModelSpec


def _extra(config: Config, where: str) -> dict[str, Any]:
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    return {"moe.layers": moe.sparse(config, where), "sliding_window": window or None}


def _extra_config(spec: ModelSpec) -> Config:
    return {
        **moe.sparse_config(spec),
        "use_sliding_window": spec.sliding_window is not None,
        "sliding_window": spec.sliding_window,
    }


QWEN3_MOE = derive(
    BASE,
    name="qwen3_moe",
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rows=(
        Row(LAYER, ("router weight",), ("model.layers.{i}.mlp.gate.weight",), COPY),
        *QK_NORM,
        *moe.COMMON,
    ),
    variants=moe.FUSED,
    renamed=(("num_experts", "num_local_experts"),),
    fields=(
        Field("num_query_groups", "num_key_value_heads", 4, lambda config: config.get("num_attention_heads")),
        Field("max_position_embeddings", "max_position_embeddings", 32768),
        Field("qk_norm", None, "head"),
        Field("qkv_bias", "attention_bias", False),
        Field("dense_bias", "attention_bias", False),
        Field("moe.num_experts", "num_experts", 128),
        Field("moe.topk", "num_experts_per_tok", 8),
        Field("moe.ffn_hidden_size", "moe_intermediate_size", 768),
        Field("moe.normalize", "norm_topk_prob", False),
    ),
    extra=_extra,
    extra_config=_extra_config,
    models="Qwen3-MoE",
    verified="logits of the real megatron-core equal to transformers' at TP1, TP2, PP2, EP2, TP2 EP2; HF round "
    "trip through its files bit for bit",
)
