"""What `--custom-layers` adds to Megatron's args: settings for the layers of examples/megatron_layers, both ways.

A model that GPTModel cannot express goes on with layers of its own (`--spec ckptconv_layers local`). They read what
they need from `ckptconv_layers.json` beside the checkpoint; the same object lies in the args, where the trainer keeps
it for the checkpoints that it writes itself. The settings are fields of ModelSpec under their own names. No tensors and
no files here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptconv.errors import SourceError
from ckptconv.formats import megatron_rules
from ckptconv.formats.megatron_rules import Rules
from ckptconv.spec import ModelSpec, Rope

MODULE = "ckptconv_layers"
FILE = "ckptconv_layers.json"
ATTRIBUTE = "ckptconv_layers"
#: transformer_impl -> object of the module.
OBJECTS = {"local": "local", "transformer_engine": "te"}

#: Fields of ModelSpec that the layers take from their settings instead of from the trainer's flags, and what a model
#: has that needs no such layers.
STOCK: dict[str, Any] = {
    "model_type": "GPT", "norm": "RMSNorm", "norm_epsilon": 1e-5, "norm_offset": False, "norms": "pre", "qk_norm": None,
    "activation": "silu", "gated": True, "parallel_residual": False, "shared_norm": False, "softmax_scale": None,
    "attention_softcap": None, "logit_softcap": None, "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
    "logit_multiplier": 1.0, "sliding_window": None, "window_layers": None, "rope": Rope(), "rope_layers": None,
    "local_rope": None,
}  # fmt: skip

ROPES = ("default", "linear", "llama3", "dynamic")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "squared_relu")

#: What the layers cannot express either.
REFUSALS: Rules = (
    (lambda s: s.moe is not None, "experts: not among the custom layers."),
    (lambda s: s.mla is not None, "multi-latent attention: not among the custom layers."),
    (lambda s: s.mtp_layers > 0, "multi-token prediction: not among the custom layers."),
    (lambda s: s.sinks, "attention sinks: not among the custom layers."),
    (lambda s: s.alibi, "alibi positions: not among the custom layers."),
    (lambda s: s.activation_clamp is not None or s.gate_offset != 0,
     "a clamped activation: not among the custom layers."),
    (lambda s: s.activation not in ACTIVATIONS, "activation {0.activation}: not among the custom layers."),
    (lambda s: any(rope is not None and rope.kind not in ROPES for rope in (s.rope, s.local_rope)),
     "rope kind {0.rope.kind}: not among the custom layers."),
    (lambda s: s.norm_has_bias and (s.qk_norm is not None or s.norms in ("sandwich", "output")),
     "LayerNorm on queries and keys or behind attention and the MLP: not among the custom layers."),
    (lambda s: s.norms == "post" and s.model_type != "BERT", "norms after the residual sums in a decoder."),
)  # fmt: skip

#: What has to be known to use them. {0} is the spec.
LIMITS: Rules = (
    (lambda s: True,
     "The layers are in examples/megatron_layers of ckptconv; its folder must be on PYTHONPATH, and " + FILE +
     " in --load, --save or named by CKPTCONV_LAYERS."),
    (lambda s: s.logit_softcap is not None or s.logit_multiplier != 1,
     "--spec alone cannot change logits: run ckptconv_layers.py pretrain_gpt.py instead of pretrain_gpt.py, or call "
     "its gpt_model in a model provider."),
    (lambda s: s.norm_offset and s.logit_softcap is None,
     "Without Transformer Engine the final norm needs more than --spec: run ckptconv_layers.py pretrain_gpt.py."),
)  # fmt: skip


def plain(spec: ModelSpec) -> ModelSpec:
    """The model less everything that the layers provide: what is left is up to GPTModel and the trainer."""
    stock = dict(STOCK)
    if spec.model_type != "GPT":  # its head has an activation, too
        stock |= {"model_type": spec.model_type, "activation": spec.activation, "gated": spec.gated}
    if spec.rope is None or spec.rope.kind == "dynamic":
        stock["rope"] = spec.rope
    return spec.replace(**stock)


def refusals(spec: ModelSpec) -> list[str]:
    """What GPTModel cannot express even with custom layers."""
    own = [text.format(spec) for applies, text in REFUSALS if applies(spec)]
    return own or megatron_rules.refusals(plain(spec))


def limits(spec: ModelSpec) -> list[str]:
    """What to do for a checkpoint with custom layers, one sentence each."""
    return [text.format(spec) for applies, text in LIMITS if applies(spec)] + megatron_rules.limits(plain(spec))


def settings(spec: ModelSpec) -> dict[str, Any]:
    """What the layers are told: plain types."""
    fields = spec.to_json()
    return {name: list(value) if isinstance(value := fields[name], tuple) else value for name in STOCK}


def fields(told: object, where: str) -> dict[str, Any]:
    """The fields of ModelSpec that settings say. Raises SourceError naming `where`."""
    if not isinstance(told, Mapping) or set(told) != set(STOCK):
        raise SourceError(
            f"{where}: the settings of the custom layers are not those this version knows: "
            f"{', '.join(sorted(STOCK))}. Were they written by another version of ckptconv?"
        )
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    try:
        for name in ("rope", "local_rope"):
            values[name] = None if values[name] is None else Rope(**dict(values[name]))
    except TypeError as error:
        raise SourceError(f"{where}: {name} of the custom layers: {error}.") from error
    return values


def of(spec: ModelSpec) -> dict[str, Any]:
    """The same fields, of a model that is known otherwise."""
    return {name: getattr(spec, name) for name in STOCK}


def stands_for(spec: object) -> bool:
    """Whether `args.spec` names our layers."""
    return isinstance(spec, list | tuple) and len(spec) == 2 and str(spec[0]).split(".")[-1] == MODULE


def without(arguments: Mapping[str, object]) -> dict[str, object]:
    """args in which everything that the layers know better is stock, so that only the rest is judged."""
    stock: dict[str, object] = {
        "spec": None, "swiglu": True, "squared_relu": False, "quick_geglu": False, "softmax_scale": None,
        "window_size": None, "window_attn_skip_freq": None, "no_rope_freq": None,
        "layernorm_zero_centered_gamma": False,
    }  # fmt: skip
    return {**arguments, **{name: value for name, value in stock.items() if arguments.get(name) is not None or value}}


