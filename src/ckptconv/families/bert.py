"""BERT, and NVIDIA's BERT with the norms of GPT-2.

Source: transformers `models/bert`, `models/megatron_bert`. BERT's norms stand behind the residual sums: see `post` of
`spec.NORMS` for the place each has here. Which heads a model has is what its files hold: bert-base-uncased says
BertForMaskedLM and is stored with the pooler and the binary head of BertForPreTraining. Both models are tied; the
decoder of the language model head has a copy of `cls.predictions.bias`, which old files store, too. Files before 2019
say gamma and beta for the weight and the bias of a norm.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ckptconv.errors import SourceError
from ckptconv.families.family import (
    ACTIVATIONS,
    REQUIRED,
    Config,
    Duplicate,
    Family,
    Field,
    Ignore,
    Neutral,
    Row,
    derive,
)
from ckptconv.families.gpt_neox import head_dim, heads
from ckptconv.families.llama import EMBEDDINGS, FINAL, LAYER, OUTPUT
from ckptconv.ops import COPY, FUSE_QKV
from ckptconv.spec import ModelSpec

POOLER, LM_HEAD, BINARY_HEAD = "pooler", "lm head", "binary head"
_E, _L, _T = "bert.embeddings.", "bert.encoder.layer.{i}.", "cls.predictions.transform."
_A = _L + "attention."

#: End of a class's name -> the heads it has.
HEADS = {
    "ForPreTraining": {"lm_head": True, "pooler": True, "binary_head": True},
    "ForMaskedLM": {"lm_head": True},
    "ForNextSentencePrediction": {"pooler": True, "binary_head": True},
    "Model": {"pooler": True},
}


def _first(spec: ModelSpec, layer: int | None) -> bool:
    return layer == 0


def _later(spec: ModelSpec, layer: int | None) -> bool:
    return layer != 0


def _headless(spec: ModelSpec) -> bool:
    return not (spec.lm_head or spec.binary_head)


def _untied(spec: ModelSpec) -> bool:
    return not spec.tied


def _heads(config: Config, where: str) -> dict[str, Any]:
    """The heads of the class in config.json. Raises SourceError for a model without token types."""
    if config.get("type_vocab_size") == 0:
        raise SourceError(
            f"{where}: type_vocab_size is 0, expected at least 1: transformers' BERT cannot run without token "
            "types."
        )
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else ""
    found = next((parts for end, parts in HEADS.items() if isinstance(name, str) and name.endswith(end)), {})
    return {"lm_head": False, "pooler": False, "binary_head": False, **found}


def _class(prefix: str, spec: ModelSpec) -> Config:
    end = {(True, True): "ForPreTraining", (True, False): "ForMaskedLM", (False, True): "ForNextSentencePrediction",
           (False, False): "Model"}[spec.lm_head, spec.binary_head]  # fmt: skip
    return {"architectures": [prefix + end]}


NORMS = (
    Row(LAYER, ("input norm weight",), (_E + "LayerNorm.weight",), COPY, when=_first),
    Row(LAYER, ("input norm bias",),   (_E + "LayerNorm.bias",), COPY, when=_first),
    Row(LAYER, ("input norm weight",), ("bert.encoder.layer.{j}.output.LayerNorm.weight",), COPY, when=_later),
    Row(LAYER, ("input norm bias",),   ("bert.encoder.layer.{j}.output.LayerNorm.bias",), COPY, when=_later),
    Row(LAYER, ("post norm weight",),  (_A + "output.LayerNorm.weight",), COPY),
    Row(LAYER, ("post norm bias",),    (_A + "output.LayerNorm.bias",), COPY),
    Row(FINAL, ("weight",),            ("bert.encoder.layer.{j}.output.LayerNorm.weight",), COPY),
    Row(FINAL, ("bias",),              ("bert.encoder.layer.{j}.output.LayerNorm.bias",), COPY),
)
LM_NORM = (
    Row(LM_HEAD, ("norm weight",), (_T + "LayerNorm.weight",), COPY),
    Row(LM_HEAD, ("norm bias",),   (_T + "LayerNorm.bias",), COPY),
)
REST = (
    Row(EMBEDDINGS, ("word embeddings",),       (_E + "word_embeddings.weight",), COPY),
    Row(EMBEDDINGS, ("position embeddings",),   (_E + "position_embeddings.weight",), COPY),
    Row(EMBEDDINGS, ("token type embeddings",), (_E + "token_type_embeddings.weight",), COPY),
    Row(LAYER, ("qkv weight",),    tuple(_A + f"self.{x}.weight" for x in ("query", "key", "value")), FUSE_QKV),
    Row(LAYER, ("qkv bias",),      tuple(_A + f"self.{x}.bias" for x in ("query", "key", "value")), FUSE_QKV),
    Row(LAYER, ("dense weight",),  (_A + "output.dense.weight",), COPY),
    Row(LAYER, ("dense bias",),    (_A + "output.dense.bias",), COPY),
    Row(LAYER, ("mlp l0 weight",), (_L + "intermediate.dense.weight",), COPY),
    Row(LAYER, ("mlp l0 bias",),   (_L + "intermediate.dense.bias",), COPY),
    Row(LAYER, ("mlp l1 weight",), (_L + "output.dense.weight",), COPY),
    Row(LAYER, ("mlp l1 bias",),   (_L + "output.dense.bias",), COPY),
    Row(OUTPUT, ("weight",),       ("cls.predictions.decoder.weight",), COPY),
    Row(POOLER, ("weight",),       ("bert.pooler.dense.weight",), COPY),
    Row(POOLER, ("bias",),         ("bert.pooler.dense.bias",), COPY),
    Row(LM_HEAD, ("dense weight",), (_T + "dense.weight",), COPY),
    Row(LM_HEAD, ("dense bias",),  (_T + "dense.bias",), COPY),
    Row(LM_HEAD, ("vocab bias",),  ("cls.predictions.bias",), COPY),
    Row(BINARY_HEAD, ("weight",),  ("cls.seq_relationship.weight",), COPY),
    Row(BINARY_HEAD, ("bias",),    ("cls.seq_relationship.bias",), COPY),
)  # fmt: skip


def _old(row: Row) -> Row:
    """With the names of norms in the first files."""
    (name,) = row.names
    return replace(row, names=(name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"),))  # fmt: skip


BERT = Family(
    name="bert",
    model_type="bert",
    architecture="BertForPreTraining",
    rows=(*NORMS, *LM_NORM, *REST),
    variants=tuple(_old(row) for row in (*NORMS, *LM_NORM)),
    fields=(
        Field("num_layers",              "num_hidden_layers",       REQUIRED),
        Field("hidden_size",             "hidden_size",             REQUIRED),
        Field("ffn_hidden_size",         "intermediate_size",       REQUIRED),
        Field("num_attention_heads",     "num_attention_heads",     REQUIRED),
        Field("num_query_groups",        None,                      heads),
        Field("kv_channels",             None,                      head_dim),
        Field("vocab_size",              "vocab_size",              REQUIRED),
        Field("max_position_embeddings", "max_position_embeddings", 512),
        Field("model_type",              None,                      "BERT"),
        Field("norm",                    None,                      "LayerNorm"),
        Field("norm_epsilon",            "layer_norm_eps",          1e-12),
        Field("norms",                   None,                      "post"),
        Field("activation",              "hidden_act",              "gelu", words=ACTIVATIONS),
        Field("gated",                   None,                      False),
        Field("qkv_bias",                None,                      True),
        Field("dense_bias",              None,                      True),
        Field("mlp_bias",                None,                      True),
        Field("learned_positions",       None,                      True),
        Field("num_tokentypes",          "type_vocab_size",         2),
        Field("tied",                    "tie_word_embeddings",     True),
    ),
    ignore=(
        Ignore(_E + "position_ids", "0, 1, 2, ...: not trained"),
        Ignore(_E + "token_type_ids", "zeros: not trained"),
    ),
    duplicates=(
        Duplicate("cls.predictions.decoder.bias", LM_HEAD, "vocab bias", when=_untied),
    ),
    neutral=(
        Neutral("position_embedding_type", ("absolute",), "positions relative to each other"),
        Neutral("is_decoder", (False,), "a causal mask"),
        Neutral("add_cross_attention", (False,), "attention to an encoder"),
    ),
    optional=("pooler", "lm_head", "binary_head"),
    bare=_headless,
    prefix="bert.",
    rope=None,
    extra=_heads,
    extra_config=lambda spec: _class("Bert", spec),
    models="BERT and models of its config (MiniLM, E5, BGE, ...): BertForPreTraining, BertForMaskedLM, BertModel",
    verified="with --custom-layers, logits of the real megatron-core equal to transformers', padding and "
    "binary head included, at TP1, TP2, PP2; HF round trip bit for bit, of all-MiniLM-L6-v2, too",
)  # fmt: skip

MEGATRON_BERT = derive(
    BERT,
    name="megatron_bert",
    model_type="megatron-bert",
    architecture="MegatronBertForPreTraining",
    rows=(
        Row(LAYER, ("input norm weight",), (_A + "ln.weight",), COPY),
        Row(LAYER, ("input norm bias",),   (_A + "ln.bias",), COPY),
        Row(LAYER, ("post norm weight",),  (_L + "ln.weight",), COPY),
        Row(LAYER, ("post norm bias",),    (_L + "ln.bias",), COPY),
        Row(FINAL, ("weight",),            ("bert.encoder.ln.weight",), COPY),
        Row(FINAL, ("bias",),              ("bert.encoder.ln.bias",), COPY),
    ),
    variants=(),
    fields=(Field("norms", None, "pre"),),
    extra_config=lambda spec: _class("MegatronBert", spec),
    models="MegatronBert: BERT with norms in front of attention and MLP",
    verified="logits of both heads of the real megatron-core's BertModel equal to transformers', with padding, at TP1, "
    "TP2, PP2, TP2 PP2; HF round trip bit for bit",
)  # fmt: skip
