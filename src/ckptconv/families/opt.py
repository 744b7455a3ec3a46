"""OPT: GPT-2's arrangement with ReLU, ordinary linears, and two rows before the positions.

Source: transformers `models/opt`. Row n + 2 of `embed_positions` is position n; padding uses row 1. Class defaults of
absent keys: ReLU, norms before attention and MLP, biases, tied. OPT-350m has norms after the residual sums and a
projection of the embeddings, and is refused.
"""

from __future__ import annotations

from typing import Any

from ckptconv.errors import SourceError
from ckptconv.families.family import ACTIVATIONS, REQUIRED, Config, Family, Field, Neutral, Row
from ckptconv.families.gpt_neox import head_dim, heads
from ckptconv.families.llama import EMBEDDINGS, FINAL, LAYER, OUTPUT
from ckptconv.ops import COPY, FUSE_QKV, STACK

_D, _L = "model.decoder.", "model.decoder.layers.{i}."
_A = _L + "self_attn."


def _projection(config: Config, where: str) -> dict[str, Any]:
    """Nothing. Raises SourceError when embeddings are projected."""
    width, hidden = config.get("word_embed_proj_dim"), config.get("hidden_size")
    if width not in (None, hidden):
        raise SourceError(f"{where}: word_embed_proj_dim is {width}, hidden_size {hidden}: projected embeddings, which "
                          "is not supported.")  # fmt: skip
    return {}


OPT = Family(
    name="opt",
    model_type="opt",
    architecture="OPTForCausalLM",
    rows=(
        Row(EMBEDDINGS, ("word embeddings",),   (_D + "embed_tokens.weight",), COPY),
        Row(EMBEDDINGS, ("position offset rows", "position embeddings"), (_D + "embed_positions.weight",), STACK),
        Row(LAYER,      ("input norm weight",), (_L + "self_attn_layer_norm.weight",), COPY),
        Row(LAYER,      ("input norm bias",),   (_L + "self_attn_layer_norm.bias",), COPY),
        Row(LAYER,      ("qkv weight",),        tuple(_A + f"{x}_proj.weight" for x in "qkv"), FUSE_QKV),
        Row(LAYER,      ("qkv bias",),          tuple(_A + f"{x}_proj.bias" for x in "qkv"), FUSE_QKV),
        Row(LAYER,      ("dense weight",),      (_A + "out_proj.weight",), COPY),
        Row(LAYER,      ("dense bias",),        (_A + "out_proj.bias",), COPY),
        Row(LAYER,      ("post norm weight",),  (_L + "final_layer_norm.weight",), COPY),
        Row(LAYER,      ("post norm bias",),    (_L + "final_layer_norm.bias",), COPY),
        Row(LAYER,      ("mlp l0 weight",),     (_L + "fc1.weight",), COPY),
        Row(LAYER,      ("mlp l0 bias",),       (_L + "fc1.bias",), COPY),
        Row(LAYER,      ("mlp l1 weight",),     (_L + "fc2.weight",), COPY),
        Row(LAYER,      ("mlp l1 bias",),       (_L + "fc2.bias",), COPY),
        Row(FINAL,      ("weight",),            (_D + "final_layer_norm.weight",), COPY),
        Row(FINAL,      ("bias",),              (_D + "final_layer_norm.bias",), COPY),
        Row(OUTPUT,     ("weight",),            ("lm_head.weight",), COPY),
    ),
    fields=(
        Field("num_layers",              "num_hidden_layers",       REQUIRED),
        Field("hidden_size",             "hidden_size",             REQUIRED),
        Field("ffn_hidden_size",         "ffn_dim",                 3072),
        Field("num_attention_heads",     "num_attention_heads",     REQUIRED),
        Field("num_query_groups",        None,                      heads),
        Field("kv_channels",             None,                      head_dim),
        Field("vocab_size",              "vocab_size",              REQUIRED),
        Field("max_position_embeddings", "max_position_embeddings", 2048),
        Field("norm",                    None,                      "LayerNorm"),
        Field("norm_epsilon",            None,                      1e-5),
        Field("activation",              "activation_function",     "relu", words=ACTIVATIONS),
        Field("gated",                   None,                      False),
        Field("qkv_bias",                "enable_bias",             True),
        Field("dense_bias",              "enable_bias",             True),
        Field("mlp_bias",                "enable_bias",             True),
        Field("learned_positions",       None,                      True),
        Field("position_offset",         None,                      2),
        Field("tied",                    "tie_word_embeddings",     True),
    ),
    neutral=(
        Neutral("do_layer_norm_before", (True,), "norms after the residual sums"),
        Neutral("layer_norm_elementwise_affine", (True,), "norms without weights"),
        Neutral("_remove_final_layer_norm", (False,), "no norm after the last layer"),
    ),
    rope=None,
    extra=_projection,
    models="OPT 125m to 66b, less 350m; Galactica",
    verified="Hugging Face only: round trip bit for bit, transformers loads it strictly, same logits",
)  # fmt: skip
