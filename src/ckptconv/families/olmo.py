"""OLMo 1 and OLMo 2.

Source: transformers `models/olmo`, `models/olmo2`. OLMo 1's norms are LayerNorms that have no parameters, with an
epsilon of 1e-5 that config.json does not say: as messages they are ones and zeros. OLMo 2 has norms only behind
attention and MLP, inside the residual (`post_attention_layernorm`, `post_feedforward_layernorm`), and norms over all
query and over all key heads together. Absent keys mean as many key/value heads as heads, in OLMo 2 eps 1e-5.
"""

from __future__ import annotations

from ckptconv.families.family import Field, Neutral, Row, derive
from ckptconv.families.llama import BASE, FINAL, LAYER
from ckptconv.ops import COPY, ONES, ZEROS

_L = "model.layers.{i}."

OLMO = derive(
    BASE,
    name="olmo",
    model_type="olmo",
    architecture="OlmoForCausalLM",
    rows=(
        Row(LAYER, ("input norm weight",), (), ONES),
        Row(LAYER, ("input norm bias",),   (), ZEROS),
        Row(LAYER, ("post norm weight",),  (), ONES),
        Row(LAYER, ("post norm bias",),    (), ZEROS),
        Row(FINAL, ("weight",),            (), ONES),
        Row(FINAL, ("bias",),              (), ZEROS),
    ),
    fields=(
        Field("norm", None, "LayerNorm"),
        Field("norm_epsilon", None, 1e-5),
        Field("qkv_bias", "attention_bias", False),
        Field("dense_bias", "attention_bias", False),
    ),
    neutral=(Neutral("clip_qkv", (), "queries, keys and values clipped at that value"),),
    models="OLMo 1 (1B, 7B; not the 7B with `clip_qkv`)",
    verified="logits of the real megatron-core equal to transformers' at TP1, TP2, PP2; HF round trip through "
    "its files bit for bit",
)

OLMO2 = derive(
    BASE,
    name="olmo2",
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    rows=(
        Row(LAYER, ("attention output norm weight",), (_L + "post_attention_layernorm.weight",), COPY),
        Row(LAYER, ("mlp output norm weight",),       (_L + "post_feedforward_layernorm.weight",), COPY),
        Row(LAYER, ("q norm weight",),                (_L + "self_attn.q_norm.weight",), COPY),
        Row(LAYER, ("k norm weight",),                (_L + "self_attn.k_norm.weight",), COPY),
    ),
    fields=(
        Field("norm_epsilon", "rms_norm_eps", 1e-5),
        Field("norms", None, "output"),
        Field("qk_norm", None, "full"),
        Field("qkv_bias", "attention_bias", False),
        Field("dense_bias", "attention_bias", False),
    ),
    models="OLMo 2 (1B to 32B)",
    verified="with --custom-layers, logits of the real megatron-core equal to transformers' at TP1, TP2, PP2; "
    "HF round trip through its files bit for bit",
)  # fmt: skip
