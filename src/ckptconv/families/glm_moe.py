"""GLM-4.5, 4.5-Air, 4.6 and 4.7 (`glm4_moe`): plain attention, half of each head rotated, DeepSeek-V3's experts.

Source: transformers `models/glm4_moe`. Rotary halves are those of Llama, not the pairs of the dense GLM-4. Biases are
on q, k and v only (`attention_bias`), norms on query and key heads with `use_qk_norm`. Absent keys mean 8 key/value
heads, eps 1e-5, one dense layer, one shared expert, no groups.
"""

from __future__ import annotations

from typing import Any

from ckptconv.families import moe
from ckptconv.families.deepseek import MTP_DUPLICATES, ROUTER, V3_NEUTRAL, V3_ROUTER, with_mtp
from ckptconv.families.family import Config, Field, derive
from ckptconv.families.gemma import QK_NORM
from ckptconv.families.llama import BASE
from ckptconv.families.rope import Style
from ckptconv.spec import ModelSpec


def _extra(config: Config, where: str) -> dict[str, Any]:
    return {
        **moe.groups(config, where, (1, 1), "top2"),
        **moe.shared(config, where, 1, 1408),
        "moe.layers": moe.dense_first(config, where, 1),
    }


def _extra_config(spec: ModelSpec) -> Config:
    return {**moe.groups_config(spec), **moe.shared_config(spec), **moe.dense_first_config(spec)}


GLM4_MOE = derive(
    BASE,
    name="glm4_moe",
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    rows=with_mtp((*QK_NORM, *ROUTER, *moe.COMMON, *BASE.rows)),
    variants=moe.FUSED,
    duplicates=MTP_DUPLICATES,
    fields=(
        Field("num_query_groups", "num_key_value_heads", 8, lambda config: config.get("num_attention_heads")),
        Field("max_position_embeddings", "max_position_embeddings", 131072),
        Field("norm_epsilon", "rms_norm_eps", 1e-5),
        Field("qk_norm", "use_qk_norm", None, words=((True, "head"), (False, None))),
        Field("qkv_bias", "attention_bias", False),
        Field("moe.num_experts", "n_routed_experts", 128),
        Field("moe.topk", "num_experts_per_tok", 8),
        Field("moe.ffn_hidden_size", "moe_intermediate_size", 1408),
        Field("moe.scaling_factor", "routed_scaling_factor", 1.0),
        Field("mtp_layers", "num_nextn_predict_layers", 0),
        *V3_ROUTER,
    ),
    renamed=(("num_nextn_predict_layers", "num_mtp_layers"), ("n_routed_experts", "num_local_experts")),
    neutral=V3_NEUTRAL,
    rope=Style(percent=0.5),
    extra=_extra,
    extra_config=_extra_config,
    models="GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7, with and without MTP layers",
    verified="logits of the real megatron-core equal to transformers' at TP1, TP2, PP2, EP2, TP2 EP2, those of "
    "MTP layers to transformers' MtpModel; HF round trip through its files bit for bit",
)
