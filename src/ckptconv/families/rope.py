"""Rotary settings in config.json, in the styles of transformers 4 (flat) and 5 (`rope_parameters`).

transformers 4.57 silently ignores `rope_parameters`; 5.x reads the flat keys and lets a non-empty `rope_scaling`
win. So both are read, and the flat keys are always written.
"""

from __future__ import annotations

from typing import Any

from ckptconv.errors import SourceError
from ckptconv.spec import Rope

KINDS = ("default", "linear", "llama3", "dynamic", "yarn", "longrope")

#: Keys of the two dictionaries that are not numbers of the scaling itself.
_NOT_SCALING = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def _dict(config: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise SourceError(f"{where}: {key} is {value!r}, expected an object or null.")
    return value


def read(config: dict[str, Any], theta: float, where: str) -> Rope:
    """The rotary settings; `theta` is the family's default base. Raises SourceError on unknown kinds."""
    parameters = _dict(config, "rope_parameters", where)
    scaling = _dict(config, "rope_scaling", where)
    if any(isinstance(value, dict) for value in parameters.values()):
        raise SourceError(f"{where}: rope_parameters differ by layer type, which this family does not have.")
    both = {**parameters, **scaling}
    kind = both.get("rope_type") or both.get("type") or "default"
    if kind not in KINDS:
        raise SourceError(f"{where}: rope type {kind!r} is unknown, expected one of {', '.join(KINDS)}.")
    base = parameters.get("rope_theta", scaling.get("rope_theta", config.get("rope_theta")))
    percent = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    numbers = {key: value for key, value in both.items() if key not in _NOT_SCALING and value is not None}
    try:
        return Rope(
            theta=float(theta if base is None else base),
            kind=kind,
            scaling={} if kind == "default" else numbers,
            percent=float(1.0 if percent is None else percent),
        )
    except (TypeError, ValueError) as error:
        raise SourceError(f"{where}: rope settings are not numbers: {error}.") from error


def write(rope: Rope | None) -> dict[str, Any]:
    """The flat keys, which transformers 4 and 5 both read. `type` is what transformers before 4.43 read."""
    if rope is None:
        return {}
    scaling = None
    if rope.kind != "default":
        scaling = {"rope_type": rope.kind, **rope.scaling}
        if rope.kind in ("linear", "dynamic"):
            scaling["type"] = rope.kind
    keys: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": scaling}
    if rope.percent != 1.0:
        keys["partial_rotary_factor"] = rope.percent
    return keys


def dual(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the keys added that make transformers 4 read it as 5 does; the same object when none lack."""
    added: dict[str, Any] = {}
    if "rope_parameters" in config and "rope_theta" not in config:
        flat = write(read(config, 10000.0, "config.json"))
        added |= {key: value for key, value in flat.items() if key not in config or config[key] is None}
    stored = config.get("dtype") or config.get("torch_dtype")
    if stored:
        added |= {key: stored for key in ("torch_dtype", "dtype") if not config.get(key)}
    if "tie_word_embeddings" not in config:
        added["tie_word_embeddings"] = False
    return {**config, **added} if added else config
