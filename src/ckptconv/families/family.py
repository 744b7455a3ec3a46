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
from ckptconv.lazy import Shape
from ckptconv.messages import Expected
from ckptconv.ops import COPY, PLAIN, Op, View
from ckptconv.spec import MLA, ModelSpec, MoE, differences

Config = dict[str, Any]

#: Spec fields that config.json does not carry, or that say nothing about which family fits.
NOT_IN_CONFIG = ("family", "dtype", "seq_length", "pooler", "lm_head", "binary_head")


def _always(spec: ModelSpec, layer: int | None) -> bool:
    return True


def _every(spec: ModelSpec) -> bool:
    return True


def _none(spec: ModelSpec) -> bool:
    return False


@dataclass(frozen=True)
class Row:
    """`keys` of `message` are made of the tensors `names` by `op`.

    In names `{i}` is the layer, which goes on counting in MTP layers, `{j}` the one before it (outside the layers: the
    last), `{e}` the expert: with an `{e}` the names are repeated expert by expert. `view`: how each stored tensor is
    seen by the op.
    """

    message: str
    keys: tuple[str, ...]
    names: tuple[str, ...]
    op: Op = COPY
    view: View = PLAIN
    when: Callable[[ModelSpec, int | None], bool] = _always

    def stored(self, layer: int | None, spec: ModelSpec) -> list[str]:
        """Names on disk, in the order of the op's parts."""
        before = spec.num_layers - 1 if layer is None else layer - 1
        if not any("{e}" in name for name in self.names):
            return [name.format(i=layer, j=before) for name in self.names]
        experts = spec.moe.num_experts if spec.moe else 0
        return [name.format(i=layer, j=before, e=expert) for expert in range(experts) for name in self.names]

    def shapes(self, message: Expected) -> list[Shape]:
        """Shapes of the keys."""
        return [message.shapes[key] for key in self.keys]

    def fits(self, message: Expected, spec: ModelSpec) -> bool:
        """Whether a message has the keys of this row."""
        return (
            self.message == message.template
            and all(key in message.shapes for key in self.keys)
            and self.when(spec, message.layer)
        )


@dataclass(frozen=True)
class Ignore:
    """A tensor that is left out on purpose, and why. `{i}` is any layer, MTP layers included."""

    name: str
    reason: str


@dataclass(frozen=True)
class Duplicate:
    """A stored tensor that has to equal a message tensor, which another row reads. `{i}` is any MTP layer.

    `written`: readers expect it, so it is written too; else it is only accepted. `when`: of which models they do.
    """

    name: str
    message: str
    key: str
    written: bool = True
    when: Callable[[ModelSpec], bool] = _every

    def stored(self, spec: ModelSpec) -> list[str]:
        """Names on disk."""
        if "{i}" not in self.name:
            return [self.name]
        return [self.name.format(i=spec.num_layers + n) for n in range(spec.mtp_layers)]


@dataclass(frozen=True)
class Field:
    """A spec field and its key in config.json (None: the family has no key, the value is always `default`).

    `spec` may be of a part: `moe.topk`. `default` is what the family's class assumes when the key is absent; a function
    is given the config. `null` is what a null means where that is not `default` (kv heads: as many as heads).
    `words`: pairs of what config.json says and what a spec says; the first that fits is written.
    """

    spec: str
    key: str | None
    default: Any = None
    null: Any = None
    words: tuple[tuple[Any, Any], ...] = ()

    def of(self, spec: ModelSpec) -> Any:
        """The value in a spec; None in a spec without that part."""
        value: Any = spec
        for name in self.spec.split("."):
            value = getattr(value, name, None)
        return next((word for word, meaning in self.words if meaning == value), value)


@dataclass(frozen=True)
class Neutral:
    """A key of config.json that a spec does not carry: refused unless absent, null or one of `values`."""

    key: str
    values: tuple[Any, ...]
    meaning: str  # of any other value


