"""T5, T5 v1.1, FLAN-T5: an encoder and a decoder that share the embeddings, biases of scores by distance.

Source: transformers `models/t5`. Attention has no scale. The first T5 is tied and multiplies what goes into the head by
d_model**-0.5; v1.1 is untied and does not, which config.json says by `tie_word_embeddings` alone before transformers 5
added `scale_decoder_outputs`. Class defaults of absent keys: as many decoder as encoder layers, d_kv 64, ReLU, 32
buckets up to a distance of 128.
"""

from __future__ import annotations

from typing import Any

from ckptconv.errors import SourceError
from ckptconv.families.family import ACTIVATIONS, REQUIRED, Config, Duplicate, Family, Field, Ignore, Row
from ckptconv.families.llama import EMBEDDINGS, FINAL, LAYER, OUTPUT
from ckptconv.ops import COPY, FUSE_KV, FUSE_QKV
from ckptconv.spec import ModelSpec

ENCODER, ENCODER_FINAL = "encoder layer {i}", "encoder final norm"
_E, _D = "encoder.block.{i}.layer.", "decoder.block.{i}.layer."
_BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def _heads(config: Config) -> Any:
    return config.get("num_heads")


def _layers(config: Config) -> Any:
    return config.get("num_layers")


def _mlp(config: Config, where: str) -> dict[str, Any]:
    """`feed_forward_proj`, and the scale in front of the head. Raises SourceError for an unknown form."""
    said = config.get("feed_forward_proj") or "relu"
    gate, _, name = str(said).rpartition("-")
    activation = dict(ACTIVATIONS).get(name)
    if gate not in ("", "gated") or activation is None:
        raise SourceError(f"{where}: feed_forward_proj is {said!r}, expected an activation, or gated- and one.")
    scaled = config.get("scale_decoder_outputs")
    if scaled is None:
        scaled = config.get("tie_word_embeddings") is not False
    return {
        "gated": gate == "gated",
        "activation": "gelu_tanh" if said == "gated-gelu" else activation,
        "logit_multiplier": config["d_model"] ** -0.5 if scaled else 1.0,
    }


def _mlp_config(spec: ModelSpec) -> Config:
    names = {meaning: word for word, meaning in reversed(ACTIVATIONS)} | {"gelu_tanh": "gelu_new"}
    name = names.get(spec.activation, spec.activation)
    if spec.gated:
        name = "gated-gelu" if name == "gelu_new" else f"gated-{name}"
    scaled = spec.logit_multiplier == spec.hidden_size**-0.5
    return {"feed_forward_proj": name, "scale_decoder_outputs": scaled, "is_encoder_decoder": True}


T5 = Family(
    name="t5",
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    rows=(
        Row(EMBEDDINGS,    ("word embeddings",),       ("shared.weight",), COPY),
        Row(EMBEDDINGS,    ("encoder relative bias",), ("encoder." + _BIAS,), COPY),
        Row(EMBEDDINGS,    ("decoder relative bias",), ("decoder." + _BIAS,), COPY),
        Row(ENCODER,       ("input norm weight",), (_E + "0.layer_norm.weight",), COPY),
        Row(ENCODER,       ("qkv weight",),        tuple(_E + f"0.SelfAttention.{x}.weight" for x in "qkv"), FUSE_QKV),
        Row(ENCODER,       ("dense weight",),      (_E + "0.SelfAttention.o.weight",), COPY),
        Row(ENCODER,       ("post norm weight",),  (_E + "1.layer_norm.weight",), COPY),
        Row(ENCODER,       ("mlp l0 weight W",),   (_E + "1.DenseReluDense.wi_0.weight",), COPY),
        Row(ENCODER,       ("mlp l0 weight V",),   (_E + "1.DenseReluDense.wi_1.weight",), COPY),
        Row(ENCODER,       ("mlp l0 weight",),     (_E + "1.DenseReluDense.wi.weight",), COPY),
        Row(ENCODER,       ("mlp l1 weight",),     (_E + "1.DenseReluDense.wo.weight",), COPY),
        Row(ENCODER_FINAL, ("weight",),            ("encoder.final_layer_norm.weight",), COPY),
        Row(LAYER,         ("input norm weight",), (_D + "0.layer_norm.weight",), COPY),
        Row(LAYER,         ("qkv weight",),        tuple(_D + f"0.SelfAttention.{x}.weight" for x in "qkv"), FUSE_QKV),
        Row(LAYER,         ("dense weight",),      (_D + "0.SelfAttention.o.weight",), COPY),
        Row(LAYER,         ("cross norm weight",), (_D + "1.layer_norm.weight",), COPY),
        Row(LAYER,         ("cross q weight",),    (_D + "1.EncDecAttention.q.weight",), COPY),
        Row(LAYER,         ("cross kv weight",),   tuple(_D + f"1.EncDecAttention.{x}.weight" for x in "kv"), FUSE_KV),
        Row(LAYER,         ("cross dense weight",), (_D + "1.EncDecAttention.o.weight",), COPY),
        Row(LAYER,         ("post norm weight",),  (_D + "2.layer_norm.weight",), COPY),
        Row(LAYER,         ("mlp l0 weight W",),   (_D + "2.DenseReluDense.wi_0.weight",), COPY),
        Row(LAYER,         ("mlp l0 weight V",),   (_D + "2.DenseReluDense.wi_1.weight",), COPY),
        Row(LAYER,         ("mlp l0 weight",),     (_D + "2.DenseReluDense.wi.weight",), COPY),
        Row(LAYER,         ("mlp l1 weight",),     (_D + "2.DenseReluDense.wo.weight",), COPY),
        Row(FINAL,         ("weight",),            ("decoder.final_layer_norm.weight",), COPY),
        Row(OUTPUT,        ("weight",),            ("lm_head.weight",), COPY),
    ),
    fields=(
        Field("encoder_layers",          "num_layers",           REQUIRED),
        Field("num_layers",              "num_decoder_layers",   _layers, _layers),
        Field("hidden_size",             "d_model",              REQUIRED),
        Field("ffn_hidden_size",         "d_ff",                 2048),
        Field("num_attention_heads",     "num_heads",            REQUIRED),
        Field("num_query_groups",        None,                   _heads),
        Field("kv_channels",             "d_kv",                 64),
        Field("vocab_size",              "vocab_size",           REQUIRED),
        # Nothing limits the positions; the number is what it was trained with.
        Field("max_position_embeddings", "n_positions",          512),
        Field("model_type",              None,                   "T5"),
        Field("norm_epsilon",            "layer_norm_epsilon",   1e-6),
        Field("softmax_scale",           None,                   1.0),
        Field("relative_buckets",        "relative_attention_num_buckets",  32),
        Field("relative_distance",       "relative_attention_max_distance", 128),
        Field("tied",                    "tie_word_embeddings",  True),
    ),
    ignore=(
        Ignore("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", "not used by any T5"),
    ),
    duplicates=(
        Duplicate("encoder.embed_tokens.weight", EMBEDDINGS, "word embeddings", written=False),
        Duplicate("decoder.embed_tokens.weight", EMBEDDINGS, "word embeddings", written=False),
    ),
    prefix="",
    rope=None,
    extra=_mlp,
    extra_config=_mlp_config,
    models="T5, T5 v1.1, FLAN-T5 (encoder and decoder), to and from Hugging Face only",
    verified="Hugging Face only: round trip bit for bit, transformers loads it strictly, same logits",
)  # fmt: skip
