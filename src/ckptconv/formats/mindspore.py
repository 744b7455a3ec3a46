"""MindSpore Transformers (mindformers) models: names in its safetensors and .ckpt files.

Names are those of megatron-core's local spec, layers and experts counted over the whole model, with layouts of its own:
which one a file has is a setting of the model (`use_interleaved_weight_layout_mlp`,
`use_contiguous_weight_layout_attention`) and not to be seen in the file.

Source: mindformers r1.6.0, r1.8.0 and master (January 2026): `parallel_core/training_graph`, `models/*/utils.py`,
`toolkit/weight_convert`, `models/llama`. Verified: dense rows of both layouts against files written by MindSpore 2.10
and by NVIDIA's core_r0.12.0 with the `core_mf` loader; experts, multi-latent attention and the older names against the
source only.

Legend: h hidden, f ffn, e experts, m ffn of one expert.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from ckptconv.cuts import COLUMN, Cut, HeadsOfQKV
from ckptconv.formats import mcore, megatron_args
from ckptconv.formats.table import Row
from ckptconv.lazy import Assembly, LazyTensor, Piece, Shape, matrix
from ckptconv.ops import JOINED_QKV, STACK, TRANSPOSE, EachExpert, Op, Then, Tile, View
from ckptconv.spec import ModelSpec

INTERLEAVED, CONTIGUOUS, GROUPED = "interleaved", "contiguous", "grouped"
#: Rows of a gated fc1: gate0, up0, gate1, up1, ... (mindformers from r1.7.0 on), or all gates above all ups.
FC1_LAYOUTS = (INTERLEAVED, CONTIGUOUS)
#: Rows of linear_qkv: per query group as Megatron's (mindformers from r1.7.0 on), or all of q, k and v in turn.
QKV_LAYOUTS = (GROUPED, CONTIGUOUS)

#: Names of the llama models before r1.6 -> those of today's models.
OLDER = {
    "model.tok_embeddings.embedding_weight": "embedding.word_embeddings.weight",
    "model.norm_out.weight":  "decoder.final_layernorm.weight",
    "lm_head.weight":         "output_layer.weight",
    "attention.wq.":          "self_attention.linear_q.",
    "attention.wk.":          "self_attention.linear_k.",
    "attention.wv.":          "self_attention.linear_v.",
    "attention.w_qkv.":       "self_attention.linear_qkv.",
    "attention.wo.":          "self_attention.linear_proj.",
    "feed_forward.w1.":       "mlp.gating.",
    "feed_forward.w3.":       "mlp.hidden.",
    "feed_forward.w_gate_hidden.": "mlp.linear_fc1.",
    "feed_forward.w2.":       "mlp.linear_fc2.",
    "attention_norm.":        "input_layernorm.",
    "ffn_norm.":              "pre_mlp_layernorm.",
}  # fmt: skip
_OLDER_LAYER = re.compile(r"model\.layers\.(\d+)\.((?:\w+\.){1,2})(\w+)")


@dataclass(frozen=True)
class Ignore:
    """Entries that are no weights: names that match, and why they are left out."""

    pattern: str
    reason: str


IGNORE = (
    Ignore(r"(adam_[mv]|moment[12]|accu_grads|grad_accum)\..*",         "optimizer state is not converted"),
    Ignore(r"(global_step|epoch_num|step_num|current_iterator_step|last_overflow_iterator_step|loss_scale|scale_sense|"
           r"beta[12]_power|learning_rate|weight_decay)",               "a counter or setting of the run"),
    Ignore(r".*dropout.*",                                              "state of a random number generator"),
    Ignore(r".*\.router\.(expert_load|fi_accu)",                        "counts of tokens per expert"),
)  # fmt: skip


def renamed(name: str) -> str:
    """Today's name of a parameter of the older llama models; others as they are."""
    if name in OLDER:
        return OLDER[name]
    match = _OLDER_LAYER.fullmatch(name)
    if match is None or match[2] not in OLDER:
        return name
    return f"decoder.layers.{match[1]}.{OLDER[match[2]]}{match[3]}"


