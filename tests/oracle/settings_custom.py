"""Models of examples/megatron_layers, built as a user builds them: from the layers and ckptconv_layers.json.

megatron-core is told only what the trainer's flags have to say beside the layers. The rest of the configuration is
deliberately that of another model: whatever the layers do not take from their file makes the logits wrong.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

from settings import Config, Settings
from settings_older import MegatronBert

LAYERS = Path(__file__).parents[2] / "examples/megatron_layers"
#: Needs more than layers: a cap or multiplier on logits, or norms that store gamma - 1 without Transformer Engine.
WHOLE = ("gemma", "gemma2", "gemma3_text", "granite")
TIED = ("gemma", "gemma2", "gemma3_text", "falcon", "bert")


def groups(c: Config) -> int:
    """Key and value heads."""
    heads: int = c["num_attention_heads"]
    if c["model_type"] != "falcon":
        return c.get("num_key_value_heads") or heads
    return c["num_kv_heads"] if c.get("new_decoder_architecture") else 1 if c["multi_query"] else heads


class Custom(Settings):
    """A decoder; BERT is built by what the older models have for it."""

    def transformer_settings(self, c: Config) -> dict[str, Any]:
        h, heads = c["hidden_size"], c["num_attention_heads"]
        names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
        epsilon = next(name for name in names if name in c)
        return {
            "num_layers": c["num_hidden_layers"],
            "hidden_size": h,
            "ffn_hidden_size": c.get("intermediate_size") or c.get("ffn_hidden_size") or 4 * h,
            "num_attention_heads": heads,
            "num_query_groups": groups(c),
            "kv_channels": c.get("head_dim") or h // heads,
            "normalization": "RMSNorm" if epsilon == "rms_norm_eps" else "LayerNorm",
            "layernorm_epsilon": c[epsilon],
            "layernorm_zero_centered_gamma": c["model_type"].startswith("gemma"),
            "qk_layernorm": c["model_type"] in ("gemma3_text", "olmo2"),
            "add_bias_linear": c["model_type"] in ("gpt_neox", "bert"),
            "add_qkv_bias": bool(c.get("use_qkv_bias") or (c["model_type"] == "glm4" and c["attention_bias"])),
        }

    def model_settings(self, c: Config) -> dict[str, Any]:
        return {
            "max_sequence_length": c["max_position_embeddings"],
            "share_embeddings_and_output_weights": c.get("tie_word_embeddings", c["model_type"] in TIED),
            "position_embedding_type": "learned_absolute" if c["model_type"] == "bert" else "rope",
        }

    def layer_spec(self, c: Config, config: Any) -> Any:
        os.environ["CKPTCONV_LAYERS"] = c["custom_layers"]
        if str(LAYERS) not in sys.path:
            sys.path.insert(0, str(LAYERS))
        return importlib.import_module("ckptconv_layers").local

    def model(self, c: Config, config: Any, layers: Any, **common: Any) -> Any:
        if c["model_type"] == "bert":
            return MegatronBert.model(self, c, config, layers, **common)  # type: ignore[arg-type]
        if c["model_type"] not in WHOLE:
            return super().model(c, config, layers, **common)
        build = importlib.import_module("ckptconv_layers").gpt_model
        return build(config, **common, **self.model_settings(c))

    def run(self, model: Any, ids: torch.Tensor) -> dict[str, Any]:
        bert = hasattr(model, "add_binary_head")
        return MegatronBert.run(self, model, ids) if bert else super().run(model, ids)  # type: ignore[arg-type]


SETTINGS = {"custom layers": Custom()}
