"""The Namespace Megatron-LM pickles as `args` into a checkpoint, both ways, and the command line that says the same.

`ROWS` is the table: a property of a model (a *fact*, in Megatron's sense: `untied`, not `tied`), the attributes that
carry it, the flag that sets it, the parser's default, and whether `--use-checkpoint-args` restores it. A new kind of
model is new rows here plus its facts in `megatron_facts`; what cannot be said is in `megatron_rules`.

Facts read in Megatron-LM at core_v0.12.0, 0.13.0, 0.14.0, 0.15.0, 0.16.1, 0.17.1, 0.18.0 and 0.19.0:
`megatron/training/checkpointing.py` (load_args_from_checkpoint, check_checkpoint_args, load_checkpoint),
`megatron/training/arguments.py`, from 0.18 also `argument_utils.py` and `megatron/training/config`, `gpt_builders.py`,
`pretrain_gpt.py`, `pretrain_bert.py`, `tools/checkpoint/loader_base.py` and `saver_base.py`.
tests/oracle/test_megatron_trainer_args.py sends what is written here through Megatron's own parser. No tensors and no
files here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptconv.errors import SourceError
from ckptconv.formats import megatron_facts
from ckptconv.formats.megatron_facts import COPIED, Facts, linear_bias, position, qkv_bias
from ckptconv.formats.megatron_rules import UNSUPPORTED, check, limits, refusals, unsupported
from ckptconv.spec import MLA, ModelSpec

__all__ = ["CONSTANTS", "ROWS", "UNSUPPORTED", "flags", "limits", "linear_bias", "namespace", "position", "qkv_bias",
           "refusals", "repeated", "spec_of", "unsupported"]  # fmt: skip


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


def _frequency(value: Any) -> Any:
    if isinstance(value, int):
        return value
    if any(item not in (0, 1) for item in value):
        raise TypeError
    return tuple(map(int, value))


def _function(value: Any) -> Any:
    """An activation: our word, or the name of the function where code of the user's own put one there."""
    name = value if isinstance(value, str) else getattr(value, "name", None)
    if name not in FUNCTIONS:
        raise TypeError
    return name


#: Functions that a pickled config may refer to; the names are also our words.
FUNCTIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "squared_relu")

INT = Kind("a whole number", _typed((int,), int))
REAL = Kind("a number", _typed((int, float), float), float)
#: A list is one 0 or 1 per layer; n stands for layers 0, n, 2n, ...; torch_dist keys of a list differ, even of ones.
LAYERS = Kind(
    "a whole number or a list of 0 and 1",
    _typed((int, list, tuple), _frequency),
    lambda layers: list(layers) if isinstance(layers, Sequence) and not all(layers) else 1,
)
#: A whole number n or a list of 0 and 1; always written as a list.
PATTERN = Kind("a whole number or a list of 0 and 1", LAYERS.read, list)
BOOL = Kind("true or false", _typed((bool, int), bool))
TEXT = Kind("a string", _typed((str,), str))
#: argparse has type=int for these, but the model takes a float: whole when it can be.
WHOLE = Kind("a number", REAL.read, lambda value: int(value) if value == int(value) else value)
#: Megatron's (w - 1, 0) keeps keys with 0 <= i - j <= w - 1; we count the query itself: w. (-1, x) is no window.
WINDOW = Kind("a window (left, 0)", _extent, lambda window: (window - 1, 0))

FUNCTION = Kind("an activation function", _function)

