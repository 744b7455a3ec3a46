"""Mistral 7B and what follows its config: Llama's tensors, a sliding window, its own class defaults.

Source: transformers `models/mistral`. Absent keys mean 8 key/value heads and a window of 4096; a null window means
none, a null head_dim h/a.
"""

from __future__ import annotations

from ckptconv.families.family import Field, derive
from ckptconv.families.llama import BASE

MISTRAL = derive(
    BASE,
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=(
        Field("num_query_groups", "num_key_value_heads", 8, lambda config: config.get("num_attention_heads")),
        Field("max_position_embeddings", "max_position_embeddings", 131072),
        Field("sliding_window", "sliding_window", 4096, lambda config: None),
    ),
    models="Mistral, with its sliding window",
    verified="logits of the real megatron-core as above; HF round trip bit for bit",
)
