"""ModelSpec: the sizes and switches of a model, independent of any format.

It travels inside the metadata message as JSON, and everything a saver plans (names, shapes, file sizes) follows from
it. It holds no paths, no parallel sizes and no tensors. Sizes are counts of elements.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

from ckptconv.errors import SourceError, near


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    kind: `default`, `linear`, `llama3`, `dynamic`, `yarn`, `longrope`; scaling: the remaining numbers of Hugging
    Face's `rope_scaling` under their own names (factor, low_freq_factor, ...); percent: share of each head that is
    rotated; interleaved: pairs are (2j, 2j+1) instead of (j, j + d/2). Messages have them as this says, but for
    multi-latent attention, where messages always have pairs and it says what the family's files have.
    """

    theta: float = 10000.0
    kind: str = "default"
    scaling: dict[str, Any] = field(default_factory=dict)
    percent: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True)
class MoE:
    """Layers with experts, and how their router chooses.

    layers: 1 for every layer that has experts, 0 for a dense one; score: what makes scores of the router's logits;
    normalize: the chosen scores are divided by their sum (softmax: the same as a softmax over the chosen logits);
    num_groups, topk_groups: experts are chosen from the `topk_groups` best of `num_groups` groups, None without
    groups; group_score: how a group is scored, `max` or `top2` (the sum of its two best).
    """

    num_experts: int
    topk: int
    ffn_hidden_size: int  # of one expert
    layers: tuple[int, ...]
    score: str = "softmax"  # or sigmoid
    normalize: bool = True
    scaling_factor: float = 1.0  # on the chosen scores, after normalising
    score_bias: bool = False  # a trained correction, in fp32, added only for choosing
    num_groups: int | None = None
    topk_groups: int | None = None
    group_score: str = "max"
    router_bias: bool = False
    router_fp32: bool = False  # the router's product is computed in fp32
    shared_ffn_hidden_size: int | None = None  # of all shared experts together
    shared_gate: bool = False


@dataclass(frozen=True)
class MLA:
    """Multi-latent attention: queries and keys are `qk_head_dim` numbers without and `qk_rope_head_dim` with rope.

    `kv_channels` of such a model is `v_head_dim`, and it has as many query groups as heads. Rotary rows are
    interleaved pairs.
    """

    q_lora_rank: int | None  # None: queries are projected in one step
    kv_lora_rank: int
    qk_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def q_head_dim(self) -> int:
        """Numbers of one query head."""
        return self.qk_head_dim + self.qk_rope_head_dim


#: Where a layer has norms. pre: before attention and before the MLP; sandwich: also after both; output: only after
#: both, inside the residual; post: after each residual sum (BERT), where "input norm" of layer i + 1 is that after
#: the MLP of layer i and the final norm that of the last layer.
NORMS = ("pre", "sandwich", "output", "post")


