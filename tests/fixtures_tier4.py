"""Tiny checkpoints of Gemma, GLM, Phi-3, gpt-oss and others: what `fixtures` has for Llama.

Facts: config.json as transformers 4.45 (gpt-oss: 4.55) wrote them; names and shapes on disk of the modeling files of
transformers 5.23, which are those of 4.57.

Shape legend: h hidden, f ffn, a query heads, g kv heads, d head dim, v vocabulary, e experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Shape = tuple[int, ...]
Config = dict[str, Any]

BASE: Config = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
    "transformers_version": "4.45.2",
    "tie_word_embeddings": False,
}
GEMMA = BASE | {
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "rope_scaling": None,
    "tie_word_embeddings": True,
}
GLM = BASE | {
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
    "pad_token_id": 0,
    "eos_token_id": [2, 3],
}
PHI3 = BASE | {
    "model_type": "phi3",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "original_max_position_embeddings": 4096,
    "sliding_window": None,
    "pad_token_id": 0,
    "attention_bias": False,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
STABLELM = BASE | {
    "model_type": "stablelm",
    "hidden_act": "silu",
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
    "use_qkv_bias": True,
    "qk_layernorm": False,
    "use_parallel_residual": False,
}
QWEN2 = BASE | {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 8,
    "use_sliding_window": True,
    "max_window_layers": 2,
}

#: Name -> config.json, less `architectures` and `torch_dtype`.
FIXTURES: dict[str, Config] = {
    "gemma": GEMMA
    | {
        "model_type": "gemma",
        "num_key_value_heads": 1,
        "hidden_act": "gelu",
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma2": GEMMA
    | {
        "model_type": "gemma2",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 20,
        "sliding_window": 8,
        # Small enough to bend what these models compute.
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": GEMMA
    | {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 20,
        "sliding_window": 8,
        "sliding_window_pattern": 3,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "glm": GLM | {"model_type": "glm"},
    "glm4": GLM | {"model_type": "glm4"},
    "phi3": PHI3 | {"sliding_window": 8},
    "phi3_partial": PHI3 | {"partial_rotary_factor": 0.5, "tie_word_embeddings": True},
    "phi3_longrope": PHI3
    | {
        "original_max_position_embeddings": 16,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        },
    },
    "gpt_oss": BASE
    | {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "hidden_act": "silu",
        "intermediate_size": 20,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "experts_per_token": 2,
        "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8,
        "swiglu_limit": 0.5,  # small enough to clamp
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 1024,
        },
        "initial_context_length": 1024,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.9,
        "pad_token_id": 0,
        "transformers_version": "4.55.0",
    },
    "qwen2_windows": QWEN2,
    "qwen2_layer_types": QWEN2
    | {"max_window_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "ministral": BASE
    | {
        "model_type": "ministral",
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "sliding_window": 8,
        "layer_types": ["full_attention"] + ["sliding_attention"] * 3,
    },
    "olmo": BASE
    | {
        "model_type": "olmo",
        "hidden_act": "silu",
        "num_key_value_heads": 4,
        "rope_scaling": None,
        "attention_bias": False,
        "clip_qkv": None,
        "pad_token_id": 1,
    },
    "olmo2": BASE
    | {
        "model_type": "olmo2",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000,
        "rope_scaling": None,
        "attention_bias": False,
        "pad_token_id": 1,
    },
    "granite": BASE
    | {
        "model_type": "granite",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
        "logits_scaling": 3.0,
        "tie_word_embeddings": True,
    },
    "smollm3": BASE
    | {
        "model_type": "smollm3",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "layer_types": ["full_attention"] * 4,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "sliding_window": None,
        "use_sliding_window": False,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    },
    "nemotron": BASE
    | {
        "model_type": "nemotron",
        "head_dim": 16,
        "hidden_act": "relu2",
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "stablelm": STABLELM,
    "stablelm_parallel": STABLELM | {"use_parallel_residual": True, "use_qkv_bias": False},
}
ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "ministral": "MinistralForCausalLM",
    "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "stablelm": "StableLmForCausalLM",
}
#: What norm weights lie around where that is not 1: these families store them less 1.
CENTRES = {"gemma": 0.0, "gemma2": 0.0, "gemma3_text": 0.0, "nemotron": 0.0}


def _decoder(
    c: Config, norms: tuple[str, ...], *, qk_norm: str = "", qkv_bias: bool = False, norm_bias: bool = False,
    joined_qkv: bool = False, mlp: tuple[str, ...] = ("gate", "up", "down"),
) -> Iterator[tuple[str, Shape]]:  # fmt: skip
    """qk_norm: `head` or `full`; mlp: its projections, `gate_up` for two in one tensor, none in a model of experts."""
    h, f, v, a = c["hidden_size"], c["intermediate_size"], c["vocab_size"], c["num_attention_heads"]
    g, d = c.get("num_key_value_heads") or a, c.get("head_dim") or h // a
    rows = {"gate": (f, h), "up": (f, h), "gate_up": (2 * f, h), "down": (h, f)}
    yield "model.embed_tokens.weight", (v, h)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for x, heads in (("qkv", a + 2 * g),) if joined_qkv else (("q", a), ("k", g), ("v", g)):
            yield f"{layer}self_attn.{x}_proj.weight", (heads * d, h)
            if qkv_bias:
                yield f"{layer}self_attn.{x}_proj.bias", (heads * d,)
        yield f"{layer}self_attn.o_proj.weight", (h, a * d)
        if qk_norm:
            yield f"{layer}self_attn.q_norm.weight", (d if qk_norm == "head" else a * d,)
            yield f"{layer}self_attn.k_norm.weight", (d if qk_norm == "head" else g * d,)
        for projection in mlp:
            yield f"{layer}mlp.{projection}_proj.weight", rows[projection]
        for norm in norms:
            yield f"{layer}{norm}.weight", (h,)
            if norm_bias:
                yield f"{layer}{norm}.bias", (h,)
    yield "model.norm.weight", (h,)
    if norm_bias:
        yield "model.norm.bias", (h,)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (v, h)


def _gpt_oss(c: Config) -> Iterator[tuple[str, Shape]]:
    h, m, e, a = c["hidden_size"], c["intermediate_size"], c["num_local_experts"], c["num_attention_heads"]
    yield from _decoder(c, TWO, qkv_bias=True, mlp=())
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        yield f"{layer}self_attn.o_proj.bias", (h,)
        yield f"{layer}self_attn.sinks", (a,)
        yield f"{layer}mlp.router.weight", (e, h)
        yield f"{layer}mlp.router.bias", (e,)
        yield f"{layer}mlp.experts.gate_up_proj", (e, h, 2 * m)
        yield f"{layer}mlp.experts.gate_up_proj_bias", (e, 2 * m)
        yield f"{layer}mlp.experts.down_proj", (e, m, h)
        yield f"{layer}mlp.experts.down_proj_bias", (e, h)


JOINED = ("gate_up", "down")
TWO = ("input_layernorm", "post_attention_layernorm")
FOUR = (*TWO, "pre_feedforward_layernorm", "post_feedforward_layernorm")

#: model_type -> names and shapes on disk.
SHAPES = {
    "gemma": lambda c: _decoder(c, TWO),
    "gemma2": lambda c: _decoder(c, FOUR),
    "gemma3_text": lambda c: _decoder(c, FOUR, qk_norm="head"),
    "glm": lambda c: _decoder(c, TWO, qkv_bias=c["attention_bias"], mlp=JOINED),
    "glm4": lambda c: _decoder(
        c, (*TWO, "post_self_attn_layernorm", "post_mlp_layernorm"), qkv_bias=c["attention_bias"], mlp=JOINED
    ),
    "phi3": lambda c: _decoder(c, TWO, joined_qkv=True, mlp=JOINED),
    "gpt_oss": _gpt_oss,
    "ministral": lambda c: _decoder(c, TWO),
    "olmo": lambda c: ((name, shape) for name, shape in _decoder(c, ()) if name != "model.norm.weight"),
    "olmo2": lambda c: _decoder(c, ("post_attention_layernorm", "post_feedforward_layernorm"), qk_norm="full"),
    "granite": lambda c: _decoder(c, TWO),
    "smollm3": lambda c: _decoder(c, TWO),
    "nemotron": lambda c: _decoder(c, TWO, norm_bias=True, mlp=("up", "down")),
    "stablelm": lambda c: _decoder(
        c, TWO[: 1 if c["use_parallel_residual"] else 2], qkv_bias=c["use_qkv_bias"], norm_bias=True
    ),
}
