"""Which layers have a sliding window: `layer_types` of config.json, and keys that stand for it where it is absent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckptconv.errors import SourceError
from ckptconv.families.family import Config
from ckptconv.spec import ModelSpec

FULL, SLIDING = "full_attention", "sliding_attention"


def alternating(config: Config, where: str, every: int = 2) -> list[str]:
    """Full attention on every `every`th layer, counted from 1."""
    return [SLIDING if (layer + 1) % every else FULL for layer in range(count(config, "num_hidden_layers", where))]


def count(config: Config, key: str, where: str, default: int | None = None) -> int:
    """A whole number of config.json. Raises SourceError."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise SourceError(f"{where}: {key} is {value!r}, expected a whole number.")
    return value


def read(config: Config, where: str, window: Any, default: Sequence[str]) -> dict[str, Any]:
    """The spec fields; default: the kinds of layers where config.json has no list of them. Raises SourceError."""
    kinds = config.get("layer_types")
    kinds = list(default) if kinds is None else kinds
    if not isinstance(kinds, list) or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise SourceError(f"{where}: layer_types is {kinds!r}, expected a list of {FULL} and {SLIDING}.")
    if isinstance(window, bool) or not isinstance(window, int | None) or (window or 0) < 0:
        raise SourceError(f"{where}: sliding_window is {window!r}, expected a whole number or null.")
    if not window or SLIDING not in kinds:
        return {"sliding_window": None, "window_layers": None}
    layers = tuple(int(kind == SLIDING) for kind in kinds)
    return {"sliding_window": window, "window_layers": None if all(layers) else layers}


def kinds(spec: ModelSpec) -> list[str]:
    """The list of config.json: the inverse of `read`."""
    if spec.sliding_window is None:
        return [FULL] * spec.num_layers
    return [SLIDING if windowed else FULL for windowed in spec.window_layers or [1] * spec.num_layers]


def pattern(spec: ModelSpec) -> int | None:
    """The n for which every nth layer has no window, and only those; None when there is none."""
    listed = kinds(spec)
    first = listed.index(FULL) + 1 if FULL in listed else spec.num_layers + 1
    fits = all((kind == FULL) == ((layer + 1) % first == 0) for layer, kind in enumerate(listed))
    return first if fits else None
