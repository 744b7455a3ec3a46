"""Qwen3 dense: Qwen2 with norms on every query and key head and no biases unless `attention_bias` says so.

Source: transformers `models/qwen3`. Absent keys mean 32 key/value heads, a head dim of 128 and windows as in Qwen2.
"""

from __future__ import annotations

from ckptconv.families.family import Field, derive, head_dim
from ckptconv.families.gemma import QK_NORM
from ckptconv.families.qwen2 import QWEN2

QWEN3 = derive(
    QWEN2,
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    rows=QK_NORM,
    fields=(
        Field("kv_channels", "head_dim", 128, head_dim),
        Field("qk_norm", None, "head"),
        Field("qkv_bias", "attention_bias", False),
        Field("dense_bias", "attention_bias", False),
    ),
    models="Qwen3 dense, tied or not, windows on all or some layers included",
    verified="logits of the real megatron-core equal to transformers' at TP1, TP2 PP2; HF round trip through "
    "its files bit for bit",
)
