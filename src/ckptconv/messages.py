"""What crosses the queue: THE definition of message names, their order, their keys and the shape of every key.

Shape legend: h hidden, f ffn, a query heads, g query groups, d kv_channels (head dim), v vocabulary (unpadded), s
learned positions, po rows before them, t token types, rb buckets of distances, qkv = (a + 2g) * d; experts: e experts,
m ffn of one expert, fs ffn of all shared experts; multi-latent attention: n, p numbers of a query head without and
with rope, w of a value head, ql, kl lora ranks of queries and of keys and values.

Source: Megatron-LM `tools/checkpoint/loader_base.py`, `saver_base.py` and `loader_mixtral_hf.py` at core_v0.13.0; the
older names are those of `tools/checkpoint_util.py` on branch 23.08, which forks still use. A key that upstream never
had is marked `extension`: a saver that does not list it refuses before the first byte.

Layouts: qkv is grouped (for every query group: its query heads, its key head, its value head); W is the activated
half of a gated MLP (gate), V the other (up); experts are stacked on a leading axis; rotary rows are in half-split
order, or in pairs where the model's rope is interleaved, which it always is with multi-latent attention; norm weights
are as stored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ckptconv.errors import ProtocolError, near, some
from ckptconv.spec import ModelSpec

Shape = tuple[int, ...]


#: Whether a model has a key, in this layer (None outside the layers). Layers that agree on whether they have experts
#: have the same keys.
When = Callable[[ModelSpec, int | None], bool]


@dataclass(frozen=True)
class Key:
    """One tensor of a message: its name, its symbolic shape, when it is there, and what it is."""

    name: str
    shape: tuple[str, ...]
    when: When
    meaning: str
    extension: bool = False


def _always(spec: ModelSpec, layer: int | None) -> bool:
    return True


def _norm_bias(spec: ModelSpec, layer: int | None) -> bool:
    return spec.norm_has_bias


def _biased(one: When) -> When:
    return lambda s, i: s.norm_has_bias and one(s, i)


def _input_norm(spec: ModelSpec, layer: int | None) -> bool:
    return spec.norms != "output"


def _mlp_norm(spec: ModelSpec, layer: int | None) -> bool:
    return spec.norms != "output" and not spec.shared_norm


def _output_norms(spec: ModelSpec, layer: int | None) -> bool:
    return spec.norms in ("sandwich", "output")


def _plain_attention(spec: ModelSpec, layer: int | None) -> bool:
    return spec.mla is None


def _latent(spec: ModelSpec, layer: int | None) -> bool:
    return spec.mla is not None


def _q_lora(spec: ModelSpec, layer: int | None) -> bool:
    return spec.mla is not None and spec.mla.q_lora_rank is not None


def _qk_norm(kind: str) -> When:
    return lambda s, i: s.qk_norm == kind


def _dense(spec: ModelSpec, layer: int | None) -> bool:
    return not spec.has_experts(layer)


def _experts(spec: ModelSpec, layer: int | None) -> bool:
    return spec.has_experts(layer)


def _shared(spec: ModelSpec, layer: int | None) -> bool:
    return spec.has_experts(layer) and spec.moe is not None and spec.moe.shared_ffn_hidden_size is not None


def _mlp(kind: When, gated: bool, bias: bool = False) -> When:
    return lambda s, i: kind(s, i) and s.gated == gated and (s.mlp_bias or not bias)


def _moe(name: str) -> When:
    return lambda s, i: s.has_experts(i) and bool(getattr(s.moe, name))


def _spec(name: str) -> When:
    return lambda s, i: bool(getattr(s, name))


def _both(one: str, other: str) -> When:
    return lambda s, i: bool(getattr(s, one)) and bool(getattr(s, other))


EMBEDDINGS = (
    Key("word embeddings",     ("v", "h"), _always,  "one row per token, without padding rows"),
    Key("position embeddings", ("s", "h"), _spec("learned_positions"), "learned absolute positions"),
    Key("token type embeddings", ("t", "h"), _spec("num_tokentypes"), "BERT's segments", True),
    Key("position offset rows", ("po", "h"), _spec("position_offset"), "rows before the first position", True),
    Key("encoder relative bias", ("rb", "a"), _both("encoder_layers", "relative_buckets"),
        "T5: biases of scores by distance", True),
    Key("decoder relative bias", ("rb", "a"), _spec("relative_buckets"), "", True),
)
LAYER = (
    Key("input norm weight",   ("h",),        _input_norm, "norm before attention (all norms: see `spec.NORMS`)"),
    Key("input norm bias",     ("h",),        _biased(_input_norm),  ""),
    Key("qkv weight",          ("qkv", "h"),  _plain_attention,
        "per query group: its query heads, key head, value head"),
    Key("qkv bias",            ("qkv",),      lambda s, i: s.qkv_bias and s.mla is None,
        "in the order of the rows of qkv weight"),
    Key("q norm weight",       ("d",),        _qk_norm("head"), "norm of every query head, before rope", True),
    Key("k norm weight",       ("d",),        _qk_norm("head"), "norm of every key head, before rope", True),
    Key("q norm weight",       ("a*d",),      _qk_norm("full"), "norm over all query heads together", True),
    Key("k norm weight",       ("g*d",),      _qk_norm("full"), "norm over all key heads together", True),
    Key("attention sinks",     ("a",),        _spec("sinks"), "one more logit per head in the softmax", True),
    Key("q proj weight",       ("a*(n+p)", "h"), lambda s, i: s.mla is not None and s.mla.q_lora_rank is None,
        "multi-latent attention; per head: n rows without rope, p with", True),
    Key("q down weight",       ("ql", "h"),   _q_lora,     "", True),
    Key("q down norm weight",  ("ql",),       _q_lora,     "", True),
    Key("q up weight",         ("a*(n+p)", "ql"), _q_lora, "as q proj weight", True),
    Key("kv down weight",      ("kl+p", "h"), _latent,     "the latent, then the rope key that all heads share", True),
    Key("kv down norm weight", ("kl",),       _latent,     "", True),
    Key("kv up weight",        ("a*(n+w)", "kl"), _latent, "per head: n rows of the key, w of the value", True),
    Key("dense weight",        ("h", "a*d"),  _always,     "attention output projection"),
    Key("dense bias",          ("h",),        lambda s, i: s.dense_bias, ""),
    Key("attention output norm weight", ("h",), _output_norms, "norm of what attention adds to the residual", True),
    Key("cross norm weight",   ("h",),        _spec("encoder_layers"), "T5: before attention to the encoder", True),
    Key("cross q weight",      ("a*d", "h"),  _spec("encoder_layers"), "", True),
    Key("cross kv weight",     ("2*g*d", "h"), _spec("encoder_layers"), "per query group: key head, value head", True),
    Key("cross dense weight",  ("h", "a*d"),  _spec("encoder_layers"), "", True),
    Key("post norm weight",    ("h",),        _mlp_norm,   "norm before the MLP"),
    Key("post norm bias",      ("h",),        _biased(_mlp_norm),  ""),
    Key("router weight",       ("e", "h"),    _experts,    "in a layer with experts; the MLP then has an axis e"),
    Key("router bias",         ("e",),        _moe("router_bias"), "", True),
    Key("router score correction bias", ("e",), _moe("score_bias"), "fp32, added to scores for choosing only", True),
    Key("mlp l0 weight W",     ("f", "h"),    _mlp(_dense, True), "gate: goes through the activation"),
    Key("mlp l0 weight V",     ("f", "h"),    _mlp(_dense, True), "up: does not"),
    Key("mlp l0 weight",       ("f", "h"),    _mlp(_dense, False), "first projection of an MLP without gate"),
    Key("mlp l0 bias W",       ("f",),        _mlp(_dense, True, bias=True), ""),
    Key("mlp l0 bias V",       ("f",),        _mlp(_dense, True, bias=True), ""),
    Key("mlp l0 bias",         ("f",),        _mlp(_dense, False, bias=True), ""),
    Key("mlp l1 weight",       ("h", "f"),    _dense,      "second projection (down)"),
    Key("mlp l1 bias",         ("h",),        lambda s, i: _dense(s, i) and s.mlp_bias, ""),
    Key("mlp l0 weight W",     ("e", "m", "h"), _mlp(_experts, True), "gates of all experts"),
    Key("mlp l0 weight V",     ("e", "m", "h"), _mlp(_experts, True), "ups of all experts"),
    Key("mlp l0 weight",       ("e", "m", "h"), _mlp(_experts, False), "first projections of all experts without gate"),
    Key("mlp l0 bias W",       ("e", "m"),    _mlp(_experts, True, bias=True), ""),
    Key("mlp l0 bias V",       ("e", "m"),    _mlp(_experts, True, bias=True), ""),
    Key("mlp l0 bias",         ("e", "m"),    _mlp(_experts, False, bias=True), ""),
    Key("mlp l1 weight",       ("e", "h", "m"), _experts,  "second projections of all experts"),
    Key("mlp l1 bias",         ("e", "h"),    lambda s, i: _experts(s, i) and s.mlp_bias, ""),
    Key("shared mlp l0 weight W", ("fs", "h"), _mlp(_shared, True),
        "experts that every token goes through, as one MLP", True),
    Key("shared mlp l0 weight V", ("fs", "h"), _mlp(_shared, True), "", True),
    Key("shared mlp l0 weight", ("fs", "h"),  _mlp(_shared, False), "", True),
    Key("shared mlp l1 weight", ("h", "fs"),  _shared,     "", True),
    Key("shared gate weight",  ("1", "h"),    _moe("shared_gate"), "sigmoid gate of the shared experts", True),
    Key("mlp output norm weight", ("h",),     _output_norms, "norm of what the MLP adds to the residual", True),
)
FINAL_NORM = (
    Key("weight",              ("h",),        _always,     "norm after the last layer"),
    Key("bias",                ("h",),        _norm_bias,  ""),
)
#: A layer of the encoder: as one of the decoder, less what reads the encoder.
ENCODER_LAYER = tuple(key for key in LAYER if not key.name.startswith("cross "))
OUTPUT_LAYER = (
    Key("weight",              ("v", "h"),    _always,     "lm head; the message is absent when tied"),
)
#: A layer that predicts one token further: it takes the norms of the next token's embedding and of the last hidden
#: state (after the final norm), joins them and is otherwise a transformer layer.
MTP = (
    Key("enorm weight",        ("h",),        _always,     "norm of the embedding of the next token", True),
    Key("hnorm weight",        ("h",),        _always,     "norm of the hidden state", True),
    Key("eh proj weight",      ("h", "2h"),   _always,     "columns: embedding, then hidden state", True),
    *LAYER,
    Key("final norm weight",   ("h",),        _always,     "norm before the output layer, which is the model's", True),
)
POOLER = (
    Key("weight",              ("h", "h"),    _always,     "BERT"),
    Key("bias",                ("h",),        _always,     ""),
)
LM_HEAD = (
    Key("dense weight",        ("h", "h"),    _always,     "BERT: transform before the output layer"),
    Key("dense bias",          ("h",),        _always,     ""),
    Key("norm weight",         ("h",),        _always,     ""),
    Key("norm bias",           ("h",),        _norm_bias,  ""),
    Key("vocab bias",          ("v",),        _always,     "bias of the output layer", True),
)
BINARY_HEAD = (
    Key("weight",              ("2", "h"),    _always,     "BERT: is the second sentence the next one"),
    Key("bias",                ("2",),        _always,     ""),
)  # fmt: skip

#: Message templates in the order they are sent, with their keys, how many are sent, and the first layer they are of.
MESSAGES: tuple[tuple[str, tuple[Key, ...], Callable[[ModelSpec], int]], ...] = (
    ("embeddings", EMBEDDINGS, lambda s: 1),
    ("encoder layer {i}", ENCODER_LAYER, lambda s: s.encoder_layers),
    ("encoder final norm", FINAL_NORM, lambda s: s.encoder_layers > 0),
    ("transformer layer {i}", LAYER, lambda s: s.num_layers),
    ("final norm", FINAL_NORM, lambda s: 1),
    ("output layer", OUTPUT_LAYER, lambda s: not s.tied and (s.lm_head or s.model_type != "BERT")),
    ("mtp layer {i}", MTP, lambda s: s.mtp_layers),
    ("pooler", POOLER, lambda s: s.pooler),
    ("lm head", LM_HEAD, lambda s: s.lm_head),
    ("binary head", BINARY_HEAD, lambda s: s.binary_head),
)

#: Keys of a layer with experts that hold one slice per expert: what `experts i:j` messages are cut from.
EXPERT_KEYS = tuple(dict.fromkeys(key.name for key in LAYER if key.shape[0] == "e" and key.name.startswith("mlp ")))

#: Keys that stay in fp32 when all else is converted: what reads them computes with them in fp32.
IN_FP32 = ("router score correction bias",)

#: Names of older plugins, message by message: what they say -> what we say. Used in both directions.
MESSAGE_ALIASES = {"final layernorm": "final norm", "final layer norm": "final norm"}
KEY_ALIASES = {
    "input layernorm weight": "input norm weight",
    "input layernorm bias": "input norm bias",
    "post layernorm weight": "post norm weight",
    "post layernorm bias": "post norm bias",
    "mlp layernorm weight": "post norm weight",  # Falcon 40B in the fork of 23.08
    "mlp layernorm bias": "post norm bias",
    "layernorm weight": "norm weight",
    "layernorm bias": "norm bias",
}


@dataclass(frozen=True)
class Expected:
    """One message as it has to be: name, template, shape by key, and the layer it is (None outside the layers).

    A layer's number goes on counting in the MTP layers; `index` is the number within the template. `experts`: the
    message holds only these experts' slices of `whole`; empty when it is the rest of a layer that comes in slices.
    """

    name: str
    template: str
    layer: int | None
    shapes: dict[str, Shape]
    index: int = 0
    experts: range | None = None
    whole: Expected | None = None

    @property
    def sliced(self) -> tuple[str, ...]:
        """Keys that may come in slices, expert by expert."""
        return tuple(key for key in EXPERT_KEYS if self.layer is not None and len(self.shapes.get(key, ())) > 1
                     and "router weight" in self.shapes)  # fmt: skip

    @property
    def part_of(self) -> str:
        """The name of the message as a whole: what tables, digests and element types are looked up by."""
        return (self.whole or self).name

    @property
    def num_experts(self) -> int:
        """How many experts there are in all."""
        whole = self.whole or self
        return whole.shapes[whole.sliced[0]][0]

    def without_experts(self) -> Expected:
        """The layer whose experts come in messages of their own."""
        shapes = {key: shape for key, shape in self.shapes.items() if key not in self.sliced}
        return Expected(self.name, self.template, self.layer, shapes, self.index, range(0), self)

    def slice_of(self, experts: range) -> Expected:
        """The message with the slices of some experts."""
        name = f"{self.name} experts {experts.start}:{experts.stop}"
        shapes = {key: (len(experts), *self.shapes[key][1:]) for key in self.sliced}
        return Expected(name, self.template, self.layer, shapes, self.index, experts, self)


def sizes(spec: ModelSpec) -> dict[str, int]:
    """What the symbols of the legend, and the products the tables use, stand for in this model."""
    h, a, d, moe, mla = spec.hidden_size, spec.num_attention_heads, spec.kv_channels, spec.moe, spec.mla
    found = {
        "1": 1,
        "2": 2,
        "h": h,
        "2h": 2 * h,
        "f": spec.ffn_hidden_size,
        "v": spec.vocab_size,
        "s": spec.max_position_embeddings,
        "t": spec.num_tokentypes,
        "a": a,
        "d": d,
        "a*d": a * d,
        "g*d": spec.num_query_groups * d,
        "2*g*d": 2 * spec.num_query_groups * d,
        "qkv": spec.qkv_rows,
        "po": spec.position_offset,
        "rb": spec.relative_buckets,
    }
    if moe:
        found |= {"e": moe.num_experts, "m": moe.ffn_hidden_size, "fs": moe.shared_ffn_hidden_size or 0}
    if mla:
        found |= {
            "ql": mla.q_lora_rank or 0,
            "kl": mla.kv_lora_rank,
            "kl+p": mla.kv_lora_rank + mla.qk_rope_head_dim,
            "a*(n+p)": a * mla.q_head_dim,
            "a*(n+w)": a * (mla.qk_head_dim + mla.v_head_dim),
        }
    return found


def expected(spec: ModelSpec) -> Iterator[Expected]:
    """Every message of a model, in order. Loader, saver and both ends of the queue check against this."""
    size = sizes(spec)
    for template, keys, count in MESSAGES:
        first = spec.num_layers if keys is MTP else 0
        kinds: dict[bool, dict[str, Shape]] = {}  # of layers without and with experts
        for index in range(count(spec)):
            layer = first + index if "{i}" in template else None
            kind = spec.has_experts(layer)
            if kind not in kinds:
                kinds[kind] = {k.name: tuple(size[s] for s in k.shape) for k in keys if k.when(spec, layer)}
            yield Expected(template.format(i=index), template, layer, kinds[kind], index)


class Course:
    """Where a stream is: what the next message has to be. A layer with experts may come whole or in slices.

    head_first: the output layer comes right after the embeddings, as loaders of Megatron-LLM send it.
    """

    def __init__(self, spec: ModelSpec, head_first: bool = False) -> None:
        self._wanted = expected(spec)
        if head_first:
            early = ("embeddings", "output layer")
            self._wanted = iter(sorted(self._wanted, key=lambda m: m.template not in early))
        self._want = next(self._wanted, None)
        self._experts: int | None = None  # how many have come, of a layer that comes in slices

    @property
    def awaited(self) -> str | None:
        """The name of the next message, None at the end."""
        if self._want is None or self._experts is None:
            return self._want.name if self._want else None
        return f"{self._want.name} experts {self._experts}:..."

    def next(self, name: object, keys: Iterable[str]) -> Expected | None:
        """What a message of this name and these keys has to be; None after the last. Raises ProtocolError."""
        want = self._want
        if want is None:
            return None
        if self._experts is None:
            return want.without_experts() if want.sliced and not set(want.sliced).intersection(keys) else want
        match = re.fullmatch(r"(.*) experts (\d+):(\d+)", str(name))
        count = want.shapes[want.sliced[0]][0]
        if not match or match[1] != want.name or int(match[2]) != self._experts or not (
            self._experts < int(match[3]) <= count
        ):  # fmt: skip
            raise ProtocolError(
                f"message {name!r} came where '{want.name} experts {self._experts}:j' with j up to {count} was "
                "expected: the slices of a layer's experts come in order and without gaps."
            )
        return want.slice_of(range(int(match[2]), int(match[3])))

    def passed(self, want: Expected) -> None:
        """The message has come."""
        if want.experts is None or (len(want.experts) and want.experts.stop == want.num_experts):
            self._want, self._experts = next(self._wanted, None), None
        else:
            self._experts = want.experts.stop


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
