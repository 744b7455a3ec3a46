"""What a family is: rows for its tensors, fields for its config.json. Data in the family modules, meaning here.

Facts on names and on config.json in transformers 4 and 5: transformers 4.57.6 and 5.23.0, files written by both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptconv import dtypes
from ckptconv.errors import SourceError, TableError
from ckptconv.families import rope
from ckptconv.ops import COPY, Op
from ckptconv.spec import ModelSpec, differences

Config = dict[str, Any]

#: Spec fields that config.json does not carry, or that say nothing about which family fits.
NOT_IN_CONFIG = ("family", "dtype", "seq_length", "model_type")


@dataclass(frozen=True)
class Row:
    """`key` of `message` is made of the tensors `names` by `op`. `{i}` is the layer."""

    message: str
    key: str
    names: tuple[str, ...]
    op: Op = COPY


@dataclass(frozen=True)
class Ignore:
    """A tensor that is left out on purpose, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Field:
    """A spec field and its key in config.json (None: the family has no key, the value is always `default`).

    `default` is what the family's class assumes when the key is absent; a function is given the config.
    `null` is what a null means where that is not `default` (kv heads: as many as heads).
    """

    spec: str
    key: str | None
    default: Any = None
    null: Any = None


REQUIRED = object()


def _head_dim(config: Config) -> Any:
    h, a = config.get("hidden_size"), config.get("num_attention_heads")
    return h // a if isinstance(h, int) and isinstance(a, int) and a else None


def _heads(config: Config) -> Any:
    return config.get("num_attention_heads")


COMMON_FIELDS = (
    Field("num_layers",              "num_hidden_layers",       REQUIRED),
    Field("hidden_size",             "hidden_size",             REQUIRED),
    Field("ffn_hidden_size",         "intermediate_size",       REQUIRED),
    Field("num_attention_heads",     "num_attention_heads",     REQUIRED),
    Field("num_query_groups",        "num_key_value_heads",     _heads, _heads),
    Field("kv_channels",             "head_dim",                _head_dim, _head_dim),
    Field("vocab_size",              "vocab_size",              REQUIRED),
    Field("max_position_embeddings", "max_position_embeddings", 2048),
    Field("norm_epsilon",            "rms_norm_eps",            1e-6),
    Field("activation",              "hidden_act",              "silu"),
    Field("qkv_bias",                None,                      False),
    Field("dense_bias",              None,                      False),
    Field("mlp_bias",                None,                      False),
    Field("tied",                    "tie_word_embeddings",     False),
    Field("sliding_window",          None,                      None),
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One family. `name` is ours, `model_type` and `architecture` are config.json's."""

    name: str
    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    fields: tuple[Field, ...]
    ignore: tuple[Ignore, ...] = ()
    theta: float = 10000.0
    #: reads what single fields cannot say; returns changed spec fields
    extra: Callable[[Config, str], dict[str, Any]] | None = None
    #: the inverse: adds config keys
    extra_config: Callable[[ModelSpec], Config] | None = None
    #: which models it is and how it was proven: the README's table
    models: str = ""
    verified: str = ""

    def spec(self, config: Config, where: str) -> ModelSpec:
        """What config.json says. Raises SourceError naming `where` and the key."""
        values: dict[str, Any] = {"family": self.name, "rope": rope.read(config, self.theta, where)}
        for field in self.fields:
            values[field.spec] = self._value(field, config, where)
        for name, value in values.items():
            if isinstance(value, float) and name not in ("norm_epsilon",) and value.is_integer():
                values[name] = int(value)
        stored = config.get("torch_dtype") or config.get("dtype") or "float32"
        values["dtype"] = dtypes.parse(stored, where)
        values["seq_length"] = values["max_position_embeddings"]
        if self.extra:
            values |= self.extra(config, where)
        try:
            return ModelSpec(**values)
        except SourceError as error:
            raise SourceError(f"{where}: {error}") from error

    @staticmethod
    def _value(field: Field, config: Config, where: str) -> Any:
        value = config.get(field.key) if field.key else None
        if value is not None:
            return value
        null = field.key in config and field.null is not None
        default = field.null if null else field.default
        if default is REQUIRED:
            raise SourceError(f"{where}: {field.key} is missing. A {field.spec} is needed to read the weights.")
        return default(config) if callable(default) else default

    def config(self, spec: ModelSpec) -> Config:
        """A config.json for `spec` that transformers 4 and 5 both read right."""
        config: Config = {"architectures": [self.architecture], "model_type": self.model_type}
        for field in self.fields:
            if field.key:
                config[field.key] = getattr(spec, field.spec)
        config |= rope.write(spec.rope)
        config |= {"torch_dtype": spec.dtype, "dtype": spec.dtype}
        if self.extra_config:
            config |= self.extra_config(spec)
        return config

    def refusals(self, spec: ModelSpec) -> list[str]:
        """In what this family's config.json would say another model than `spec`; empty when it says it exactly."""
        try:
            said = self.spec(self.config(spec), self.name)
        except SourceError as error:
            return [str(error)]
        return differences(said, spec, NOT_IN_CONFIG)

    def row(self, message: str, key: str) -> Row:
        """The row of a message key. Raises TableError when the family has none."""
        for row in self.rows:
            if (row.message, row.key) == (message, key):
                return row
        raise TableError(f"family {self.name}: no row for {key!r} of {message!r}")


def derive(base: Family, *, fields: Sequence[Field] = (), rows: Sequence[Row] = (), **changes: Any) -> Family:
    """`base` with some fields and rows replaced (by spec field, by message key) and other attributes changed."""
    new_fields = {f.spec: f for f in (*base.fields, *fields)}
    new_rows = {(r.message, r.key): r for r in (*base.rows, *rows)}
    return replace(base, fields=tuple(new_fields.values()), rows=tuple(new_rows.values()), **changes)
