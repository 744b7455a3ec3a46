"""Llama 1, 2, 3, 3.1, 3.2, CodeLlama and their clones (Yi, ...): the common decoder that others derive from.

Names: transformers `models/llama/modeling_llama.py`, on disk the same in 4.57 and 5.23. Class defaults of absent
keys: tie_word_embeddings False, rope_theta 1e4, rms_norm_eps 1e-6, key/value heads = heads, head_dim = h/a.
"""

from __future__ import annotations

from ckptconv.families.family import COMMON_FIELDS, Family, Field, Ignore, Row, derive
from ckptconv.ops import COPY, FUSE_QKV

EMBEDDINGS, LAYER, FINAL, OUTPUT = "embeddings", "transformer layer {i}", "final norm", "output layer"
_A, _M = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."

ROWS = (
    Row(EMBEDDINGS, ("word embeddings",),   ("model.embed_tokens.weight",), COPY),
    Row(LAYER,      ("input norm weight",), ("model.layers.{i}.input_layernorm.weight",), COPY),
    Row(LAYER,      ("qkv weight",),        tuple(_A + f"{x}_proj.weight" for x in "qkv"), FUSE_QKV),
    Row(LAYER,      ("qkv bias",),          tuple(_A + f"{x}_proj.bias" for x in "qkv"), FUSE_QKV),
    Row(LAYER,      ("dense weight",),      (_A + "o_proj.weight",), COPY),
    Row(LAYER,      ("dense bias",),        (_A + "o_proj.bias",), COPY),
    Row(LAYER,      ("post norm weight",),  ("model.layers.{i}.post_attention_layernorm.weight",), COPY),
    Row(LAYER,      ("mlp l0 weight W",),   (_M + "gate_proj.weight",), COPY),
    Row(LAYER,      ("mlp l0 weight V",),   (_M + "up_proj.weight",), COPY),
    Row(LAYER,      ("mlp l0 bias W",),     (_M + "gate_proj.bias",), COPY),
    Row(LAYER,      ("mlp l0 bias V",),     (_M + "up_proj.bias",), COPY),
    Row(LAYER,      ("mlp l1 weight",),     (_M + "down_proj.weight",), COPY),
    Row(LAYER,      ("mlp l1 bias",),       (_M + "down_proj.bias",), COPY),
    Row(FINAL,      ("weight",),            ("model.norm.weight",), COPY),
    Row(OUTPUT,     ("weight",),            ("lm_head.weight",), COPY),
)  # fmt: skip

IGNORE = (
    Ignore("model.layers.{i}.self_attn.rotary_emb.inv_freq", "rotary frequencies are computed, not trained"),
    Ignore("model.rotary_emb.inv_freq", "rotary frequencies are computed, not trained"),
)

BASE = Family("llama", "llama", "LlamaForCausalLM", ROWS, COMMON_FIELDS, IGNORE)

LLAMA = derive(
    BASE,
    fields=(
        Field("qkv_bias", "attention_bias", False),
        Field("dense_bias", "attention_bias", False),
        Field("mlp_bias", "mlp_bias", False),
    ),
    models="Llama 1, 2, 3, 3.1, 3.2, CodeLlama and clones of their config: `attention_bias`, `mlp_bias`, tied, free "
    "head dim, MHA, GQA, MQA, linear and llama3 rope scaling",
    verified="logits of the real megatron-core equal to transformers' at TP1, TP2, PP2, TP2 PP2; files written by "
    "Megatron-LM, tensor by tensor, both ways; HF round trip bit for bit",
)
