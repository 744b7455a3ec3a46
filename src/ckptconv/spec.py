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
    rotated; interleaved: pairs are (2j, 2j+1) instead of (j, j + d/2).
    """

    theta: float = 10000.0
    kind: str = "default"
    scaling: dict[str, Any] = field(default_factory=dict)
    percent: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """What a model is. Names are Megatron's; the family names the table that knows its Hugging Face names."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
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
    norm_offset: bool = False  # stored weights are gamma - 1; a flag, never arithmetic
    activation: str = "silu"
    gated: bool = True  # two first projections: W is activated, V is not
    qkv_bias: bool = False
    dense_bias: bool = False  # on the attention output projection
    mlp_bias: bool = False
    tied: bool = False  # the output layer is the word embedding
    rope: Rope | None = field(default_factory=Rope)  # None: learned absolute positions
    sliding_window: int | None = None  # keys seen by a query, itself included

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

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused qkv: (a + 2g) * d."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    @property
    def norm_has_bias(self) -> bool:
        return self.norm == "LayerNorm"

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
            if values.get("rope") is not None:
                values["rope"] = Rope(**values["rope"])
            return cls(**values)
        except TypeError as error:
            raise SourceError(f"{where}: {error}.") from error


def differences(one: ModelSpec, other: ModelSpec, ignore: typing.Collection[str] = ()) -> list[str]:
    """`field: a != b` for every field in which two specs differ."""
    lines = []
    for f in dataclasses.fields(ModelSpec):
        left, right = getattr(one, f.name), getattr(other, f.name)
        if f.name not in ignore and left != right:
            lines.append(f"{f.name}: {left} != {right}")
    return lines
