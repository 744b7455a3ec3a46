"""DeepSeek-V2, V3 and R1, Moonlight, Kimi-K2, GLM-4.7-Flash: multi-latent attention, experts behind dense layers.

Source: transformers `models/deepseek_v2`, `models/deepseek_v3`, `models/glm4_moe_lite`, `modeling_layers.py:MtpModel`;
Kimi-K2, which transformers does not know, has DeepSeek-V3's class in its own code. Rotary rows are interleaved pairs
unless `rope_interleave` is false. The norms inside the attention have eps 1e-6 whatever `rms_norm_eps` says.

V2 chooses by softmax scores, which it does not divide by their sum, and with `group_limited_greedy` from the groups
with the best single experts; V3 by sigmoid scores plus a trained correction, from the groups whose two best sum up
highest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ckptconv.errors import SourceError
from ckptconv.families import moe, rope, windows
from ckptconv.families.family import Config, Duplicate, Field, Neutral, Row, derive
from ckptconv.families.llama import BASE, LAYER
from ckptconv.messages import MTP as MTP_KEYS
from ckptconv.ops import COPY, LatentHalves
from ckptconv.spec import ModelSpec

MTP = "mtp layer {i}"
_A, _M = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."


def _halves(spec: ModelSpec, layer: int | None) -> bool:
    return spec.rope is not None and not spec.rope.interleaved


ATTENTION = (
    Row(LAYER, ("q proj weight",),       (_A + "q_proj.weight",), LatentHalves(), when=_halves),
    Row(LAYER, ("q proj weight",),       (_A + "q_proj.weight",), COPY),
    Row(LAYER, ("q down weight",),       (_A + "q_a_proj.weight",), COPY),
    Row(LAYER, ("q down norm weight",),  (_A + "q_a_layernorm.weight",), COPY),
    Row(LAYER, ("q up weight",),         (_A + "q_b_proj.weight",), LatentHalves(), when=_halves),
    Row(LAYER, ("q up weight",),         (_A + "q_b_proj.weight",), COPY),
    Row(LAYER, ("kv down weight",),      (_A + "kv_a_proj_with_mqa.weight",), LatentHalves(shared=True), when=_halves),
    Row(LAYER, ("kv down weight",),      (_A + "kv_a_proj_with_mqa.weight",), COPY),
    Row(LAYER, ("kv down norm weight",), (_A + "kv_a_layernorm.weight",), COPY),
    Row(LAYER, ("kv up weight",),        (_A + "kv_b_proj.weight",), COPY),
)
ROUTER = (
    Row(LAYER, ("router weight",),                (_M + "gate.weight",), COPY),
    Row(LAYER, ("router score correction bias",), (_M + "gate.e_score_correction_bias",), COPY),
    Row(LAYER, ("shared mlp l0 weight W",),       (_M + "shared_experts.gate_proj.weight",), COPY),
    Row(LAYER, ("shared mlp l0 weight V",),       (_M + "shared_experts.up_proj.weight",), COPY),
    Row(LAYER, ("shared mlp l1 weight",),         (_M + "shared_experts.down_proj.weight",), COPY),
)
MTP_ONLY = (
    Row(MTP, ("enorm weight",),      ("model.layers.{i}.enorm.weight",), COPY),
    Row(MTP, ("hnorm weight",),      ("model.layers.{i}.hnorm.weight",), COPY),
    Row(MTP, ("eh proj weight",),    ("model.layers.{i}.eh_proj.weight",), COPY),
    Row(MTP, ("final norm weight",), ("model.layers.{i}.shared_head.norm.weight",), COPY),
)  # fmt: skip

#: Every MTP layer on disk repeats the model's embedding and head.
MTP_DUPLICATES = (
    Duplicate("model.layers.{i}.embed_tokens.weight", "embeddings", "word embeddings"),
    Duplicate("model.layers.{i}.shared_head.head.weight", "output layer", "weight"),
)


def with_mtp(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Rows of a layer, repeated for MTP layers, whose numbers on disk go on behind the last layer's."""
    keys = {key.name for key in MTP_KEYS}
    again = tuple(replace(row, message=MTP) for row in rows if row.message == LAYER and set(row.keys) <= keys)
    return (*rows, *MTP_ONLY, *again)


