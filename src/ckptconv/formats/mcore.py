"""Megatron-Core GPT and BERT models in the `torch` checkpoint format: names in `mp_rank_*/model_optim_rng.pt`.

Source: Megatron-LM `core/models/gpt/gpt_layer_specs.py`, `tools/checkpoint/schema_core.py` at core_v0.13.0 and
core_v0.16.1. Two dialects: the local spec, and Transformer Engine's, whose linears contain the norm before them.

Verified: local names by strict loading into real megatron-core 0.16.1 (TP1, TP2, PP2, TP2 PP2) and against files
written by Megatron-LM core_v0.16.1; TE names against files written by Gaudi Megatron's saver and the source, as
Transformer Engine cannot be built without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ckptconv.cuts import COLUMN, GATED_COLUMN, HEADS_COLUMN, QKV_COLUMN, REPLICATED, ROW
from ckptconv.errors import SourceError
from ckptconv.formats import mcore_bert, megatron_args
from ckptconv.formats.table import Ignore, Row
from ckptconv.lazy import LazyTensor, Transposed
from ckptconv.messages import When
from ckptconv.spec import ModelSpec

EMBEDDINGS, LAYER, FINAL, OUTPUT = "embeddings", "transformer layer {i}", "final norm", "output layer"
MTP = "mtp layer {i}"
_L = "decoder.layers.{i}."
_A, _M = _L + "self_attention.", _L + "mlp."
_E, _G = _M + "experts.local_experts.{e}.", _M + "experts."


def _tied(spec: ModelSpec, layer: int | None) -> bool:
    return spec.tied


def _mtp(spec: ModelSpec, layer: int | None) -> bool:
    return spec.mtp_layers > 0


def _dense(spec: ModelSpec, layer: int | None) -> bool:
    return not spec.has_experts(layer)


def _experts(spec: ModelSpec, layer: int | None) -> bool:
    return spec.has_experts(layer)


def _shared(spec: ModelSpec, layer: int | None) -> bool:
    return spec.shared_norm


def _and(one: When, other: When) -> When:
    return lambda s, i: one(s, i) and other(s, i)


W, V = "mlp l0 weight W", "mlp l0 weight V"

ENDS = (
    Row(EMBEDDINGS, ("word embeddings",),     "embedding.word_embeddings.weight", COLUMN, vocab=True),
    Row(EMBEDDINGS, ("word embeddings",),     "output_layer.weight", COLUMN, vocab=True, last_stage=True, when=_tied),
    Row(EMBEDDINGS, ("word embeddings",),     "embedding.word_embeddings.weight", COLUMN, vocab=True, mtp_stage=True,
        when=_mtp),
    Row(EMBEDDINGS, ("position embeddings",), "embedding.position_embeddings.weight", REPLICATED),
    Row(FINAL, ("weight",),                   "decoder.final_layernorm.weight", REPLICATED),
    Row(FINAL, ("bias",),                     "decoder.final_layernorm.bias", REPLICATED),
    Row(OUTPUT, ("weight",),                  "output_layer.weight", COLUMN, vocab=True),
)
ATTENTION = (
    Row(LAYER, ("input norm weight",),        _L + "input_layernorm.weight", REPLICATED),
    Row(LAYER, ("input norm bias",),          _L + "input_layernorm.bias", REPLICATED),
    Row(LAYER, ("qkv weight",),               _A + "linear_qkv.weight", QKV_COLUMN),
    Row(LAYER, ("qkv bias",),                 _A + "linear_qkv.bias", QKV_COLUMN),
    Row(LAYER, ("q norm weight",),            _A + "q_layernorm.weight", REPLICATED),
    Row(LAYER, ("k norm weight",),            _A + "k_layernorm.weight", REPLICATED),
    Row(LAYER, ("attention sinks",),          _A + "core_attention.softmax_offset", COLUMN),
    Row(LAYER, ("q proj weight",),            _A + "linear_q_proj.weight", HEADS_COLUMN),
    Row(LAYER, ("q down weight",),            _A + "linear_q_down_proj.weight", COLUMN),
    Row(LAYER, ("q down norm weight",),       _A + "q_layernorm.weight", REPLICATED),
    Row(LAYER, ("q up weight",),              _A + "linear_q_up_proj.weight", HEADS_COLUMN),
    Row(LAYER, ("kv down weight",),           _A + "linear_kv_down_proj.weight", COLUMN),
    Row(LAYER, ("kv down norm weight",),      _A + "kv_layernorm.weight", REPLICATED),
    Row(LAYER, ("kv up weight",),             _A + "linear_kv_up_proj.weight", HEADS_COLUMN),
    Row(LAYER, ("dense weight",),             _A + "linear_proj.weight", ROW),
    Row(LAYER, ("dense bias",),               _A + "linear_proj.bias", REPLICATED),
    # Of layers of one's own (--spec): the names of examples/megatron_layers and of Megatron-Bridge.
    Row(LAYER, ("attention output norm weight",), _A + "linear_proj.post_layernorm.weight", REPLICATED),
    Row(LAYER, ("post norm weight",),         _L + "pre_mlp_layernorm.weight", REPLICATED),
    Row(LAYER, ("post norm bias",),           _L + "pre_mlp_layernorm.bias", REPLICATED),
    Row(LAYER, ("input norm weight",),        _L + "pre_mlp_layernorm.weight", REPLICATED, double=True, when=_shared),
    Row(LAYER, ("input norm bias",),          _L + "pre_mlp_layernorm.bias", REPLICATED, double=True, when=_shared),
    Row(LAYER, ("mlp output norm weight",),   _M + "linear_fc2.post_layernorm.weight", REPLICATED),
)
DENSE = (
    Row(LAYER, (W, V),                        _M + "linear_fc1.weight", GATED_COLUMN, when=_dense),
    Row(LAYER, ("mlp l0 weight",),            _M + "linear_fc1.weight", COLUMN, when=_dense),
    Row(LAYER, ("mlp l0 bias W", "mlp l0 bias V"), _M + "linear_fc1.bias", GATED_COLUMN, when=_dense),
    Row(LAYER, ("mlp l0 bias",),              _M + "linear_fc1.bias", COLUMN, when=_dense),
    Row(LAYER, ("mlp l1 weight",),            _M + "linear_fc2.weight", ROW, when=_dense),
    Row(LAYER, ("mlp l1 bias",),              _M + "linear_fc2.bias", REPLICATED, when=_dense),
)
ROUTER = (
    Row(LAYER, ("router weight",),            _M + "router.weight", REPLICATED),
    Row(LAYER, ("router bias",),              _M + "router.bias", REPLICATED),
    Row(LAYER, ("router score correction bias",), _M + "router.expert_bias", REPLICATED),
    Row(LAYER, ("shared mlp l0 weight W", "shared mlp l0 weight V"), _M + "shared_experts.linear_fc1.weight",
        GATED_COLUMN),
    Row(LAYER, ("shared mlp l0 weight",),     _M + "shared_experts.linear_fc1.weight", COLUMN),
    Row(LAYER, ("shared mlp l1 weight",),     _M + "shared_experts.linear_fc2.weight", ROW),
    Row(LAYER, ("shared gate weight",),       _M + "shared_experts.gate_weight", REPLICATED),
)
#: SequentialMLP: a module per expert.
EXPERTS = (
    Row(LAYER, (W, V),                        _E + "linear_fc1.weight", GATED_COLUMN, when=_experts),
    Row(LAYER, ("mlp l0 weight",),            _E + "linear_fc1.weight", COLUMN, when=_experts),
    Row(LAYER, ("mlp l0 bias W", "mlp l0 bias V"), _E + "linear_fc1.bias", ROW, when=_experts, vector=True),
    Row(LAYER, ("mlp l0 bias",),              _E + "linear_fc1.bias", ROW, when=_experts, vector=True),
    Row(LAYER, ("mlp l1 weight",),            _E + "linear_fc2.weight", ROW, when=_experts),
    Row(LAYER, ("mlp l1 bias",),              _E + "linear_fc2.bias", REPLICATED, when=_experts, vector=True),
)
#: A layer that predicts a token further, beside those of a transformer layer.
MTP_ONLY = (
    Row(MTP, ("enorm weight",),               "mtp.layers.{i}.enorm.weight", REPLICATED),
    Row(MTP, ("hnorm weight",),               "mtp.layers.{i}.hnorm.weight", REPLICATED),
    Row(MTP, ("eh proj weight",),             "mtp.layers.{i}.eh_proj.weight", COLUMN),
    Row(MTP, ("final norm weight",),          "mtp.layers.{i}.final_layernorm.weight", REPLICATED),
)  # fmt: skip

#: What Transformer Engine's fused linears call the norms in front of them, in every layer and in dense ones.
TE_NAMES = {
    _L + "input_layernorm.weight":   _A + "linear_qkv.layer_norm_weight",
    _L + "input_layernorm.bias":     _A + "linear_qkv.layer_norm_bias",
}
TE_DENSE_NAMES = {
    _L + "pre_mlp_layernorm.weight": _M + "linear_fc1.layer_norm_weight",
    _L + "pre_mlp_layernorm.bias":   _M + "linear_fc1.layer_norm_bias",
}
#: The same with multi-latent attention, where the norm before attention stands alone.
TE_LATENT_NAMES = {
    "q down norm weight":  _A + "linear_q_up_proj.layer_norm_weight",
    "kv down norm weight": _A + "linear_kv_up_proj.layer_norm_weight",
}
#: Multi-latent projections that its spec does not cut (core_v0.14.0 and newer; before that as the local one).
TE_WHOLE = ("q down weight", "kv down weight")
#: TEGroupedMLP: one module for all experts, with a weight and a bias per expert.
GROUPED_NAMES = {
    _E + f"linear_{linear}.{kind}": _G + f"linear_{linear}.{kind}{{e}}"
    for linear in ("fc1", "fc2") for kind in ("weight", "bias")
}  # fmt: skip

#: Legacy GroupedMLP (`moe_grouped_gemm` of the local spec, last in megatron-core 0.16): one tensor for all experts of a
#: rank, and what it holds in EXPERTS' names. Only read.
LEGACY = {
    ".mlp.experts.weight1": ".mlp.experts.local_experts.{e}.linear_fc1.weight",
    ".mlp.experts.weight2": ".mlp.experts.local_experts.{e}.linear_fc2.weight",
}

IMPLEMENTATIONS = ("local", "transformer_engine")
#: What the module of an MTP layer's transformer layer is called, from megatron-core 0.17 on and before.
MTP_MODULES = ("mtp_model_layer", "transformer_layer")


def _transformer_engine(rows: tuple[Row, ...]) -> Iterator[Row]:
    """The rows in Transformer Engine's names; where those depend on the layer, a row for each kind."""
    for row in rows:
        if row.name in TE_NAMES:
            yield replace(row, name=TE_NAMES[row.name], when=lambda s, i: s.mla is None and s.norms != "post")
            yield replace(row, when=lambda s, i: s.mla is not None or s.norms == "post")
        elif row.name in TE_DENSE_NAMES:
            inside: When = lambda s, i: not s.has_experts(i) and s.norms != "post"  # noqa: E731
            yield replace(row, name=TE_DENSE_NAMES[row.name], when=_and(row.when, inside))
            yield replace(row, when=_and(row.when, lambda s, i: s.has_experts(i) or s.norms == "post"))
        elif row.keys[0] in TE_LATENT_NAMES:
            yield replace(row, name=TE_LATENT_NAMES[row.keys[0]])
        elif row.keys[0] in TE_WHOLE:
            yield replace(row, cut=REPLICATED)
        else:
            yield row