REQUIRED = object()
#: The default of an attribute that is only there when it says something: no parser of Megatron's knows it.
ABSENT = object()


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
    # YaRN. The first three are shared with multi-latent attention, the others have flags from 0.19 on.
    Row("yarn_factor",             ("rotary_scaling_factor",),               REAL,   "--rotary-scaling-factor {}", 1.0,
        False),
    Row("yarn_mscale",             ("mscale",),                              REAL,   "--mscale {}", 1.0, False),
    Row("yarn_mscale_all_dim",     ("mscale_all_dim",),                      REAL,   "--mscale-all-dim {}", 0.0, False),
    Row("yarn_original",           ("yarn_original_max_position_embeddings",), INT,
        "--yarn-original-max-position-embeddings {}", None, False),
    Row("yarn_beta_fast",          ("yarn_beta_fast",),                      REAL,   "--yarn-beta-fast {}", None,
        False),
    Row("yarn_beta_slow",          ("yarn_beta_slow",),                      REAL,   "--yarn-beta-slow {}", None,
        False),
    Row("yarn_round",              ("yarn_correction_range_round_to_int",),  BOOL,
        "!--no-yarn-correction-range-round-to-int", None, False),
    Row("no_rope",                 ("no_rope_freq",),                        PATTERN, "--no-rope-freq {}", None, False),
    Row("sliding_window",          ("window_size",),                         WINDOW, "--window-size {}", None, False),
    Row("window_skip",             ("window_attn_skip_freq",),               PATTERN, "--window-attn-skip-freq {}",
        None, False),
    Row("softmax_type",            ("softmax_type",),                        TEXT,   "--softmax-type {}", "vanilla",
        False),
    Row("softmax_scale",           ("softmax_scale",),                       REAL,   "", ABSENT, False),
    Row("norm",                    ("normalization",),                       TEXT,   "--normalization {}", "LayerNorm"),
    Row("norm_epsilon",            ("layernorm_epsilon", "norm_epsilon"),    REAL,   "--norm-epsilon {}", 1e-5, False),
    # Restored up to 0.15; from 0.16 the restore list still has the old name, which the model no longer reads.
    Row("norm_offset",             ("layernorm_zero_centered_gamma", "apply_layernorm_1p"), BOOL,
        "--apply-layernorm-1p", False, False),
    Row("swiglu",                  ("swiglu",),                              BOOL,   "--swiglu", False),
    Row("squared_relu",            ("squared_relu",),                        BOOL,   "--squared-relu", False),
    Row("quick_geglu",             ("quick_geglu",),                         BOOL,   "--quick-geglu", False, False),
    Row("activation_func",         ("activation_func",),                     FUNCTION, "", ABSENT, False),
    Row("gated_linear_unit",       ("gated_linear_unit",),                   BOOL,   "", ABSENT, False),
    Row("activation_clamp",        ("activation_func_clamp_value",),         REAL,   "--activation-func-clamp-value {}",
        None, False),
    Row("gate_offset",             ("glu_linear_offset",),                   REAL,   "--glu-linear-offset {}", 0.0,
        False),
    Row("swiglu_fusion",           ("bias_swiglu_fusion",),                  BOOL,   "!--no-bias-swiglu-fusion", True,
        False),
    Row("linear_bias",             ("add_bias_linear",),                     BOOL,   "!--disable-bias-linear", True),
    # Without linear biases validate_args switches it off.
    Row("gelu_fusion",             ("bias_gelu_fusion",),                    BOOL,   "!--no-bias-gelu-fusion", True,
        False, when="linear_bias"),
    Row("qkv_bias",                ("add_qkv_bias",),                        BOOL,   "--add-qkv-bias", False),
    Row("untied",                  ("untie_embeddings_and_output_weights",), BOOL,
        "--untie-embeddings-and-output-weights", False),
    Row("qk_norm",                 ("qk_layernorm",),                        BOOL,   "--qk-layernorm", False, False),
    Row("mtp_layers",              ("mtp_num_layers",),                      INT,    "--mtp-num-layers {}", None,
        False),
    Row("num_experts",             ("num_experts",),                         INT,    "--num-experts {}", None),
    Row("moe_layers",              ("moe_layer_freq",),                      LAYERS, "--moe-layer-freq {}", 1,
        when="num_experts"),
    Row("moe_ffn_hidden_size",     ("moe_ffn_hidden_size",),                 INT,    "--moe-ffn-hidden-size {}", None,
        when="num_experts"),
    Row("moe_topk",                ("moe_router_topk",),                     INT,    "--moe-router-topk {}", 2,
        when="num_experts"),
    Row("moe_pre_softmax",         ("moe_router_pre_softmax",),              BOOL,   "--moe-router-pre-softmax", False,
        when="num_experts"),
    # These three are restored from 0.16 on.
    Row("moe_score",               ("moe_router_score_function",),           TEXT,
        "--moe-router-score-function {}", "softmax", False, when="num_experts"),
    Row("moe_score_bias",          ("moe_router_enable_expert_bias",),       BOOL,
        "--moe-router-enable-expert-bias", False, False, when="num_experts"),
    Row("moe_scaling",             ("moe_router_topk_scaling_factor",),      REAL,
        "--moe-router-topk-scaling-factor {}", None, False, when="num_experts"),
    Row("moe_groups",              ("moe_router_num_groups",),               INT,    "--moe-router-num-groups {}", None,
        False, when="num_experts"),
    Row("moe_topk_groups",         ("moe_router_group_topk",),               INT,    "--moe-router-group-topk {}", None,
        False, when="num_experts"),
    Row("moe_router_dtype",        ("moe_router_dtype",),                    TEXT,   "--moe-router-dtype {}", None,
        False, when="num_experts"),
    Row("moe_shared",              ("moe_shared_expert_intermediate_size",), INT,
        "--moe-shared-expert-intermediate-size {}", None, when="num_experts"),
    Row("moe_shared_gate",         ("moe_shared_expert_gate",),              BOOL,   "--moe-shared-expert-gate", False,
        False, when="num_experts"),
    Row("moe_grouped_gemm",        ("moe_grouped_gemm",),                    BOOL,   "--moe-grouped-gemm", False,
        when="num_experts"),
    # Multi-latent attention; without rope_type the config's default is yarn with factor 40.
    Row("mla",                     ("multi_latent_attention",),              BOOL,   "--multi-latent-attention", False,
        False),
    Row("mla_q_lora",              ("q_lora_rank",),                         INT,    "--q-lora-rank {}", None, False,
        when="mla"),
    Row("mla_kv_lora",             ("kv_lora_rank",),                        INT,    "--kv-lora-rank {}", 32, False,
        when="mla"),
    Row("mla_qk",                  ("qk_head_dim",),                         INT,    "--qk-head-dim {}", 128, False,
        when="mla"),
    Row("mla_rope",                ("qk_pos_emb_head_dim",),                 INT,    "--qk-pos-emb-head-dim {}", 64,
        False, when="mla"),
    Row("mla_v",                   ("v_head_dim",),                          INT,    "--v-head-dim {}", 128, False,
        when="mla"),
    Row("mla_rope_type",           ("rope_type",),                           TEXT,   "--rope-type {}", None, False,
        when="mla"),
    # No release has flags for these three; code that makes its own config may.
    Row("mla_original",            ("original_max_position_embeddings",),    INT,    "", 4096, False, when="mla"),
    Row("mla_beta_fast",           ("beta_fast",),                           REAL,   "", 32.0, False, when="mla"),
    Row("mla_beta_slow",           ("beta_slow",),                           REAL,   "", 1.0, False, when="mla"),
    Row("rope_fusion",             ("apply_rope_fusion",),                   BOOL,   "!--no-rope-fusion", True, False,
        when="mla"),
    # Hugging Face checkpoints carry no dropout that mattered in pretraining; Megatron's default would be 0.1.
    Row("hidden_dropout",          ("hidden_dropout",),                      REAL,   "--hidden-dropout {}", 0.1),
    Row("attention_dropout",       ("attention_dropout",),                   REAL,   "--attention-dropout {}", 0.1),
)  # fmt: skip

