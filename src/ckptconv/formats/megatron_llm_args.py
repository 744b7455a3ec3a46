"""The args that EPFL's Megatron-LLM pickles into a checkpoint, both ways, its flags, and what they cannot say.

`ROWS` is the table: an attribute, the ModelSpec field it carries, its type, its parser's default, and its flag. A
loader takes the default for what is absent, as release checkpoints lack much. Three attributes are our own: what Gemma
needs and no published Megatron-LLM knows; they are written only where they say something.

Source: epfLLM/Megatron-LLM at 806a833, `megatron/arguments.py` (defaults), `megatron/checkpointing.py`
(load_args_from_checkpoint: what a trainer restores, check_checkpoint_args: what has to be there), `finetune.py`
(model_name), `megatron/model/transformer.py` (which GELU, which window, dims of the rotary table). No tensors here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ckptconv.errors import SourceError, TableError
from ckptconv.formats.megatron_args import BOOL, INT, REAL, REQUIRED, TEXT, Kind
from ckptconv.formats.megatron_llm import target_spec
from ckptconv.spec import ModelSpec, Rope, differences


def _position(value: Any) -> str:
    """A name, or an enum of the trainer's, which files hold by number."""
    if isinstance(value, str):
        return value
    if getattr(value, "name", None) != "PositionEmbeddingType":
        raise TypeError
    return POSITIONS[value.args[0]]


#: Members of the trainer's enum PositionEmbeddingType.
POSITIONS = {1: "rotary", 2: "absolute"}

POSITION = Kind("rotary or absolute", _position)


@dataclass(frozen=True)
class Row:
    """One attribute. flag: `--x {}` takes the value, `--x` stands for true, `!--x` for false, empty: none of theirs.

    `ours`: the attribute is written only where it differs from its default.
    """

    attr: str
    kind: Kind
    flag: str
    default: object = REQUIRED
    ours: bool = False


ROWS = (
    Row("num_layers",              INT,      "--num_layers {}"),
    Row("hidden_size",             INT,      "--hidden_size {}"),
    Row("ffn_hidden_size",         INT,      "--ffn_hidden_size {}", None),
    Row("num_attention_heads",     INT,      "--num_attention_heads {}"),
    Row("num_attention_heads_kv",  INT,      "--num_attention_heads_kv {}", None),
    Row("kv_channels",             INT,      "--kv_channels {}", None),
    Row("seq_length",              INT,      "--seq_length {}", None),
    Row("max_position_embeddings", INT,      "--max_position_embeddings {}"),
    Row("position_embedding_type", POSITION, "--position_embedding_type {}", "absolute"),
    Row("rope_theta",              REAL,     "--rope_theta {}", 10000.0),
    Row("rope_scaling_factor",     REAL,     "--rope_scaling_factor {}", 1.0),
    Row("sliding_window_size",     INT,      "--sliding_window_size {}", None),
    Row("use_rms_norm",            BOOL,     "--use_rms_norm", False),
    Row("layernorm_epsilon",       REAL,     "--layernorm_epsilon {}", 1e-5),
    Row("glu_activation",          TEXT,     "--glu_activation {}", None),
    Row("bias_gelu_fusion",        BOOL,     "!--no_bias_gelu_fusion", True),
    Row("use_bias",                BOOL,     "--use_bias", False),
    Row("parallel_attn",           BOOL,     "--parallel_attn", False),
    Row("parallel_layernorm",      BOOL,     "--parallel_layernorm", False),
    Row("tie_embed_logits",        BOOL,     "!--no_tie_embed_logits", True),
    Row("apply_layernorm_1p",      BOOL,     "", False, ours=True),
    Row("embedding_multiplier",    REAL,     "", 1.0, ours=True),
    Row("approximate_gelu",        BOOL,     "", False, ours=True),
)  # fmt: skip

#: glu_activation -> activation of a spec. Their geglu has the exact GELU.
GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}

#: Attributes of which these values (or None, or absence) mean "not used", and what another one would be.
UNSUPPORTED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("use_post_ln",                  (False,), "norms behind the layers"),
    ("apply_residual_connection_post_layernorm", (False,), "residuals of what comes out of the norms"),
    ("glu_activation",               tuple(GATED), "a gated MLP of another kind"),
    ("num_experts",                  (0, 1),   "experts"),
    ("decoder_num_layers",           (0,),     "an encoder and a decoder (T5)"),
)  # fmt: skip

