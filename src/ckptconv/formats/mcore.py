"""Megatron-Core GPT models in the `torch` checkpoint format: names in `mp_rank_*/model_optim_rng.pt`.

Source: Megatron-LM `core/models/gpt/gpt_layer_specs.py`, `tools/checkpoint/schema_core.py` at core_v0.13.0 and
core_v0.16.1. Two dialects: the local spec, and Transformer Engine's, whose linears contain the norm before them.

Verified: local names by strict loading into real megatron-core 0.16.1 (TP1, TP2, PP2, TP2 PP2) and against files
written by Megatron-LM core_v0.16.1; TE names against files written by Gaudi Megatron's saver and the source, as
Transformer Engine cannot be built without a GPU.
"""

from __future__ import annotations

from dataclasses import replace

from ckptconv.cuts import COLUMN, GATED_COLUMN, QKV_COLUMN, REPLICATED, ROW
from ckptconv.formats import megatron_args
from ckptconv.formats.table import Ignore, Row
from ckptconv.spec import ModelSpec

EMBEDDINGS, LAYER, FINAL, OUTPUT = "embeddings", "transformer layer {i}", "final norm", "output layer"
_L = "decoder.layers.{i}."
_A, _M = _L + "self_attention.", _L + "mlp."

LOCAL = (
    Row(EMBEDDINGS, ("word embeddings",),     "embedding.word_embeddings.weight", COLUMN, vocab=True),
    Row(EMBEDDINGS, ("word embeddings",),     "output_layer.weight", COLUMN, vocab=True, last_stage=True,
        when=lambda spec: spec.tied),
    Row(EMBEDDINGS, ("position embeddings",), "embedding.position_embeddings.weight", REPLICATED),
    Row(LAYER, ("input norm weight",),        _L + "input_layernorm.weight", REPLICATED),
    Row(LAYER, ("input norm bias",),          _L + "input_layernorm.bias", REPLICATED),
    Row(LAYER, ("qkv weight",),               _A + "linear_qkv.weight", QKV_COLUMN),
    Row(LAYER, ("qkv bias",),                 _A + "linear_qkv.bias", QKV_COLUMN),
    Row(LAYER, ("dense weight",),             _A + "linear_proj.weight", ROW),
    Row(LAYER, ("dense bias",),               _A + "linear_proj.bias", REPLICATED),
    Row(LAYER, ("post norm weight",),         _L + "pre_mlp_layernorm.weight", REPLICATED),
    Row(LAYER, ("post norm bias",),           _L + "pre_mlp_layernorm.bias", REPLICATED),
    Row(LAYER, ("mlp l0 weight W", "mlp l0 weight V"), _M + "linear_fc1.weight", GATED_COLUMN),
    Row(LAYER, ("mlp l0 weight",),            _M + "linear_fc1.weight", COLUMN),
    Row(LAYER, ("mlp l0 bias W", "mlp l0 bias V"), _M + "linear_fc1.bias", GATED_COLUMN),
    Row(LAYER, ("mlp l0 bias",),              _M + "linear_fc1.bias", COLUMN),
    Row(LAYER, ("mlp l1 weight",),            _M + "linear_fc2.weight", ROW),
    Row(LAYER, ("mlp l1 bias",),              _M + "linear_fc2.bias", REPLICATED),
    Row(FINAL, ("weight",),                   "decoder.final_layernorm.weight", REPLICATED),
    Row(FINAL, ("bias",),                     "decoder.final_layernorm.bias", REPLICATED),
    Row(OUTPUT, ("weight",),                  "output_layer.weight", COLUMN, vocab=True),
)  # fmt: skip

#: What Transformer Engine's fused linears call the norms of a dense layer.
TE_NAMES = {
    _L + "input_layernorm.weight":   _A + "linear_qkv.layer_norm_weight",
    _L + "input_layernorm.bias":     _A + "linear_qkv.layer_norm_bias",
    _L + "pre_mlp_layernorm.weight": _M + "linear_fc1.layer_norm_weight",
    _L + "pre_mlp_layernorm.bias":   _M + "linear_fc1.layer_norm_bias",
}  # fmt: skip

TABLES = {
    "local": LOCAL,
    "transformer_engine": tuple(replace(row, name=TE_NAMES.get(row.name, row.name)) for row in LOCAL),
}

IGNORE = (Ignore("_extra_state", "state of fp8 scaling or a placeholder; Megatron makes new ones"),)

#: Names that only other kinds of Megatron models have, and what they are.
FOREIGN = {
    "decoder.final_norm.": "a HybridModel checkpoint",
    ".mixer.": "a Mamba or hybrid checkpoint",
    ".experts.": "a mixture-of-experts checkpoint",
    "mtp.": "a checkpoint with multi-token prediction layers",
    "language_model": "a legacy (pre megatron-core) checkpoint",
    ".linear_kv_up_proj.": "a multi-latent-attention checkpoint",
    "encoder.layers.": "a BERT or T5 checkpoint",
}


def implementation(names: list[str]) -> str:
    """Which dialect a rank file's names are in: the key of `TABLES`."""
    fused = any(name.endswith(("linear_qkv.layer_norm_weight", "linear_fc1.layer_norm_weight")) for name in names)
    return "transformer_engine" if fused else "local"


def target_spec(spec: ModelSpec) -> ModelSpec:
    """The model as megatron-core builds it: linear biases are all or none, so missing ones are written as zeros."""
    linear = megatron_args.linear_bias(spec)
    return spec.replace(
        qkv_bias=linear or megatron_args.qkv_bias(spec), dense_bias=linear, mlp_bias=linear
    )


def padded_vocab(vocab_size: int, divisible_by: int, tp: int) -> int:
    """Rows of the embedding: `vocab_size` rounded up to a multiple of `divisible_by * tp`."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple
