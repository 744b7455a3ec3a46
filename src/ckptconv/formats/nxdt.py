"""NxD Training (AWS Neuron): names of its Hugging Face style, its Megatron style and of DBRX, and how they are cut.

Layers are counted over the whole model, whatever stage they are on. Experts lie in one tensor for all, transposed
against nn.Linear: [experts, in, out].

Source: neuronx-distributed 0.18 (`modules/qkv_linear.py`, `modules/moe/`), neuronx-distributed-training 1.6
(`models/hf_models`, `models/megatron`). Verified: dense models against files of AWS's own converter; experts against
what the modules compute from such tensors.

Legend: e experts of a rank, m ffn of one expert, h hidden.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ckptconv.cuts import COLUMN, GATED_COLUMN, REPLICATED, ROW, Cut
from ckptconv.errors import LayoutError
from ckptconv.formats.nxdt_heads import Heads
from ckptconv.formats.table import Ignore, Row
from ckptconv.lazy import Shape, matrix
from ckptconv.ops import PLAIN, TRANSPOSE, Tile, View
from ckptconv.spec import ModelSpec, MoE, Rope

EMBEDDINGS, LAYER, FINAL, OUTPUT = "embeddings", "transformer layer {i}", "final norm", "output layer"
W, V, DOWN = "mlp l0 weight W", "mlp l0 weight V", "mlp l1 weight"

STYLES = ("hf", "megatron", "dbrx")
#: How the hf and dbrx styles hold queries, keys and values: names -> which heads each has.
FORMS = {
    "separate":  {"q_proj.weight": "q", "k_proj.weight": "k", "v_proj.weight": "v"},
    "linear":    {"qkv_proj.weight_q": "q", "qkv_proj.weight_k": "k", "qkv_proj.weight_v": "v"},
    "fused":     {"qkv_proj.weight_qkv": "qkv"},
    "coalesced": {"qkv_proj.weight": "qkv"},
}  # fmt: skip
#: The Megatron style: with a key head for every query head, and with fewer.
MEGATRON_FORMS = {
    "joined":    {"query_key_value.weight": "qkv"},
    "grouped":   {"query.weight": "q", "key_value.weight": "kv"},
}  # fmt: skip
#: Rows of its fused tensors on a rank: all heads of one kind above those of the next (AWS's converter), or head by head
#: (its model).
BLOCKED, INTERLEAVED = "blocked", "interleaved"


def _tied(spec: ModelSpec, layer: int | None) -> bool:
    return spec.tied


def _experts(spec: ModelSpec, layer: int | None) -> bool:
    return spec.has_experts(layer)


def _dense(spec: ModelSpec, layer: int | None) -> bool:
    return not spec.has_experts(layer)


@dataclass(frozen=True)
class ExpertColumn(Cut):
    """W and V [e, m, h]: for each expert W_t above V_t, each padded with zeros to a multiple of `multiple` rows."""

    multiple: int = 1

    def height(self, keys: Sequence[Shape], tp: int) -> tuple[int, int]:
        """Rows of a rank's W, without and with padding."""
        each = keys[0][-2] // tp
        return each, -(-each // self.multiple) * self.multiple

    def shape(self, keys: Sequence[Shape], tp: int) -> Shape:
        return (keys[0][0], len(keys) * self.height(keys, tp)[1], keys[0][-1])

    def tiles(self, keys: Sequence[Shape], index: int, tp: int) -> list[Tile]:
        (count, m, cols), (each, high) = keys[0], self.height(keys, tp)
        return [
            Tile(t, e * m + t * each, 0, (e * len(keys) + index) * high, 0, each, cols)
            for t in range(tp) for e in range(count)
        ]  # fmt: skip

    def blanks(self, keys: Sequence[Shape], tp: int) -> list[Tile]:
        each, high = self.height(keys, tp)
        tops = range(0, keys[0][0] * len(keys) * high, high) if high > each else ()
        return [Tile(t, 0, 0, top + each, 0, high - each, keys[0][-1]) for t in range(tp) for top in tops]

    def check(self, name: str, keys: Sequence[Shape], tp: int, spec: ModelSpec) -> None:
        if keys[0][-2] % tp:
            raise LayoutError(f"{name}: tp {tp} does not divide the {keys[0][-2]} rows of an expert.")


@dataclass(frozen=True)
class ExpertRow(Cut):
    """[e, h, m]: the last dimension, each rank's part padded with zeros to a multiple of `multiple`."""

    multiple: int = 1

    def shape(self, keys: Sequence[Shape], tp: int) -> Shape:
        return (*keys[0][:-1], -(-(keys[0][-1] // tp) // self.multiple) * self.multiple)

    def tiles(self, keys: Sequence[Shape], index: int, tp: int) -> list[Tile]:
        rows, each = matrix(keys[0])[0], keys[0][-1] // tp
        return [Tile(t, 0, t * each, 0, 0, rows, each) for t in range(tp)]

    def blanks(self, keys: Sequence[Shape], tp: int) -> list[Tile]:
        rows, each, wide = matrix(keys[0])[0], keys[0][-1] // tp, self.shape(keys, tp)[-1]
        return [Tile(t, 0, 0, 0, each, rows, wide - each) for t in range(tp)] if wide > each else []


@dataclass(frozen=True)
class Names:
    """What one style calls things."""

    embedding: str
    layer: str
    attention: str
    dense: str
    input_norm: str
    post_norm: str
    final_norm: str
    output: str
    experts: str
    l0: str = ""  # DBRX has no dense layers
    l1: str = ""


NAMES = {
    "hf": Names(
        embedding="model.embed_tokens.weight",
        layer="model.layers.{n}.",
        attention="self_attn.",
        dense="self_attn.o_proj.weight",
        input_norm="input_layernorm.weight",
        post_norm="post_attention_layernorm.weight",
        final_norm="model.norm.weight",
        output="lm_head.weight",
        l0="mlp.gate_up_proj.weight",
        l1="mlp.down_proj.weight",
        experts="mlp.",
    ),
    "megatron": Names(
        embedding="language_model.embedding.word_embeddings.weight",
        layer="language_model.encoder.layers.{n}.",
        attention="self_attention.",
        dense="self_attention.dense.weight",
        input_norm="input_layernorm.weight",
        post_norm="post_attention_layernorm.weight",
        final_norm="language_model.encoder.final_layernorm.weight",
        output="language_model.output_layer.weight",
        l0="mlp.dense_h_to_4h.weight",
        l1="mlp.dense_4h_to_h.weight",
        experts="mlp.moe.",
    ),
    "dbrx": Names(
        embedding="transformer.wte.weight",
        layer="transformer.blocks.{n}.",
        attention="norm_attn_norm.attn.",
        dense="norm_attn_norm.attn.o_proj.weight",
        input_norm="norm_attn_norm.norm_1.weight",
        post_norm="norm_attn_norm.norm_2.weight",
        final_norm="transformer.norm_f.weight",
        output="lm_head.weight",
        experts="ffn.",
    ),
}

IGNORE = (
    Ignore("rotary_emb.inv_freq", "rotary frequencies are computed, not trained"),
)

#: What a name may contain that only other checkpoints have, and what they are.
FOREIGN = {
    "lora_": "adapters (LoRA): merge them into the model first",
    ".scale": "quantised weights",
    "position_embeddings": "a GPT model with learned positions",
    ".bias": "biases, which no model of the supported styles has",
    "shared_expert": "shared experts",
}


@dataclass(frozen=True)
class Dialect:
    """How a checkpoint holds its model. `head`: tied models have an output layer too; `mlp_op`: part of the experts'
    names, which neuronx-distributed before 2.20 lacked; `multiple`: see `ExpertColumn`."""

    style: str
    form: str
    rows: str = BLOCKED  # of fused tensors in the Megatron style
    head: bool = True
    mlp_op: bool = True
    multiple: int = 1
    experts: str = "module"  # or upstream: as AWS's Mixtral converter writes them, not transposed; only read

    def table(self, heads: Heads) -> tuple[Row, ...]:
        """Its rows for a model's heads on its ranks."""
        return _table(self, heads)


@functools.cache
def _table(dialect: Dialect, heads: Heads) -> tuple[Row, ...]:
    names = NAMES[dialect.style]
    layer = names.layer
    forms = MEGATRON_FORMS if dialect.style == "megatron" else FORMS
    interleaved = dialect.style == "megatron" and dialect.rows == INTERLEAVED
    head = Row(
        EMBEDDINGS, ("word embeddings",), names.output, COLUMN, vocab=True, last_stage=True, double=True, when=_tied
    )
    experts = layer + names.experts + "expert_mlps." + ("mlp_op." if dialect.mlp_op else "")
    column: Cut = ExpertColumn(dialect.multiple)
    row: Cut = ExpertRow(dialect.multiple)
    view: View = TRANSPOSE
    if dialect.experts == "upstream":  # the dimensions that the module cuts, of tensors that are not transposed
        column, row, view = ROW, ExpertColumn(), PLAIN
    inside = Row(LAYER, (), "", REPLICATED, view=view, stacked=True, when=_experts)
    return (
        Row(EMBEDDINGS, ("word embeddings",),   names.embedding, COLUMN, vocab=True),
        *(Row(LAYER, ("qkv weight",),           layer + names.attention + name, heads.cut(kinds, interleaved))
          for name, kinds in forms[dialect.form].items()),
        Row(LAYER, ("dense weight",),           layer + names.dense, heads.columns()),
        Row(LAYER, (W, V),                      layer + names.l0, GATED_COLUMN, when=_dense),
        Row(LAYER, (DOWN,),                     layer + names.l1, ROW, when=_dense),
        Row(LAYER, ("router weight",),          layer + names.experts + "router.linear_router.weight", REPLICATED),
        replace(inside, keys=(W, V),            name=experts + "gate_up_proj.weight", cut=column),
        replace(inside, keys=(DOWN,),           name=experts + "down_proj.weight", cut=row),
        Row(LAYER, ("input norm weight",),      layer + names.input_norm, REPLICATED),
        Row(LAYER, ("post norm weight",),       layer + names.post_norm, REPLICATED),
        Row(FINAL, ("weight",),                 names.final_norm, REPLICATED),
        Row(OUTPUT, ("weight",),                names.output, COLUMN, vocab=True),
        *((head,) if dialect.head else ()),
    )  # fmt: skip


def dialect_of(names: Iterable[str]) -> Dialect | None:
    """The dialect that names are in, less what only shapes and values tell; None for names of something else."""
    known = set(names)
    for style, words in NAMES.items():
        prefix = words.layer.partition("{")[0]
        own = [name for name in known if name.startswith(prefix)]
        if not own:
            continue
        forms = MEGATRON_FORMS if style == "megatron" else FORMS
        for form, parts in forms.items():
            if any(name.endswith("." + words.attention.split(".")[-2] + "." + next(iter(parts))) for name in own):
                old = any(name.endswith(".expert_mlps.down_proj.weight") for name in own)
                return Dialect(style, form, mlp_op=not old)
    return None


#: Spec fields of which any value fits.
FREE = ("family", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
        "kv_channels", "vocab_size", "max_position_embeddings", "seq_length", "dtype", "norm_epsilon", "tied", "rope",
        "sliding_window", "moe")  # fmt: skip


def refusals(spec: ModelSpec, style: str) -> list[str]:
    """What the modules of a style cannot be told or have no tensors for; empty when they can hold the model."""
    other: dict[str, object] = {}
    if style == "dbrx":
        other = {"norm": "LayerNorm", "norm_bias": False, "qkv_clip": spec.qkv_clip}
    reasons = []
    for field in dataclasses.fields(ModelSpec):
        if field.name in FREE or (field.default is dataclasses.MISSING and field.name not in other):
            continue
        want, found = other.get(field.name, field.default), getattr(spec, field.name)
        if found != want:
            reasons.append(f"{field.name}: {found} (only {want})")
    if spec.kv_channels * spec.num_attention_heads != spec.hidden_size:
        reasons.append(
            f"head dim {spec.kv_channels}: NxDT computes {spec.hidden_size} / {spec.num_attention_heads} heads"
        )
    rope = spec.rope or Rope()
    if spec.rope is None or rope.interleaved or rope.percent != 1:
        reasons.append(f"rope: {spec.rope} (only on whole heads, in halves)")
    if style == "dbrx" and spec.moe is None:
        reasons.append("moe: None (DBRX always has experts)")
    if spec.moe:
        if not all(spec.moe.layers):
            reasons.append("moe: layers without experts")
        plain = MoE(spec.moe.num_experts, spec.moe.topk, spec.moe.ffn_hidden_size, spec.moe.layers)
        for field in dataclasses.fields(MoE):
            want, found = getattr(plain, field.name), getattr(spec.moe, field.name)
            if found != want:
                reasons.append(f"moe.{field.name}: {found} (only {want})")
    return reasons


def style_of(spec: ModelSpec, wanted: str) -> str:
    """DBRX has names of its own in the hf style."""
    return "dbrx" if wanted == "hf" and spec.norm == "LayerNorm" and spec.moe is not None else wanted


def counts(num_layers: int, pp: int, vpp: int) -> tuple[int, ...]:
    """Layers of each of pp * vpp stages; what does not divide goes to the last ones, one each. Raises LayoutError."""
    stages = pp * vpp
    each, rest = divmod(num_layers, stages)
    if not each:
        raise LayoutError(f"{num_layers} layers on {stages} stages (pp {pp}, vpp {vpp}): some would have none.")
    return tuple(each + (stage >= stages - rest) for stage in range(stages))