#: Of V3's router, beside what DeepSeek's config.json calls them.
V3_ROUTER = (
    Field("moe.normalize", "norm_topk_prob", True, lambda config: False),
    Field("moe.score", None, "sigmoid"),
    Field("moe.score_bias", None, True),
    Field("moe.router_fp32", None, True),
)
V3_NEUTRAL = (
    Neutral("topk_method", ("noaux_tc",), "another way to choose experts"),
    Neutral("scoring_func", ("sigmoid",), "another score of experts"),
)
_LATENT_NEUTRAL = (
    Neutral("attention_bias", (False,), "biases in multi-latent attention"),
    Neutral("mlp_bias", (False,), "biases in the MLP but not in the experts"),
)
_INTERLEAVED = rope.Style(interleaved=True)


def _heads(config: Config, where: str) -> dict[str, Any]:
    """Spec fields of the heads, which multi-latent attention has no fewer of for keys and values."""
    if (percent := rope.read(config, _INTERLEAVED, where).percent) != 1:  # type: ignore[union-attr]
        raise SourceError(f"{where}: partial_rotary_factor is {percent} with multi-latent attention: not supported.")
    return {"num_query_groups": windows.count(config, "num_attention_heads", where)}


def _heads_config(spec: ModelSpec) -> Config:
    if spec.mla is None:
        return {}
    return {
        "num_key_value_heads": spec.num_attention_heads,
        "head_dim": spec.mla.qk_rope_head_dim,
        "qk_head_dim": spec.mla.q_head_dim,
    }


def _v2(config: Config, where: str) -> dict[str, Any]:
    method = config.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise SourceError(f"{where}: topk_method is {method!r}, expected greedy or group_limited_greedy.")
    grouped = config if method == "group_limited_greedy" else {}
    return {
        **_heads(config, where),
        **moe.groups(grouped, where, (1, 1), "max"),
        **moe.shared(config, where, 2, 1407),
        "moe.layers": moe.dense_first(config, where, 0),
    }


def _v2_config(spec: ModelSpec) -> Config:
    grouped = spec.moe is not None and spec.moe.num_groups is not None
    return {
        **_heads_config(spec),
        **moe.groups_config(spec),
        **moe.shared_config(spec),
        **moe.dense_first_config(spec),
        "topk_method": "group_limited_greedy" if grouped else "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
    }


def _v3(config: Config, where: str) -> dict[str, Any]:
    return {
        **_heads(config, where),
        **moe.groups(config, where, (8, 4), "top2"),
        **moe.shared(config, where, 1, 2048),
        "moe.layers": moe.dense_first(config, where, 3),
    }


def _v3_config(spec: ModelSpec) -> Config:
    return {
        **_heads_config(spec),
        **moe.groups_config(spec),
        **moe.shared_config(spec),
        **moe.dense_first_config(spec),
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    }


def _lite(config: Config, where: str) -> dict[str, Any]:
    kinds = config.get("mlp_layer_types")
    if kinds is not None and (not isinstance(kinds, list) or not set(kinds) <= {"dense", "sparse"}):
        raise SourceError(f"{where}: mlp_layer_types is {kinds!r}, expected a list of dense and sparse.")
    first = moe.dense_first(config, where, 1)
    return {
        **_heads(config, where),
        **moe.groups(config, where, (1, 1), "top2"),
        **moe.shared(config, where, 1, 1536),
        "moe.layers": first if kinds is None else tuple(int(kind == "sparse") for kind in kinds),
    }


def _lite_config(spec: ModelSpec) -> Config:
    layers = spec.moe.layers if spec.moe else ()
    return {**_v3_config(spec), "mlp_layer_types": ["sparse" if experts else "dense" for experts in layers]}


_LATENT_FIELDS = (
    Field("num_query_groups", None),
    Field("kv_channels", "v_head_dim", 128),
    Field("mla.q_lora_rank", "q_lora_rank", 1536, lambda config: None),
    Field("mla.kv_lora_rank", "kv_lora_rank", 512),
    Field("mla.qk_head_dim", "qk_nope_head_dim", 128),
    Field("mla.qk_rope_head_dim", "qk_rope_head_dim", 64),
    Field("mla.v_head_dim", "v_head_dim", 128),
)

