"""Granite 3 dense: Llama with four multipliers.

Source: transformers `models/granite`. Embeddings are multiplied by `embedding_multiplier`, what attention and MLP add
by `residual_multiplier`, scores by `attention_multiplier` (1 where absent, not 1/sqrt(d)), and logits divided by
`logits_scaling`.
"""

from __future__ import annotations

from typing import Any

from ckptconv.errors import SourceError
from ckptconv.families import windows
from ckptconv.families.family import Config, Field, derive, head_dim
from ckptconv.families.llama import LLAMA
from ckptconv.spec import ModelSpec


def _number(config: Config, key: str, where: str) -> float:
    value = config.get(key)
    value = 1.0 if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise SourceError(f"{where}: {key} is {value!r}, expected a number above 0.")
    return float(value)


def _multipliers(config: Config, where: str) -> dict[str, Any]:
    scale = _number(config, "attention_multiplier", where)
    size = windows.count(config, "head_dim", where, head_dim(config)) or 1
    return {
        "softmax_scale": None if scale == size**-0.5 else scale,
        "logit_multiplier": 1 / _number(config, "logits_scaling", where),
    }


def _divisor(multiplier: float) -> float:
    """The number of few digits that 1 is divided by, where there is one."""
    near = round(1 / multiplier, 9)
    return near if near and 1 / near == multiplier else 1 / multiplier


def _multiplier_config(spec: ModelSpec) -> Config:
    scale = spec.softmax_scale
    return {
        "attention_multiplier": spec.kv_channels**-0.5 if scale is None else scale,
        "logits_scaling": _divisor(spec.logit_multiplier),
    }


GRANITE = derive(
    LLAMA,
    name="granite",
    model_type="granite",
    architecture="GraniteForCausalLM",
    fields=(
        Field("embedding_multiplier", "embedding_multiplier", 1.0),
        Field("residual_multiplier", "residual_multiplier", 1.0),
    ),
    extra=_multipliers,
    extra_config=_multiplier_config,
    models="Granite 3 dense (2B, 8B)",
    verified="with --custom-layers, logits of the real megatron-core equal to transformers' at TP1, TP2, PP2; "
    "HF round trip through its files bit for bit",
)
