"""SmolLM3: Llama without rope on every fourth layer. (SmolLM 1 and 2 are Llamas.)

Source: transformers `models/smollm3`. In `no_rope_layers` 1 means rope. Absent keys mean 4 key/value heads, theta 2e6,
tied, and with `use_sliding_window` a window on the layers without rope.
"""

from __future__ import annotations

from typing import Any

from ckptconv.errors import SourceError
from ckptconv.families import windows
from ckptconv.families.family import Config, Field, derive
from ckptconv.families.glm import no_padding
from ckptconv.families.llama import LLAMA
from ckptconv.families.rope import Style
from ckptconv.spec import ModelSpec


def _layers(config: Config, where: str) -> dict[str, Any]:
    layers = windows.count(config, "num_hidden_layers", where)
    every = windows.count(config, "no_rope_layer_interval", where, 4) or 1
    rope = config.get("no_rope_layers")
    rope = [int((layer + 1) % every != 0) for layer in range(layers)] if rope is None else rope
    if not isinstance(rope, list) or len(rope) < layers or any(one not in (0, 1) for one in rope):
        raise SourceError(f"{where}: no_rope_layers is {rope!r}, expected 0 or 1 for each of {layers} layers.")
    used = tuple(map(int, rope[:layers]))
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    kinds = [windows.FULL if has else windows.SLIDING for has in used]
    return {"rope_layers": None if all(used) else used, **windows.read(config, where, window, kinds)}


def _layers_config(spec: ModelSpec) -> Config:
    return {
        "no_rope_layers": list(spec.rope_layers or [1] * spec.num_layers),
        "use_sliding_window": spec.sliding_window is not None,
        "layer_types": windows.kinds(spec),
        **no_padding(128004)(spec),
    }


SMOLLM3 = derive(
    LLAMA,
    name="smollm3",
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    fields=(
        Field("num_query_groups", "num_key_value_heads", 4, lambda config: config.get("num_attention_heads")),
        Field("max_position_embeddings", "max_position_embeddings", 32768),
        Field("tied", "tie_word_embeddings", True),
        Field("sliding_window", "sliding_window", None),
    ),
    rope=Style(theta=2e6),
    extra=_layers,
    extra_config=_layers_config,
    models="SmolLM3 3B",
    verified="logits of the real megatron-core equal to transformers' at TP1, TP2, PP2; HF round trip through "
    "its files bit for bit",
)
