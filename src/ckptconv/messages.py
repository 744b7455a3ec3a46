"""What crosses the queue: THE definition of message names, their order, their keys and the shape of every key.

Shape legend: h hidden, f ffn, a query heads, g query groups, d kv_channels (head dim), v vocabulary (unpadded),
s learned positions, qkv = (a + 2g) * d.

Source: Megatron-LM `tools/checkpoint/loader_base.py` and `saver_base.py` at core_v0.13.0; the older names are those
of `tools/checkpoint_util.py` on branch 23.08, which forks still use. A key that upstream never had is marked
`extension`: a saver that does not list it refuses before the first byte.

Layouts: qkv is grouped (for every query group: its query heads, its key head, its value head); W is the activated
half of a gated MLP (gate), V the other (up); rotary rows are in half-split order; norm weights are as stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ckptconv.errors import ProtocolError, near, some
from ckptconv.spec import ModelSpec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Key:
    """One tensor of a message: its name, its symbolic shape, when it is there, and what it is."""

    name: str
    shape: tuple[str, ...]
    when: Callable[[ModelSpec], bool]
    meaning: str
    extension: bool = False


def _always(spec: ModelSpec) -> bool:
    return True


def _norm_bias(spec: ModelSpec) -> bool:
    return spec.norm_has_bias


def _learned(spec: ModelSpec) -> bool:
    return spec.rope is None


def _gated(spec: ModelSpec) -> bool:
    return spec.gated


def _plain(spec: ModelSpec) -> bool:
    return not spec.gated


def _gated_bias(spec: ModelSpec) -> bool:
    return spec.gated and spec.mlp_bias


def _plain_bias(spec: ModelSpec) -> bool:
    return not spec.gated and spec.mlp_bias


EMBEDDINGS = (
    Key("word embeddings",     ("v", "h"), _always,  "one row per token, without padding rows"),
    Key("position embeddings", ("s", "h"), _learned, "learned absolute positions"),
)
LAYER = (
    Key("input norm weight",   ("h",),        _always,     "norm before attention"),
    Key("input norm bias",     ("h",),        _norm_bias,  ""),
    Key("qkv weight",          ("qkv", "h"),  _always,     "per query group: its query heads, key head, value head"),
    Key("qkv bias",            ("qkv",),      lambda s: s.qkv_bias, "in the order of the rows of qkv weight"),
    Key("dense weight",        ("h", "a*d"),  _always,     "attention output projection"),
    Key("dense bias",          ("h",),        lambda s: s.dense_bias, ""),
    Key("post norm weight",    ("h",),        _always,     "norm before the MLP"),
    Key("post norm bias",      ("h",),        _norm_bias,  ""),
    Key("mlp l0 weight W",     ("f", "h"),    _gated,      "gate: the half that goes through the activation"),
    Key("mlp l0 weight V",     ("f", "h"),    _gated,      "up: the half that does not"),
    Key("mlp l0 weight",       ("f", "h"),    _plain,      "first projection of an MLP without gate"),
    Key("mlp l0 bias W",       ("f",),        _gated_bias, ""),
    Key("mlp l0 bias V",       ("f",),        _gated_bias, ""),
    Key("mlp l0 bias",         ("f",),        _plain_bias, ""),
    Key("mlp l1 weight",       ("h", "f"),    _always,     "second projection (down)"),
    Key("mlp l1 bias",         ("h",),        lambda s: s.mlp_bias, ""),
)
FINAL_NORM = (
    Key("weight",              ("h",),        _always,     "norm after the last layer"),
    Key("bias",                ("h",),        _norm_bias,  ""),
)
OUTPUT_LAYER = (
    Key("weight",              ("v", "h"),    _always,     "lm head; the message is absent when tied"),
)  # fmt: skip

#: Message templates in the order they are sent, with their keys and when they are sent. `{i}` is the layer.
MESSAGES: tuple[tuple[str, tuple[Key, ...], Callable[[ModelSpec], bool]], ...] = (
    ("embeddings", EMBEDDINGS, _always),
    ("transformer layer {i}", LAYER, _always),
    ("final norm", FINAL_NORM, _always),
    ("output layer", OUTPUT_LAYER, lambda s: not s.tied),
)

#: Names of older plugins, message by message: what they say -> what we say. Used in both directions.
MESSAGE_ALIASES = {"final layernorm": "final norm", "final layer norm": "final norm"}
KEY_ALIASES = {
    "input layernorm weight": "input norm weight",
    "input layernorm bias": "input norm bias",
    "post layernorm weight": "post norm weight",
    "post layernorm bias": "post norm bias",
}


@dataclass(frozen=True)
class Expected:
    """One message as it has to be: name, layer (None outside the layers), template, and shape by key."""

    name: str
    template: str
    layer: int | None
    shapes: dict[str, Shape]


def dimension(symbol: str, spec: ModelSpec) -> int:
    """The size a symbol of the legend stands for in this model."""
    sizes = {
        "h": spec.hidden_size,
        "f": spec.ffn_hidden_size,
        "v": spec.vocab_size,
        "s": spec.max_position_embeddings,
        "qkv": spec.qkv_rows,
        "a*d": spec.num_attention_heads * spec.kv_channels,
    }
    return sizes[symbol]


def expected(spec: ModelSpec) -> Iterator[Expected]:
    """Every message of a model, in order. Loader, saver and both ends of the queue check against this."""
    for template, keys, sent in MESSAGES:
        if not sent(spec):
            continue
        shapes = {k.name: tuple(dimension(s, spec) for s in k.shape) for k in keys if k.when(spec)}
        if "{i}" not in template:
            yield Expected(template, template, None, shapes)
        else:
            for layer in range(spec.num_layers):
                yield Expected(template.format(i=layer), template, layer, shapes)


def canonical(message: dict[str, Any]) -> dict[str, Any]:
    """The same message under today's names (older plugins say `input layernorm weight`, `final layernorm`, ...)."""
    name = message.get("name")
    renamed = {KEY_ALIASES.get(key, key): value for key, value in message.items()}
    renamed["name"] = MESSAGE_ALIASES.get(name, name) if isinstance(name, str) else name
    return renamed


