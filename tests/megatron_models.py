"""Hand-made specs of the kinds of models that stock megatron-core has, small, for the tests of Megatron's arguments.

Numbers that Megatron might have as a default (rotary base 10000, top 2, epsilon 1e-5, 4096 positions) are avoided where
a model of the kind has others.
"""

from __future__ import annotations

from ckptconv.spec import MLA, ModelSpec, MoE, Rope

SMALL = ModelSpec(
    family="llama", num_layers=4, hidden_size=48, ffn_hidden_size=88, num_attention_heads=4, num_query_groups=2,
    kv_channels=12, vocab_size=131, max_position_embeddings=96, seq_length=24, dtype="bfloat16",
)  # fmt: skip
#: GPT-2's world: LayerNorm and biases everywhere.
BIASED = SMALL.replace(
    norm="LayerNorm", gated=False, qkv_bias=True, dense_bias=True, mlp_bias=True, activation="gelu", tied=True,
    num_query_groups=4,
)  # fmt: skip
MLA_MODEL = SMALL.replace(
    num_query_groups=4, kv_channels=10, norm_epsilon=1e-6, mla=MLA(20, 18, 8, 6, 10),
    rope=Rope(50000.0, interleaved=True),
)  # fmt: skip
YARN = {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096}
LATENT_YARN = {"factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096,
               "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
V3_MOE = MoE(
    num_experts=8, topk=4, ffn_hidden_size=24, layers=(0, 1, 1, 1), score="sigmoid", scaling_factor=2.5,
    score_bias=True, num_groups=4, topk_groups=2, group_score="top2", router_fp32=True, shared_ffn_hidden_size=48,
)  # fmt: skip

#: Everything here has flags in some release.
MODELS = {
    "mixtral": SMALL.replace(
        rope=Rope(1000000.0), moe=MoE(num_experts=8, topk=2, ffn_hidden_size=88, layers=(1,) * 4),
    ),
    "qwen2 moe": SMALL.replace(
        norm_epsilon=1e-6, qkv_bias=True, rope=Rope(1000000.0),
        moe=MoE(8, 3, 24, (0, 1, 0, 1), normalize=False, shared_ffn_hidden_size=40, shared_gate=True),
    ),
    "qwen3 moe": SMALL.replace(
        norm_epsilon=1e-6, qk_norm="head", rope=Rope(1000000.0), moe=MoE(8, 4, 24, (1, 1, 1, 1)),
    ),
    "one sigmoid expert": SMALL.replace(moe=MoE(4, 1, 24, (1, 1, 1, 1), score="sigmoid", normalize=False)),
    "deepseek v2": MLA_MODEL.replace(
        mla=MLA(None, 18, 8, 6, 10),
        rope=Rope(10000.0, "yarn", {**LATENT_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, interleaved=True),
        moe=MoE(8, 2, 24, (0, 1, 1, 1), normalize=False, scaling_factor=16.0, num_groups=4, topk_groups=2,
                router_fp32=True, shared_ffn_hidden_size=24),
    ),
    "deepseek v3": MLA_MODEL.replace(
        moe=V3_MOE, mtp_layers=1, max_position_embeddings=163840,
        rope=Rope(10000.0, "yarn", LATENT_YARN, interleaved=True),
    ),
    "moonlight": MLA_MODEL.replace(
        norm_epsilon=1e-5,
        moe=MoE(8, 3, 24, (0, 1, 1, 1), score="sigmoid", scaling_factor=2.446, score_bias=True, router_fp32=True,
                shared_ffn_hidden_size=48),
    ),
    "gpt-oss": SMALL.replace(
        ffn_hidden_size=40, qkv_bias=True, dense_bias=True, mlp_bias=True, activation="quick_gelu",
        activation_clamp=7.0, gate_offset=1.0, sinks=True, sliding_window=8, window_layers=(1, 0, 1, 0),
        rope=Rope(150000.0, "yarn", {**YARN, "truncate": False}), moe=MoE(8, 4, 40, (1,) * 4, router_bias=True),
    ),
    "yarn": SMALL.replace(rope=Rope(1000000.0, "yarn", {**YARN, "factor": 4.0, "original_max_position_embeddings": 32,
                                                        "attention_factor": 1.3})),
    "gpt2": BIASED.replace(activation="gelu_tanh", rope=None, learned_positions=True),
    "gpt bigcode": BIASED.replace(activation="gelu_tanh", rope=None, learned_positions=True, num_query_groups=1),
    "gpt neox, serial": BIASED.replace(rope=Rope(percent=0.5), tied=False),
    "starcoder2": BIASED.replace(
        activation="gelu_tanh", num_query_groups=2, rope=Rope(999999.0), sliding_window=16, norm_epsilon=1e-6,
    ),
    "qwen2, late windows": SMALL.replace(qkv_bias=True, sliding_window=8, window_layers=(0, 0, 1, 1)),
    "nope layers": SMALL.replace(rope=Rope(2000000.0), rope_layers=(1, 1, 1, 0), norm_epsilon=1e-6, tied=True),
    "no positions": SMALL.replace(rope=None),
    "nemotron": SMALL.replace(
        norm="LayerNorm", norm_offset=True, activation="squared_relu", gated=False, rope=Rope(percent=0.5),
    ),
    "squared relu, biases": BIASED.replace(activation="squared_relu"),
    "quick geglu": SMALL.replace(activation="quick_gelu"),
    "quick geglu, biases": BIASED.replace(activation="quick_gelu", gated=True),
    "clamped swiglu": SMALL.replace(activation_clamp=7.0),
    "glm4 moe": SMALL.replace(
        qkv_bias=True, qk_norm="head", rope=Rope(1000000.0, percent=0.5), moe=V3_MOE, mtp_layers=1,
    ),
    "glm": SMALL.replace(qkv_bias=True, rope=Rope(percent=0.5, interleaved=True), norm_epsilon=1.5625e-7),
    "erf without biases": SMALL.replace(norm="LayerNorm", gated=False, activation="gelu"),
}  # fmt: skip

#: What a config can be but no flag says: the properties are in the Namespace all the same.
IN_CODE = {
    "opt": BIASED.replace(activation="relu", rope=None, learned_positions=True),
    "gemma": SMALL.replace(activation="gelu_tanh", norm_offset=True, norm_epsilon=1e-6, tied=True),
    "gemma without caps": SMALL.replace(
        activation="gelu_tanh", norm_offset=True, softmax_scale=0.0625, sliding_window=8, window_layers=(1, 0, 1, 0),
    ),
    "geglu erf": SMALL.replace(activation="gelu"),
    "gelu tanh without biases": SMALL.replace(activation="gelu_tanh", gated=False),
    "silu without gate": SMALL.replace(gated=False),
    "kimi k2": MLA_MODEL.replace(
        moe=V3_MOE, rope=Rope(50000.0, "yarn", {**LATENT_YARN, "beta_fast": 1.0}, interleaved=True),
    ),
}  # fmt: skip

BERT = BIASED.replace(
    family="megatron_bert", model_type="BERT", rope=None, learned_positions=True, norm_epsilon=1e-12,
    num_tokentypes=2, lm_head=True, binary_head=True, pooler=True,
)  # fmt: skip
