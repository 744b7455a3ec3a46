"""megatron-core's words for Phi-3, GLM, gpt-oss, SmolLM3, Nemotron, StableLM and windows on some layers.

Facts: megatron-core 0.16.1 `transformer/transformer_config.py`, `models/gpt/gpt_model.py`, `transformer/utils.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from settings import Config, Settings

SLIDING = "sliding_attention"


class SomeWindows(Settings):
    """Windows on the layers of a list; the reader of config.json says which."""

    def windowed(self, c: Config) -> list[int]:
        """1 for a layer with a window."""
        return [int(kind == SLIDING) for kind in c["layer_types"]]

    def transformer_settings(self, c: Config) -> dict[str, Any]:
        found = super().transformer_settings(c)
        if found["window_size"] is not None:
            found["window_attn_skip_freq"] = self.windowed(c)
        return found


class Qwen2(SomeWindows):
    def windowed(self, c: Config) -> list[int]:
        if "layer_types" in c:
            return super().windowed(c)
        return [int(layer >= c["max_window_layers"]) for layer in range(c["num_hidden_layers"])]


class Partial(Settings):
    """A part of each head is rotated."""

    percent = 1.0

    def model_settings(self, c: Config) -> dict[str, Any]:
        return super().model_settings(c) | {"rotary_percent": c.get("partial_rotary_factor", self.percent)}


class Glm(Partial):
    """Rotated in pairs, biases on q, k and v."""

    percent = 0.5

    def transformer_settings(self, c: Config) -> dict[str, Any]:
        own = {"rotary_interleaved": True, "add_bias_linear": False, "add_qkv_bias": c["attention_bias"]}
        return super().transformer_settings(c) | own


class SmolLM3(Settings):
    def transformer_settings(self, c: Config) -> dict[str, Any]:
        # 1 means no rope here, and rope in config.json.
        return super().transformer_settings(c) | {"no_rope_freq": [1 - used for used in c["no_rope_layers"]]}


class StableLM(Partial):
    percent = 0.25

    def transformer_settings(self, c: Config) -> dict[str, Any]:
        own = {"normalization": "LayerNorm", "add_qkv_bias": c["use_qkv_bias"]}
        return super().transformer_settings(c | {"rms_norm_eps": c["layer_norm_eps"]}) | own


class Olmo(Settings):
    def transformer_settings(self, c: Config) -> dict[str, Any]:
        return super().transformer_settings(c | {"rms_norm_eps": 1e-5}) | {"normalization": "LayerNorm"}


class Nemotron(Partial):
    """Norms store gamma - 1, which the norms of the local layers do not know: it is added as they run."""

    percent = 0.5

    def transformer_settings(self, c: Config) -> dict[str, Any]:
        own = {
            "normalization": "LayerNorm",
            "gated_linear_unit": False,
            "activation_func": lambda x: functional.relu(x).square(),
        }
        return super().transformer_settings(c | {"rms_norm_eps": c["norm_eps"]}) | own

    def after(self, model: Any, c: Config) -> None:
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.forward = _one_more.__get__(module)  # type: ignore[method-assign]


def _one_more(self: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], self.weight + 1, self.bias, self.eps)


class GptOss(SomeWindows):
    """Sinks, a clamped activation, biases everywhere, yarn, whose numbers are no fields of the configuration."""

    def transformer_settings(self, c: Config) -> dict[str, Any]:
        from megatron.core.fusions.fused_bias_geglu import quick_gelu

        return super().transformer_settings(c) | {
            "add_bias_linear": True,
            "add_qkv_bias": True,
            "activation_func": quick_gelu,
            "activation_func_clamp_value": c["swiglu_limit"],
            "glu_linear_offset": 1.0,
            "softmax_type": "learnable",
            "num_moe_experts": c["num_local_experts"],
            "moe_router_topk": c["num_experts_per_tok"],
            "moe_router_pre_softmax": False,
            "moe_ffn_hidden_size": c["intermediate_size"],
        }

    def model_settings(self, c: Config) -> dict[str, Any]:
        assert c["rope_scaling"]["rope_type"] == "yarn"
        plain = super().model_settings(c | {"rope_scaling": None})
        return plain | {"position_embedding_type": "yarn"}

    def attributes(self, c: Config) -> dict[str, Any]:
        yarn = c["rope_scaling"]
        return {
            "yarn_rotary_scaling_factor": yarn["factor"],
            "yarn_original_max_position_embeddings": yarn["original_max_position_embeddings"],
            "yarn_beta_fast": yarn["beta_fast"],
            "yarn_beta_slow": yarn["beta_slow"],
            "yarn_mscale": None,
            "yarn_mscale_all_dim": None,
            "yarn_correction_range_round_to_int": yarn["truncate"],
        }


SETTINGS = {
    "qwen2": Qwen2(),
    "ministral": SomeWindows(),
    "phi3": Partial(),
    "glm": Glm(),
    "smollm3": SmolLM3(),
    "stablelm": StableLM(),
    "nemotron": Nemotron(),
    "olmo": Olmo(),
    "gpt_oss": GptOss(),
}