@dataclass(frozen=True)
class Whole(Cut):
    """What an op of one part makes of the keys, on a single rank."""

    op: Op
    spec: ModelSpec

    def shape(self, keys: Sequence[Shape], tp: int) -> Shape:
        return self.op.part_shapes(keys, self.spec)[0]

    def tiles(self, keys: Sequence[Shape], index: int, tp: int) -> list[Tile]:
        return self.op.tiles(keys, index, self.spec)


@dataclass(frozen=True)
class Alternating(Cut):
    """Keys [f, h] in one tensor [n * f, h], row by row in turn. A round is seen as one row, of which keys are runs."""

    def shape(self, keys: Sequence[Shape], tp: int) -> Shape:
        rows, cols = matrix(keys[0])
        return (rows // tp, len(keys) * cols)

    def stored(self, keys: Sequence[Shape], tp: int) -> Shape:
        return (len(keys) * keys[0][0] // tp, *keys[0][1:])

    def tiles(self, keys: Sequence[Shape], index: int, tp: int) -> list[Tile]:
        rows, cols = matrix(keys[index])
        return [Tile(t, t * (rows // tp), 0, 0, index * cols, rows // tp, cols) for t in range(tp)]


@dataclass(frozen=True)
class Flat(View):
    """[e, n, c] stored as [e * n, c]."""

    experts: int

    def shape(self, seen: Shape) -> Shape:
        return (seen[0] * seen[1], seen[2])

    def seen(self, stored: LazyTensor) -> LazyTensor:
        return _shaped(stored, (self.experts, stored.rows // self.experts, stored.cols))

    def stored(self, seen: LazyTensor) -> LazyTensor:
        return _shaped(seen, self.shape(seen.shape))


def _shaped(tensor: LazyTensor, shape: Shape) -> LazyTensor:
    """The same rows under another number of dimensions."""
    piece = Piece(0, 0, tensor.rows, tensor.cols, tensor, 0, 0)
    return Assembly(tensor.dtype, shape, (piece,))


@dataclass(frozen=True)
class Dialect:
    """How a file says what can be said in several ways.

    fc1, qkv: layouts of fused tensors; split_fc1, split_qkv: they are apart, as for inference and in the older models;
    fused_latent: down projections of multi-latent attention are one tensor; local_experts: each expert has tensors of
    its own; gamma: LayerNorms have gamma and beta instead of weight and bias.
    """

    fc1: str = INTERLEAVED
    qkv: str = GROUPED
    split_fc1: bool = False
    split_qkv: bool = False
    fused_latent: bool = False
    local_experts: bool = False
    gamma: bool = False


def dialect(names: Collection[str], fc1: str, qkv: str) -> Dialect:
    """What the names tell, beside what they cannot."""

    def some_name(part: str) -> bool:
        return any(part in name for name in names)

    return Dialect(
        fc1, qkv, some_name(".gating."), some_name(".linear_q."), some_name(".linear_kvb."),
        some_name(".local_experts."), some_name("layernorm.gamma"),
    )  # fmt: skip


def table(spec: ModelSpec, how: Dialect) -> tuple[Row, ...]:
    """The rows of one model."""
    rows = mcore.table("local", mtp_module="transformer_layer")
    made = [new for row in rows if not row.last_stage for new in _rows(row, spec, how)]
    if spec.norm != "LayerNorm" or not how.gamma:
        return tuple(made)
    gammas = {"layernorm.weight": "layernorm.gamma", "layernorm.bias": "layernorm.beta"}
    for old, new in gammas.items():
        made = [replace(row, name=row.name.replace(old, new)) for row in made]
    return tuple(made)


def _rows(row: Row, spec: ModelSpec, how: Dialect) -> Iterator[Row]:
    """What stands for a row of megatron-core's."""
    split = [".gating.", ".hidden."]
    if row.expert:
        yield from () if spec.moe is None else _experts(row, spec, how)
    elif ".linear_fc1." in row.name and len(row.keys) == 2 and how.split_fc1:
        for key, name in zip(row.keys, split, strict=True):
            yield replace(row, keys=(key,), name=row.name.replace(".linear_fc1.", name), cut=COLUMN)
    elif ".linear_fc1." in row.name and len(row.keys) == 2 and how.fc1 == INTERLEAVED:
        yield replace(row, cut=Alternating())
    elif ".linear_qkv." in row.name and how.split_qkv:
        r, d = spec.heads_per_group, spec.kv_channels
        for name, first, count in (("linear_q.", 0, r), ("linear_k.", r, 1), ("linear_v.", r + 1, 1)):
            yield replace(row, name=row.name.replace("linear_qkv.", name), cut=HeadsOfQKV(first, count, r + 2, d))
    elif ".linear_qkv." in row.name and how.qkv == CONTIGUOUS:
        yield replace(row, cut=Whole(JOINED_QKV, spec))
    elif how.fused_latent and row.keys[0] in _FUSED_LATENT:
        yield from _latent(row)
    else:
        yield row


#: Key -> name with fused down projections, where the norm on the latent of keys is called that on keys.
_FUSED_LATENT = {
    "q proj weight": None, "q down weight": None, "kv down weight": None,
    "q up weight": "linear_qb.weight", "kv up weight": "linear_kvb.weight", "kv down norm weight": "k_layernorm.weight",
}  # fmt: skip


def _latent(row: Row) -> Iterator[Row]:
    """[q down; kv down], or [q; kv down] without a latent of queries, is linear_qkv."""
    (key,) = row.keys
    name = _FUSED_LATENT[key]
    folder = row.name.rsplit(".", 2)[0]
    if name is not None:
        yield replace(row, name=f"{folder}.{name}")
    elif key != "kv down weight":  # that is the second of the pair
        yield replace(row, keys=(key, "kv down weight"), name=f"{folder}.linear_qkv.weight", cut=COLUMN)


def _experts(row: Row, spec: ModelSpec, how: Dialect) -> Iterator[Row]:
    """One tensor for all experts, each expert's transposed; its gates and ups lie side by side whatever `how` says."""
    assert spec.moe is not None
    if how.local_experts or "bias" in row.name:
        yield row
        return
    number = 1 if ".linear_fc1." in row.name else 2
    name = re.sub(r"local_experts\.\{e\}\.linear_fc\d\.weight", f"weight{number}", row.name)
    view = Then(Flat(spec.moe.num_experts), TRANSPOSE)
    yield replace(row, name=name, cut=Whole(EachExpert(STACK), spec), view=view, stacked=True)


def reshaped(name: str, tensor: LazyTensor, spec: ModelSpec) -> LazyTensor:
    """weight1 of r1.6, which is declared [h, e * 2m] but filled expert by expert, as later releases declare it."""
    if spec.moe is None or not name.endswith(".experts.weight1") or tensor.shape[:1] != (spec.hidden_size,):
        return tensor
    experts = spec.moe.num_experts
    return tensor.seen((tensor.rows * experts, tensor.cols // experts)) if tensor.cols % experts == 0 else tensor


def refusals(spec: ModelSpec) -> list[str]:
    """What mindformers' GPTModel cannot express, one sentence each: its settings are megatron-core's, less a few."""
    found = megatron_args.refusals(spec)
    if spec.model_type != "GPT":
        found.append(f"a {spec.model_type} model: only decoders are written.")
    for name, what in (("sinks", "trained sinks in the softmax"), ("local_rope", "a second rope"),
                       ("rope_layers", "layers without rope"), ("alibi", "ALiBi")):  # fmt: skip
        if getattr(spec, name):
            found.append(f"{what} ({name}): mindformers' GPTModel has no such setting.")
    if spec.moe and spec.mlp_bias:
        found.append("experts with biases: mindformers' experts have none.")
    return found