#: What has no place in the args and needs none.
UNSAID = ("family", "dtype", "vocab_size")

#: Attributes that describe a run or a file, not the model: never taken over from the source.
OF_A_RUN = (
    "load", "save", "rank", "local_rank", "model_type", "pipeline_model_parallel_split_rank",
    "num_layers_per_virtual_pipeline_stage", "virtual_pipeline_model_parallel_size", "standalone_embedding_stage",
    "encoder_num_layers", "encoder_seq_length", "wandb_api_key",
)  # fmt: skip


def gemma(spec: ModelSpec) -> bool:
    """Whether a model has what Gemma has and no published Megatron-LLM knows."""
    return spec.norm_offset or spec.embedding_multiplier != 1


def model_name(spec: ModelSpec) -> str:
    """The --model_name under which finetune.py builds it; `gpt` takes everything."""
    llama = (spec.gated, spec.activation, spec.norm, spec.tied) == (True, "silu", "RMSNorm", False)
    if gemma(spec):
        return "gemma"
    if spec.parallel_residual and not (spec.gated or target_spec(spec).mlp_bias):
        return "falcon"
    if spec.rope is None or not llama or spec.parallel_residual or target_spec(spec).mlp_bias:
        return "gpt"
    if spec.sliding_window:
        return "mistral" if spec.sliding_window == 4096 else "gpt"
    return "codellama" if spec.rope.theta == 1e6 else "llama" if spec.norm_epsilon == 1e-6 else "llama2"


#: Kinds of tokenizers that its parser takes, and a file (or pair of files) that shows which one a model has.
TOKENIZERS = {
    "SentencePieceTokenizer": ("tokenizer.model",),
    "FalconTokenizer": (),
    "GPT2BPETokenizer": ("vocab.json", "merges.txt"),
    "BertWordPieceLowerCase": (),
    "BertWordPieceCase": (),
}


def tokenizer_type(spec: ModelSpec, said: str | None, files: Collection[str]) -> str | None:
    """What the args call the tokenizer: as a source of this format said, by the model, or by the files there are."""
    if said in TOKENIZERS:
        return said
    if model_name(spec) == "falcon":
        return "FalconTokenizer"
    seen = next((kind for kind, names in TOKENIZERS.items() if names and all(n in files for n in names)), None)
    # As hf_to_megatron.py says of these; Llama 3, with another theta, has no sentencepiece model.
    theta = spec.rope.theta if spec.rope else None
    usual = model_name(spec) in ("llama", "llama2", "codellama", "mistral") and theta in (1e4, 1e6)
    return seen or ("SentencePieceTokenizer" if usual and not files else None)


def values_of(spec: ModelSpec) -> dict[str, Any]:
    """What the attributes of `ROWS` say of a model; where it has more, `refusals` tells."""
    bias, rope = target_spec(spec).mlp_bias, spec.rope
    tanh = spec.activation == "gelu_tanh"
    linear = rope is not None and rope.kind == "linear"
    return {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.ffn_hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "num_attention_heads_kv": spec.num_query_groups,
        "kv_channels": spec.kv_channels,
        "seq_length": spec.seq_length,
        "max_position_embeddings": spec.max_position_embeddings,
        "position_embedding_type": "absolute" if rope is None else "rotary",
        "rope_theta": 10000.0 if rope is None else rope.theta,
        "rope_scaling_factor": float(rope.scaling["factor"]) if rope is not None and linear else 1.0,
        "sliding_window_size": spec.sliding_window,
        "use_rms_norm": spec.norm == "RMSNorm",
        "layernorm_epsilon": spec.norm_epsilon,
        "glu_activation": _glu(spec),
        "bias_gelu_fusion": tanh and bias and not spec.gated,
        "use_bias": bias,
        "parallel_attn": spec.parallel_residual,
        "parallel_layernorm": spec.parallel_residual and not spec.shared_norm,
        "tie_embed_logits": spec.tied,
        "apply_layernorm_1p": spec.norm_offset,
        "embedding_multiplier": spec.embedding_multiplier,
        "approximate_gelu": tanh and not (bias and not spec.gated),
    }


def _glu(spec: ModelSpec) -> str | None:
    """The name of a gated activation; another than theirs has that of the GELU, and `refusals` says so."""
    exact = "gelu" if spec.activation == "gelu_tanh" else spec.activation
    return next((name for name, word in GATED.items() if word == exact), "geglu") if spec.gated else None


