"""Falcon 7B, 40B, 180B, 11B and RW: three arrangements of one model_type.

Source: transformers `models/falcon`. All of them store `query_key_value` in the grouped order: 7B (multi_query) as one
group [a queries, key, value], 40B (new_decoder_architecture) per group, RW per head [query, key, value]. 40B has two
norms in front of its parallel halves (ln_attn, ln_mlp), 7B and 11B one. RW is serial, with biases and ALiBi, whose
slopes are scaled like the scores. Class defaults of absent keys: parallel_attn, multi_query and tied true.
"""

from __future__ import annotations

from typing import Any

from ckptconv.errors import SourceError
from ckptconv.families.family import ACTIVATIONS, REQUIRED, Config, Family, Field, Ignore, Row
from ckptconv.families.gpt_neox import head_dim
from ckptconv.families.llama import EMBEDDINGS, FINAL, LAYER, OUTPUT
from ckptconv.ops import COPY
from ckptconv.spec import ModelSpec

_L = "transformer.h.{i}."
_A, _M = _L + "self_attention.", _L + "mlp."


def _two_norms(spec: ModelSpec, layer: int | None) -> bool:
    return spec.parallel_residual and not spec.shared_norm


def _one_norm(spec: ModelSpec, layer: int | None) -> bool:
    return not _two_norms(spec, layer)


def _ffn(config: Config) -> Any:
    hidden = config.get("hidden_size")
    return 4 * hidden if isinstance(hidden, int) else None


def _on(config: Config, key: str, default: bool) -> bool:
    value = config.get(key)
    return default if value is None else bool(value)


def _architecture(config: Config, where: str) -> dict[str, Any]:
    """The switches of config.json. Raises SourceError for pairs that transformers cannot run."""
    new, parallel = _on(config, "new_decoder_architecture", False), _on(config, "parallel_attn", True)
    multi_query = _on(config, "multi_query", True)
    heads = config.get("num_attention_heads")
    groups = heads if config.get("num_kv_heads") is None else config["num_kv_heads"]
    norms = config.get("num_ln_in_parallel_attn")
    norms = (2 if new else 1) if norms is None else norms
    if new and not parallel:
        raise SourceError(f"{where}: new_decoder_architecture without parallel_attn: transformers cannot run it.")
    if norms not in (1, 2) or (norms == 2 and parallel and not new):
        raise SourceError(f"{where}: num_ln_in_parallel_attn is {norms!r}: transformers cannot run it.")
    if not new and not multi_query and groups != heads:
        raise SourceError(f"{where}: num_kv_heads is {groups} for {heads} heads without multi_query: not supported.")
    alibi = _on(config, "alibi", False)
    return {
        "num_query_groups": groups if new else 1 if multi_query else heads,
        "parallel_residual": new or parallel,
        "shared_norm": parallel and norms == 1,
        "alibi": alibi,
        "alibi_scaled": alibi,
        **({"rope": None} if alibi else {}),
    }


def _architecture_config(spec: ModelSpec) -> Config:
    heads, groups = spec.num_attention_heads, spec.num_query_groups
    new = spec.parallel_residual and (not spec.shared_norm or groups not in (1, heads))
    return {
        "alibi": spec.alibi,
        "multi_query": new or groups == 1,
        "new_decoder_architecture": new,
        "num_kv_heads": groups if new else heads,
        "num_ln_in_parallel_attn": (1 if spec.shared_norm else 2) if new else None,
        "parallel_attn": spec.parallel_residual,
    }


FALCON = Family(
    name="falcon",
    model_type="falcon",
    architecture="FalconForCausalLM",
    rows=(
        Row(EMBEDDINGS, ("word embeddings",),   ("transformer.word_embeddings.weight",), COPY),
        Row(LAYER,      ("input norm weight",), (_L + "ln_attn.weight",), COPY, when=_two_norms),
        Row(LAYER,      ("input norm bias",),   (_L + "ln_attn.bias",), COPY, when=_two_norms),
        Row(LAYER,      ("input norm weight",), (_L + "input_layernorm.weight",), COPY, when=_one_norm),
        Row(LAYER,      ("input norm bias",),   (_L + "input_layernorm.bias",), COPY, when=_one_norm),
        Row(LAYER,      ("qkv weight",),        (_A + "query_key_value.weight",), COPY),
        Row(LAYER,      ("qkv bias",),          (_A + "query_key_value.bias",), COPY),
        Row(LAYER,      ("dense weight",),      (_A + "dense.weight",), COPY),
        Row(LAYER,      ("dense bias",),        (_A + "dense.bias",), COPY),
        Row(LAYER,      ("post norm weight",),  (_L + "ln_mlp.weight",), COPY, when=_two_norms),
        Row(LAYER,      ("post norm bias",),    (_L + "ln_mlp.bias",), COPY, when=_two_norms),
        Row(LAYER,      ("post norm weight",),  (_L + "post_attention_layernorm.weight",), COPY, when=_one_norm),
        Row(LAYER,      ("post norm bias",),    (_L + "post_attention_layernorm.bias",), COPY, when=_one_norm),
        Row(LAYER,      ("mlp l0 weight",),     (_M + "dense_h_to_4h.weight",), COPY),
        Row(LAYER,      ("mlp l0 bias",),       (_M + "dense_h_to_4h.bias",), COPY),
        Row(LAYER,      ("mlp l1 weight",),     (_M + "dense_4h_to_h.weight",), COPY),
        Row(LAYER,      ("mlp l1 bias",),       (_M + "dense_4h_to_h.bias",), COPY),
        Row(FINAL,      ("weight",),            ("transformer.ln_f.weight",), COPY),
        Row(FINAL,      ("bias",),              ("transformer.ln_f.bias",), COPY),
        Row(OUTPUT,     ("weight",),            ("lm_head.weight",), COPY),
    ),
    fields=(
        Field("num_layers",              "num_hidden_layers",       REQUIRED),
        Field("hidden_size",             "hidden_size",             REQUIRED),
        Field("ffn_hidden_size",         "ffn_hidden_size",         _ffn, _ffn),
        Field("num_attention_heads",     "num_attention_heads",     REQUIRED),
        Field("num_query_groups",        None,                      1),
        Field("kv_channels",             None,                      head_dim),
        Field("vocab_size",              "vocab_size",              REQUIRED),
        Field("max_position_embeddings", "max_position_embeddings", 2048),
        Field("norm",                    None,                      "LayerNorm"),
        Field("norm_epsilon",            "layer_norm_epsilon",      1e-5),
        Field("activation",              "activation",              "gelu", words=ACTIVATIONS),
        Field("gated",                   None,                      False),
        Field("qkv_bias",                "bias",                    False),
        Field("dense_bias",              "bias",                    False),
        Field("mlp_bias",                "bias",                    False),
        Field("tied",                    "tie_word_embeddings",     True),
    ),
    ignore=(Ignore(_A + "rotary_emb.inv_freq", "rotary frequencies are computed, not trained"),),
    prefix="transformer.",
    extra=_architecture,
    extra_config=_architecture_config,
    models="Falcon 7B, 40B, 180B, 11B (Falcon2) and RW; Falcon3 is Llama",
    verified="7B, 40B, 11B with --custom-layers: logits of the real megatron-core equal to transformers' at "
    "TP1, TP2, PP2; RW (alibi) Hugging Face only; round trips bit for bit",
)  # fmt: skip