def check(message: dict[str, Any], want: Expected, checking: bool = True) -> dict[str, Any]:
    """The tensors of `message` that belong to `want`, in its order.

    `message` is canonical: a "name" and tensors with `.shape`. With `checking` a wrong name and unknown keys are
    errors, without it unknown keys are dropped; missing keys and wrong shapes are always errors.
    Raises ProtocolError.
    """
    name = message.get("name")
    if checking and name != want.name:
        raise ProtocolError(
            f"message {name!r} came where {want.name!r} was expected. "
            "The loader must send every layer once and in order; --no-checking turns this check off."
        )
    tensors = {key: value for key, value in message.items() if key != "name"}
    missing = [key for key in want.shapes if key not in tensors]
    unknown = [key for key in tensors if key not in want.shapes]
    if missing:
        raise ProtocolError(
            f"message {want.name!r} lacks {some(missing)}; it has {some(tensors)}.{near(missing[0], unknown)} "
            "The metadata of the loader says that this model has them."
        )
    if unknown and checking:
        raise ProtocolError(
            f"message {want.name!r} has unexpected {some(unknown)}; expected {some(want.shapes)}."
            f"{near(unknown[0], want.shapes)} --no-checking drops unknown keys."
        )
    for key, shape in want.shapes.items():
        if tuple(tensors[key].shape) != shape:
            raise ProtocolError(
                f"message {want.name!r}: {key!r} is {list(tensors[key].shape)}, expected {list(shape)} "
                "from the sizes in the metadata."
            )
    return {key: tensors[key] for key in want.shapes}


def schema() -> Iterable[tuple[str, Key]]:
    """(message template, key) of everything that can be sent: what the plugin author's page lists."""
    for template, keys, _ in MESSAGES:
        for key in keys:
            yield template, key