def namespace(
    spec: ModelSpec, *, tp: int, pp: int, padded_vocab_size: int, make_vocab_size_divisible_by: int,
    iteration: int | str, tokenizer_type: str | None, params_dtype: object, carried: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The attributes of the Namespace. carried: plain ones of a source of this format, which are kept."""
    values = values_of(spec)
    return {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Their attention without flash attention knows no window.
        "use_flash_attn": spec.sliding_window is not None or spec.parallel_residual,
        "lima_dropout": False,
        "model_name": model_name(spec),
        **{name: value for name, value in carried.items() if name not in OF_A_RUN},
        **{row.attr: values[row.attr] for row in ROWS if not row.ours or values[row.attr] != row.default},
        "encoder_num_layers": spec.num_layers,
        "bias_dropout_fusion": False,
        "bias_droput_fusion": False,  # so the trainer spells it when it restores it
        "bf16": spec.dtype == "bfloat16",
        "fp16": spec.dtype == "float16",
        "params_dtype": params_dtype,
        "make_vocab_size_divisible_by": make_vocab_size_divisible_by,
        "padded_vocab_size": padded_vocab_size,
        "vocab_size": spec.vocab_size,
        "tokenizer_type": tokenizer_type,
        "data_parallel_random_init": False,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "iteration": iteration,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "transformer_pipeline_model_parallel_size": pp,
        "num_layers_per_virtual_pipeline_stage": None,
        "virtual_pipeline_model_parallel_size": None,
        "sequence_parallel": bool(carried.get("sequence_parallel")) and tp > 1,
        "use_distributed_optimizer": False,
        "world_size": tp * pp,
    }


def flags(spec: ModelSpec, *, tp: int, pp: int, make_vocab_size_divisible_by: int, tokenizer_type: str | None,
          vocab_file: str | None) -> list[str]:  # fmt: skip
    """The training flags that rebuild the model, one item per flag with its value."""
    values, lines = values_of(spec), [f"--model_name {model_name(spec)}"]
    for row in ROWS:
        value, name = values[row.attr], row.flag.lstrip("!")
        if not name or value is None:
            continue
        if "{}" in name:
            lines.append(name.format(value))
        elif bool(value) != row.flag.startswith("!"):
            lines.append(name)
    lines += ["--hidden_dropout 0.0", "--attention_dropout 0.0", "--no_bias_dropout_fusion"]
    lines += ["--use_flash_attn"] if spec.sliding_window is not None or spec.parallel_residual else []
    lines += {"bfloat16": ["--bf16"], "float16": ["--fp16"]}.get(spec.dtype, [])
    lines.append(f"--make_vocab_size_divisible_by {make_vocab_size_divisible_by}")
    named = {"--tokenizer_type": tokenizer_type, "--vocab_file": vocab_file}
    lines += [f"{flag} {value}" for flag, value in named.items() if value]
    return [*lines, f"--tensor_model_parallel_size {tp}", f"--pipeline_model_parallel_size {pp}"]


def _value(args: Mapping[str, Any], row: Row, where: str) -> Any:
    value = args.get(row.attr)
    if value is None and row.attr == "num_layers":
        value = args.get("encoder_num_layers")
    if value is None:
        if row.default is REQUIRED:
            raise SourceError(f"{where}: args has no {row.attr}. Is this a checkpoint of Megatron-LLM?")
        return row.default
    try:
        return row.kind.read(value)
    except (TypeError, KeyError, IndexError):
        raise SourceError(f"{where}: args.{row.attr} is {value!r}, expected {row.kind.name}.") from None


def unsupported(args: Mapping[str, Any]) -> list[str]:
    """Why args describe a model that is not read."""
    return [f"{name}={args[name]!r}: {what}" for name, unused, what in UNSUPPORTED
            if args.get(name) is not None and args[name] not in unused]  # fmt: skip


def fields(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of ModelSpec that args say; the inverse of `values_of`. Raises SourceError.

    A Gemma of a fork (its model_name says it) that has none of our attributes has Gemma's settings.
    """
    reasons = unsupported(args)
    if reasons:
        raise SourceError(f"{where}: its args describe a model that is not supported: {'; '.join(reasons)}.")
    said = {row.attr: _value(args, row, where) for row in ROWS}
    if args.get("model_name") == "gemma" and not any(row.attr in args for row in ROWS if row.ours):
        multiplier = said["hidden_size"] ** 0.5
        said |= {"apply_layernorm_1p": True, "approximate_gelu": True, "embedding_multiplier": multiplier}
    h, a, bias = said["hidden_size"], said["num_attention_heads"], said["use_bias"]
    factor, gated = said["rope_scaling_factor"], said["glu_activation"] is not None
    rotary = said["position_embedding_type"] == "rotary"
    scaling: dict[str, Any] = {"factor": factor} if factor != 1 else {}
    fused = bias and said["bias_gelu_fusion"]
    activation = GATED[said["glu_activation"]] if gated else "gelu_tanh" if fused else "gelu"
    if said["approximate_gelu"] and activation == "gelu":
        activation = "gelu_tanh"
    if h < 1 or a < 1:
        raise SourceError(f"{where}: args.hidden_size is {h} and args.num_attention_heads {a}, expected both above 0.")
    return {
        "num_layers": said["num_layers"],
        "hidden_size": h,
        "ffn_hidden_size": said["ffn_hidden_size"] or 4 * h,
        "num_attention_heads": a,
        "num_query_groups": said["num_attention_heads_kv"] or a,
        "kv_channels": said["kv_channels"] or h // a,
        "seq_length": said["seq_length"] or said["max_position_embeddings"],
        "max_position_embeddings": said["max_position_embeddings"],
        "norm": "RMSNorm" if said["use_rms_norm"] else "LayerNorm",
        "norm_epsilon": said["layernorm_epsilon"],
        "norm_offset": said["apply_layernorm_1p"],
        "activation": activation,
        "gated": gated,
        "qkv_bias": bias,
        "dense_bias": bias,
        "mlp_bias": bias,
        "tied": said["tie_embed_logits"],
        "rope": Rope(said["rope_theta"], "linear" if scaling else "default", scaling) if rotary else None,
        "learned_positions": not rotary,
        "sliding_window": said["sliding_window_size"],
        "embedding_multiplier": said["embedding_multiplier"],
        "parallel_residual": said["parallel_attn"],
        "shared_norm": said["parallel_attn"] and not said["parallel_layernorm"],
    }


def refusals(spec: ModelSpec) -> list[str]:
    """In what Megatron-LLM would make another model of it (on the left); empty when it makes the same."""
    if spec.rope is not None and spec.kv_channels % 2:
        return [f"kv_channels (head dim): {spec.kv_channels} is odd, rotary rows are pairs"]
    try:
        known = ("dtype", "vocab_size", "family")
        said = fields(values_of(spec), "args")
        made = ModelSpec(**said, **{name: getattr(spec, name) for name in known})
    except (SourceError, TableError, KeyError) as error:
        return [str(error)]
    return differences(made, target_spec(spec), UNSAID)


Rules = tuple[tuple[Callable[[ModelSpec], bool], str], ...]

#: What the trainer has to be told or changed beside the checkpoint. {0} is the spec.
LIMITS: Rules = (
    (gemma, "no published Megatron-LLM has Gemma: the code that reads it has to add 1 to norm weights (norm offset: "
     "they are stored as Hugging Face has them) and to multiply embeddings by {0.embedding_multiplier}."),
    (lambda s: s.gated and s.activation == "gelu_tanh",
     "its geglu has the exact GELU, this model the approximate one."),
    (lambda s: s.kv_channels * s.num_attention_heads != s.hidden_size and s.rope is not None,
     "its rotary table takes hidden size / heads for the head dim, which is {0.kv_channels} here (kv_channels): "
     "change precompute_freqs_cis' dim."),
    (lambda s: s.sliding_window is not None,
     "its flash attention sees one key more than the window of {0.sliding_window}."),
    (lambda s: s.rope is not None and s.rope.interleaved, "rotary rows were pairs already and stay as they are."),
    (lambda s: target_spec(s) != s, "its linears have all biases or none: those that the model lacks are zeros."),
)  # fmt: skip

#: Attributes that --use_checkpoint_args does not restore, where they differ from the parser's default.
FORGOTTEN = ("layernorm_epsilon", "rope_theta", "rope_scaling_factor", "use_bias")


def limits(spec: ModelSpec) -> list[str]:
    """What its trainer does not do with a checkpoint that is right, one sentence each."""
    found = [text.format(spec) for applies, text in LIMITS if applies(spec)]
    values = values_of(spec)
    lost = [row.flag.format(values[row.attr]) for row in ROWS
            if row.attr in FORGOTTEN and values[row.attr] != row.default]  # fmt: skip
    if lost:
        found.append(f"--use_checkpoint_args does not restore all: also give {' '.join(lost)}.")
    return found
