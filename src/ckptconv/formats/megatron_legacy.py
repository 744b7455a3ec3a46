"""Megatron-LM's models before megatron-core (`megatron.legacy.model`, `--use-legacy-models`) in the `torch` format.

The table is that of megatron-core's local layers under other names: files hold nested dicts, whose keys are joined by
dots here. Older files spell names in other ways (`canonical`), and up to checkpoint version 1 their qkv rows have
another order (`Reordered`).

Source: Megatron-LM `megatron/legacy/model` (language_model.py, transformer.py, gpt_model.py, bert_model.py) and
`megatron/training/checkpointing.py` (fix_query_key_value_ordering) at core_v0.12.0; the folder is the same up to
core_v0.17.1, and gone in 0.18.

Verified: the real GPTModel and BertModel of core_v0.12.0, 0.13.0 and 0.15.0 restart from what is written (TP2, PP2,
both; virtual stages in 0.12.0) with transformers' logits, and what they save is read with the same logits, checkpoint
versions 0 to 3. Not verified: files that NVIDIA or others have released.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckptconv import nested as nesting
from ckptconv.errors import TableError
from ckptconv.formats import mcore, mcore_bert, megatron_args, megatron_rules
from ckptconv.formats.table import Row
from ckptconv.lazy import Assembly, LazyTensor, Piece
from ckptconv.ops import View
from ckptconv.spec import ModelSpec

#: Module of megatron-core (local layers, GPT) -> of the legacy models. Rows of other modules have no place in them.
MODULES = {
    "embedding.word_embeddings":                   "language_model.embedding.word_embeddings",
    "embedding.position_embeddings":               "language_model.embedding.position_embeddings",
    "embedding.tokentype_embeddings":              "language_model.embedding.tokentype_embeddings",
    "decoder.layers.{i}.input_layernorm":          "language_model.encoder.layers.{i}.input_norm",
    "decoder.layers.{i}.self_attention.linear_qkv": "language_model.encoder.layers.{i}.self_attention.query_key_value",
    "decoder.layers.{i}.self_attention.linear_proj": "language_model.encoder.layers.{i}.self_attention.dense",
    "decoder.layers.{i}.pre_mlp_layernorm":        "language_model.encoder.layers.{i}.post_attention_norm",
    "decoder.layers.{i}.mlp.linear_fc1":           "language_model.encoder.layers.{i}.mlp.dense_h_to_4h",
    "decoder.layers.{i}.mlp.linear_fc2":           "language_model.encoder.layers.{i}.mlp.dense_4h_to_h",
    "decoder.final_layernorm":                     "language_model.encoder.final_norm",
    "output_layer":                                "language_model.output_layer",
    "pooler.dense":                                "language_model.pooler.dense",
    "lm_head.dense":                               "lm_head.dense",
    "lm_head.layer_norm":                          "lm_head.norm",
    "binary_head":                                 "binary_head",
}  # fmt: skip
#: Where the module alone does not tell: the embedding's copy on the last stage, and the bias of BERT's output layer.
HEAD, VOCAB_BIAS = "word_embeddings_for_head.weight", "lm_head.bias"

#: Parts of names that only other models have, and what they are.
FOREIGN = {
    "language_model.decoder.": "a T5 or other encoder-decoder model",
    ".inter_attention.": "a T5 or other encoder-decoder model",
    ".retriever.": "a Retro model",
    ".mlp.router.": "a switch MLP (experts of the legacy models)",
    ".mlp.local_experts.": "a switch MLP (experts of the legacy models)",
    ".layernorm_qkv.": "layers of Transformer Engine in a legacy model",
    ".layernorm_mlp.": "layers of Transformer Engine in a legacy model",
    ".self_attention.proj.": "layers of Transformer Engine in a legacy model",
}  # fmt: skip

#: Attributes that only the args of EPFL's Megatron-LLM have, whose names are alike but whose rows are not.
EPFL = ("num_attention_heads_kv", "glu_activation", "use_rms_norm", "tie_embed_logits", "parallel_attn")

#: All that the legacy models' rotary embedding knows: no release gives it --rotary-base.
ROPE_THETA = 10000.0


@dataclass(frozen=True)
class Reordered(View):
    """Rows of a rank's qkv as checkpoints of older versions have them; seen as [heads, 3, d].

    version 0: [3, heads, d], version 1: [heads, d, 3] (versions 2 and 3 are in order). Only read.
    """

    version: int
    d: int

    def seen(self, stored: LazyTensor) -> LazyTensor:
        heads, cols, d = stored.rows // (3 * self.d), stored.cols, self.d
        # Three rows that follow each other are one row of a wider matrix, whose thirds are rectangles.
        base = stored.seen((heads * d, 3 * cols)) if self.version else stored
        pieces = [
            Piece((3 * head + part) * d, 0, d, cols, base,
                  head * d if self.version else (part * heads + head) * d, part * cols if self.version else 0)
            for head in range(heads) for part in range(3)
        ]  # fmt: skip
        return Assembly(stored.dtype, stored.shape, tuple(pieces))

    def stored(self, seen: LazyTensor) -> LazyTensor:
        raise TableError("qkv rows in the order of old checkpoint versions are only read, not written.")


def _rows(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        module, _, kind = row.name.rpartition(".")
        if row.last_stage:
            yield replace(row, name=HEAD)
        elif row.keys == ("vocab bias",):
            yield replace(row, name=VOCAB_BIAS)
        elif module in MODULES and not (row.double or row.mtp_stage):
            yield replace(row, name=f"{MODULES[module]}.{kind}")


@functools.cache
def table(version: int = 3, d: int = 1) -> tuple[Row, ...]:
    """The rows of GPT and BERT. version: of the checkpoint, without the part behind the point; d: head dim."""
    rows = _rows((*mcore.ENDS, *mcore.ATTENTION, *mcore.DENSE, *mcore_bert.ROWS))
    old = Reordered(version, d)
    return tuple(replace(row, view=old) if version < 2 and row.keys[0].startswith("qkv ") else row for row in rows)


def is_legacy(names: Iterable[str]) -> bool:
    """Whether these keys of a rank file's model, nested or joined, are of a legacy model."""
    return any(re.match(r"(module\.)*language_model(\.|$)", name) for name in names)


