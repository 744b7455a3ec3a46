"""The Namespace Megatron-LM pickles as `args` into a checkpoint, both ways, and the command line that says the same.

`ROWS` is the table: a property of a model (a *fact*, in Megatron's sense: `untied`, not `tied`), the attributes that
carry it, the flag that sets it, the parser's default, and whether `--use-checkpoint-args` restores it. A new kind of
model is new rows here plus its facts in `_facts` and `_fields`.

Facts read in Megatron-LM at core_v0.12.0, 0.13.0, 0.14.0, 0.15.0, 0.16.1, 0.17.1, 0.18.0 and 0.19.0:
`megatron/training/checkpointing.py` (load_args_from_checkpoint, check_checkpoint_args, load_checkpoint),
`megatron/training/arguments.py`, from 0.18 also `argument_utils.py` and `megatron/training/config`, `gpt_builders.py`,
`pretrain_gpt.py`, `tools/checkpoint/loader_base.py` and `saver_base.py`. tests/oracle/test_megatron_trainer_args.py
sends what is written here through Megatron's own parser. No tensors and no files here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptconv.errors import SourceError, TargetError
from ckptconv.spec import ModelSpec, Rope


@dataclass(frozen=True)
class Kind:
    """A type of value: as it is written, as it is read (raises TypeError), and its name in an error message."""

    name: str
    read: Callable[[Any], Any]
    write: Callable[[Any], Any] = lambda value: value


def _typed(types: tuple[type, ...], then: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise TypeError
        return then(value)

    return read


def _extent(value: Any) -> Any:
    left = value[0] if isinstance(value, Sequence) and len(value) == 2 else value
    if isinstance(left, bool) or not isinstance(left, int):
        raise TypeError
    return left + 1 if left >= 0 else None


INT = Kind("a whole number", _typed((int,), int))
REAL = Kind("a number", _typed((int, float), float), float)
BOOL = Kind("true or false", _typed((bool, int), bool))
TEXT = Kind("a string", _typed((str,), str))
#: argparse has type=int for these, but the model takes a float: whole when it can be.
WHOLE = Kind("a number", REAL.read, lambda value: int(value) if value == int(value) else value)
#: Megatron's (w - 1, 0) keeps keys with 0 <= i - j <= w - 1; we count the query itself: w. (-1, x) is no window.
WINDOW = Kind("a window (left, 0)", _extent, lambda window: (window - 1, 0))

REQUIRED = object()


@dataclass(frozen=True)
class Row:
    """One fact. flag: `--x {}` takes the value, `--x` stands for true, `!--x` for false; when: the fact that has to
    be true for this one to count. `default` is the parser's; it is written when the model has no such number.
    """

    fact: str
    attrs: tuple[str, ...]  # newest spelling first; all are written, the first one present is read
    kind: Kind
    flag: str
    default: object = REQUIRED
    restored: bool = True  # by --use-checkpoint-args, in every release from 0.12 to 0.19
    when: str = ""


ROWS = (
    Row("num_layers",              ("num_layers", "encoder_num_layers"),     INT,    "--num-layers {}"),
    Row("hidden_size",             ("hidden_size",),                         INT,    "--hidden-size {}"),
    Row("ffn_hidden_size",         ("ffn_hidden_size",),                     INT,    "--ffn-hidden-size {}", None),
    Row("num_attention_heads",     ("num_attention_heads",),                 INT,    "--num-attention-heads {}"),
    Row("grouped",                 ("group_query_attention",),               BOOL,   "--group-query-attention", False),
    Row("num_query_groups",        ("num_query_groups",),                    INT,    "--num-query-groups {}", 1,
        when="grouped"),
    Row("kv_channels",             ("kv_channels",),                         INT,    "--kv-channels {}", None),
    Row("seq_length",              ("seq_length", "encoder_seq_length"),     INT,    "--seq-length {}", None),
    Row("max_position_embeddings", ("max_position_embeddings",),             INT,    "--max-position-embeddings {}"),
    Row("position",                ("position_embedding_type",),             TEXT,   "--position-embedding-type {}",
        "learned_absolute"),
    Row("rotary",                  ("use_rotary_position_embeddings",),      BOOL,   "", False),
    Row("rope_theta",              ("rotary_base",),                         WHOLE,  "--rotary-base {}", 10000),
    Row("rope_percent",            ("rotary_percent",),                      REAL,   "--rotary-percent {}", 1.0),
    Row("rope_interleaved",        ("rotary_interleaved",),                  BOOL,   "--rotary-interleaved", False),
    Row("llama3",                  ("use_rope_scaling",),                    BOOL,   "--use-rope-scaling", False,
        False),
    Row("llama3_factor",           ("rope_scaling_factor",),                 REAL,   "--rope-scaling-factor {}", 8.0,
        False, when="llama3"),
    Row("linear_factor",           ("rotary_seq_len_interpolation_factor",), WHOLE,
        "--rotary-seq-len-interpolation-factor {}", None, False),
    Row("sliding_window",          ("window_size",),                         WINDOW, "--window-size {}", None, False),
    Row("norm",                    ("normalization",),                       TEXT,   "--normalization {}", "LayerNorm"),
    Row("norm_epsilon",            ("layernorm_epsilon", "norm_epsilon"),    REAL,   "--norm-epsilon {}", 1e-5, False),
    # Restored up to 0.15; from 0.16 the restore list still has the old name, which the model no longer reads.
    Row("norm_offset",             ("layernorm_zero_centered_gamma", "apply_layernorm_1p"), BOOL,
        "--apply-layernorm-1p", False, False),
    Row("swiglu",                  ("swiglu",),                              BOOL,   "--swiglu", False),
    Row("squared_relu",            ("squared_relu",),                        BOOL,   "--squared-relu", False),
    Row("quick_geglu",             ("quick_geglu",),                         BOOL,   "--quick-geglu", False, False),
    Row("linear_bias",             ("add_bias_linear",),                     BOOL,   "!--disable-bias-linear", True),
    Row("qkv_bias",                ("add_qkv_bias",),                        BOOL,   "--add-qkv-bias", False),
    Row("untied",                  ("untie_embeddings_and_output_weights",), BOOL,
        "--untie-embeddings-and-output-weights", False),
    # Hugging Face checkpoints carry no dropout that mattered in pretraining; Megatron's default would be 0.1.
    Row("hidden_dropout",          ("hidden_dropout",),                      REAL,   "--hidden-dropout {}", 0.1),
    Row("attention_dropout",       ("attention_dropout",),                   REAL,   "--attention-dropout {}", 0.1),
)  # fmt: skip

#: Facts that are fields of ModelSpec under the same name.
COPIED = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "seq_length", "max_position_embeddings", "sliding_window", "norm", "norm_epsilon", "norm_offset",
)  # fmt: skip

#: (activation, gated) of a spec -> the one fact that is true for it.
ACTIVATIONS = {("silu", True): "swiglu"}
ACTIVATION_FACTS = ("swiglu", "squared_relu", "quick_geglu")

#: Rope kinds GPTModel can build with position_embedding_type=rope: fact -> key of Rope.scaling, or True.
ROPES: dict[str, dict[str, str | bool]] = {
    "default": {},
    "dynamic": {},
    "linear":  {"linear_factor": "factor"},
    "llama3":  {"llama3": True, "llama3_factor": "factor"},
}  # fmt: skip
#: RotaryEmbedding._apply_scaling has these as constants; only original / low and original / high matter in it.
LLAMA3 = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

#: Attributes with one value for every model in scope. `sequence_parallel` and `apply_query_key_layer_scaling` are read
#: without a default by tools/checkpoint; `num_experts`, `spec` and the like are there so that no default can slip in.
CONSTANTS: dict[str, object] = {
    **dict.fromkeys((
        "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "mtp_num_layers", "no_rope_freq",
        "num_experts", "num_layers_per_virtual_pipeline_stage", "spec", "virtual_pipeline_model_parallel_size",
        "window_attn_skip_freq",
    )),
    **dict.fromkeys((
        "apply_query_key_layer_scaling", "apply_residual_connection_post_layernorm", "bert_binary_head",
        "bias_gelu_fusion", "data_parallel_random_init", "is_hybrid_model", "multi_latent_attention", "qk_layernorm",
        "sequence_parallel", "use_dist_ckpt", "use_distributed_optimizer", "use_legacy_models",
    ), False),
    **dict.fromkeys((
        "add_position_embedding", "bias_swiglu_fusion", "no_save_optim", "no_save_rng", "use_mcore_models",
    ), True),
    **dict.fromkeys(("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples"), 0),
    **dict.fromkeys((
        "context_parallel_size", "data_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size",
    ), 1),
    "ckpt_format": "torch",
}  # fmt: skip

#: attribute, values beside None that mean "not used", what it is.
UNSUPPORTED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("num_experts",                             (0,),         "mixture of experts"),
    ("multi_latent_attention",                  (False,),     "multi-latent attention"),
    ("qk_layernorm",                            (False,),     "norms on queries and keys"),
    ("qk_l2_norm",                              (False,),     "L2 norms on queries and keys"),
    ("mtp_num_layers",                          (0,),         "multi-token prediction"),
    ("virtual_pipeline_model_parallel_size",    (1,),         "interleaved (virtual) pipeline stages"),
    ("window_attn_skip_freq",                   (),           "a window on some layers only"),
    ("no_rope_freq",                            (0,),         "rope on some layers only"),
    ("rope_type",                               ("rope",),    "another kind of rope"),
    ("softmax_scale",                           (),           "its own softmax scale"),
    ("softmax_type",                            ("vanilla",), "attention sinks"),
    ("attention_output_gate",                   (False,),     "a gate on the attention output"),
    ("experimental_attention_variant",          (),           "an experimental attention"),
    ("squared_relu",                            (False,),     "the squared ReLU activation"),
    ("quick_geglu",                             (False,),     "the gated quick GELU activation"),
    ("glu_linear_offset",                       (0,),         "an offset in the gated activation"),
    ("activation_func_clamp_value",             (),           "a clamped activation"),
    ("use_mup",                                 (False,),     "muP multipliers"),
    ("is_hybrid_model",                         (False,),     "a hybrid of attention and other layers"),
    ("hybrid_override_pattern",                 ("",),        "a hybrid of attention and other layers"),
    ("hybrid_layer_pattern",                    ("",),        "a hybrid of attention and other layers"),
    ("heterogeneous_layers_config_path",        ("",),        "layers that differ in shape"),
    ("heterogeneous_layers_config_encoded_json",("",),        "layers that differ in shape"),
    ("spec",                                    (),           "layers of its own (--spec)"),
    ("apply_residual_connection_post_layernorm",(False,),     "residuals after the norm"),
)  # fmt: skip


def linear_bias(spec: ModelSpec) -> bool:
    """Whether the Megatron model has biases on qkv, proj, fc1 and fc2: all of them or none (`add_bias_linear`)."""
    return spec.dense_bias or spec.mlp_bias


def qkv_bias(spec: ModelSpec) -> bool:
    """Whether the Megatron model has a bias on qkv. True with `linear_bias`, as validate_args leaves the Namespace."""
    return spec.qkv_bias or linear_bias(spec)


def _factor(spec: ModelSpec) -> float:
    return float(spec.rope.scaling.get("factor") or 0) if spec.rope else 0.0


def _llama3_fits(spec: ModelSpec) -> bool:
    scaling = spec.rope.scaling if spec.rope else {}
    original, low, high = (scaling.get(name) or 0 for name in LLAMA3)
    return bool(low and high) and (original / low, original / high) == (8192, 2048)


YARN = (
    "rope kind yarn: for a dense model it needs config attributes (yarn_*) that no flag sets before Megatron-LM 0.19 "
    "and no release restores from a checkpoint; it is not written yet."
)
LLAMA3_FIXED = (
    "llama3 rope {0.rope.scaling}: in megatron-core original_max_position_embeddings / low_freq_factor is fixed at "
    "8192 and original_max_position_embeddings / high_freq_factor at 2048."
)
FACTOR_DROPPED = (
    "No Megatron-LM release passes --rope-scaling-factor on, the model uses 8 instead of {0.rope.scaling[factor]}: add "
    "rope_scaling_factor=args.rope_scaling_factor where gpt_builders.py (before 0.15 pretrain_gpt.py) builds "
    "GPTModel, from 0.19 on the same entry to gpt_config_from_args in megatron/training/argument_utils.py."
)
LINEAR_DROPPED = (
    "Before Megatron-LM 0.19 --rotary-seq-len-interpolation-factor does not reach the model: use 0.19, or add "
    "seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor where gpt_builders.py (before 0.15 "
    "pretrain_gpt.py) builds GPTModel."
)
DYNAMIC = (
    "Megatron has no dynamic rope: the model is the same up to {0.max_position_embeddings} positions and differs "
    "beyond, so do not raise --max-position-embeddings or --seq-length above that."
)
WINDOW_FLAG = (
    "--window-size exists from Megatron-LM 0.15 on: use 0.15 or newer, or keep --seq-length within {0.sliding_window}, "
    "where the window does nothing."
)
LOCAL_OFFSET = (
    "--apply-layernorm-1p works with --transformer-impl transformer_engine; the local one has it only for LayerNorm "
    "with apex: use transformer_engine."
)
ZERO_BIASES = (
    "Megatron has biases on all linear layers or on none: those this model lacks are zeros in the checkpoint and would "
    "be trained; freeze them to keep the architecture."
)


def _rope_is(*kinds: str) -> Callable[[ModelSpec], bool]:
    return lambda spec: spec.rope is not None and spec.rope.kind in kinds


Rules = tuple[tuple[Callable[[ModelSpec], bool], str], ...]

#: What GPTModel cannot be told, or this converter cannot write yet. {0} is the spec.
REFUSALS: Rules = (
    (lambda s: s.model_type != "GPT", "model_type {0.model_type}: only decoder (GPT) models are written yet."),
    (lambda s: s.norm not in ("RMSNorm", "LayerNorm"), "norm {0.norm}: megatron-core has RMSNorm and LayerNorm."),
    (lambda s: (s.activation, s.gated) not in ACTIVATIONS,
     "activation {0.activation} (gated: {0.gated}): only gated silu (--swiglu) is written yet."),
    (lambda s: s.rope is None, "learned absolute positions: only rope models are written yet."),
    (_rope_is("yarn"), YARN),
    (lambda s: s.rope is not None and s.rope.kind not in (*ROPES, "yarn"),
     "rope kind {0.rope.kind}: megatron-core has no such rotary embedding."),
    (lambda s: _rope_is("linear", "llama3")(s) and not _factor(s), "rope kind {0.rope.kind} without a factor above 0."),
    (lambda s: _rope_is("llama3")(s) and not _llama3_fits(s), LLAMA3_FIXED),
)  # fmt: skip

#: What the stock trainer cannot be told, or only from some release on; each says what to do. {0} is the spec.
LIMITS: Rules = (
    (lambda s: _rope_is("llama3")(s) and _factor(s) not in (0, 8), FACTOR_DROPPED),
    (_rope_is("linear"), LINEAR_DROPPED),
    (lambda s: _rope_is("linear")(s) and _factor(s) % 1 != 0,
     "--rotary-seq-len-interpolation-factor takes whole numbers: make its type float in arguments.py for this model."),
    (lambda s: s.rope is not None and s.rope.theta % 1 != 0,
     "--rotary-base takes whole numbers: use --use-checkpoint-args, which restores {0.rope.theta} as it is."),
    (_rope_is("dynamic"), DYNAMIC),
    (lambda s: s.rope is not None and s.rope.interleaved,
     "Interleaved rope: add --no-rope-fusion unless Transformer Engine is 2.3 or newer."),
    (lambda s: s.sliding_window is not None, WINDOW_FLAG),
    (lambda s: s.norm_offset, LOCAL_OFFSET),
    (lambda s: linear_bias(s) and not (s.qkv_bias and s.dense_bias and s.mlp_bias), ZERO_BIASES),
)  # fmt: skip


def refusals(spec: ModelSpec) -> list[str]:
    """What megatron-core's GPTModel (or this converter yet) cannot express; empty when the model can be written."""
    return [text.format(spec) for applies, text in REFUSALS if applies(spec)]


