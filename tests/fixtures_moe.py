"""Tiny checkpoints with experts or multi-latent attention, and Qwen3: what `fixtures` has for Llama.

Facts: config.json as transformers 4.45 to 4.57 wrote them (qwen3_moe_v5: 5.23), as the released DeepSeek, Moonlight,
Kimi-K2 and GLM models have them; names and shapes on disk of the modeling files of transformers 5.23, MTP layers as in
DeepSeek-V3's and GLM-4.5's own files.

Shape legend: h hidden, f ffn, a query heads, g kv heads, d head dim, v vocabulary, e experts, m ffn of an expert;
multi-latent attention: n, p numbers of a query head without and with rope, w of a value head, ql, kl lora ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Shape = tuple[int, ...]
Config = dict[str, Any]

BASE: Config = {
    "hidden_act": "silu",
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
    "transformers_version": "4.45.2",
    "tie_word_embeddings": False,
}
QWEN3 = BASE | {
    "model_type": "qwen3",
    "head_dim": 16,
    "rope_theta": 1000000.0,
    "attention_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 4,
}
MIXTRAL = BASE | {
    "model_type": "mixtral",
    "intermediate_size": 40,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}
QWEN2_MOE = BASE | {
    "model_type": "qwen2_moe",
    "rope_theta": 1000000.0,
    "decoder_sparse_step": 1,
    "max_window_layers": 4,
    "mlp_only_layers": [1],
    "moe_intermediate_size": 20,
    "norm_topk_prob": False,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 36,
    "sliding_window": 8,
    "use_sliding_window": False,
}
QWEN3_MOE = BASE | {
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "rope_theta": 1000000.0,
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "max_window_layers": 4,
    "mlp_only_layers": [],
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "use_sliding_window": False,
}
LATENT = BASE | {
    "num_key_value_heads": 4,
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 18,
    "moe_intermediate_size": 20,
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 22,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
}
DEEPSEEK_V2 = LATENT | {
    "model_type": "deepseek_v2",
    "n_group": 3,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 24,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "scoring_func": "softmax",
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
}
DEEPSEEK_V3 = LATENT | {
    "model_type": "deepseek_v3",
    "n_group": 4,
    "n_routed_experts": 12,
    "norm_topk_prob": True,
    "num_experts_per_tok": 4,
    "num_nextn_predict_layers": 0,
    "routed_scaling_factor": 2.5,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 24,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "scoring_func": "sigmoid",
    "topk_group": 2,
    "topk_method": "noaux_tc",
}
ONE_GROUP: Config = {"n_group": 1, "topk_group": 1, "n_routed_experts": 6, "num_experts_per_tok": 2}
GLM4_MOE = BASE | {
    "model_type": "glm4_moe",
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 20,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "partial_rotary_factor": 0.5,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
    **ONE_GROUP,
}

#: Name -> config.json, less `architectures` and `torch_dtype`.
FIXTURES: dict[str, Config] = {
    "qwen3": QWEN3,
    "qwen3_tied": QWEN3 | {"tie_word_embeddings": True, "attention_bias": True},
    "mixtral": MIXTRAL,
    "mixtral_window": MIXTRAL | {"sliding_window": 8, "head_dim": 16},
    "qwen2_moe": QWEN2_MOE,
    "qwen2_moe_step": QWEN2_MOE | {"mlp_only_layers": [], "decoder_sparse_step": 2, "norm_topk_prob": True},
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe_v5": {
        **{k: v for k, v in QWEN3_MOE.items() if k not in ("num_experts", "rope_theta", "rope_scaling")},
        "num_local_experts": 6,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "norm_topk_prob": False,
        "mlp_only_layers": [0, 3],
    },
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v2_lite": DEEPSEEK_V2
    | {
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 1.0,
    },
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v3_mtp": DEEPSEEK_V3 | {"num_nextn_predict_layers": 1},
    "deepseek_v3_halves": DEEPSEEK_V3 | {"rope_interleave": False, "rope_scaling": None},
    "moonlight": DEEPSEEK_V3
    | {"q_lora_rank": None, "n_shared_experts": 2, "rope_scaling": None, "routed_scaling_factor": 2.446, **ONE_GROUP},
    "kimi_k2": DEEPSEEK_V3
    | {
        "model_type": "kimi_k2",
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "rope_scaling": DEEPSEEK_V3["rope_scaling"] | {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
        **ONE_GROUP,
    },
    "glm4_moe": GLM4_MOE,
    "glm4_moe_mtp": GLM4_MOE
    | {
        "num_nextn_predict_layers": 1,
        "use_qk_norm": False,
        "attention_bias": False,
        "n_shared_experts": 2,
        "first_k_dense_replace": 2,
    },
    "glm4_moe_lite": {
        **{k: v for k, v in DEEPSEEK_V3.items() if k not in ("scoring_func", "moe_layer_freq", "rope_scaling")},
        **ONE_GROUP,
        "model_type": "glm4_moe_lite",
        "rms_norm_eps": 1e-6,
        "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
    },
}
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
}
LATENT_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite")


def sparse(c: Config, layer: int) -> bool:
    """Whether a layer has experts, as the model's class decides."""
    if c["model_type"] == "qwen3":
        return False
    if c["model_type"] == "mixtral":
        return True
    if "decoder_sparse_step" in c:
        return layer not in c["mlp_only_layers"] and (layer + 1) % c["decoder_sparse_step"] == 0
    if "mlp_layer_types" in c and layer < c["num_hidden_layers"]:
        return bool(c["mlp_layer_types"][layer] == "sparse")
    return bool(layer >= c["first_k_dense_replace"])