@functools.cache
def table(
    implementation: str, grouped: bool = False, mtp_module: str = MTP_MODULES[0], bert: bool = False
) -> tuple[Row, ...]:
    """The rows of one dialect: whose layers (`IMPLEMENTATIONS`), whose experts, whose name for MTP's layer, BERT's."""
    layer: tuple[Row, ...] = (*ATTENTION, *DENSE, *ROUTER, *EXPERTS)
    if implementation == "transformer_engine":
        layer = tuple(_transformer_engine(layer))
    if grouped:
        layer = tuple(replace(row, name=GROUPED_NAMES.get(row.name, row.name)) for row in layer)
    inner = f"mtp.layers.{{i}}.{mtp_module}."
    behind = tuple(replace(row, message=MTP, name=row.name.replace(_L, inner)) for row in layer)
    rows = (*ENDS, *layer, *MTP_ONLY, *behind)
    return mcore_bert.table(rows) if bert else rows


@dataclass(frozen=True)
class Dialect:
    """Which of the tables a checkpoint is in."""

    implementation: str
    grouped: bool = False
    mtp_module: str = MTP_MODULES[0]
    bert: bool = False

    @property
    def table(self) -> tuple[Row, ...]:
        """Its rows."""
        return table(self.implementation, self.grouped, self.mtp_module, self.bert)