#: Attributes with one value for every model in scope. `sequence_parallel` and `apply_query_key_layer_scaling` are read
#: without a default by tools/checkpoint; `num_experts`, `spec` and the like are there so that no default can slip in.
CONSTANTS: dict[str, object] = {
    **dict.fromkeys((
        "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
        "num_layers_per_virtual_pipeline_stage", "virtual_pipeline_model_parallel_size",
    )),
    **dict.fromkeys((
        "apply_query_key_layer_scaling", "apply_residual_connection_post_layernorm", "data_parallel_random_init",
        "is_hybrid_model", "use_dist_ckpt",
        "use_distributed_optimizer", "use_legacy_models",
    ), False),
    **dict.fromkeys((
        "add_position_embedding", "no_save_optim", "no_save_rng", "use_mcore_models",
    ), True),
    **dict.fromkeys(("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples"), 0),
    **dict.fromkeys(("context_parallel_size", "data_parallel_size"), 1),
    "ckpt_format": "torch",
}  # fmt: skip

def _value(row: Row, facts: Mapping[str, Any]) -> object:
    value = facts.get(row.fact)
    return row.default if value is None else row.kind.write(value)


def _spec(spec: ModelSpec, transformer_impl: str, module: tuple[str, str] | None) -> list[str] | None:
    """`args.spec`; pretrain_bert.py goes by it, not by --transformer-impl."""
    if module is not None:
        return list(module)
    return ["local"] if spec.model_type == "BERT" and transformer_impl == "local" else None