def is_epfl(args: Mapping[str, object]) -> bool:
    """Whether args beside such names are those of Megatron-LLM."""
    return any(name in args for name in EPFL)


def is_bert(names: Iterable[str]) -> bool:
    """Whether canonical names of all stages are those of a BERT model, which always has the language model head."""
    return any(name.startswith("lm_head.") for name in names)


#: (pattern, replacement) of older spellings, in this order.
OLDER = (
    (r"^(module\.)+", ""),
    (r"^language_model\.((word|position|tokentype)_embeddings\.)", r"language_model.embedding.\1"),
    (r"^language_model\.transformer\.", "language_model.encoder."),
    (r"^(language_model\.encoder\.layers\.\d+)\.attention\.", r"\1.self_attention."),
    (r"^(language_model\.encoder\.(?:layers\.\d+\.)?\w+_|lm_head\.)layernorm\.", r"\1norm."),
)


def canonical(name: str) -> str:
    """The newest spelling of a name."""
    for pattern, new in OLDER:
        name = re.sub(pattern, new, name)
    return name


def flat(model: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of nested dicts, names joined by dots and in their newest spelling."""
    return ((canonical(name), value) for name, value in nesting.flat(model))


#: Dicts within the model of a file; what follows in a name is one key.
DICTS = (
    "language_model.embedding.word_embeddings.", "language_model.embedding.position_embeddings.",
    "language_model.embedding.tokentype_embeddings.", "language_model.encoder.", "language_model.pooler.",
    "language_model.output_layer.", "word_embeddings_for_head.", "lm_head.", "binary_head.",
)  # fmt: skip


def nested(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The dicts that state_dict_for_save_checkpoint gives, of what lies on a stage by name; inverse of `flat`."""
    model: dict[str, Any] = {}
    for name, tensor in tensors.items():
        place = next(prefix for prefix in DICTS if name.startswith(prefix))
        inner = model
        for key in place.rstrip(".").split("."):
            inner = inner.setdefault(key, {})
        inner[name.removeprefix(place)] = tensor
    return model


def called(name: str, block: str) -> str:
    """What megatron-core calls the module that a tensor is of, as far as the model as a whole is known by it."""
    for ours, core in (("language_model.encoder.final_norm.", block + "final_layernorm."),
                       ("language_model.encoder.", block), ("language_model.", "")):  # fmt: skip
        if name.startswith(ours):
            return core + name.removeprefix(ours)
    return name


# What the legacy models can be told

Rules = tuple[tuple[Callable[[ModelSpec], bool], str], ...]


def openai_gelu(spec: ModelSpec) -> bool:
    """Whether --openai-gelu has to say the approximate GELU: the fused one needs biases, and heads lack it."""
    tanh = (spec.activation, spec.gated) == ("gelu_tanh", False)
    return tanh and (not megatron_args.linear_bias(spec) or (spec.lm_head and spec.head_activation is None))


#: What nothing in the legacy models can be told, beside what megatron-core cannot either. {0} is the spec.
REFUSALS: Rules = (
    (lambda s: s.moe is not None, "experts."),
    (lambda s: s.mla is not None, "multi-latent attention."),
    (lambda s: s.mtp_layers > 0, "multi-token prediction."),
    (lambda s: s.qk_norm is not None, "norms on queries and keys."),
    (lambda s: s.sinks, "attention sinks."),
    (lambda s: s.sliding_window is not None and s.sliding_window < s.max_position_embeddings,
     "attention in a window of {0.sliding_window} keys."),
    (lambda s: s.softmax_scale is not None, "a softmax scale of its own."),
    (lambda s: s.rope is not None and s.rope.theta != ROPE_THETA,
     "rope theta {0.rope.theta}: the legacy models never read --rotary-base, theirs is 10000."),
    (lambda s: s.rope is not None and s.rope.kind not in ("default", "dynamic", "linear"),
     "rope kind {0.rope.kind}."),
    (lambda s: s.rope is not None and s.rope.interleaved, "rotary embedding in interleaved pairs."),
    (lambda s: s.rope_layers is not None, "layers without rope."),
    (lambda s: s.norm == "RMSNorm" and s.norm_offset, "RMSNorm weights around 0 (norm offset)."),
    (lambda s: (s.activation, s.gated) not in (
        ("gelu", False), ("gelu_tanh", False), ("squared_relu", False), ("silu", True)),
     "activation {0.activation}, gated {0.gated}: the legacy models have GELU, its approximation, squared ReLU and "
     "SwiGLU."),
    (lambda s: s.activation_clamp is not None or s.gate_offset != 0, "a clamped or shifted gated activation."),
)  # fmt: skip

REMOVED = (
    "Legacy models run in Megatron-LM up to 0.15 with --use-legacy-models; in 0.16 and 0.17 they are there, but find "
    "no apply_layernorm_1p in the args unless --use-checkpoint-args brings it. In 0.12 and 0.13 there is no "
    "--padded-vocab-size: leave it out."
)
VIRTUAL = "Legacy models with virtual pipeline stages start in Megatron-LM up to 0.12 only."
GROUPS = (
    "Megatron-LM's legacy attention runs several query heads to a group only with one group per tensor rank (it views "
    "a tensor that is not contiguous): train with tensor parallel size {0.num_query_groups}."
)


def refusals(spec: ModelSpec, tp: int = 1) -> list[str]:
    """What the legacy models cannot express, one sentence each; empty when it can be written."""
    # BertLMHead has the exact GELU, or with --openai-gelu the approximate one, which megatron-core's has not.
    core = spec.replace(activation="gelu", head_activation=None) if openai_gelu(spec) else spec
    found = [text.format(spec) for applies, text in REFUSALS if applies(spec)]
    found += [text for text in megatron_args.refusals(core, tp=tp) if text not in found]
    if spec.num_query_groups % tp:
        found.append(
            f"tensor parallel size {tp} with {spec.num_query_groups} query groups: the legacy models hold whole groups "
            "on every rank. Choose a size that divides them."
        )
    return found


def limits(spec: ModelSpec, tp: int = 1, vpp: int = 1) -> list[str]:
    """What the trainer does not do with a checkpoint that is right, one sentence each, with what to do."""
    rules = megatron_rules
    texts = (rules.ZERO_BIASES, rules.DYNAMIC, rules.BERT_TYPES)
    found = [REMOVED, *(text.format(spec) for applies, text in rules.LIMITS if text in texts and applies(spec))]
    if spec.heads_per_group > 1 and spec.num_query_groups > tp:
        found.append(GROUPS.format(spec))
    return [*found, VIRTUAL] if vpp > 1 else found


def arguments(spec: ModelSpec) -> dict[str, object]:
    """What differs in the args from those of a model of megatron-core."""
    tanh = openai_gelu(spec)
    return {
        "use_legacy_models": True, "use_mcore_models": False, "openai_gelu": tanh, "onnx_safe": None,
        **({"bias_gelu_fusion": False} if tanh else {}),
    }  # fmt: skip


def flags(spec: ModelSpec, core: list[str]) -> list[str]:
    """The training flags, of those of the same model in megatron-core."""
    more = ["--openai-gelu", "--no-bias-gelu-fusion"] if openai_gelu(spec) else []
    return [*(flag for flag in core if flag not in more), *more, "--use-legacy-models"]


# What their args say

#: attribute, values beside None that mean "not used", what it is.
UNSUPPORTED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("num_experts",          (0, 1, [1]), "a switch MLP"),
    ("retro_add_retriever",  (False,),    "a Retro model"),
    ("qk_layernorm",         (False,),    "norms on queries and keys, which legacy models do not have"),
    ("multi_latent_attention", (False,),  "multi-latent attention, which legacy models do not have"),
    ("mtp_num_layers",       (0,),        "multi-token prediction, which legacy models do not have"),
    ("rotary_interleaved",   (False,),    "interleaved rotary pairs, which legacy models do not have"),
    ("use_rope_scaling",     (False,),    "a scaled rope, which legacy models do not have"),
    ("window_size",          (),          "attention in a window, which legacy models do not have"),
)  # fmt: skip


def unsupported(args: Mapping[str, object]) -> list[str]:
    """Why args describe a model that is not read."""
    return [f"{name}={args[name]!r}: {what}" for name, unused, what in UNSUPPORTED
            if args.get(name) not in (None, *unused)]  # fmt: skip


def core_arguments(args: Mapping[str, object]) -> dict[str, object]:
    """The args in the words of megatron-core's trainer: what legacy models had other words for, or do not read."""
    found = dict(args)
    if args.get("openai_gelu"):
        found |= {"activation_func": "gelu_tanh", "bias_gelu_fusion": False}
    elif args.get("onnx_safe"):
        found["bias_gelu_fusion"] = False
    if "tensor_model_parallel_size" not in args and "model_parallel_size" in args:  # before version 3
        found["tensor_model_parallel_size"] = args["model_parallel_size"]
    return found | {"num_experts": None}