IGNORE = (Ignore("_extra_state", "state of fp8 scaling or a placeholder; Megatron makes new ones"),)

HYBRID = (
    "a HybridModel checkpoint (attention, MLP and Mamba layers, each with a number of its own; of attention and MLP "
    "alone Megatron-LM's tools/checkpoint/gpt_hybrid_conversion.py makes a GPTModel's)"
)
#: Names that only other kinds of Megatron models have, and what they are.
FOREIGN = {
    "decoder.final_norm.": HYBRID,
    ".mixer.": HYBRID,
    "language_model": "a legacy (pre megatron-core) checkpoint",
    ".cross_attention.": "a T5 checkpoint",
}

_FUSED = tuple(
    name.rsplit(".", 2)[1] + ".layer_norm_weight"
    for name in (*TE_NAMES.values(), *TE_DENSE_NAMES.values(), *TE_LATENT_NAMES.values())
)


def dialect(names: list[str]) -> Dialect:
    """Which dialect a rank's names are in."""
    fused = any(name.endswith(_FUSED) for name in names)
    grouped = any(".mlp.experts.linear_fc1.weight" in name for name in names)
    old = any(f".{MTP_MODULES[1]}." in name for name in names if name.startswith("mtp."))
    return Dialect(IMPLEMENTATIONS[fused], grouped, MTP_MODULES[old], mcore_bert.is_bert(names))