@dataclass(frozen=True)
class ModelSpec:
    """What a model is. Names are Megatron's; the family names the table that knows its Hugging Face names."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int  # of a dense layer
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int  # rows of the embedding without padding
    max_position_embeddings: int
    seq_length: int
    dtype: str  # torch's name; what most tensors are stored as
    model_type: str = "GPT"
    norm: str = "RMSNorm"  # or LayerNorm, which adds biases
    norm_epsilon: float = 1e-5
    norm_bias: bool = True  # of LayerNorm; RMSNorm never has one
    norm_offset: bool = False  # stored weights are gamma - 1; a flag, never arithmetic
    norms: str = "pre"  # one of NORMS
    qk_norm: str | None = None  # norms on queries and keys: `head` (one for all heads) or `full` (over all heads)
    activation: str = "silu"  # `gelu` is the exact one, `gelu_tanh` its approximation, `quick_gelu` x sigmoid(1.702 x)
    gated: bool = True  # two first projections: W is activated, V is not
    activation_clamp: float | None = None  # both halves of a gated MLP are clamped
    gate_offset: float = 0.0  # added to V before the product
    qkv_bias: bool = False
    dense_bias: bool = False  # on the attention output projection
    mlp_bias: bool = False  # on both linears of the MLP, experts included
    tied: bool = False  # the output layer is the word embedding
    rope: Rope | None = field(default_factory=Rope)  # None: no rotary embedding
    rope_layers: tuple[int, ...] | None = None  # 1 for every layer that has rope; None: all
    local_rope: Rope | None = None  # of the windowed layers, where it differs
    learned_positions: bool = False
    position_offset: int = 0  # rows of the learned positions before that of the first token (OPT: for padding)
    alibi: bool = False
    alibi_scaled: bool = False  # its slopes are multiplied by the softmax scale like the scores (Falcon)
    sliding_window: int | None = None  # keys seen by a query, itself included
    window_layers: tuple[int, ...] | None = None  # 1 for every layer with the window; None: all
    sinks: bool = False  # one more, trained logit per head in the softmax
    qkv_clip: float | None = None  # queries, keys and values are clipped to this and its negative
    softmax_scale: float | None = None  # None: 1 / sqrt(head dim)
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    parallel_residual: bool = False  # attention and MLP read the same input: x + attn(norm x) + mlp(norm x)
    shared_norm: bool = False  # with parallel_residual: one norm feeds both
    moe: MoE | None = None
    mla: MLA | None = None
    mtp_layers: int = 0  # multi-token prediction layers behind the last one, of its kind
    num_tokentypes: int = 0  # BERT: rows of the token type embeddings
    lm_head: bool = False  # BERT: the transform before the output layer, and the vocabulary bias
    head_activation: str | None = None  # BERT: of that transform, where it is not the layers'
    binary_head: bool = False  # BERT: next sentence classifier
    pooler: bool = False  # BERT
    encoder_layers: int = 0  # T5: layers of the encoder; the decoder's `num_layers` layers read its output, too
    relative_buckets: int = 0  # T5: learned biases of scores by distance, `relative_buckets` per head and half
    relative_distance: int = 0  # T5: from this distance on all are in the last bucket

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
                     "kv_channels", "vocab_size", "max_position_embeddings"):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SourceError(f"model config: {name} is {value!r}, expected a whole number above 0.")
        if self.num_attention_heads % self.num_query_groups:
            raise SourceError(
                f"model config: {self.num_attention_heads} attention heads do not divide into "
                f"{self.num_query_groups} query groups (kv heads)."
            )
        lists = {"window_layers": self.window_layers, "rope_layers": self.rope_layers}
        for name, per_layer in {**lists, "moe.layers": self.moe.layers if self.moe else None}.items():
            if per_layer is not None and len(per_layer) != self.num_layers:
                raise SourceError(
                    f"model config: {name} has {len(per_layer)} entries, expected one for each of {self.num_layers} "
                    "layers."
                )
        if self.moe and not 0 < self.moe.topk <= self.moe.num_experts:
            raise SourceError(
                f"model config: top {self.moe.topk} of {self.moe.num_experts} experts, expected at least one, and no "
                "more than there are."
            )

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused qkv: (a + 2g) * d."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    def has_experts(self, layer: int | None) -> bool:
        """Whether a layer is a mixture of experts; layers behind the last are of its kind (MTP)."""
        return self.moe is not None and layer is not None and bool(self.moe.layers[min(layer, self.num_layers - 1)])

    @property
    def norm_has_bias(self) -> bool:
        return self.norm == "LayerNorm" and self.norm_bias

    def replace(self, **changes: Any) -> ModelSpec:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Plain types only; `from_json` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str = "model spec") -> ModelSpec:
        """Build from `to_json` output. Raises SourceError on unknown or missing fields."""
        known = {f.name for f in dataclasses.fields(cls)}
        for name in data:
            if name not in known:
                raise SourceError(
                    f"{where}: unknown field {name!r}.{near(name, known)} Was it written by a newer ckptconv?"
                )
        values = dict(data)
        try:
            for name, kind in (("rope", Rope), ("local_rope", Rope), ("moe", MoE), ("mla", MLA)):
                if values.get(name) is not None:
                    values[name] = kind(**_tuples(values[name]))
            return cls(**_tuples(values))
        except TypeError as error:
            raise SourceError(f"{where}: {error}.") from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where specs, which are hashable, have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def differences(one: ModelSpec, other: ModelSpec, ignore: typing.Collection[str] = ()) -> list[str]:
    """`field: a != b` for every field in which two specs differ, `rope.theta: a != b` for a field of a field."""
    return list(_differences(one, other, ignore))


def _differences(one: Any, other: Any, ignore: typing.Collection[str]) -> typing.Iterator[str]:
    for f in dataclasses.fields(one):
        left, right = getattr(one, f.name), getattr(other, f.name)
        if f.name in ignore or left == right:
            continue
        if type(left) is type(right) and dataclasses.is_dataclass(left):
            yield from (f"{f.name}.{line}" for line in _differences(left, right, ()))
        else:
            yield f"{f.name}: {_short(left)} != {_short(right)}"


def _short(value: Any) -> str:
    """A part that the other model lacks, by its first fields."""
    if not dataclasses.is_dataclass(value):
        return str(value)
    first = [f"{f.name}={getattr(value, f.name)}" for f in dataclasses.fields(value)[:3]]
    return f"{type(value).__name__}({', '.join(first)}, ...)"
