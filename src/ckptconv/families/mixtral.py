"""Mixtral 8x7B and 8x22B: Mistral's attention, experts in every layer.

Source: transformers `models/mixtral`. On disk experts are w1 (gate), w3 (up) and w2 (down) of `block_sparse_moe`;
transformers 5 holds them fused under `mlp`, and writes that with save_original_format=False. The router: a softmax
over the chosen experts' logits. Absent keys mean 8 key/value heads, rope_theta 1e6, no window.
"""

from __future__ import annotations

from typing import Any

from ckptconv.families import moe
from ckptconv.families.family import Config, Field, Row, derive
from ckptconv.families.llama import BASE, LAYER
from ckptconv.families.rope import Style
from ckptconv.ops import COPY

_B = "model.layers.{i}.block_sparse_moe."


def _all_layers(config: Config, where: str) -> dict[str, Any]:
    return {"moe.layers": (1,) * config["num_hidden_layers"]}


MIXTRAL = derive(
    BASE,
    name="mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    rows=(
        Row(LAYER, ("router weight",), (_B + "gate.weight",), COPY),
        *moe.expert_rows(_B + "experts.", "w1", "w3", "w2"),
    ),
    variants=(Row(LAYER, ("router weight",), ("model.layers.{i}.mlp.gate.weight",), COPY), *moe.FUSED),
    fields=(
        Field("num_query_groups", "num_key_value_heads", 8, lambda config: config.get("num_attention_heads")),
        Field("max_position_embeddings", "max_position_embeddings", 131072),
        Field("norm_epsilon", "rms_norm_eps", 1e-5),
        Field("sliding_window", "sliding_window", None),
        Field("moe.num_experts", "num_local_experts", 8),
        Field("moe.topk", "num_experts_per_tok", 2),
        Field("moe.ffn_hidden_size", "intermediate_size", 14336),
    ),
    rope=Style(theta=1e6),
    extra=_all_layers,
    models="Mixtral",
    verified="logits of the real megatron-core equal to transformers' at TP1, TP2, PP2, EP2, TP2 EP2; HF round "
    "trip through its files bit for bit",
)