REQUIRED = object()


def head_dim(config: Config) -> Any:
    """h/a, or None without those: what most classes assume of an absent head dim."""
    h, a = config.get("hidden_size"), config.get("num_attention_heads")
    return h // a if isinstance(h, int) and isinstance(a, int) and a else None


def _heads(config: Config) -> Any:
    return config.get("num_attention_heads")


#: Names of activations in transformers and in a spec; the first of several is what is written.
ACTIVATIONS = (
    ("silu", "silu"), ("swish", "silu"), ("gelu", "gelu"), ("gelu_python", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"),
    ("gelu_new", "gelu_tanh"), ("gelu_fast", "gelu_tanh"), ("relu", "relu"), ("relu2", "squared_relu"),
)  # fmt: skip

COMMON_FIELDS = (
    Field("num_layers",              "num_hidden_layers",       REQUIRED),
    Field("hidden_size",             "hidden_size",             REQUIRED),
    Field("ffn_hidden_size",         "intermediate_size",       REQUIRED),
    Field("num_attention_heads",     "num_attention_heads",     REQUIRED),
    Field("num_query_groups",        "num_key_value_heads",     _heads, _heads),
    Field("kv_channels",             "head_dim",                head_dim, head_dim),
    Field("vocab_size",              "vocab_size",              REQUIRED),
    Field("max_position_embeddings", "max_position_embeddings", 2048),
    Field("norm_epsilon",            "rms_norm_eps",            1e-6),
    Field("activation",              "hidden_act",              "silu", words=ACTIVATIONS),
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
    #: rows that read the same keys from other names, where those are in the files; never written
    variants: tuple[Row, ...] = ()
    duplicates: tuple[Duplicate, ...] = ()
    #: what names begin with, and lack in the files of a model saved without its head
    prefix: str = "model."
    rope: rope.Style | None = rope.STYLE
    #: (key, what it is called in config.json of another release of transformers): either is read
    renamed: tuple[tuple[str, str], ...] = ()
    #: settings that change what is computed and that no field reads
    neutral: tuple[Neutral, ...] = ()
    #: spec fields of messages that are there when their tensors are in the files, whatever config.json says
    optional: tuple[str, ...] = ()
    #: of which models names are written without `prefix`
    bare: Callable[[ModelSpec], bool] = _none
    #: reads what single fields cannot say; returns changed spec fields
    extra: Callable[[Config, str], dict[str, Any]] | None = None
    #: the inverse: adds config keys
    extra_config: Callable[[ModelSpec], Config] | None = None
    #: which models it is and how it was proven: the README's table
    models: str = ""
    verified: str = ""

    def spec(self, config: Config, where: str) -> ModelSpec:
        """What config.json says. Raises SourceError naming `where` and the key."""
        config = self.spelled(config)
        for rule in self.neutral:
            value = config.get(rule.key)
            if value is not None and value not in rule.values:
                raise SourceError(f"{where}: {rule.key} is {value!r}: {rule.meaning}, which is not supported.")
        values: dict[str, Any] = {"family": self.name, "rope": rope.read(config, self.rope, where)}
        for field in self.fields:
            values[field.spec] = self._value(field, config, where)
        stored = config.get("torch_dtype") or config.get("dtype") or "float32"
        values["dtype"] = dtypes.parse(stored, where)
        values["seq_length"] = values["max_position_embeddings"]
        if self.extra:
            values |= self.extra(config, where)
        try:
            return _spec({name: _whole(name, value) for name, value in values.items()})
        except (SourceError, TypeError) as error:
            raise SourceError(f"{where}: {error}") from error

    def spelled(self, config: Config) -> Config:
        """`config` with keys that are there under another name only; the same object when none lack."""
        added = {key: config[other] for key, other in self.renamed if key not in config and other in config}
        return {**config, **added} if added else config

    @staticmethod
    def _value(field: Field, config: Config, where: str) -> Any:
        value = config.get(field.key) if field.key else None
        if value is not None:
            return next((meaning for word, meaning in field.words if word == value), value)
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
                config[field.key] = field.of(spec)
        config |= rope.write(spec.rope, self.rope, spec.local_rope)
        config |= {"torch_dtype": spec.dtype, "dtype": spec.dtype}
        if self.extra_config:
            config |= self.extra_config(spec)
        return config

    def refusals(self, spec: ModelSpec) -> list[str]:
        """In what this family's config.json would say another model than `spec`; empty when it says it exactly."""
        for part in ("moe", "mla"):
            has = any(field.spec.startswith(f"{part}.") for field in self.fields)
            if has != (getattr(spec, part) is not None):
                return [f"{part}: {'always there' if has else 'never there'}"]
        try:
            said = self.spec(self.config(spec), self.name)
        except SourceError as error:
            return [str(error)]
        return differences(said, spec, NOT_IN_CONFIG)

    def written(self, name: str, spec: ModelSpec) -> str:
        """A row's name as this model's files have it."""
        return name.removeprefix(self.prefix) if self.bare(spec) else name

    @property
    def tied_by_default(self) -> bool:
        """What the family's class assumes when config.json does not say whether the head is tied."""
        return bool(next(field.default for field in self.fields if field.spec == "tied"))

    def rows_of(self, message: Expected, spec: ModelSpec, names: Callable[[str], bool] | None = None) -> list[Row]:
        """The rows that make the keys of a message. `names`: whether the files have a name, to choose variants by.

        Raises TableError when a key has none.
        """
        rows: list[Row] = []
        left = set(message.shapes)
        if names:
            for row in self.variants:
                fits = left.issuperset(row.keys) and row.fits(message, spec)
                if fits and all(names(name) for name in row.stored(message.layer, spec)):
                    rows.append(row)
                    left.difference_update(row.keys)
        for row in self.rows:
            if left.issuperset(row.keys) and row.fits(message, spec):
                rows.append(row)
                left.difference_update(row.keys)
        if left:
            raise TableError(f"family {self.name}: no row for {sorted(left)[0]!r} of {message.name!r}.")
        return rows


def _whole(name: str, value: Any) -> Any:
    """Counts that JSON has as 8.0."""
    real = name.endswith(("epsilon", "multiplier", "softcap", "scale", "factor", "clamp", "offset"))
    return int(value) if isinstance(value, float) and not real and value.is_integer() else value


def _spec(values: dict[str, Any]) -> ModelSpec:
    """A ModelSpec from fields with dots for those of its parts. Raises TypeError, SourceError."""
    whole = {name: value for name, value in values.items() if "." not in name}
    for part, kind in (("moe", MoE), ("mla", MLA)):
        own = {name.split(".")[1]: value for name, value in values.items() if name.startswith(f"{part}.")}
        if not own:
            continue
        for name in ("num_experts", "topk", "ffn_hidden_size", "kv_lora_rank", "qk_head_dim", "v_head_dim"):
            if name in own and (isinstance(own[name], bool) or not isinstance(own[name], int) or own[name] < 1):
                raise SourceError(f"model config: {part}.{name} is {own[name]!r}, expected a whole number above 0.")
        whole[part] = kind(**own)
    return ModelSpec(**whole)


def derive(base: Family, *, fields: Sequence[Field] = (), rows: Sequence[Row] = (), **changes: Any) -> Family:
    """`base` with fields replaced (by spec field), rows put before its own (which serve what those do not), and
    other attributes changed.
    """
    new_fields = {f.spec: f for f in (*base.fields, *fields)}
    taken = {(row.message, key) for row in rows if row.when is _always for key in row.keys}
    kept = [row for row in base.rows if not all((row.message, key) in taken for key in row.keys)]
    return replace(base, fields=tuple(new_fields.values()), rows=(*rows, *kept), **changes)
