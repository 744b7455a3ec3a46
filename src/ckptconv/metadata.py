"""The first message: a Namespace as Megatron-LM's plugins know it, with our typed fields inside.

`build` makes it from a ModelSpec; `complete` makes a ModelSpec from what a plugin written for Megatron-LM's
convert.py sends, as far as its fields and the shapes of its first messages tell.

Source: Megatron-LM `tools/checkpoint/loader_base.py:build_checkpoint_metadata` at core_v0.13.0; branch 23.08 for the
older fields (and its misspelt `make_vocab_size_divisble_by`).
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ckptconv import dtypes
from ckptconv.errors import ProtocolError, SourceError
from ckptconv.formats import megatron_args
from ckptconv.spec import ModelSpec

log = logging.getLogger("ckptconv")

#: Attributes of checkpoint_args that are the converter's own, not the model's: Megatron's loaders parse their args with
#: --no-bias-gelu-fusion and a single stage, whatever the model was trained with.
OF_THE_LOADER = ("bias_gelu_fusion", "virtual_pipeline_model_parallel_size")

#: The attribute that carries our fields; plugins of others neither set nor read it.
OURS = "ckptconv"


@dataclass(frozen=True)
class Origin:
    """Where a stream comes from, for provenance, for `--resume`, and to carry small files along.

    files: [path, bytes, mtime in ns] of every file read; companions: name -> path of config.json,
    generation_config.json and tokenizer files; notes: sentences for the provenance file.
    """

    format: str
    directory: str
    files: list[list[Any]] = field(default_factory=list)
    companions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Metadata:
    """The first message, understood."""

    spec: ModelSpec
    origin: Origin
    #: element types that differ from spec.dtype: message name -> key -> torch's name
    dtypes: dict[str, dict[str, str]] = field(default_factory=dict)
    iteration: int = 1
    tp: int | None = None  # of the source, the default for the target
    pp: int | None = None
    ep: int | None = None
    make_vocab_size_divisible_by: int | None = None
    tokenizer_type: str | None = None
    tokenizer_model: str | None = None
    vocab_as_is: bool = False  # nothing tells which rows of the vocabulary are padding
    head_first: bool = False  # the output layer comes right after the embeddings
    model_type: str | None = None  # as --model-type says it, for plugins of others
    #: plain args of the source, for a target of its own format
    arguments: dict[str, Any] = field(default_factory=dict)

    def dtype(self, message: str, key: str) -> str:
        """Element type of one tensor of the stream."""
        return self.dtypes.get(message, {}).get(key, self.spec.dtype)


def build(metadata: Metadata) -> Namespace:
    """The wire form: Megatron's fields for plugins of others, ours for our own. Plain types only."""
    spec = metadata.spec
    fields: dict[str, Any] = {
        "model_type": spec.model_type,
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "seq_length": spec.seq_length,
        "num_attention_heads": spec.num_attention_heads,
        "max_position_embeddings": spec.max_position_embeddings,
        "tokenizer_type": metadata.tokenizer_type or "HuggingFaceTokenizer",
        "iteration": metadata.iteration,
        "params_dtype": spec.dtype,
        "bert_binary_head": spec.binary_head,
        "output_layer": not spec.tied,
        "position_embedding_type": megatron_args.position(spec),
        "linear_bias": megatron_args.linear_bias(spec),
        "qkv_bias": spec.qkv_bias,
        "norm_has_bias": spec.norm_has_bias,
        "swiglu": spec.gated and spec.activation == "silu",
        "previous_tensor_parallel_size": metadata.tp or 1,
        "previous_pipeline_parallel_size": metadata.pp or 1,
        "true_vocab_size": spec.vocab_size,
        "make_vocab_size_divisible_by": metadata.make_vocab_size_divisible_by,
        "make_vocab_size_divisble_by": metadata.make_vocab_size_divisible_by,
        "use_legacy_models": False,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "num_query_groups": spec.num_query_groups,
        "kv_channels": spec.kv_channels,
        "ffn_hidden_size": spec.ffn_hidden_size,
        # Only for experts: Megatron's savers print whatever is there into --num-experts.
        **({"num_experts": spec.moe.num_experts} if spec.moe else {}),
    }
    own = asdict(metadata)
    own["spec"] = spec.to_json()
    return Namespace(**fields, **{OURS: own})