def unpacked(name: str, tensor: LazyTensor, experts: int, where: str) -> dict[str, LazyTensor]:
    """The tensors of the `experts` of a rank that a tensor of legacy GroupedMLP holds; any other tensor as it is.

    weight1 is declared [h, experts * c] and weight2 [experts * c, h], but `GroupedMLP.forward` sees both expert after
    expert: [experts, h, c], [experts, c, h], the transposes of fc1 [c, h] and fc2 [h, c]. Raises SourceError.
    """
    ending = next((ending for ending in LEGACY if name.endswith(ending)), None)
    if ending is None:
        return {name: tensor}
    first = ending == ".mlp.experts.weight1"
    if experts < 1 or len(tensor.shape) != 2 or tensor.shape[first] % experts:
        raise SourceError(
            f"{where}: {name} is {list(tensor.shape)}, expected two axes that divide into {experts} experts of a rank "
            "(num_experts over expert_model_parallel_size in the args). Are the args of the same checkpoint?"
        )
    rows, cols = tensor.shape
    high, wide = (rows, cols // experts) if first else (rows // experts, cols)
    whole = tensor.seen((experts * high, wide))
    template = name.removesuffix(ending) + LEGACY[ending]
    return {template.format(e=e): Transposed(whole.narrow_rows(e * high, high)) for e in range(experts)}


def target_spec(spec: ModelSpec) -> ModelSpec:
    """The model as megatron-core builds it: linear biases are all or none, so missing ones are written as zeros."""
    linear = megatron_args.linear_bias(spec)
    return spec.replace(
        qkv_bias=linear or megatron_args.qkv_bias(spec), dense_bias=linear, mlp_bias=linear
    )


def padded_vocab(vocab_size: int, divisible_by: int, tp: int) -> int:
    """Rows of the embedding: `vocab_size` rounded up to a multiple of `divisible_by * tp`."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple
