"""Rotary settings in config.json, in the styles of transformers 4 (flat) and 5 (`rope_parameters`).

transformers 4.57 silently ignores `rope_parameters`; 5.x reads the flat keys and lets a non-empty `rope_scaling`
win. So both are read, and the flat keys are always written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ckptconv.errors import SourceError
from ckptconv.spec import Rope

KINDS = ("default", "linear", "llama3", "dynamic", "yarn", "longrope")
#: What transformers 5 nests `rope_parameters` under: the layers without and with a window.
GLOBAL, LOCAL = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Style:
    """What a family's class assumes of keys that are absent, what it calls them, and which kinds it takes.

    absent: the scaling where config.json says none at all; aliases: other words for a kind; beside: numbers of the
    scaling that lie outside `rope_scaling`, with their defaults; local_theta: layers with a window have a rope of
    their own, without scaling, whose theta this is where the key is absent; interleaved_key: says whether rows are
    pairs, where `interleaved` is not always so.
    """

    theta: float = 10000.0
    percent: float = 1.0
    interleaved: bool = False
    theta_key: str = "rope_theta"
    percent_key: str = "partial_rotary_factor"
    kind_key: str = "rope_type"
    kinds: tuple[str, ...] = KINDS
    aliases: tuple[tuple[str, str], ...] = ()
    absent: tuple[tuple[str, Any], ...] = ()
    beside: tuple[tuple[str, Any], ...] = ()
    local_theta: float | None = None
    local_theta_key: str = "rope_local_base_freq"
    interleaved_key: str | None = None
    #: a part of each head is rotated where config.json says so; other classes of transformers pass over the key
    partial: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "partial", self.partial or self.percent != 1.0)



STYLE = Style()

#: Keys of the two dictionaries that are not numbers of the scaling itself.
_NOT_SCALING = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def _dict(config: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise SourceError(f"{where}: {key} is {value!r}, expected an object or null.")
    return value


def read(config: dict[str, Any], style: Style | None, where: str) -> Rope | None:
    """The rotary settings of a family of this style (None: it has none). Raises SourceError on unknown kinds."""
    if style is None:
        return None
    parameters = _dict(config, "rope_parameters", where)
    scaling = _dict(config, "rope_scaling", where)
    if any(isinstance(value, dict) for value in parameters.values()):
        if style.local_theta is None:
            raise SourceError(f"{where}: rope_parameters differ by layer type, which this family does not have.")
        parameters = _dict(parameters, GLOBAL, where)
    both = {**parameters, **scaling} or dict(style.absent)
    return _rope(both, config, style, where)


def read_local(config: dict[str, Any], style: Style | None, where: str) -> Rope | None:
    """The rotary settings of layers with a window, in a family where those have their own."""
    if style is None or style.local_theta is None:
        return None
    nested = _dict(_dict(config, "rope_parameters", where), LOCAL, where)
    own = replace(style, theta=style.local_theta, theta_key=style.local_theta_key, beside=())
    return _rope(nested, config, own, where)


def _rope(both: dict[str, Any], config: dict[str, Any], style: Style, where: str) -> Rope:
    """Settings in one dictionary of transformers 5's kind, which flat keys complete."""
    word = both.get("rope_type") or both.get("type") or "default"
    kind = next((kind for alias, kind in style.aliases if alias == word), word)
    if kind not in style.kinds:
        raise SourceError(f"{where}: rope type {kind!r} is unknown, expected one of {', '.join(style.kinds)}.")
    base = both.get("rope_theta", config.get(style.theta_key))
    percent = both.get("partial_rotary_factor", config.get(style.percent_key))
    if not style.partial and percent not in (None, 1):
        raise SourceError(f"{where}: {style.percent_key} is {percent!r}, which this family does not have.")
    interleaved = config.get(style.interleaved_key) if style.interleaved_key else None
    numbers = {key: value for key, value in both.items() if key not in _NOT_SCALING and value is not None}
    numbers |= {key: config[key] if config.get(key) is not None else numbers.get(key, default)
                for key, default in style.beside}  # fmt: skip
    try:
        return Rope(
            theta=float(style.theta if base is None else base),
            kind=kind,
            scaling={} if kind == "default" else numbers,
            percent=float(style.percent if percent is None else percent),
            interleaved=bool(style.interleaved if interleaved is None else interleaved),
        )
    except (TypeError, ValueError) as error:
        raise SourceError(f"{where}: rope settings are not numbers: {error}.") from error


def write(rope: Rope | None, style: Style | None, local: Rope | None = None) -> dict[str, Any]:
    """The flat keys, which transformers 4 and 5 both read. `type` is what transformers before 4.43 read."""
    if rope is None or style is None:
        return {}
    scaling: dict[str, Any] | None = {style.kind_key: "default"} if style.absent else None
    keys: dict[str, Any] = {style.theta_key: rope.theta}
    if rope.kind != "default":
        scaling = {style.kind_key: rope.kind, **rope.scaling}
        keys |= {key: scaling.pop(key) for key, _ in style.beside if key in scaling}
        if rope.kind in ("linear", "dynamic"):
            scaling["type"] = rope.kind
    keys["rope_scaling"] = scaling
    if style.partial:
        keys[style.percent_key] = rope.percent
    if style.interleaved_key:
        keys[style.interleaved_key] = rope.interleaved
    if style.local_theta is not None:
        keys[style.local_theta_key] = (local or rope).theta
    return keys


def dual(config: dict[str, Any], style: Style | None, tied: bool) -> dict[str, Any]:
    """`config` with the keys added that make transformers 4 read it as 5 does; the same object when none lack.

    tied: what the family's class assumes when `tie_word_embeddings` is absent.
    """
    added: dict[str, Any] = {}
    if style and "rope_parameters" in config and style.theta_key not in config:
        flat = write(read(config, style, "config.json"), style, read_local(config, style, "config.json"))
        added |= {key: value for key, value in flat.items() if key not in config or config[key] is None}
    stored = config.get("dtype") or config.get("torch_dtype")
    if stored:
        added |= {key: stored for key in ("torch_dtype", "dtype") if not config.get(key)}
    if "tie_word_embeddings" not in config:
        added["tie_word_embeddings"] = tied
    return {**config, **added} if added else config
