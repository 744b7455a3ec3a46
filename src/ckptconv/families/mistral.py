"""Mistral 7B, Ministral and what follows their config: Llama's tensors, a sliding window, their own class defaults.

Source: transformers `models/mistral`, `models/ministral`. Absent keys mean 8 key/value heads and a window of 4096; a
null window means none, a null head_dim h/a. Mistral has its window on all layers, whatever `layer_types` says;
Ministral on those that it says.
"""

from __future__ import annotations

from typing import Any

from ckptconv.errors import SourceError
from ckptconv.families import windows
from ckptconv.families.family import Config, Field, derive
from ckptconv.families.llama import BASE
from ckptconv.spec import ModelSpec


def _everywhere(config: Config, where: str) -> dict[str, Any]:
    window = config.get("sliding_window", 4096)
    layers = windows.count(config, "num_hidden_layers", where)
    found = windows.read(config, where, window, [windows.SLIDING] * layers)
    if window and found != {"sliding_window": window, "window_layers": None}:
        raise SourceError(
            f"{where}: layer_types has layers without a window, which transformers ignores in a model of type mistral "
            "and others do not. Make model_type ministral (MinistralForCausalLM) if the list is right, else remove it."
        )
    return found


def _some(config: Config, where: str) -> dict[str, Any]:
    layers = windows.count(config, "num_hidden_layers", where)
    return windows.read(config, where, config.get("sliding_window", 4096), [windows.SLIDING] * layers)


def _some_config(spec: ModelSpec) -> Config:
    return {"layer_types": windows.kinds(spec)}


MISTRAL = derive(
    BASE,
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=(
        Field("num_query_groups", "num_key_value_heads", 8, lambda config: config.get("num_attention_heads")),
        Field("max_position_embeddings", "max_position_embeddings", 131072),
        Field("sliding_window", "sliding_window", 4096, lambda config: None),
    ),
    extra=_everywhere,
    models="Mistral, with its sliding window",
    verified="logits of the real megatron-core as above; HF round trip bit for bit",
)

MINISTRAL = derive(
    MISTRAL,
    name="ministral",
    model_type="ministral",
    architecture="MinistralForCausalLM",
    extra=_some,
    extra_config=_some_config,
    models="Ministral, with windows on some layers",
    verified="logits of the real megatron-core equal to transformers' at TP1, TP2, PP2; HF round trip through "
    "its files bit for bit",
)
