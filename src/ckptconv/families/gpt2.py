"""GPT-2 and models of its config (DistilGPT2, DialoGPT, Cerebras-GPT): learned positions, weights stored [in, out].

Source: transformers `models/gpt2`; its Conv1D holds the transposed matrix, with queries, keys and values side by side.
Files written without the head lack `transformer.`; old ones hold the causal mask of every layer. Class defaults of
absent keys: n_inner 4 * n_embd, activation gelu_new, tied.
"""

from __future__ import annotations

from typing import Any

from ckptconv.families.family import ACTIVATIONS, REQUIRED, Config, Family, Field, Ignore, Neutral, Row
from ckptconv.families.llama import EMBEDDINGS, FINAL, LAYER, OUTPUT
from ckptconv.ops import COPY, JOINED_QKV, TRANSPOSE

_L = "transformer.h.{i}."
_A, _M = _L + "attn.", _L + "mlp."


def _heads(config: Config) -> Any:
    return config.get("n_head")


def _head_dim(config: Config) -> Any:
    h, a = config.get("n_embd"), config.get("n_head")
    return h // a if isinstance(h, int) and isinstance(a, int) and a else None


def _ffn(config: Config) -> Any:
    hidden = config.get("n_embd")
    return 4 * hidden if isinstance(hidden, int) else None


NEUTRAL = (
    Neutral("scale_attn_weights", (True,), "scores without a scale"),
    Neutral("add_cross_attention", (False,), "attention to an encoder"),
)

GPT2 = Family(
    name="gpt2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    rows=(
        Row(EMBEDDINGS, ("word embeddings",),     ("transformer.wte.weight",), COPY),
        Row(EMBEDDINGS, ("position embeddings",), ("transformer.wpe.weight",), COPY),
        Row(LAYER,      ("input norm weight",),   (_L + "ln_1.weight",), COPY),
        Row(LAYER,      ("input norm bias",),     (_L + "ln_1.bias",), COPY),
        Row(LAYER,      ("qkv weight",),          (_A + "c_attn.weight",), JOINED_QKV, TRANSPOSE),
        Row(LAYER,      ("qkv bias",),            (_A + "c_attn.bias",), JOINED_QKV),
        Row(LAYER,      ("dense weight",),        (_A + "c_proj.weight",), COPY, TRANSPOSE),
        Row(LAYER,      ("dense bias",),          (_A + "c_proj.bias",), COPY),
        Row(LAYER,      ("post norm weight",),    (_L + "ln_2.weight",), COPY),
        Row(LAYER,      ("post norm bias",),      (_L + "ln_2.bias",), COPY),
        Row(LAYER,      ("mlp l0 weight",),       (_M + "c_fc.weight",), COPY, TRANSPOSE),
        Row(LAYER,      ("mlp l0 bias",),         (_M + "c_fc.bias",), COPY),
        Row(LAYER,      ("mlp l1 weight",),       (_M + "c_proj.weight",), COPY, TRANSPOSE),
        Row(LAYER,      ("mlp l1 bias",),         (_M + "c_proj.bias",), COPY),
        Row(FINAL,      ("weight",),              ("transformer.ln_f.weight",), COPY),
        Row(FINAL,      ("bias",),                ("transformer.ln_f.bias",), COPY),
        Row(OUTPUT,     ("weight",),              ("lm_head.weight",), COPY),
    ),
    fields=(
        Field("num_layers",              "n_layer",             REQUIRED),
        Field("hidden_size",             "n_embd",              REQUIRED),
        Field("ffn_hidden_size",         "n_inner",             _ffn, _ffn),
        Field("num_attention_heads",     "n_head",              REQUIRED),
        Field("num_query_groups",        None,                  _heads),
        Field("kv_channels",             None,                  _head_dim),
        Field("vocab_size",              "vocab_size",          REQUIRED),
        Field("max_position_embeddings", "n_positions",         1024),
        Field("norm",                    None,                  "LayerNorm"),
        Field("norm_epsilon",            "layer_norm_epsilon",  1e-5),
        Field("activation",              "activation_function", "gelu_tanh",
              words=(("gelu_new", "gelu_tanh"), *ACTIVATIONS)),
        Field("gated",                   None,                  False),
        Field("qkv_bias",                None,                  True),
        Field("dense_bias",              None,                  True),
        Field("mlp_bias",                None,                  True),
        Field("learned_positions",       None,                  True),
        Field("tied",                    "tie_word_embeddings", True),
    ),
    ignore=(
        Ignore(_A + "bias", "the causal mask, not trained"),
        Ignore(_A + "masked_bias", "the value of masked scores, not trained"),
    ),
    neutral=(*NEUTRAL, Neutral("scale_attn_by_inverse_layer_idx", (False,), "scores divided by the layer's number")),
    prefix="transformer.",
    rope=None,
    models="GPT-2 and models of its config (DistilGPT2, DialoGPT, Cerebras-GPT), with and without head",
    verified="logits of the real megatron-core equal to transformers' at TP1, TP2, PP2; HF round trip through "
    "its files bit for bit",
)  # fmt: skip
