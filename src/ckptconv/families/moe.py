"""What families with experts share: rows for their names, and the reading of their routers' settings."""

from __future__ import annotations

from typing import Any

from ckptconv.errors import SourceError
from ckptconv.families import windows
from ckptconv.families.family import Config, Row
from ckptconv.families.llama import LAYER
from ckptconv.ops import PER_EXPERT, STACK, EachExpert
from ckptconv.spec import ModelSpec

W, V, DOWN = "mlp l0 weight W", "mlp l0 weight V", "mlp l1 weight"
_M = "model.layers.{i}.mlp."


def experts(spec: ModelSpec, layer: int | None) -> bool:
    """Whether a layer has experts."""
    return spec.has_experts(layer)


def expert_rows(prefix: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Rows of experts stored one by one: [m, h], [m, h] and [h, m] for each, under `prefix`."""
    return tuple(
        Row(LAYER, (key,), (f"{prefix}{{e}}.{name}.weight",), PER_EXPERT, when=experts)
        for key, name in ((W, gate), (V, up), (DOWN, down))
    )


#: Experts stored together, as transformers 5 does with save_original_format=False: [E, 2m, h] (gates above ups) and
#: [E, h, m].
FUSED = (
    Row(LAYER, (W, V), (_M + "experts.gate_up_proj",), EachExpert(STACK), when=experts),
    Row(LAYER, (DOWN,), (_M + "experts.down_proj",), when=experts),
)

#: Qwen2-MoE, Qwen3-MoE, DeepSeek and GLM name experts like this.
COMMON = expert_rows(_M + "experts.", "gate_proj", "up_proj", "down_proj")


# Which layers have experts


def sparse(config: Config, where: str) -> tuple[int, ...]:
    """1 for the layers with experts, in Qwen's words. Raises SourceError."""
    layers = windows.count(config, "num_hidden_layers", where)
    step = windows.count(config, "decoder_sparse_step", where, 1)
    dense = config.get("mlp_only_layers") or []
    if step < 1 or not isinstance(dense, list):
        raise SourceError(
            f"{where}: decoder_sparse_step is {step} and mlp_only_layers {dense!r}, expected a whole number above 0 "
            "and a list of layers."
        )
    return tuple(int(layer not in dense and (layer + 1) % step == 0) for layer in range(layers))


def sparse_config(spec: ModelSpec) -> Config:
    """The inverse of `sparse`."""
    layers = spec.moe.layers if spec.moe else ()
    return {"decoder_sparse_step": 1, "mlp_only_layers": [n for n, experts in enumerate(layers) if not experts]}


def dense_first(config: Config, where: str, default: int) -> tuple[int, ...]:
    """1 for the layers with experts, in DeepSeek's words; default: `first_k_dense_replace` where it is absent.

    Raises SourceError.
    """
    layers = windows.count(config, "num_hidden_layers", where)
    dense = windows.count(config, "first_k_dense_replace", where, default)
    every = windows.count(config, "moe_layer_freq", where, 1) or 1
    return tuple(int(layer >= dense and layer % every == 0) for layer in range(layers))


def dense_first_config(spec: ModelSpec) -> Config:
    """The inverse of `dense_first`, for layers it can say."""
    layers = spec.moe.layers if spec.moe else ()
    dense = layers.index(1) if 1 in layers else len(layers)
    behind = [number for number, experts in enumerate(layers) if experts and number > dense]
    every = behind[0] - dense if behind else max(1, dense if dense < len(layers) - 1 else 1)
    return {"first_k_dense_replace": dense, "moe_layer_freq": every}


# Routers


def groups(config: Config, where: str, default: tuple[int, int], score: str) -> dict[str, Any]:
    """Spec fields of `n_group` and `topk_group`; default: both where absent. One group is none. Raises SourceError."""
    number = windows.count(config, "n_group", where, default[0])
    chosen = windows.count(config, "topk_group", where, default[1])
    if number < 2:
        return {"moe.num_groups": None, "moe.topk_groups": None, "moe.group_score": "max"}
    return {"moe.num_groups": number, "moe.topk_groups": chosen, "moe.group_score": score}


def groups_config(spec: ModelSpec) -> Config:
    """The inverse of `groups`."""
    moe = spec.moe
    return {"n_group": (moe and moe.num_groups) or 1, "topk_group": (moe and moe.topk_groups) or 1}


def shared(config: Config, where: str, default: int, width: int) -> dict[str, Any]:
    """Spec fields of `n_shared_experts`, null for none; default: their number, width: of one, where absent."""
    number = windows.count(config, "n_shared_experts", where, 0 if "n_shared_experts" in config else default)
    size = number * windows.count(config, "moe_intermediate_size", where, width)
    return {"moe.shared_ffn_hidden_size": size or None}


def shared_config(spec: ModelSpec) -> Config:
    """The inverse of `shared`."""
    if spec.moe is None or not spec.moe.shared_ffn_hidden_size:
        return {"n_shared_experts": None}
    return {"n_shared_experts": spec.moe.shared_ffn_hidden_size // spec.moe.ffn_hidden_size}
