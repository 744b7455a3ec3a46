"""The queue protocol of EPFL's Megatron-LLM: its loaders' messages in our words, and ours in those of its savers.

Beside older names (`messages.KEY_ALIASES`) it differs in what tensors hold: query and key rows of rotary models are
pairs, "mlp l0 weight" of a gated MLP is one tensor [up; gate], and `lm_head` comes right after the embeddings, as
message and key of that name. Its metadata has its own attributes, by which it is recognised: `SPOKEN` is what no loader
of Megatron-LM's sends and no saver of Megatron-LM's reads.

Source: epfLLM/Megatron-LLM at 806a833, `tools/checkpoint_loader_megatron.py`, `tools/checkpoint_saver_megatron.py`.

Legend: h hidden, f ffn, g query groups, r query heads of a group, d head dim.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from ckptconv import dtypes
from ckptconv.errors import ProtocolError, SourceError, some
from ckptconv.formats import megatron_llm, megatron_llm_args
from ckptconv.metadata import Metadata, Origin
from ckptconv.spec import ModelSpec

log = logging.getLogger("ckptconv")

#: Attributes of its metadata that no other dialect has: a loader that sends all of them speaks it, and its savers read
#: all of them before the first message.
SPOKEN = ("tie_embed_logits", "glu_activation", "parallel_attn", "use_rms_norm")

#: What its metadata never carried, and what models of a --model_type have instead of the parser's default.
USUAL: dict[str, dict[str, Any]] = {
    "llama": {"layernorm_epsilon": 1e-6}, "codellama": {"rope_theta": 1e6}, "llama3": {"rope_theta": 5e5},
    "gemma": {"layernorm_epsilon": 1e-6, "model_name": "gemma"},
}  # fmt: skip
UNSAID = ("layernorm_epsilon", "rope_theta", "rope_scaling_factor")


def speaks(namespace: object) -> bool:
    """Whether a loader's metadata is of this dialect."""
    return all(hasattr(namespace, name) for name in SPOKEN) and getattr(namespace, "model_type", None) != "BERT"


def complete(namespace: Any, first: Mapping[str, Any], layer: Mapping[str, Any], loader: str) -> Metadata:
    """A Metadata from what such a loader sends: its Namespace, the embeddings and the first layer.

    Raises ProtocolError naming what is missing or cannot be read.
    """
    where = f"metadata of loader {loader}"
    said = {name: value for name, value in vars(namespace).items() if value is not None}
    usual = {**USUAL.get(said.get("model_type", ""), {}), "bias_gelu_fusion": False}
    assumed = [f"{row.attr} {usual.get(row.attr, row.default)}" for row in megatron_llm_args.ROWS
               if row.attr in UNSAID and row.attr not in said]  # fmt: skip
    if assumed:
        log.warning("%s does not say them, so these are assumed: %s.", where, ", ".join(assumed))
    said = {**usual, **said}
    try:
        rows, a = layer["qkv weight"].shape[0], int(said["num_attention_heads"])
        g = int(said.get("num_attention_heads_kv", a))
        if rows % (a + 2 * g):
            raise ProtocolError(
                f"{where}: 'qkv weight' has {rows} rows, which do not divide into {a} query heads and twice {g} key "
                "heads."
            )
        said["kv_channels"] = rows // (a + 2 * g)
        found = megatron_llm_args.fields(said, where)
        words, true = first["word embeddings"].shape[0], said.get("true_vocab_size")
        dtype = dtypes.parse(said["params_dtype"], where)
        spec = ModelSpec(**found, family="", dtype=dtype, vocab_size=min(true or words, words))
    except (SourceError, KeyError) as error:
        text = str(error) if isinstance(error, SourceError) else f"{where}: has no {error}."
        raise ProtocolError(f"loader {loader}: {text}") from error
    previous = (said.get(f"previous_{kind}_parallel_size") for kind in ("tensor", "pipeline"))
    tp, pp = (value if isinstance(value, int) else None for value in previous)
    iteration, kind = said.get("iteration"), said.get("tokenizer_type")
    return Metadata(
        spec=spec,
        origin=Origin(format=f"plugin {loader}", directory=""),
        iteration=iteration if isinstance(iteration, int) and iteration else 1,
        tp=tp,
        pp=pp,
        make_vocab_size_divisible_by=said.get("make_vocab_size_divisible_by"),
        tokenizer_type=kind if isinstance(kind, str) else None,
        vocab_as_is=true is None,
        head_first=not spec.tied,
    )


