"""What a config.json stands for in megatron-core, in its own words. Nothing of ckptconv is imported.

A model_type that needs more than the dense decoder below has an object of its own: modules settings_*.py each have a
dict SETTINGS, model_type -> object. A family written from the facts of both libraries, not from ckptconv's tables, is
what makes the comparison of logits an independent one.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

Config = dict[str, Any]


class Settings:
    """The dense decoder: Llama, Mistral, Qwen2."""

    def transformer_settings(self, c: Config) -> dict[str, Any]:
        """TransformerConfig fields; `activation_func` silu when not said."""
        heads = c["num_attention_heads"]
        window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
        return {
            "num_layers": c["num_hidden_layers"],
            "hidden_size": c["hidden_size"],
            "ffn_hidden_size": c["intermediate_size"],
            "num_attention_heads": heads,
            "num_query_groups": c.get("num_key_value_heads") or heads,
            "kv_channels": c.get("head_dim") or c["hidden_size"] // heads,
            "normalization": "RMSNorm",
            "layernorm_epsilon": c["rms_norm_eps"],
            "gated_linear_unit": True,
            # All linears or none: one kind of bias in the source makes the others zeros.
            "add_bias_linear": bool(c.get("attention_bias") or c.get("mlp_bias")),
            "add_qkv_bias": c["model_type"] == "qwen2",
            # (left, right) keys beside the query itself; Hugging Face counts the query too.
            "window_size": None if window is None else (window - 1, 0),
        }

    def model_settings(self, c: Config) -> dict[str, Any]:
        """GPTModel arguments."""
        rope = c.get("rope_scaling") or {}
        kind = rope.get("rope_type") or rope.get("type")
        settings = {
            "max_sequence_length": c["max_position_embeddings"],
            "share_embeddings_and_output_weights": c["tie_word_embeddings"],
            "position_embedding_type": "rope",
            "rotary_base": c.get("rope_theta", 10000.0),
        }
        if kind == "llama3":
            # The other three numbers are constants in megatron-core.
            fixed = (rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"])
            assert fixed == (8192, 1, 4), f"megatron-core cannot express llama3 rope scaling {fixed}"
            settings |= {"rope_scaling": True, "rope_scaling_factor": rope["factor"]}
        elif kind == "linear":
            settings |= {"seq_len_interpolation_factor": rope["factor"]}
        else:
            assert kind is None, f"no settings for rope scaling {kind}"
        return settings

    def attributes(self, c: Config) -> dict[str, Any]:
        """What megatron-core reads from its configuration that is not a field of it (yarn_...)."""
        return {}

    def layer_spec(self, c: Config, config: Any, vp_stage: int | None = None) -> Any:
        """The layers, of torch modules (the local spec). `config` is the finished TransformerConfig."""
        from megatron.core.models.gpt import gpt_layer_specs

        if config.num_moe_experts is None:
            return gpt_layer_specs.get_gpt_layer_local_spec(
                qk_layernorm=config.qk_layernorm,
                multi_latent_attention=config.multi_latent_attention,
                normalization=config.normalization,
            )
        return gpt_layer_specs.get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
        )

    def model(self, c: Config, config: Any, layers: Any, **common: Any) -> Any:
        """The model of one stage. `common` are arguments of every kind of model."""
        from megatron.core.models.gpt import GPTModel

        return GPTModel(config, layers, **common, **self.model_settings(c))

    def run(self, model: Any, ids: Any) -> dict[str, Any]:
        """What one stage computes from [b, s] token ids: its output by "", others by the end of their names."""
        import torch

        return {"": model(ids, torch.arange(ids.shape[1]).expand(ids.shape), None)}

    def after(self, model: Any, c: Config) -> None:
        """Change the built model where configuration cannot say it, in place. Nothing may be added silently."""


def of(c: Config) -> Settings:
    """The settings of a model. `custom_layers` in a config: the file that says what layers of one's own need."""
    return SETTINGS.get("custom layers" if "custom_layers" in c else c["model_type"], DENSE)


DENSE = Settings()
SETTINGS: dict[str, Any] = {}
for _name in sorted(path.stem for path in Path(__file__).parent.glob("settings_*.py")):
    SETTINGS |= importlib.import_module(_name).SETTINGS
