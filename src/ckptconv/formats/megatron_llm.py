"""EPFL's Megatron-LLM (Falcon, Llama, Llama 2, CodeLlama, Mistral, and forks with Llama 3 and Gemma): names and cuts.

Rank files hold nested dicts, whose keys are joined by dots here. They come in two dialects, which its trainer both
loads: `release`, as hf_to_megatron.py writes it, and `encoder`, as training and checkpoint_util.py do. Rows are named
in the second. Three things differ from megatron-core beside names: query and key rows of rotary models are pairs
(Meta's order), the first projection of a gated MLP is [up; gate] on every rank, and `lm_head` is a bare tensor.

Source: epfLLM/Megatron-LLM at 806a833, `megatron/model/{language_model,gpt_model,transformer,positional_embeddings,
glu_activations}.py`, `weights_conversion/`, `tools/checkpoint_*_megatron.py`.

Verified: tensor by tensor against files of hf_to_megatron.py, megatron_to_hf.py and checkpoint_util.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ckptconv import nested as nesting
from ckptconv.cuts import COLUMN, GATED_COLUMN, QKV_GROUPS, REPLICATED, ROW
from ckptconv.formats.table import Row
from ckptconv.ops import RotaryPairs
from ckptconv.spec import ModelSpec

EMBEDDINGS, LAYER, FINAL, OUTPUT = "embeddings", "transformer layer {i}", "final norm", "output layer"
_E = "language_model.embedding."
_L = "language_model.encoder.layers.{i}."
_A, _M = _L + "self_attention.", _L + "mlp."


def _tied(spec: ModelSpec, layer: int | None) -> bool:
    return spec.tied


def _serial(spec: ModelSpec, layer: int | None) -> bool:
    return not spec.parallel_residual


def _parallel(spec: ModelSpec, layer: int | None) -> bool:
    return spec.parallel_residual


W, V = "mlp l0 weight W", "mlp l0 weight V"

ROWS = (
    Row(EMBEDDINGS, ("word embeddings",),     _E + "word_embeddings.weight", COLUMN, vocab=True),
    Row(EMBEDDINGS, ("word embeddings",),     "word_embeddings_for_head.weight", COLUMN, vocab=True, last_stage=True,
        when=_tied),
    Row(EMBEDDINGS, ("position embeddings",), _E + "position_embeddings.weight", REPLICATED),
    Row(LAYER, ("input norm weight",),        _L + "input_layernorm.weight", REPLICATED),
    Row(LAYER, ("input norm bias",),          _L + "input_layernorm.bias", REPLICATED),
    Row(LAYER, ("qkv weight",),               _A + "query_key_value.weight", QKV_GROUPS),
    Row(LAYER, ("qkv bias",),                 _A + "query_key_value.bias", QKV_GROUPS),
    Row(LAYER, ("dense weight",),             _A + "dense.weight", ROW),
    Row(LAYER, ("dense bias",),               _A + "dense.bias", REPLICATED),
    Row(LAYER, ("post norm weight",),         _L + "post_attention_layernorm.weight", REPLICATED, when=_serial),
    Row(LAYER, ("post norm bias",),           _L + "post_attention_layernorm.bias", REPLICATED, when=_serial),
    Row(LAYER, ("post norm weight",),         _L + "mlp_layernorm.weight", REPLICATED, when=_parallel),
    Row(LAYER, ("post norm bias",),           _L + "mlp_layernorm.bias", REPLICATED, when=_parallel),
    Row(LAYER, (V, W),                        _M + "dense_h_to_4h.weight", GATED_COLUMN),
    Row(LAYER, ("mlp l0 weight",),            _M + "dense_h_to_4h.weight", COLUMN),
    Row(LAYER, ("mlp l0 bias V", "mlp l0 bias W"), _M + "dense_h_to_4h.bias", GATED_COLUMN),
    Row(LAYER, ("mlp l0 bias",),              _M + "dense_h_to_4h.bias", COLUMN),
    Row(LAYER, ("mlp l1 weight",),            _M + "dense_4h_to_h.weight", ROW),
    Row(LAYER, ("mlp l1 bias",),              _M + "dense_4h_to_h.bias", REPLICATED),
    Row(FINAL, ("weight",),                   "language_model.encoder.final_layernorm.weight", REPLICATED),
    Row(FINAL, ("bias",),                     "language_model.encoder.final_layernorm.bias", REPLICATED),
    Row(OUTPUT, ("weight",),                  "language_model.lm_head", COLUMN, vocab=True),
)  # fmt: skip


def paired(spec: ModelSpec) -> bool:
    """Whether its query and key rows have another order in messages than here, where rotary rows are pairs."""
    return spec.rope is not None and not spec.rope.interleaved


def table(spec: ModelSpec) -> tuple[Row, ...]:
    """The rows for a model's heads. Biases that it lacks and that are written as zeros have no order."""
    if not paired(spec):
        return ROWS
    view = RotaryPairs(spec.heads_per_group + 1, spec.heads_per_group + 2, spec.kv_channels)
    keys = ("qkv weight", *(("qkv bias",) if spec.qkv_bias else ()))
    return tuple(replace(row, view=view) if row.keys[0] in keys else row for row in ROWS)


def target_spec(spec: ModelSpec) -> ModelSpec:
    """The model as Megatron-LLM builds it: all linears have biases or none has, so missing ones are zeros."""
    bias = spec.qkv_bias or spec.dense_bias or spec.mlp_bias
    return spec.replace(qkv_bias=bias, dense_bias=bias, mlp_bias=bias)


def called(name: str) -> str:
    """What megatron-core calls the module that a tensor is of, as far as the model as a whole is known by it."""
    return name.removeprefix("language_model.").replace("encoder.", "decoder.", 1)


#: The folders of a rank file's model in each dialect: what follows is one key, joined by dots.
DIALECTS = {
    "release": ("language_model.embedding", "language_model.transformer", "language_model", "word_embeddings_for_head"),
    "encoder": ("language_model.embedding.word_embeddings", "language_model.embedding.position_embeddings",
                "language_model.encoder", "language_model", "word_embeddings_for_head"),
}  # fmt: skip
#: (in the encoder dialect, in the release dialect)
_SPELLINGS = (("language_model.encoder.", "language_model.transformer."), (".self_attention.", ".attention."))


def flat(model: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Names, as in `ROWS`, and values of a rank file's model in either dialect."""
    for name, value in nesting.flat(model):
        for encoder, release in _SPELLINGS:
            name = name.replace(release, encoder)
        yield name, value


def nested(slots: Mapping[str, Any], dialect: str) -> dict[str, Any]:
    """The model of a rank file: the inverse of `flat`."""
    model: dict[str, Any] = {}
    for name, slot in slots.items():
        for encoder, release in _SPELLINGS if dialect == "release" else ():
            name = name.replace(encoder, release)
        folder = next(folder for folder in DIALECTS[dialect] if name.startswith(folder + "."))
        there = model
        for key in folder.split("."):
            there = there.setdefault(key, {})
        there[name.removeprefix(folder + ".")] = slot
    return model


#: Parts of names that only other models have, and what they are.
FOREIGN = {
    ".decoder.": "a model with an encoder and a decoder (T5)",
    ".inter_attention.": "a model with an encoder and a decoder (T5)",
    "tokentype_embeddings": "a BERT model",
    ".pooler.": "a BERT model",
    "lm_head.dense.": "a BERT model",
}

#: The sentencepiece model that hf_to_megatron.py puts beside a release.
TOKENIZER = "tokenizer.model"
