"""Megatron-Core BERT models in the `torch` checkpoint format: what differs from GPT's table.

Layers have GPT's names under `encoder.`; the embedding has token types; the heads lie on the last stage, and of them
only the bias of the output layer is cut over tensor ranks, and padded, as the vocabulary is.

Source: Megatron-LM `core/models/bert/bert_model.py`, `bert_lm_head.py`, `bert_layer_specs.py`, `pretrain_bert.py` at
core_v0.16.1 (the script was removed in 0.18).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ckptconv.cuts import COLUMN, REPLICATED
from ckptconv.formats.table import Row
from ckptconv.lazy import LazyTensor

EMBEDDINGS, POOLER, LM_HEAD, BINARY_HEAD = "embeddings", "pooler", "lm head", "binary head"
GPT_BLOCK, BLOCK = "decoder.", "encoder."
TOKEN_TYPES = "embedding.tokentype_embeddings.weight"

ROWS = (
    Row(EMBEDDINGS, ("token type embeddings",), TOKEN_TYPES, REPLICATED),
    Row(POOLER, ("weight",),                    "pooler.dense.weight", REPLICATED),
    Row(POOLER, ("bias",),                      "pooler.dense.bias", REPLICATED),
    Row(LM_HEAD, ("dense weight",),             "lm_head.dense.weight", REPLICATED),
    Row(LM_HEAD, ("dense bias",),               "lm_head.dense.bias", REPLICATED),
    Row(LM_HEAD, ("norm weight",),              "lm_head.layer_norm.weight", REPLICATED),
    Row(LM_HEAD, ("norm bias",),                "lm_head.layer_norm.bias", REPLICATED),
    Row(LM_HEAD, ("vocab bias",),               "output_layer.bias", COLUMN, vocab=True),
    Row(BINARY_HEAD, ("weight",),               "binary_head.weight", REPLICATED),
    Row(BINARY_HEAD, ("bias",),                 "binary_head.bias", REPLICATED),
)  # fmt: skip


def table(gpt: Iterable[Row]) -> tuple[Row, ...]:
    """BERT's rows, of GPT's."""
    renamed = (
        replace(row, name=BLOCK + row.name.removeprefix(GPT_BLOCK)) if row.name.startswith(GPT_BLOCK) else row
        for row in gpt
    )
    return (*renamed, *ROWS)


def is_bert(names: Iterable[str]) -> bool:
    """Whether tensors of all stages are those of a BERT model."""
    return any(name.startswith(BLOCK + "layers.") for name in names)


def fields(tensors: Mapping[str, LazyTensor], activation: object, of_head: str = "gelu") -> dict[str, Any]:
    """The ModelSpec fields that only the tensors tell: which heads there are, and how many token types.

    `activation` is that of the layers; the head of megatron-core has the exact GELU (`BertLMHead.gelu`).
    """
    types, head = tensors.get(TOKEN_TYPES), "lm_head.dense.weight" in tensors
    return {
        "head_activation": of_head if head and activation != of_head else None,
        "model_type": "BERT",
        "num_tokentypes": types.shape[0] if types else 0,
        "lm_head": head,
        "pooler": "pooler.dense.weight" in tensors,
        "binary_head": "binary_head.weight" in tensors,
    }
