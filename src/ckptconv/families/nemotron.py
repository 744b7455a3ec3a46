"""Nemotron 3, 4 and Minitron (`nemotron`), and StableLM: LayerNorm with biases, part of each head rotated.

Source: transformers `models/nemotron`, `models/stablelm`. Nemotron's norms store gamma - 1, its MLP has no gate and
squares a ReLU, half of a head is rotated where `partial_rotary_factor` is absent. StableLM's MLP is Llama's, a quarter
is rotated; `use_parallel_residual` feeds both halves of a layer from one norm.
"""

from __future__ import annotations

from ckptconv.families.family import Field, Neutral, Row, derive, head_dim
from ckptconv.families.llama import BASE, FINAL, LAYER
from ckptconv.families.rope import Style
from ckptconv.ops import COPY

_L = "model.layers.{i}."
_M = _L + "mlp."

NORM_BIASES = (
    Row(LAYER, ("input norm bias",), (_L + "input_layernorm.bias",), COPY),
    Row(LAYER, ("post norm bias",),  (_L + "post_attention_layernorm.bias",), COPY),
    Row(FINAL, ("bias",),            ("model.norm.bias",), COPY),
)

NEMOTRON = derive(
    BASE,
    name="nemotron",
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    rows=(
        *NORM_BIASES,
        Row(LAYER, ("mlp l0 weight",), (_M + "up_proj.weight",), COPY),
        Row(LAYER, ("mlp l0 bias",),   (_M + "up_proj.bias",), COPY),
    ),
    fields=(
        Field("max_position_embeddings", "max_position_embeddings", 4096),
        Field("norm", None, "LayerNorm"),
        Field("norm_epsilon", "norm_eps", 1e-5),
        Field("norm_offset", None, True),
        Field("activation", "hidden_act", "squared_relu",
              words=(("relu2", "squared_relu"), ("silu", "silu"), ("relu", "relu"), ("gelu", "gelu"),
                     ("gelu_pytorch_tanh", "gelu_tanh"))),
        Field("gated", None, False),
        Field("qkv_bias", "attention_bias", False),
        Field("dense_bias", "attention_bias", False),
        Field("mlp_bias", "mlp_bias", False),
    ),
    rope=Style(percent=0.5),
    models="Nemotron-3 8B, Nemotron-4 15B and 340B, Minitron",
    verified="logits of the real megatron-core equal to transformers' at TP1, TP2, PP2; HF round trip through "
    "its files bit for bit",
)  # fmt: skip

STABLELM = derive(
    BASE,
    name="stablelm",
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    rows=NORM_BIASES,
    fields=(
        Field("num_query_groups", "num_key_value_heads", 32),
        Field("kv_channels", None, head_dim),
        Field("max_position_embeddings", "max_position_embeddings", 4096),
        Field("norm", None, "LayerNorm"),
        Field("norm_epsilon", "layer_norm_eps", 1e-5),
        Field("qkv_bias", "use_qkv_bias", False),
        Field("parallel_residual", "use_parallel_residual", False),
        Field("shared_norm", "use_parallel_residual", False),
    ),
    neutral=(Neutral("qk_layernorm", (False,), "a norm of its own for each head's queries and keys"),),
    rope=Style(percent=0.25),
    models="StableLM 3B, StableLM 2 1.6B (without `qk_layernorm`)",
    verified="logits of the real megatron-core equal to transformers' at TP1, TP2, PP2 (parallel residual: "
    "with --custom-layers); HF round trip through its files bit for bit",
)