def namespace(
    spec: ModelSpec, *, tp: int, pp: int, ep: int = 1, padded_vocab_size: int, make_vocab_size_divisible_by: int,
    transformer_impl: str, iteration: int, tokenizer_type: str | None, tokenizer_model: str | None,
    params_dtype: object, grouped_gemm: bool = False, inexact: bool = False,
    spec_module: tuple[str, str] | None = None,
) -> dict[str, object]:  # fmt: skip
    """The attributes of the Namespace for one model, right for everything `--use-checkpoint-args` overwrites.

    params_dtype: an opaque object (the torch dtype). A tokenizer that is None leaves the user's flags alone; any other
    wins over them. spec_module: the module and name of layers of one's own (`--spec`). Raises TargetError when
    `refusals` is not empty, unless `inexact`.
    """
    if not inexact:
        check(spec, spec_module is not None, tp)
    facts = megatron_facts.from_spec(spec) | {"moe_grouped_gemm": grouped_gemm}
    attrs = {attr: value for row in ROWS if (value := _value(row, facts)) is not ABSENT for attr in row.attrs}
    return {
        **attrs,
        **CONSTANTS,
        "bert_binary_head": spec.binary_head,
        "bf16": spec.dtype == "bfloat16",
        "fp16": spec.dtype == "float16",
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": tp,
        "iteration": iteration,
        "make_vocab_size_divisible_by": make_vocab_size_divisible_by,
        "no_persist_layer_norm": transformer_impl == "local",
        "padded_vocab_size": padded_vocab_size,
        "params_dtype": params_dtype,
        "pipeline_model_parallel_size": pp,
        # Megatron asserts it for experts and tensor parallelism together.
        "sequence_parallel": spec.moe is not None and tp > 1,
        "spec": _spec(spec, transformer_impl, spec_module),
        "tensor_model_parallel_size": tp,
        "tokenizer_model": tokenizer_model,
        "tokenizer_type": tokenizer_type,
        "transformer_impl": transformer_impl,
        "transformer_pipeline_model_parallel_size": pp,
        "vocab_size": spec.vocab_size,
        "world_size": tp * pp * ep,
    }


def _architecture(spec: ModelSpec, restored: bool, grouped_gemm: bool) -> list[str]:
    facts, lines = megatron_facts.from_spec(spec) | {"moe_grouped_gemm": grouped_gemm}, []
    for row in ROWS:
        value, name = facts.get(row.fact), row.flag.lstrip("!")
        if not name or value is None or (row.when and not facts[row.when]) or (row.restored and not restored):
            continue
        if "{}" in name:
            shown = row.kind.write(value)
            text = ",".join(map(str, shown)) if isinstance(shown, tuple | list) else str(shown)
            lines.append(name.format(f"[{text}]" if isinstance(shown, list) else text))
        elif bool(value) != row.flag.startswith("!"):
            lines.append(name)
    # pretrain_bert.py gives a model with a binary head two token types, and none to one without.
    return [*lines, "--bert-no-binary-head"] if spec.model_type == "BERT" and not spec.binary_head else lines


