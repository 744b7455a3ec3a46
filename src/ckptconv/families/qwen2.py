"""Qwen2 and Qwen2.5 dense: Llama's tensors with biases on q, k and v only.

Source: transformers `models/qwen2`. Absent keys mean 32 key/value heads and no window (`use_sliding_window` False).
With a window, the layers from `max_window_layers` on have it.
"""

from __future__ import annotations

from typing import Any

from ckptconv.errors import SourceError
from ckptconv.families.family import Config, Field, derive
from ckptconv.families.llama import BASE
from ckptconv.spec import ModelSpec


def _window(config: Config, where: str) -> dict[str, Any]:
    layers, first = config.get("num_hidden_layers"), config.get("max_window_layers", 28)
    if not config.get("use_sliding_window") or not config.get("sliding_window") or first >= layers:
        return {"sliding_window": None}
    if first > 0:
        raise SourceError(
            f"{where}: a sliding window from layer {first} of {layers} on: windows on some of the layers only are "
            "not supported yet."
        )
    return {"sliding_window": config["sliding_window"]}


def _window_config(spec: ModelSpec) -> Config:
    windowed = spec.sliding_window is not None
    return {
        "use_sliding_window": windowed,
        "sliding_window": spec.sliding_window,
        "max_window_layers": 0 if windowed else spec.num_layers,
    }


QWEN2 = derive(
    BASE,
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=(
        Field("num_query_groups", "num_key_value_heads", 32, lambda config: config.get("num_attention_heads")),
        Field("max_position_embeddings", "max_position_embeddings", 32768),
        Field("qkv_bias", None, True),
    ),
    extra=_window,
    extra_config=_window_config,
    verified="megatron-core logits at TP1, TP2, PP2, TP2 PP2; golden files of Megatron-LM; HF round trip",
)