DEEPSEEK_V2 = derive(
    BASE,
    name="deepseek_v2",
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    rows=(*ATTENTION, *(row for row in ROUTER if row.keys != ("router score correction bias",)), *moe.COMMON),
    variants=moe.FUSED,
    fields=(
        *_LATENT_FIELDS,
        Field("moe.num_experts", "n_routed_experts", 64),
        Field("moe.topk", "num_experts_per_tok", None),
        Field("moe.ffn_hidden_size", "moe_intermediate_size", 1407),
        Field("moe.scaling_factor", "routed_scaling_factor", 1.0),
        Field("moe.normalize", None, False),
        Field("moe.router_fp32", None, True),
    ),
    neutral=(
        *_LATENT_NEUTRAL,
        Neutral("norm_topk_prob", (False,), "scores divided by their sum, which transformers does not do here"),
        Neutral("scoring_func", ("softmax",), "another score of experts"),
    ),
    rope=_INTERLEAVED,
    extra=_v2,
    extra_config=_v2_config,
    models="DeepSeek-V2, V2-Lite, DeepSeek-Coder-V2",
    verified="logits of the real megatron-core equal to transformers' at TP1, TP2, PP2, EP2, TP2 EP2; HF round "
    "trip through its files bit for bit",
)

DEEPSEEK_V3 = derive(
    BASE,
    name="deepseek_v3",
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    rows=with_mtp((*ATTENTION, *ROUTER, *moe.COMMON, *BASE.rows)),
    variants=moe.FUSED,
    duplicates=MTP_DUPLICATES,
    fields=(
        *_LATENT_FIELDS,
        Field("max_position_embeddings", "max_position_embeddings", 4096),
        Field("moe.num_experts", "n_routed_experts", 256),
        Field("moe.topk", "num_experts_per_tok", 8),
        Field("moe.ffn_hidden_size", "moe_intermediate_size", 2048),
        Field("moe.scaling_factor", "routed_scaling_factor", 2.5),
        Field("mtp_layers", "num_nextn_predict_layers", 0),
        *V3_ROUTER,
    ),
    renamed=(("num_nextn_predict_layers", "num_mtp_layers"), ("n_routed_experts", "num_local_experts")),
    neutral=(*_LATENT_NEUTRAL, *V3_NEUTRAL),
    rope=replace(_INTERLEAVED, interleaved_key="rope_interleave"),
    extra=_v3,
    extra_config=_v3_config,
    models="DeepSeek-V3, V3.1, R1, Moonlight, with and without MTP layers, rotary rows in pairs or halves",
    verified="logits of the real megatron-core equal to transformers' at TP1, TP2, PP2, EP2, TP2 EP2, those of "
    "MTP layers to transformers' MtpModel; HF round trip through its files bit for bit",
)

KIMI_K2 = derive(
    DEEPSEEK_V3,
    name="kimi_k2",
    model_type="kimi_k2",
    models="Kimi-K2",
    verified="as DeepSeek-V3, which transformers reads it as, having no class of its own: logits at TP1, TP2 "
    "PP2",
)

GLM4_MOE_LITE = derive(
    DEEPSEEK_V3,
    name="glm4_moe_lite",
    model_type="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    fields=(
        Field("max_position_embeddings", "max_position_embeddings", 202752),
        Field("norm_epsilon", "rms_norm_eps", 1e-5),
        Field("kv_channels", "v_head_dim", 256),
        Field("mla.q_lora_rank", "q_lora_rank", 768, lambda config: None),
        Field("mla.qk_head_dim", "qk_nope_head_dim", 192),
        Field("mla.v_head_dim", "v_head_dim", 256),
        Field("moe.num_experts", "n_routed_experts", 64),
        Field("moe.topk", "num_experts_per_tok", 4),
        Field("moe.ffn_hidden_size", "moe_intermediate_size", 1536),
        Field("moe.scaling_factor", "routed_scaling_factor", 1.8),
    ),
    extra=_lite,
    extra_config=_lite_config,
    models="GLM-4.7-Flash",
    verified="logits of the real megatron-core equal to transformers' at TP1, TP2 PP2; HF round trip through "
    "its files bit for bit",
)