def read(namespace: Any) -> Metadata | None:
    """Our fields of a first message, or None when its sender knows nothing of them."""
    own = getattr(namespace, OURS, None)
    if own is None:
        return None
    values = dict(own)
    values["spec"] = ModelSpec.from_json(values["spec"], "metadata")
    values["origin"] = Origin(**values["origin"])
    return Metadata(**values)


def for_plugin(namespace: Any) -> Namespace:
    """The first message as a saver of others reads it: a real torch.dtype and Megatron's args of the source."""
    fields = {key: value for key, value in vars(namespace).items() if key != OURS}
    metadata = read(namespace)
    if isinstance(fields.get("params_dtype"), str):
        fields["params_dtype"] = dtypes.of_torch(fields["params_dtype"])
    if metadata and fields.get("checkpoint_args") is None:
        divisor = metadata.make_vocab_size_divisible_by or 128
        fields["checkpoint_args"] = Namespace(
            **megatron_args.namespace(
                metadata.spec,
                tp=metadata.tp or 1,
                pp=metadata.pp or 1,
                ep=metadata.ep or 1,
                padded_vocab_size=metadata.spec.vocab_size,
                make_vocab_size_divisible_by=divisor,
                transformer_impl="local",
                iteration=metadata.iteration,
                tokenizer_type=metadata.tokenizer_type,
                tokenizer_model=metadata.tokenizer_model,
                params_dtype=fields["params_dtype"],
                inexact=True,
            )
        )
    return Namespace(**fields)


def complete(namespace: Any, first: dict[str, Any], layer: dict[str, Any], loader: str) -> Metadata:
    """A Metadata from the Namespace, the embeddings and the first layer of a loader that knows only Megatron's fields.

    `checkpoint_args` is believed where it is there; else sizes come from shapes. Raises ProtocolError naming what
    is missing or cannot be expressed.
    """
    need, where = _needed(namespace, loader), f"metadata of loader {loader}"
    model_type = getattr(namespace, "model_type", None) or "GPT"
    if model_type not in ("GPT", "BERT"):
        raise ProtocolError(f"loader {loader}: model_type is {model_type!r}; only GPT and BERT models are supported.")
    known = _known(namespace, need, first, layer, loader)
    if reasons := megatron_args.unsupported(known, model_type):
        raise ProtocolError(f"{where}: checkpoint_args describe a model that is not supported: {'; '.join(reasons)}.")
    values = megatron_args.spec_of(known, where, model_type)
    if model_type == "BERT":
        values["num_tokentypes"] = first["token type embeddings"].shape[0] if "token type embeddings" in first else 0
    if values["activation"] in ("gelu", "gelu_tanh"):
        log.warning("%s does not say which GELU: %s is assumed.", where, values["activation"])
    dtype = dtypes.parse(need("params_dtype"), where)
    rows = first["word embeddings"].shape[0]
    true = getattr(namespace, "true_vocab_size", None)
    try:
        spec = ModelSpec(**{**values, "family": "", "dtype": dtype, "vocab_size": min(true or rows, rows)})
    except SourceError as error:
        raise ProtocolError(f"{where}: {error}") from error
    divisor = getattr(namespace, "make_vocab_size_divisible_by", None)
    divisor = divisor or getattr(namespace, "make_vocab_size_divisble_by", None)
    return Metadata(
        spec=spec,
        origin=Origin(format=f"plugin {loader}", directory=""),
        iteration=getattr(namespace, "iteration", None) or 1,
        tp=getattr(namespace, "previous_tensor_parallel_size", None),
        pp=getattr(namespace, "previous_pipeline_parallel_size", None),
        make_vocab_size_divisible_by=divisor,
        tokenizer_type=getattr(namespace, "tokenizer_type", None),
        tokenizer_model=known.get("tokenizer_model"),
    )


