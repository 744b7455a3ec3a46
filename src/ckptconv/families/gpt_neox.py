"""GPT-NeoX 20B, Pythia, Dolly 2, StableLM alpha: attention and MLP side by side, rope on a part of each head.

Source: transformers `models/gpt_neox`. `query_key_value` is [a, 3, d]: per head its query, key and value, which is the
grouped order for as many groups as heads. Class defaults of absent keys: rotary_pct 0.25, rotary_emb_base 1e4,
use_parallel_residual and attention_bias true, untied.
"""

from __future__ import annotations

from ckptconv.families.family import ACTIVATIONS, REQUIRED, Config, Family, Field, Ignore, Row
from ckptconv.families.llama import EMBEDDINGS, FINAL, LAYER, OUTPUT
from ckptconv.families.rope import Style
from ckptconv.ops import COPY

_L = "gpt_neox.layers.{i}."
_A, _M = _L + "attention.", _L + "mlp."


def heads(config: Config) -> int | None:
    """`num_attention_heads`: no key says the groups."""
    return config.get("num_attention_heads")


def head_dim(config: Config) -> int | None:
    """`hidden_size / num_attention_heads`: no key says the head dim."""
    h, a = config.get("hidden_size"), config.get("num_attention_heads")
    return h // a if isinstance(h, int) and isinstance(a, int) and a else None


GPT_NEOX = Family(
    name="gpt_neox",
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    rows=(
        Row(EMBEDDINGS, ("word embeddings",),   ("gpt_neox.embed_in.weight",), COPY),
        Row(LAYER,      ("input norm weight",), (_L + "input_layernorm.weight",), COPY),
        Row(LAYER,      ("input norm bias",),   (_L + "input_layernorm.bias",), COPY),
        Row(LAYER,      ("qkv weight",),        (_A + "query_key_value.weight",), COPY),
        Row(LAYER,      ("qkv bias",),          (_A + "query_key_value.bias",), COPY),
        Row(LAYER,      ("dense weight",),      (_A + "dense.weight",), COPY),
        Row(LAYER,      ("dense bias",),        (_A + "dense.bias",), COPY),
        Row(LAYER,      ("post norm weight",),  (_L + "post_attention_layernorm.weight",), COPY),
        Row(LAYER,      ("post norm bias",),    (_L + "post_attention_layernorm.bias",), COPY),
        Row(LAYER,      ("mlp l0 weight",),     (_M + "dense_h_to_4h.weight",), COPY),
        Row(LAYER,      ("mlp l0 bias",),       (_M + "dense_h_to_4h.bias",), COPY),
        Row(LAYER,      ("mlp l1 weight",),     (_M + "dense_4h_to_h.weight",), COPY),
        Row(LAYER,      ("mlp l1 bias",),       (_M + "dense_4h_to_h.bias",), COPY),
        Row(FINAL,      ("weight",),            ("gpt_neox.final_layer_norm.weight",), COPY),
        Row(FINAL,      ("bias",),              ("gpt_neox.final_layer_norm.bias",), COPY),
        Row(OUTPUT,     ("weight",),            ("embed_out.weight",), COPY),
    ),
    variants=(Row(OUTPUT, ("weight",), ("lm_head.weight",), COPY),),
    fields=(
        Field("num_layers",              "num_hidden_layers",       REQUIRED),
        Field("hidden_size",             "hidden_size",             REQUIRED),
        Field("ffn_hidden_size",         "intermediate_size",       REQUIRED),
        Field("num_attention_heads",     "num_attention_heads",     REQUIRED),
        Field("num_query_groups",        None,                      heads),
        Field("kv_channels",             None,                      head_dim),
        Field("vocab_size",              "vocab_size",              REQUIRED),
        Field("max_position_embeddings", "max_position_embeddings", 2048),
        Field("norm",                    None,                      "LayerNorm"),
        Field("norm_epsilon",            "layer_norm_eps",          1e-5),
        Field("activation",              "hidden_act",              "gelu", words=ACTIVATIONS),
        Field("gated",                   None,                      False),
        Field("qkv_bias",                "attention_bias",          True),
        Field("dense_bias",              "attention_bias",          True),
        Field("mlp_bias",                None,                      True),
        Field("parallel_residual",       "use_parallel_residual",   True),
        Field("tied",                    "tie_word_embeddings",     False),
    ),
    ignore=(
        Ignore(_A + "bias", "the causal mask, not trained"),
        Ignore(_A + "masked_bias", "the value of masked scores, not trained"),
        Ignore(_A + "rotary_emb.inv_freq", "rotary frequencies are computed, not trained"),
        Ignore("gpt_neox.rotary_emb.inv_freq", "rotary frequencies are computed, not trained"),
    ),
    prefix="gpt_neox.",
    rope=Style(percent=0.25, theta_key="rotary_emb_base", percent_key="rotary_pct"),
    models="GPT-NeoX, Pythia, Dolly 2 and clones of their config: with and without parallel residual, attention biases",
    verified="without parallel residual, and with it under --custom-layers: logits of the real megatron-core "
    "equal to transformers' at TP1, TP2, PP2; HF round trip through its files bit for bit",
)  # fmt: skip