def attention(c: Config) -> Iterator[tuple[str, Shape]]:
    """Names under `self_attn.`"""
    h, a, g = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    if c["model_type"] in LATENT_TYPES:
        n, p, w = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        ql, kl = c["q_lora_rank"], c["kv_lora_rank"]
        if ql is None:
            yield "q_proj.weight", (a * (n + p), h)
        else:
            yield "q_a_proj.weight", (ql, h)
            yield "q_a_layernorm.weight", (ql,)
            yield "q_b_proj.weight", (a * (n + p), ql)
        yield "kv_a_proj_with_mqa.weight", (kl + p, h)
        yield "kv_a_layernorm.weight", (kl,)
        yield "kv_b_proj.weight", (a * (n + w), kl)
        yield "o_proj.weight", (h, a * w)
        return
    d = c.get("head_dim") or h // a
    qkv_bias = c["model_type"] == "qwen2_moe" or c.get("attention_bias")
    for linear, heads in (("q", a), ("k", g), ("v", g)):
        yield f"{linear}_proj.weight", (heads * d, h)
        if qkv_bias:
            yield f"{linear}_proj.bias", (heads * d,)
    yield "o_proj.weight", (h, a * d)
    if c.get("attention_bias") and c["model_type"] != "glm4_moe":
        yield "o_proj.bias", (h,)
    if c["model_type"] in ("qwen3", "qwen3_moe") or c.get("use_qk_norm"):
        yield "q_norm.weight", (d,)
        yield "k_norm.weight", (d,)


def experts(c: Config) -> Iterator[tuple[str, Shape]]:
    """Names under `mlp.` of a layer with experts."""
    h = c["hidden_size"]
    e = c.get("n_routed_experts") or c.get("num_experts") or c["num_local_experts"]
    m = c.get("moe_intermediate_size")
    yield "gate.weight", (e, h)
    if c["model_type"] in ("deepseek_v3", "kimi_k2", "glm4_moe", "glm4_moe_lite"):
        yield "gate.e_score_correction_bias", (e,)
    for n in range(e):
        yield from mlp(h, m, f"experts.{n}.")
    if c.get("n_shared_experts"):
        yield from mlp(h, m * c["n_shared_experts"], "shared_experts.")
    if c["model_type"] == "qwen2_moe":
        yield from mlp(h, c["shared_expert_intermediate_size"], "shared_expert.")
        yield "shared_expert_gate.weight", (1, h)


def mlp(h: int, f: Any, prefix: str = "") -> Iterator[tuple[str, Shape]]:
    """Names of a gated MLP."""
    yield f"{prefix}gate_proj.weight", (f, h)
    yield f"{prefix}up_proj.weight", (f, h)
    yield f"{prefix}down_proj.weight", (h, f)


def mixture(c: Config) -> Iterator[tuple[str, Shape]]:
    """Mixtral's names under `block_sparse_moe.`"""
    h, f = c["hidden_size"], c["intermediate_size"]
    yield "gate.weight", (c["num_local_experts"], h)
    for n in range(c["num_local_experts"]):
        yield f"experts.{n}.w1.weight", (f, h)
        yield f"experts.{n}.w2.weight", (h, f)
        yield f"experts.{n}.w3.weight", (f, h)


def shapes(c: Config) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor on disk."""
    h, v, layers = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
    further = c.get("num_nextn_predict_layers") or 0
    yield "model.embed_tokens.weight", (v, h)
    for i in range(layers + further):
        prefix = f"model.layers.{i}."
        for name, shape in attention(c):
            yield f"{prefix}self_attn.{name}", shape
        if c["model_type"] == "mixtral":
            for name, shape in mixture(c):
                yield f"{prefix}block_sparse_moe.{name}", shape
        else:
            for name, shape in experts(c) if sparse(c, i) else mlp(h, c["intermediate_size"]):
                yield f"{prefix}mlp.{name}", shape
        yield f"{prefix}input_layernorm.weight", (h,)
        yield f"{prefix}post_attention_layernorm.weight", (h,)
        if i >= layers:
            yield f"{prefix}embed_tokens.weight", (v, h)
            yield f"{prefix}enorm.weight", (h,)
            yield f"{prefix}hnorm.weight", (h,)
            yield f"{prefix}eh_proj.weight", (h, 2 * h)
            yield f"{prefix}shared_head.norm.weight", (h,)
            yield f"{prefix}shared_head.head.weight", (v, h)
    yield "model.norm.weight", (h,)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (v, h)


SHAPES = dict.fromkeys(ARCHITECTURES, shapes)
