"""Phi-3, Phi-3.5 mini and Phi-4 (`phi3`): q, k and v in one tensor, gate and up in another.

Source: transformers `models/phi3`. Absent keys mean as many key/value heads as heads, eps 1e-5, no window, a head of
h/a numbers. The only rope scaling is longrope, which old configs call `su` or `yarn`; its
`original_max_position_embeddings` (4096 where absent) lies beside `rope_scaling`, of which transformers 4 takes
exactly `type`, `short_factor` and `long_factor`.
"""

from __future__ import annotations

from ckptconv.families.family import Field, Row, derive
from ckptconv.families.glm import GATE_UP, no_padding
from ckptconv.families.llama import BASE, LAYER
from ckptconv.families.rope import Style
from ckptconv.ops import JOINED_QKV

PHI3 = derive(
    BASE,
    name="phi3",
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    rows=(Row(LAYER, ("qkv weight",), ("model.layers.{i}.self_attn.qkv_proj.weight",), JOINED_QKV), GATE_UP),
    fields=(
        Field("max_position_embeddings", "max_position_embeddings", 4096),
        Field("norm_epsilon", "rms_norm_eps", 1e-5),
        Field("sliding_window", "sliding_window", None),
    ),
    rope=Style(
        partial=True,
        kinds=("default", "longrope"),
        aliases=(("su", "longrope"), ("yarn", "longrope")),
        kind_key="type",
        beside=(("original_max_position_embeddings", 4096),),
    ),
    extra_config=no_padding(32000),
    models="Phi-3 mini and medium, Phi-3.5 mini, Phi-4, Phi-4 mini",
    verified="logits of the real megatron-core equal to transformers' at TP1, TP2, PP2; HF round trip through "
    "its files bit for bit",
)