def _needed(namespace: Any, loader: str) -> Callable[[str], Any]:
    def need(name: str) -> Any:
        if getattr(namespace, name, None) is None:
            raise ProtocolError(f"loader {loader}: its metadata has no {name!r}, which every model needs.")
        return getattr(namespace, name)

    return need


def _known(
    namespace: Any, need: Callable[[str], Any], first: dict[str, Any], layer: dict[str, Any], loader: str
) -> dict[str, Any]:
    """Megatron's args as far as they are told, completed by what the first messages show."""
    args = getattr(namespace, "checkpoint_args", None)
    known = {name: value for name, value in vars(args).items() if name not in OF_THE_LOADER} if args is not None else {}
    for name in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "seq_length"):
        known[name] = need(name)
    h, a = known["hidden_size"], known["num_attention_heads"]
    swiglu = bool(getattr(namespace, "swiglu", "mlp l0 weight W" in layer))
    probe = "mlp l0 weight W" if swiglu else "mlp l0 weight"
    if probe not in layer or "qkv weight" not in layer:
        raise ProtocolError(f"loader {loader}: transformer layer 0 lacks 'qkv weight' or {probe!r}.")
    d = known.get("kv_channels") or getattr(namespace, "kv_channels", None) or h // a
    heads = layer["qkv weight"].shape[0] // d
    normalization = "LayerNorm" if getattr(namespace, "norm_has_bias", "input norm bias" in layer) else "RMSNorm"
    position = "learned_absolute" if "position embeddings" in first else "rope"
    known |= {
        "kv_channels": d,
        "ffn_hidden_size": known.get("ffn_hidden_size") or layer[probe].shape[-2],
        "group_query_attention": heads != 3 * a,
        "num_query_groups": max(1, (heads - a) // 2),
        "swiglu": swiglu,
        "normalization": normalization,
        "add_bias_linear": bool(getattr(namespace, "linear_bias", "dense bias" in layer)),
        "add_qkv_bias": bool(getattr(namespace, "qkv_bias", "qkv bias" in layer)),
        "untie_embeddings_and_output_weights": bool(getattr(namespace, "output_layer", False)),
        "position_embedding_type": getattr(namespace, "position_embedding_type", None) or position,
        "padded_vocab_size": first["word embeddings"].shape[0],
        "bert_binary_head": bool(getattr(namespace, "bert_binary_head", False)),
    }
    if "q norm weight" in layer:
        known["qk_layernorm"] = True
    return known | _known_experts(namespace, known, layer, layer[probe], loader)


def _known_experts(
    namespace: Any, known: Mapping[str, Any], layer: Mapping[str, Any], l0: Any, loader: str
) -> dict[str, Any]:
    """The same for experts, l0: [m, h] of a dense layer or [E, m, h]. Raises ProtocolError where shapes cannot tell."""
    told = {name: getattr(namespace, name, None) for name in ("num_experts", "moe_layer_freq", "moe_router_topk")}
    told = {name: known.get(name) if value is None else value for name, value in told.items()}
    router = layer.get("router weight")
    number = told["num_experts"] or (None if router is None else router.shape[0])
    if not number:
        return {"num_experts": None}
    if router is None and (not isinstance(told["moe_layer_freq"], list) or not known.get("moe_ffn_hidden_size")):
        raise ProtocolError(
            f"loader {loader}: its metadata has {number} experts, but transformer layer 0 has no 'router weight', and "
            "checkpoint_args do not say which layers have one: moe_layer_freq (a list) and moe_ffn_hidden_size."
        )
    if told["moe_router_topk"] is None:
        log.warning("loader %s does not say moe_router_topk: 2, Megatron's default, is assumed.", loader)
    found: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
    found["num_experts"] = number
    if router is not None:
        found["moe_ffn_hidden_size"] = l0.shape[-2]
        if "router score correction bias" in layer:
            found |= {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
        if "shared mlp l1 weight" in layer:
            found["moe_shared_expert_intermediate_size"] = layer["shared mlp l1 weight"].shape[1]
            found["moe_shared_expert_gate"] = "shared gate weight" in layer
    return found
