"""Gemma 1, Gemma 2 and the text models of Gemma 3: norms that store gamma - 1, embeddings times sqrt(h).

Source: transformers `models/gemma`, `models/gemma2`, `models/gemma3` (Gemma3ForCausalLM), names on disk the same in
4.57 and 5.23. Absent keys mean a head dim of 256, 16 (later 4) key/value heads, tied; in Gemma 2 a window of 4096 on
even layers and soft caps 50 and 30, in Gemma 3 a window on all but every sixth layer and theta 1e6 (1e4 with the
window). transformers casts sqrt(h) to the model's type before it multiplies. Norm weights are copied, never added to.

Gemma 1 says `hidden_act: gelu` and means the approximation: transformers 5 reads it so, and `hidden_activation`, which
some releases of 4 preferred, says it outright.
"""

from __future__ import annotations

from typing import Any

from ckptconv.families import rope, windows
from ckptconv.families.family import ACTIVATIONS, Config, Field, Neutral, Row, derive
from ckptconv.families.llama import BASE, LAYER
from ckptconv.ops import COPY
from ckptconv.spec import ModelSpec

_L = "model.layers.{i}."

#: Norms before and after both halves of a layer; `post_attention_layernorm` is not the one before the MLP here.
SANDWICH = (
    Row(LAYER, ("attention output norm weight",), (_L + "post_attention_layernorm.weight",), COPY),
    Row(LAYER, ("post norm weight",),             (_L + "pre_feedforward_layernorm.weight",), COPY),
    Row(LAYER, ("mlp output norm weight",),       (_L + "post_feedforward_layernorm.weight",), COPY),
)
QK_NORM = (
    Row(LAYER, ("q norm weight",), (_L + "self_attn.q_norm.weight",), COPY),
    Row(LAYER, ("k norm weight",), (_L + "self_attn.k_norm.weight",), COPY),
)  # fmt: skip


def _embedding_multiplier(config: Config) -> Any:
    h = config.get("hidden_size")
    return h**0.5 if isinstance(h, int) else 1.0


def _no(config: Config) -> None:
    return None


_BIDIRECTIONAL = Neutral("use_bidirectional_attention", (False,), "attention to later tokens")

GEMMA = derive(
    BASE,
    name="gemma",
    model_type="gemma",
    architecture="GemmaForCausalLM",
    fields=(
        Field("num_query_groups", "num_key_value_heads", 16),
        Field("kv_channels", "head_dim", 256),
        Field("max_position_embeddings", "max_position_embeddings", 8192),
        Field("activation", "hidden_act", "gelu_tanh",
              words=(("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu_tanh"), *ACTIVATIONS)),
        Field("norm_offset", None, True),
        Field("embedding_multiplier", None, _embedding_multiplier),
        Field("qkv_bias", "attention_bias", False),
        Field("dense_bias", "attention_bias", False),
        Field("tied", "tie_word_embeddings", True),
    ),
    neutral=(
        _BIDIRECTIONAL,
        Neutral("hidden_activation", ("gelu_pytorch_tanh",), "an activation on which releases of transformers differ"),
    ),
    extra_config=lambda spec: {"hidden_activation": "gelu_pytorch_tanh"} if spec.activation == "gelu_tanh" else {},
    models="Gemma 1 (2B, 7B) and CodeGemma",
    verified="with --custom-layers, logits of the real megatron-core equal to transformers' at TP1, TP2, PP2; "
    "HF round trip through its files bit for bit",
)  # fmt: skip


def _scale(config: Config, where: str) -> dict[str, Any]:
    """`query_pre_attn_scalar`: scores are divided by its square root; None where that is the head dim."""
    scalar = windows.count(config, "query_pre_attn_scalar", where, 256)
    head_dim = windows.count(config, "head_dim", where, 256)
    return {"softmax_scale": None if scalar == head_dim else max(scalar, 1) ** -0.5}


def _scale_config(spec: ModelSpec) -> Config:
    scale = spec.softmax_scale
    return {"query_pre_attn_scalar": spec.kv_channels if scale is None else round(scale**-2)}


def _gemma2(config: Config, where: str) -> dict[str, Any]:
    window = config.get("sliding_window", 4096)
    return _scale(config, where) | windows.read(config, where, window, windows.alternating(config, where))


def _gemma2_config(spec: ModelSpec) -> Config:
    return {"layer_types": windows.kinds(spec), **_scale_config(spec)}


GEMMA2 = derive(
    GEMMA,
    name="gemma2",
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    rows=SANDWICH,
    fields=(
        Field("num_query_groups", "num_key_value_heads", 4),
        Field("activation", "hidden_activation", "gelu_tanh",
              words=(("gelu_pytorch_tanh", "gelu_tanh"), *ACTIVATIONS)),
        Field("norms", None, "sandwich"),
        Field("attention_softcap", "attn_logit_softcapping", 50.0, _no),
        Field("logit_softcap", "final_logit_softcapping", 30.0, _no),
        Field("sliding_window", "sliding_window", 4096, _no),
    ),
    neutral=(_BIDIRECTIONAL,),
    extra=_gemma2,
    extra_config=_gemma2_config,
    models="Gemma 2 (2B, 9B, 27B)",
    verified="with --custom-layers, logits of the real megatron-core equal to transformers' at TP1, TP2, PP2; "
    "HF round trip through its files bit for bit",
)  # fmt: skip

_GEMMA3_ROPE = rope.Style(theta=1e6, local_theta=1e4)


def _gemma3(config: Config, where: str) -> dict[str, Any]:
    every = windows.count(config, "sliding_window_pattern", where, 6) or 1
    window = config.get("sliding_window", 4096)
    found = windows.read(config, where, window, windows.alternating(config, where, every))
    local = rope.read_local(config, _GEMMA3_ROPE, where)
    own = found["sliding_window"] is not None and local != rope.read(config, _GEMMA3_ROPE, where)
    return {**_scale(config, where), **found, "local_rope": local if own else None}


def _gemma3_config(spec: ModelSpec) -> Config:
    every = windows.pattern(spec)
    return {**_gemma2_config(spec), **({} if every is None else {"sliding_window_pattern": every})}


GEMMA3_TEXT = derive(
    GEMMA2,
    name="gemma3_text",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    rows=QK_NORM,
    fields=(
        Field("max_position_embeddings", "max_position_embeddings", 131072),
        Field("qk_norm", None, "head"),
        Field("attention_softcap", None, None),
        Field("logit_softcap", "final_logit_softcapping", None),
    ),
    # transformers takes this key and does not apply it.
    neutral=(_BIDIRECTIONAL, Neutral("attn_logit_softcapping", (), "a soft cap on attention scores")),
    rope=_GEMMA3_ROPE,
    extra=_gemma3,
    extra_config=_gemma3_config,
    models="Gemma 3 text models (1B; the text part saved as a model of its own)",
    verified="with --custom-layers, logits of the real megatron-core equal to transformers' at TP1, TP2, PP2; "
    "HF round trip through its files bit for bit",
)  # fmt: skip
