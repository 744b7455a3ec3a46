"""gpt-oss 20B and 120B: attention sinks, windows on every other layer, experts with biases and a clamped gate.

Source: transformers `models/gpt_oss`. Experts are stored together as [e, in, out], with gate and up alternating in
the last dimension (even: gate), and so are their biases. The router is a softmax over the chosen experts' logits. The
activation is gate * sigmoid(1.702 gate) * (up + 1), with gate and up clamped. Absent keys mean 8 key/value heads, a
head dim of 64, biases in attention, a window of 128, theta 1.5e5 and yarn without rounding.

The experts of the released checkpoints are in mxfp4, which is another format of the same tensors.
"""

from __future__ import annotations

from typing import Any

from ckptconv.families import moe, windows
from ckptconv.families.family import Config, Field, Neutral, Row, derive, head_dim
from ckptconv.families.llama import BASE, LAYER
from ckptconv.families.rope import Style
from ckptconv.ops import ALTERNATE, BESIDE, COPY, STACK, TRANSPOSE, EachExpert, Then
from ckptconv.spec import ModelSpec

_A, _M = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
_E = _M + "experts."

ROWS = (
    Row(LAYER, ("attention sinks",), (_A + "sinks",), COPY),
    Row(LAYER, ("router weight",),   (_M + "router.weight",), COPY),
    Row(LAYER, ("router bias",),     (_M + "router.bias",), COPY),
    Row(LAYER, (moe.W, moe.V),       (_E + "gate_up_proj",), EachExpert(STACK), Then(ALTERNATE, TRANSPOSE)),
    Row(LAYER, ("mlp l0 bias W", "mlp l0 bias V"), (_E + "gate_up_proj_bias",), BESIDE, ALTERNATE),
    Row(LAYER, (moe.DOWN,),          (_E + "down_proj",), COPY, TRANSPOSE),
    Row(LAYER, ("mlp l1 bias",),     (_E + "down_proj_bias",), COPY),
)  # fmt: skip

YARN = (
    ("rope_type", "yarn"), ("factor", 32.0), ("beta_fast", 32.0), ("beta_slow", 1.0), ("truncate", False),
    ("original_max_position_embeddings", 4096),
)  # fmt: skip


def _extra(config: Config, where: str) -> dict[str, Any]:
    window = config.get("sliding_window", 128)
    layers = windows.count(config, "num_hidden_layers", where)
    return {
        "moe.layers": (1,) * layers,
        **windows.read(config, where, window, windows.alternating(config, where)),
    }


def _extra_config(spec: ModelSpec) -> Config:
    return {"layer_types": windows.kinds(spec), "hidden_act": "silu"}


GPT_OSS = derive(
    BASE,
    name="gpt_oss",
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    rows=ROWS,
    fields=(
        Field("num_query_groups", "num_key_value_heads", 8, lambda config: config.get("num_attention_heads")),
        Field("kv_channels", "head_dim", 64, head_dim),
        Field("max_position_embeddings", "max_position_embeddings", 131072),
        Field("norm_epsilon", "rms_norm_eps", 1e-5),
        Field("activation", None, "quick_gelu"),
        Field("activation_clamp", "swiglu_limit", 7.0),
        Field("gate_offset", None, 1.0),
        Field("sinks", None, True),
        Field("qkv_bias", "attention_bias", True),
        Field("dense_bias", "attention_bias", True),
        Field("mlp_bias", None, True),
        Field("sliding_window", "sliding_window", 128, lambda config: None),
        Field("moe.num_experts", "num_local_experts", 128),
        Field("moe.topk", "num_experts_per_tok", 4),
        Field("moe.ffn_hidden_size", "intermediate_size", 2880),
        Field("moe.router_bias", None, True),
    ),
    neutral=(Neutral("swiglu_alpha", (1.702,), "another gain in the experts' activation"),),
    rope=Style(theta=150000.0, absent=YARN),
    extra=_extra,
    extra_config=_extra_config,
    models="gpt-oss 20B and 120B, in bf16 or mxfp4",
    verified="logits of the real megatron-core equal to transformers' at EP1, EP2, PP2, EP2 PP2; HF round trip "
    "through its files bit for bit; mxfp4 equal to transformers' dequantisation",
)
