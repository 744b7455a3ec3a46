"""The small models that savers are given."""

from __future__ import annotations

from ckptconv.spec import ModelSpec, MoE

LLAMA = ModelSpec(
    family="llama", num_layers=2, hidden_size=24, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2,
    kv_channels=6, vocab_size=37, max_position_embeddings=32, seq_length=32, dtype="float32",
)  # fmt: skip
#: The models a saver is given.
MODELS = {
    "dense": LLAMA,
    "dense in bf16": LLAMA.replace(dtype="bfloat16"),
    "tied embeddings": LLAMA.replace(tied=True),
    "biases": LLAMA.replace(qkv_bias=True, dense_bias=True, mlp_bias=True),
    "GPT-2": LLAMA.replace(
        family="gpt2", num_query_groups=4, norm="LayerNorm", activation="gelu_tanh", gated=False, qkv_bias=True,
        dense_bias=True, mlp_bias=True, tied=True, rope=None, learned_positions=True,
    ),
    "norms of queries and keys": LLAMA.replace(family="qwen3", qk_norm="head"),
    "experts": LLAMA.replace(
        family="mixtral", moe=MoE(num_experts=4, topk=2, ffn_hidden_size=20, layers=(1, 1))
    ),
}  # fmt: skip
