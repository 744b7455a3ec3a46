"""Qwen2 and Qwen2.5 dense: Llama's tensors with biases on q, k and v only.

Source: transformers `models/qwen2/configuration_qwen2.py`. Absent keys mean 32 key/value heads, no window
(`use_sliding_window` False), a window of 4096 where it is used, from layer 28 on (`max_window_layers`); `layer_types`
wins over all of them.
"""

from __future__ import annotations

from typing import Any

from ckptconv.errors import SourceError
from ckptconv.families.family import Config, Field, derive
from ckptconv.families.llama import BASE
from ckptconv.spec import ModelSpec


def _window(config: Config, where: str) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    kinds = config.get("layer_types")
    if not isinstance(layers, int) or not isinstance(first, int) or not isinstance(kinds, (list, type(None))):
        raise SourceError(f"{where}: max_window_layers is {first!r}, layer_types {kinds!r}: expected a number, a list.")
    if kinds is None and window:
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    if not window or not kinds or all(kind == "full_attention" for kind in kinds):
        return {"sliding_window": None}
    if any(kind != "sliding_attention" for kind in kinds):
        raise SourceError(
            f"{where}: a sliding window on {kinds.count('sliding_attention')} of {layers} layers: windows on some of "
            "the layers only are not supported yet."
        )
    return {"sliding_window": window}


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
    models="Qwen2 and Qwen2.5 dense, tied or not (no window on part of the layers)",
    verified="logits of the real megatron-core as above; files written by Megatron-LM; HF round trip bit for bit",
)
