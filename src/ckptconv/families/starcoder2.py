"""StarCoder2: Llama's attention with biases, LayerNorm, and an MLP without gate.

Source: transformers `models/starcoder2`. Class defaults of absent keys: 2 key/value heads, use_bias true, gelu_tanh,
no window, tied.
"""

from __future__ import annotations

from ckptconv.families.family import ACTIVATIONS, Config, Field, Neutral, Row, derive
from ckptconv.families.llama import BASE, FINAL, LAYER
from ckptconv.ops import COPY

_L, _M = "model.layers.{i}.", "model.layers.{i}.mlp."


def _heads(config: Config) -> int | None:
    return config.get("num_attention_heads")


STARCODER2 = derive(
    BASE,
    name="starcoder2",
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    rows=(
        Row(LAYER, ("input norm bias",), (_L + "input_layernorm.bias",), COPY),
        Row(LAYER, ("post norm bias",),  (_L + "post_attention_layernorm.bias",), COPY),
        Row(LAYER, ("mlp l0 weight",),   (_M + "c_fc.weight",), COPY),
        Row(LAYER, ("mlp l0 bias",),     (_M + "c_fc.bias",), COPY),
        Row(LAYER, ("mlp l1 weight",),   (_M + "c_proj.weight",), COPY),
        Row(LAYER, ("mlp l1 bias",),     (_M + "c_proj.bias",), COPY),
        Row(FINAL, ("bias",),            ("model.norm.bias",), COPY),
    ),
    fields=(
        Field("num_query_groups",        "num_key_value_heads",     2, _heads),
        Field("max_position_embeddings", "max_position_embeddings", 4096),
        Field("norm",                    None,                      "LayerNorm"),
        Field("norm_epsilon",            "norm_epsilon",            1e-5),
        Field("activation",              "hidden_act",              "gelu_tanh", words=ACTIVATIONS),
        Field("gated",                   None,                      False),
        Field("qkv_bias",                "use_bias",                True),
        Field("dense_bias",              "use_bias",                True),
        Field("mlp_bias",                "use_bias",                True),
        Field("sliding_window",          "sliding_window",          None),
        Field("tied",                    "tie_word_embeddings",     True),
    ),
    neutral=(
        Neutral("mlp_type", ("default",), "a gated MLP"),
        Neutral("norm_type", ("layer_norm",), "another norm"),
    ),
    models="StarCoder2 3B, 7B, 15B",
    verified="logits of the real megatron-core equal to transformers' at TP1, TP2, PP2; HF round trip through "
    "its files bit for bit",
)  # fmt: skip