def to_ours(message: Mapping[str, Any], spec: ModelSpec, tp: int | None) -> dict[str, Any]:
    """A message of such a loader as the rest of the program knows it; names are canonical already. tp: its source's."""
    found = dict(message)
    if found.get("name") == "lm_head":
        return {"name": "output layer", **{_HEAD.get(key, key): value for key, value in found.items() if key != "name"}}
    for kind in ("weight", "bias"):
        key = f"mlp l0 {kind}"
        if spec.gated and key in found:
            if kind == "bias" and (tp or 1) > 1:
                raise ProtocolError(
                    f"message {found.get('name')!r}: {key!r} of a gated MLP is joined from {tp} ranks in an order "
                    "that loses which half is which. Send it from tensor parallel size 1."
                )
            up, gate = found.pop(key).chunk(2)
            found |= {f"{key} W": gate, f"{key} V": up}
        if f"qkv {kind}" in found and megatron_llm.paired(spec):
            found[f"qkv {kind}"] = _rotary(found[f"qkv {kind}"], spec, pairs=False)
    return found


_HEAD = {"lm_head": "weight"}


def to_theirs(message: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """A message of ours (real tensors) as such a saver knows it; older names are the business of `Message`."""
    import torch

    found = dict(message)
    if found["name"] == "output layer":
        return {"name": "lm_head", "lm_head": found["weight"]}
    for kind in ("weight", "bias"):
        if f"mlp l0 {kind} W" in found:
            gate, up = (found.pop(f"mlp l0 {kind} {half}") for half in "WV")
            found[f"mlp l0 {kind}"] = torch.cat([up, gate])
        if f"qkv {kind}" in found and megatron_llm.paired(spec):
            found[f"qkv {kind}"] = _rotary(found[f"qkv {kind}"], spec, pairs=True)
    return found


def _rotary(qkv: Any, spec: ModelSpec, pairs: bool) -> Any:
    """qkv [g*(r+2)*d, ...] with the rows of query and key heads as pairs, or in halves again."""
    heads = qkv.clone().view(spec.num_query_groups, spec.heads_per_group + 2, spec.kv_channels, -1)
    turned = heads[:, :-1]
    outer = (2, spec.kv_channels // 2) if pairs else (spec.kv_channels // 2, 2)
    heads[:, :-1] = turned.reshape(*turned.shape[:2], *outer, -1).transpose(2, 3).reshape(turned.shape)
    return heads.view(qkv.shape)


class Fields(Namespace):
    """The metadata for a saver that may speak this dialect: reading an attribute of `SPOKEN` shows that it does.

    Its own attributes are not in `vars()`, so that nothing but asking for them by name touches them.
    """

    __slots__ = ("_metadata", "_own", "spoken")

    def __init__(self, fields: Mapping[str, Any], metadata: Metadata) -> None:
        super().__init__(**{name: value for name, value in fields.items() if name not in SPOKEN})
        self._metadata, self._own, self.spoken = metadata, _attributes(metadata), False

    def speak(self) -> None:
        """From now on all is said in this dialect. Raises ProtocolError for a model that it cannot express."""
        reasons = refusals(self._metadata.spec)
        if reasons:
            raise ProtocolError(
                f"the queue protocol of Megatron-LLM cannot express this model: {some(reasons)}. Use another saver."
            )
        self.spoken = True
        vars(self).update(self._own)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._own:
            raise AttributeError(name)
        if name in SPOKEN:
            self.speak()
        return self._own[name]


def _attributes(metadata: Metadata) -> dict[str, Any]:
    """What its savers read beside what all metadata has, `position_embedding_type` in its own words."""
    spec = metadata.spec
    values = megatron_llm_args.values_of(spec)
    own = ("num_attention_heads_kv", "parallel_attn", "parallel_layernorm", "use_bias", "use_rms_norm",
           "glu_activation", "tie_embed_logits", "sliding_window_size", "position_embedding_type",
           *UNSAID)  # fmt: skip
    return {
        **{name: values[name] for name in own},
        "model_type": metadata.model_type or "GPT",
        "use_flash_attn": spec.sliding_window is not None or spec.parallel_residual,
        "hidden_dropout": 0.0,
        "lima_dropout": False,
    }


def refusals(spec: ModelSpec) -> list[str]:
    """What its messages cannot carry; empty when they can."""
    found = megatron_llm_args.refusals(spec)
    if spec != megatron_llm.target_spec(spec):
        found.append("biases: all linears have them or none")
    if spec.gated and spec.mlp_bias:
        found.append("a gated MLP with biases, which its savers cut wrongly")
    return found
