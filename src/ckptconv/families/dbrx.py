"""DBRX: LayerNorm without biases, queries, keys and values fused and clipped, fine-grained experts in every layer.

Source: transformers `models/dbrx` at 4.57.6 and 5.23.0. Experts are matrices of all of them, [e*m, h] each, of which
w2 is the transposed second projection. The rotary base lies in `attn_config` (databricks' own code and transformers 4
read it there, transformers 5 at the top; both are written). Router weights are divided by their 1-norm.
"""

from __future__ import annotations

from typing import Any

from ckptconv.errors import SourceError
from ckptconv.families import rope
from ckptconv.families.family import Config, Family, Field, Row
from ckptconv.ops import COPY, EXPERTS_BELOW, EXPERTS_BESIDE, JOINED_QKV, TRANSPOSE
from ckptconv.spec import ModelSpec

EMBEDDINGS, LAYER, FINAL, OUTPUT = "embeddings", "transformer layer {i}", "final norm", "output layer"
_N, _F = "transformer.blocks.{i}.norm_attn_norm.", "transformer.blocks.{i}.ffn."
_STYLE = rope.Style(theta=10000.0, kinds=("default",))

ROWS = (
    Row(EMBEDDINGS, ("word embeddings",),   ("transformer.wte.weight",), COPY),
    Row(LAYER,      ("input norm weight",), (_N + "norm_1.weight",), COPY),
    Row(LAYER,      ("qkv weight",),        (_N + "attn.Wqkv.weight",), JOINED_QKV),
    Row(LAYER,      ("dense weight",),      (_N + "attn.out_proj.weight",), COPY),
    Row(LAYER,      ("post norm weight",),  (_N + "norm_2.weight",), COPY),
    Row(LAYER,      ("router weight",),     (_F + "router.layer.weight",), COPY),
    Row(LAYER,      ("mlp l0 weight W",),   (_F + "experts.mlp.w1",), EXPERTS_BELOW),
    Row(LAYER,      ("mlp l0 weight V",),   (_F + "experts.mlp.v1",), EXPERTS_BELOW),
    Row(LAYER,      ("mlp l1 weight",),     (_F + "experts.mlp.w2",), EXPERTS_BESIDE, TRANSPOSE),
    Row(FINAL,      ("weight",),            ("transformer.norm_f.weight",), COPY),
    Row(OUTPUT,     ("weight",),            ("lm_head.weight",), COPY),
)  # fmt: skip

#: Part of config.json -> its keys, what they say in a spec, and the class defaults.
_NESTED: dict[str, dict[str, tuple[str, int | None]]] = {
    "attn_config": {"kv_n_heads": ("num_query_groups", 1), "clip_qkv": ("qkv_clip", None)},
    "ffn_config": {"ffn_hidden_size": ("moe.ffn_hidden_size", 3584), "moe_num_experts": ("moe.num_experts", 4),
                   "moe_top_k": ("moe.topk", 1)},
}  # fmt: skip


def _part(config: Config, name: str, where: str) -> Config:
    part = config.get(name) or {}
    if not isinstance(part, dict):
        raise SourceError(f"{where}: {name} is {part!r}, expected an object.")
    return part


def _read(config: Config, where: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, keys in _NESTED.items():
        part = _part(config, name, where)
        for key, (field, default) in keys.items():
            values[field] = part.get(key, default)
            if isinstance(values[field], float) and field != "qkv_clip" and values[field].is_integer():
                values[field] = int(values[field])
    ffn, attention = _part(config, "ffn_config", where), _part(config, "attn_config", where)
    act, power = ffn.get("ffn_act_fn") or {"name": "silu"}, ffn.get("moe_normalize_expert_weights", 1.0)
    if act != {"name": "silu"} or power not in (None, 1):
        raise SourceError(
            f"{where}: ffn_act_fn {act!r} and moe_normalize_expert_weights {power!r}: expected silu, and 1 or null."
        )
    clip = values["qkv_clip"]
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, int | float) or clip <= 0):
        raise SourceError(f"{where}: clip_qkv is {clip!r}, expected a number above 0 or null.")
    values["qkv_clip"] = None if clip is None else float(clip)
    told = attention.get("rope_theta") or _part(config, "rope_parameters", where).get("rope_theta")
    # A head without attn_config's own says it at the top.
    settings = {**config, "rope_theta": told} if told else config
    values["rope"] = rope.read({**settings, "rope_parameters": None}, _STYLE, where)
    values["ffn_hidden_size"] = values["moe.ffn_hidden_size"]
    values["moe.normalize"] = power is not None
    layers = config.get("n_layers", 24)
    values["moe.layers"] = (1,) * layers if isinstance(layers, int) else ()
    return values


def _write(spec: ModelSpec) -> Config:
    parts: Config = {}
    for name, keys in _NESTED.items():
        parts[name] = {key: Field(field, key).of(spec) for key, (field, _) in keys.items()}
    parts["attn_config"]["rope_theta"] = spec.rope.theta if spec.rope else None
    normalize = spec.moe is None or spec.moe.normalize
    parts["ffn_config"] |= {"ffn_act_fn": {"name": "silu"}, "moe_normalize_expert_weights": 1.0 if normalize else None}
    return parts


def _head_dim(config: Config) -> Any:
    h, a = config.get("d_model", 2048), config.get("n_heads", 16)
    return h // a if isinstance(h, int) and isinstance(a, int) and a else None


DBRX = Family(
    "dbrx",
    "dbrx",
    "DbrxForCausalLM",
    ROWS,
    (
        Field("num_layers", "n_layers", 24),
        Field("hidden_size", "d_model", 2048),
        Field("num_attention_heads", "n_heads", 16),
        Field("kv_channels", None, _head_dim),
        Field("vocab_size", "vocab_size", 32000),
        Field("max_position_embeddings", "max_seq_len", 2048),
        Field("norm", None, "LayerNorm"),
        Field("norm_bias", None, False),
        Field("norm_epsilon", None, 1e-5),
        Field("tied", "tie_word_embeddings", False),
        # In attn_config and ffn_config:
        Field("num_query_groups", None),
        Field("qkv_clip", None),
        Field("ffn_hidden_size", None),
        Field("moe.num_experts", None),
        Field("moe.topk", None),
        Field("moe.ffn_hidden_size", None),
    ),
    prefix="transformer.",
    rope=_STYLE,
    extra=_read,
    extra_config=_write,
    models="DBRX (base, instruct)",
    verified="HF round trip through its files bit for bit, and through NxDT's; transformers' logits by a forward of "
    "its messages (megatron-core has no such norms and no clipping)",
)
