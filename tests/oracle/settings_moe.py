"""Qwen3, Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 and V3, Kimi-K2 and GLM-4.5 in megatron-core's own words.

Facts: megatron-core 0.16.1 `transformer/transformer_config.py`, `transformer/multi_latent_attention.py`,
`transformer/moe/router.py`, `transformer/moe/moe_utils.py`; transformers 5.23 modeling files.
"""

from __future__ import annotations

from typing import Any

from settings import Config, Settings


def rope(c: Config) -> Config:
    """Rotary settings of both styles of config.json, with `rope_theta`."""
    both = {"rope_theta": c.get("rope_theta"), **(c.get("rope_parameters") or {}), **(c.get("rope_scaling") or {})}
    return both | {"kind": both.get("rope_type") or both.get("type") or "default"}


class Decoder(Settings):
    """A dense decoder with plain rope, and what experts add to it."""

    def transformer_settings(self, c: Config) -> dict[str, Any]:
        heads = c["num_attention_heads"]
        window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
        return {
            "num_layers": c["num_hidden_layers"],
            "hidden_size": c["hidden_size"],
            "ffn_hidden_size": c["intermediate_size"],
            "num_attention_heads": heads,
            "num_query_groups": c["num_key_value_heads"],
            "kv_channels": c.get("head_dim") or c["hidden_size"] // heads,
            "normalization": "RMSNorm",
            "layernorm_epsilon": c["rms_norm_eps"],
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "window_size": None if window is None else (window - 1, 0),
            **self.attention(c),
            **self.experts(c),
            "mtp_num_layers": c.get("num_nextn_predict_layers") or None,
        }

    def model_settings(self, c: Config) -> dict[str, Any]:
        assert rope(c)["kind"] == "default"
        return {
            "max_sequence_length": c["max_position_embeddings"],
            "share_embeddings_and_output_weights": c["tie_word_embeddings"],
            "position_embedding_type": "rope",
            "rotary_base": rope(c)["rope_theta"],
            "rotary_percent": c.get("partial_rotary_factor", 1.0),
        }

    def attention(self, c: Config) -> dict[str, Any]:
        return {}

    def experts(self, c: Config) -> dict[str, Any]:
        return {}


class Qwen3(Decoder):
    def attention(self, c: Config) -> dict[str, Any]:
        # `attention_bias` is on all four projections, and linears have biases all or none in megatron-core.
        return {"qk_layernorm": True, "add_bias_linear": c["attention_bias"]}


class Mixtral(Decoder):
    def experts(self, c: Config) -> dict[str, Any]:
        return {
            "num_moe_experts": c["num_local_experts"],
            "moe_router_topk": c["num_experts_per_tok"],
            "moe_ffn_hidden_size": c["intermediate_size"],
        }


class Qwen2Moe(Decoder):
    def attention(self, c: Config) -> dict[str, Any]:
        return {"add_qkv_bias": True}

    def experts(self, c: Config) -> dict[str, Any]:
        dense, step = c["mlp_only_layers"], c["decoder_sparse_step"]
        shared = c.get("shared_expert_intermediate_size")
        return {
            "num_moe_experts": c.get("num_experts") or c["num_local_experts"],
            "moe_router_topk": c["num_experts_per_tok"],
            "moe_ffn_hidden_size": c["moe_intermediate_size"],
            "moe_layer_freq": [int(n not in dense and (n + 1) % step == 0) for n in range(c["num_hidden_layers"])],
            "moe_router_pre_softmax": not c["norm_topk_prob"],
            "moe_shared_expert_intermediate_size": shared,
            "moe_shared_expert_gate": shared is not None,
        }


class Qwen3Moe(Qwen2Moe):
    def attention(self, c: Config) -> dict[str, Any]:
        return {"qk_layernorm": True}


class DeepSeekV3(Decoder):
    """DeepSeek-V3's experts; `attention` is the latent one."""

    def attention(self, c: Config) -> dict[str, Any]:
        said = rope(c)
        scaling: dict[str, Any] = {"rope_type": "rope"}
        if said["kind"] == "yarn":
            scaling = {"rope_type": "yarn", "rotary_scaling_factor": said["factor"]} | {
                name: said[name]
                for name in ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
            }
        return {
            "multi_latent_attention": True,
            "qk_layernorm": True,
            "q_lora_rank": c["q_lora_rank"],
            "kv_lora_rank": c["kv_lora_rank"],
            "qk_head_dim": c["qk_nope_head_dim"],
            "qk_pos_emb_head_dim": c["qk_rope_head_dim"],
            "v_head_dim": c["v_head_dim"],
            "rotary_base": said["rope_theta"],
            **scaling,
        }

    def layers(self, c: Config) -> list[int]:
        """1 for a layer with experts."""
        return [int(n >= c["first_k_dense_replace"]) for n in range(c["num_hidden_layers"])]

    def experts(self, c: Config) -> dict[str, Any]:
        assert c["norm_topk_prob"], "megatron-core always divides sigmoid scores by their sum"
        return {**self.routed(c), "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}

    def routed(self, c: Config) -> dict[str, Any]:
        grouped = c["n_group"] > 1
        return {
            "num_moe_experts": c["n_routed_experts"],
            "moe_router_topk": c["num_experts_per_tok"],
            "moe_ffn_hidden_size": c["moe_intermediate_size"],
            "moe_layer_freq": self.layers(c),
            "moe_shared_expert_intermediate_size": c["moe_intermediate_size"] * c["n_shared_experts"],
            "moe_router_num_groups": c["n_group"] if grouped else None,
            "moe_router_group_topk": c["topk_group"] if grouped else None,
            "moe_router_topk_scaling_factor": c["routed_scaling_factor"],
            "moe_router_dtype": "fp32",
        }

    def model_settings(self, c: Config) -> dict[str, Any]:
        return {
            "max_sequence_length": c["max_position_embeddings"],
            "share_embeddings_and_output_weights": c["tie_word_embeddings"],
            "position_embedding_type": "rope",
        }


class DeepSeekV2(DeepSeekV3):
    def experts(self, c: Config) -> dict[str, Any]:
        found = self.routed(c) | {"moe_router_pre_softmax": True}
        if c["topk_method"] == "greedy":
            found |= {"moe_router_num_groups": None, "moe_router_group_topk": None}
        return found


class Glm47Flash(DeepSeekV3):
    def layers(self, c: Config) -> list[int]:
        return [int(kind == "sparse") for kind in c["mlp_layer_types"]]


class Glm45(DeepSeekV3):
    def attention(self, c: Config) -> dict[str, Any]:
        return {"qk_layernorm": c["use_qk_norm"], "add_qkv_bias": c["attention_bias"]}

    def model_settings(self, c: Config) -> dict[str, Any]:
        return Decoder.model_settings(self, c)


SETTINGS = {
    "qwen3": Qwen3(),
    "mixtral": Mixtral(),
    "qwen2_moe": Qwen2Moe(),
    "qwen3_moe": Qwen3Moe(),
    "deepseek_v2": DeepSeekV2(),
    "deepseek_v3": DeepSeekV3(),
    "kimi_k2": DeepSeekV3(),
    "glm4_moe": Glm45(),
    "glm4_moe_lite": Glm47Flash(),
}
