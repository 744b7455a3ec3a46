"""GLM-4 9B (`glm`) and GLM-4-0414 (`glm4`): half of each head rotated in pairs, gate and up in one tensor.

Source: transformers `models/glm`, `models/glm4`. Absent keys mean 2 key/value heads, a head dim of 128, biases on q, k
and v (never on the output projection), eps 1.5625e-7. In glm4 `post_attention_layernorm` is the norm before the MLP,
as in Llama, and there are two more behind attention and MLP.
"""

from __future__ import annotations

from collections.abc import Callable

from ckptconv.families.family import Config, Field, Row, derive
from ckptconv.families.llama import BASE, LAYER
from ckptconv.families.rope import Style
from ckptconv.ops import COPY, STACK
from ckptconv.spec import ModelSpec

_L = "model.layers.{i}."

#: Gate above up, in one tensor.
GATE_UP = Row(LAYER, ("mlp l0 weight W", "mlp l0 weight V"), (_L + "mlp.gate_up_proj.weight",), STACK)

def no_padding(default: int) -> Callable[[ModelSpec], Config]:
    """A null `pad_token_id` where the class's own is no row of the embedding: transformers would not load that."""
    return lambda spec: {} if default < spec.vocab_size else {"pad_token_id": None}


GLM = derive(
    BASE,
    name="glm",
    model_type="glm",
    architecture="GlmForCausalLM",
    rows=(GATE_UP,),
    fields=(
        Field("num_query_groups", "num_key_value_heads", 2, lambda config: config.get("num_attention_heads")),
        Field("kv_channels", "head_dim", 128),
        Field("max_position_embeddings", "max_position_embeddings", 131072),
        Field("norm_epsilon", "rms_norm_eps", 1.5625e-7),
        Field("qkv_bias", "attention_bias", True),
    ),
    rope=Style(percent=0.5, interleaved=True),
    extra_config=no_padding(151329),
    models="GLM-4 9B (GlmForCausalLM)",
    verified="logits of the real megatron-core equal to transformers' at TP1, TP2, PP2; HF round trip through "
    "its files bit for bit",
)

GLM4 = derive(
    GLM,
    name="glm4",
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    rows=(
        Row(LAYER, ("attention output norm weight",), (_L + "post_self_attn_layernorm.weight",), COPY),
        Row(LAYER, ("mlp output norm weight",),       (_L + "post_mlp_layernorm.weight",), COPY),
    ),
    fields=(Field("norms", None, "sandwich"),),
    models="GLM-4-0414 (9B, 32B) and GLM-Z1",
    verified="with --custom-layers, logits of the real megatron-core equal to transformers' at TP1, TP2, PP2; "
    "HF round trip through its files bit for bit",
)  # fmt: skip