def _layout(
    spec: ModelSpec, tp: int, pp: int, ep: int, padded: int | None, divisible_by: int, impl: str,
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
    if spec.moe:
        lines += [f"--expert-model-parallel-size {ep}", f"--expert-tensor-parallel-size {tp}"]
        lines += ["--sequence-parallel"] if tp > 1 else []
    lines += [f"--transformer-impl {impl}", "--ckpt-format torch"]
    # The torch norms of the local implementation refuse the default (torch_norm.py WrappedTorchNorm).
    return [*lines, "--no-persist-layer-norm"] if impl == "local" else lines


def flags(
    spec: ModelSpec, *, tp: int, pp: int, ep: int = 1, make_vocab_size_divisible_by: int, transformer_impl: str,
    tokenizer_type: str | None, tokenizer_model: str | None, padded_vocab_size: int | None = None,
    grouped_gemm: bool = False, inexact: bool = False, spec_module: tuple[str, str] | None = None,
) -> list[str]:  # fmt: skip
    """The training flags that rebuild exactly this model without --use-checkpoint-args: architecture, then layout.

    One item per flag with its values, unquoted. All of them exist in Megatron-LM 0.15 to 0.19; in 0.12 to 0.14 there is
    no --window-size, and in 0.12 and 0.13 no --padded-vocab-size; `limits` names the others. Raises TargetError as
    `namespace` does.
    """
    if not inexact:
        check(spec, spec_module is not None, tp)
    tokenizer = {"--tokenizer-type": tokenizer_type, "--tokenizer-model": tokenizer_model}
    layout = _layout(spec, tp, pp, ep, padded_vocab_size, make_vocab_size_divisible_by, transformer_impl, tokenizer)
    given = _spec(spec, transformer_impl, spec_module)
    module = [] if given is None else [f"--spec {' '.join(given)}"]
    return _architecture(spec, restored=True, grouped_gemm=grouped_gemm) + module + layout


def repeated(
    spec: ModelSpec, *, tp: int, pp: int, ep: int = 1, make_vocab_size_divisible_by: int, transformer_impl: str,
    padded_vocab_size: int | None = None, grouped_gemm: bool = False, inexact: bool = False,
    spec_module: tuple[str, str] | None = None,
) -> list[str]:  # fmt: skip
    """Those of `flags` that are needed beside --use-checkpoint-args, because not every release restores them."""
    if not inexact:
        check(spec, spec_module is not None, tp)
    layout = _layout(spec, tp, pp, ep, padded_vocab_size, make_vocab_size_divisible_by, transformer_impl, {})
    return _architecture(spec, restored=False, grouped_gemm=grouped_gemm) + layout


def _read(args: Mapping[str, object], row: Row, where: str) -> Any:
    name = next((attr for attr in row.attrs if args.get(attr) is not None), None)
    if name is None:
        if row.default is REQUIRED:
            raise SourceError(f"{where}: args has no {row.attrs[0]}. Is this a Megatron-LM checkpoint?")
        return None if row.default is ABSENT else row.default
    try:
        return row.kind.read(args[name])
    except TypeError:
        raise SourceError(f"{where}: args.{name} is {args[name]!r}, expected {row.kind.name}.") from None


def _read_facts(args: Mapping[str, object], where: str) -> Facts:
    # "One-off conversion for foundation models" in load_args_from_checkpoint: the old attribute wins.
    if args.get("disable_bias_linear") is not None:
        args = {**args, "add_bias_linear": not args["disable_bias_linear"]}
    facts: Facts = {}
    for row in ROWS:  # a `when` fact stands above the rows that need it
        if not row.when or facts[row.when]:
            facts[row.fact] = _read(args, row, where)
    if facts["mla"] and "rope_type" not in args:
        # Releases without the argument took the length as it is now for the original one.
        facts["mla_original"] = facts["max_position_embeddings"]
    return facts


def spec_of(args: Mapping[str, object], where: str, model_type: str = "GPT") -> dict[str, object]:
    """The fields of ModelSpec that vars() of a Namespace of any release says; the inverse of `namespace`.

    Without family and dtype, and without vocab_size when the Namespace does not know it. What is absent has Megatron's
    default. `unsupported` tells whether the result is the whole truth. where: for messages; model_type: which no
    Namespace says. Raises SourceError when a required attribute is absent or one that counts has a wrong type; other
    attributes may hold any object.
    """
    facts = _read_facts(args, where)
    padded, true = args.get("padded_vocab_size"), args.get("vocab_size")
    if isinstance(padded, bool) or not isinstance(padded, int):
        raise SourceError(f"{where}: args.padded_vocab_size is {padded!r}, expected a whole number.")
    hidden, heads, latent = facts["hidden_size"], facts["num_attention_heads"], facts["mla"]
    # The rule of validate_args, rounding included.
    ffn = int((4 * hidden * 2 / 3) / 64) * 64 if facts["swiglu"] else 4 * hidden
    activation, gated = megatron_facts.read_activation(facts)
    fields: dict[str, object] = {name: facts.get(name) for name in COPIED}
    fields |= {
        "model_type": model_type,
        "ffn_hidden_size": facts["ffn_hidden_size"] or ffn,
        "num_query_groups": facts.get("num_query_groups", heads),
        "kv_channels": facts["kv_channels"] or hidden // heads,
        "seq_length": facts["seq_length"] or facts["max_position_embeddings"],
        "activation": activation,
        "gated": gated,
        "gate_offset": facts["gate_offset"],
        "qkv_bias": (facts["qkv_bias"] or facts["linear_bias"]) and not latent,
        "dense_bias": facts["linear_bias"],
        "mlp_bias": facts["linear_bias"],
        "tied": not facts["untied"],
        "rope": megatron_facts.read_rope(facts),
        "rope_layers": megatron_facts.read_rope_layers(facts, where),
        "learned_positions": facts["position"] == "learned_absolute" and not facts["rotary"] and not latent,
        "sinks": facts["softmax_type"] == "learnable",
        "qk_norm": "head" if facts["qk_norm"] and not latent else None,
        "mtp_layers": facts["mtp_layers"] or 0,
        "moe": megatron_facts.read_moe(facts, where),
        **megatron_facts.read_windows(facts, where),
    }
    if latent:
        fields["mla"] = MLA(facts["mla_q_lora"], facts["mla_kv_lora"], facts["mla_qk"], facts["mla_rope"],
                            facts["mla_v"])  # fmt: skip
        fields |= {"kv_channels": facts["mla_v"], "num_query_groups": heads}
    if model_type == "BERT":
        binary = args.get("bert_binary_head") is not False
        fields |= {"num_tokentypes": 2 * binary, "binary_head": binary, "pooler": binary, "lm_head": True}
    if isinstance(true, int) and not isinstance(true, bool) and 0 < true <= padded:
        fields["vocab_size"] = true
    return fields
