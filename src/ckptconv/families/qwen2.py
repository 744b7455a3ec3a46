"""Qwen2 and Qwen2.5 dense: Llama's tensors with biases on q, k and v only.

Source: transformers `models/qwen2/configuration_qwen2.py`. Absent keys mean 32 key/value heads, no window
(`use_sliding_window` False), a window of 4096 where it is used, from layer 28 on (`max_window_layers`); `layer_types`
wins over all of them.
"""

from __future__ import annotations

from typing import Any

from ckptconv.families import windows
from ckptconv.families.family import Config, Field, derive
from ckptconv.families.llama import BASE
from ckptconv.spec import ModelSpec


def _window(config: Config, where: str) -> dict[str, Any]:
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    layers = windows.count(config, "num_hidden_layers", where)
    first = windows.count(config, "max_window_layers", where, 28)
    kinds = [windows.SLIDING if layer >= first else windows.FULL for layer in range(layers)]
    return windows.read(config, where, window, kinds)


def _window_config(spec: ModelSpec) -> Config:
    kinds = windows.kinds(spec)
    listed = {"layer_types": kinds} if spec.window_layers else {}
    return {
        "use_sliding_window": spec.sliding_window is not None,
        "sliding_window": spec.sliding_window,
        "max_window_layers": kinds.index(windows.SLIDING) if windows.SLIDING in kinds else spec.num_layers,
        **listed,
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
    models="Qwen2 and Qwen2.5 dense, tied or not, windows on all or some layers included",
    verified="logits of the real megatron-core as above; files written by Megatron-LM; HF round trip bit for bit",
)