def limits(spec: ModelSpec) -> list[str]:
    """What the stock trainer does not do with a checkpoint that is right, one sentence each, with what to do."""
    return [text.format(spec) for applies, text in LIMITS if applies(spec)]


def _checked(spec: ModelSpec, inexact: bool) -> None:
    if not inexact and (reasons := refusals(spec)):
        raise TargetError("Megatron cannot express this model: " + " ".join(reasons))


def _facts(spec: ModelSpec) -> dict[str, Any]:
    """Megatron's view of a spec: one value per row of ROWS. What Megatron cannot express is left at its default."""
    facts: dict[str, Any] = {name: getattr(spec, name) for name in COPIED}
    facts |= {name: name == ACTIVATIONS.get((spec.activation, spec.gated)) for name in ACTIVATION_FACTS}
    facts |= {
        # With group_query_attention false every release ignores num_query_groups and uses the number of heads.
        "grouped": spec.num_query_groups != spec.num_attention_heads,
        "linear_bias": linear_bias(spec),
        "qkv_bias": qkv_bias(spec),
        "untied": not spec.tied,
        "position": "rope" if spec.rope else "learned_absolute",
        "rotary": spec.rope is not None,
        "llama3": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if spec.rope:
        facts |= {
            "rope_theta": spec.rope.theta,
            "rope_percent": spec.rope.percent,
            "rope_interleaved": spec.rope.interleaved,
        }
        for fact, key in ROPES.get(spec.rope.kind, {}).items():
            facts[fact] = spec.rope.scaling.get(key) if isinstance(key, str) else key
    return facts


def _value(row: Row, facts: Mapping[str, Any]) -> object:
    value = facts.get(row.fact)
    return row.default if value is None else row.kind.write(value)


def namespace(
    spec: ModelSpec, *, tp: int, pp: int, padded_vocab_size: int, make_vocab_size_divisible_by: int,
    transformer_impl: str, iteration: int, tokenizer_type: str | None, tokenizer_model: str | None,
    params_dtype: object, inexact: bool = False,
) -> dict[str, object]:  # fmt: skip
    """The attributes of the Namespace for one model, right for everything `--use-checkpoint-args` overwrites.

    params_dtype: an opaque object (the torch dtype). A tokenizer that is None leaves the user's flags alone; any other
    wins over them. Raises TargetError when `refusals` is not empty, unless `inexact`.
    """
    _checked(spec, inexact)
    facts = _facts(spec)
    attrs = {attr: _value(row, facts) for row in ROWS for attr in row.attrs}
    return {
        **attrs,
        **CONSTANTS,
        "bf16": spec.dtype == "bfloat16",
        "fp16": spec.dtype == "float16",
        "iteration": iteration,
        "make_vocab_size_divisible_by": make_vocab_size_divisible_by,
        "no_persist_layer_norm": transformer_impl == "local",
        "padded_vocab_size": padded_vocab_size,
        "params_dtype": params_dtype,
        "pipeline_model_parallel_size": pp,
        "tensor_model_parallel_size": tp,
        "tokenizer_model": tokenizer_model,
        "tokenizer_type": tokenizer_type,
        "transformer_impl": transformer_impl,
        "transformer_pipeline_model_parallel_size": pp,
        "vocab_size": spec.vocab_size,
        "world_size": tp * pp,
    }


def _architecture(spec: ModelSpec, restored: bool) -> list[str]:
    facts, lines = _facts(spec), []
    for row in ROWS:
        value, name = facts.get(row.fact), row.flag.lstrip("!")
        if not name or value is None or (row.when and not facts[row.when]) or (row.restored and not restored):
            continue
        if "{}" in name:
            shown = row.kind.write(value)
            lines.append(name.format(",".join(map(str, shown)) if isinstance(shown, tuple) else shown))
        elif bool(value) != row.flag.startswith("!"):
            lines.append(name)
    return lines


def _layout(
    spec: ModelSpec, tp: int, pp: int, padded: int | None, divisible_by: int, impl: str,
    tokenizer: Mapping[str, str | None],
) -> list[str]:  # fmt: skip
    multiple = divisible_by * tp
    size = padded or -(-spec.vocab_size // multiple) * multiple
    lines = {"bfloat16": ["--bf16"], "float16": ["--fp16"]}.get(spec.dtype, [])
    lines = [*lines, f"--vocab-size {spec.vocab_size}", f"--make-vocab-size-divisible-by {divisible_by}"]
    # Without it the padded size follows the tokenizer, whose size often is not the number of embedding rows
    # (NullTokenizer adds one; Qwen2 has fewer tokens than rows).
    lines.append(f"--padded-vocab-size {size}")
    lines += [f"{flag} {value}" for flag, value in tokenizer.items() if value]
    lines += [f"--tensor-model-parallel-size {tp}", f"--pipeline-model-parallel-size {pp}"]
    lines += [f"--transformer-impl {impl}", "--ckpt-format torch"]
    # The torch norms of the local implementation refuse the default (torch_norm.py WrappedTorchNorm).
    return [*lines, "--no-persist-layer-norm"] if impl == "local" else lines


def flags(
    spec: ModelSpec, *, tp: int, pp: int, make_vocab_size_divisible_by: int, transformer_impl: str,
    tokenizer_type: str | None, tokenizer_model: str | None, padded_vocab_size: int | None = None,
    inexact: bool = False,
) -> list[str]:  # fmt: skip
    """The training flags that rebuild exactly this model without --use-checkpoint-args: architecture, then layout.

    One item per flag with its values, unquoted. All of them exist in Megatron-LM 0.15 to 0.19; in 0.12 to 0.14 there is
    no --window-size, and in 0.12 and 0.13 no --padded-vocab-size. Raises TargetError as `namespace` does.
    """
    _checked(spec, inexact)
    tokenizer = {"--tokenizer-type": tokenizer_type, "--tokenizer-model": tokenizer_model}
    layout = _layout(spec, tp, pp, padded_vocab_size, make_vocab_size_divisible_by, transformer_impl, tokenizer)
    return _architecture(spec, restored=True) + layout


def repeated(
    spec: ModelSpec, *, tp: int, pp: int, make_vocab_size_divisible_by: int, transformer_impl: str,
    padded_vocab_size: int | None = None,
) -> list[str]:  # fmt: skip
    """Those of `flags` that are needed beside --use-checkpoint-args, because no release restores them."""
    _checked(spec, inexact=False)
    layout = _layout(spec, tp, pp, padded_vocab_size, make_vocab_size_divisible_by, transformer_impl, {})
    return _architecture(spec, restored=False) + layout


def _read(args: Mapping[str, object], row: Row, where: str) -> Any:
    name = next((attr for attr in row.attrs if args.get(attr) is not None), None)
    if name is None:
        if row.default is REQUIRED:
            raise SourceError(f"{where}: args has no {row.attrs[0]}. Is this a Megatron-LM checkpoint?")
        return row.default
    try:
        return row.kind.read(args[name])
    except TypeError:
        raise SourceError(f"{where}: args.{name} is {args[name]!r}, expected {row.kind.name}.") from None


def _read_facts(args: Mapping[str, object], where: str) -> dict[str, Any]:
    # "One-off conversion for foundation models" in load_args_from_checkpoint: the old attribute wins.
    if args.get("disable_bias_linear") is not None:
        args = {**args, "add_bias_linear": not args["disable_bias_linear"]}
    facts: dict[str, Any] = {}
    for row in ROWS:  # a `when` fact stands above the rows that need it
        if not row.when or facts[row.when]:
            facts[row.fact] = _read(args, row, where)
    return facts


def _rope(facts: Mapping[str, Any]) -> Rope | None:
    if facts["position"] != "rope" and not facts["rotary"]:
        return None
    kind, scaling = "default", {}
    if facts["llama3"]:
        kind, scaling = "llama3", {"factor": facts["llama3_factor"], **LLAMA3}
    elif facts["linear_factor"] not in (None, 1):
        kind, scaling = "linear", {"factor": facts["linear_factor"]}
    return Rope(float(facts["rope_theta"]), kind, scaling, facts["rope_percent"], facts["rope_interleaved"])


def spec_of(args: Mapping[str, object], where: str) -> dict[str, object]:
    """The fields of ModelSpec that vars() of a Namespace of any release says; the inverse of `namespace`.

    Without family and dtype, and without vocab_size when the Namespace does not know it. What is absent has Megatron's
    default. `unsupported` tells whether the result is the whole truth. where: for messages. Raises SourceError when a
    required attribute is absent or one that counts has a wrong type; other attributes may hold any object.
    """
    facts = _read_facts(args, where)
    padded, true = args.get("padded_vocab_size"), args.get("vocab_size")
    if isinstance(padded, bool) or not isinstance(padded, int):
        raise SourceError(f"{where}: args.padded_vocab_size is {padded!r}, expected a whole number.")
    hidden, heads = facts["hidden_size"], facts["num_attention_heads"]
    # The rule of validate_args, rounding included.
    ffn = int((4 * hidden * 2 / 3) / 64) * 64 if facts["swiglu"] else 4 * hidden
    name = next((fact for fact in ACTIVATION_FACTS if facts[fact]), "")
    activation, gated = {fact: pair for pair, fact in ACTIVATIONS.items()}.get(name, (name or "gelu", "glu" in name))
    fields: dict[str, object] = {name: facts.get(name) for name in COPIED}
    fields |= {
        "ffn_hidden_size": facts["ffn_hidden_size"] or ffn,
        "num_query_groups": facts.get("num_query_groups", heads),
        "kv_channels": facts["kv_channels"] or hidden // heads,
        "seq_length": facts["seq_length"] or facts["max_position_embeddings"],
        "activation": activation,
        "gated": gated,
        "qkv_bias": facts["qkv_bias"] or facts["linear_bias"],
        "dense_bias": facts["linear_bias"],
        "mlp_bias": facts["linear_bias"],
        "tied": not facts["untied"],
        "rope": _rope(facts),
    }
    if isinstance(true, int) and not isinstance(true, bool) and 0 < true <= padded:
        fields["vocab_size"] = true
    return fields


def unsupported(args: Mapping[str, object]) -> list[str]:
    """Why a Namespace describes a model that is not read yet; empty when `spec_of` says all there is to it."""
    reasons = [
        f"{attr}={args[attr]!r}: {what}" for attr, unused, what in UNSUPPORTED if args.get(attr) not in (None, *unused)
    ]
    position = args.get("position_embedding_type") or "learned_absolute"
    if position != "rope" and not args.get("use_rotary_position_embeddings"):
        reasons.append(f"position_embedding_type={position!r}: only rope is read yet")
    if not args.get("swiglu") and not args.get("squared_relu") and not args.get("quick_geglu"):
        reasons.append("swiglu=False: the GELU activation")
    if (norm := args.get("normalization") or "LayerNorm") not in ("RMSNorm", "LayerNorm"):
        reasons.append(f"normalization={norm!r}: only RMSNorm and LayerNorm are read")
    window = args.get("window_size")
    if isinstance(window, Sequence) and len(window) == 2 and window[0] != -1 and window[1] != 0:
        reasons.append(f"window_size={window!r}: a window that looks ahead")
    if args.get("use_rope_scaling") and args.get("rotary_seq_len_interpolation_factor") not in (None, 1):
        reasons.append("use_rope_scaling and rotary_seq_len_interpolation_factor: two rope scalings at once")
    return reasons
