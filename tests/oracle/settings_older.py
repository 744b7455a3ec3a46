"""GPT-2, StarCoder 1 and 2, GPT-NeoX without parallel residual, and MegatronBert in megatron-core's own words.

The approximate GELU is what `F.gelu` becomes with bias_activation_fusion; without it F.gelu is the exact one. Without
biases there is nothing to fuse, and the function itself has to be given.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from settings import Config, Settings

TANH = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
PAD, SEPARATOR = 0, 2


def _layer_norm(c: Config, activation: str, epsilon: float) -> dict[str, Any]:
    assert activation in (*TANH, "gelu"), activation
    gelu, fused = torch.nn.functional.gelu, activation in TANH and c.get("use_bias", True)
    return {
        "normalization": "LayerNorm",
        "layernorm_epsilon": epsilon,
        "activation_func": gelu if fused or activation == "gelu" else functools.partial(gelu, approximate="tanh"),
        "bias_activation_fusion": fused,
        "gated_linear_unit": False,
    }


class Gpt2(Settings):
    """GPT-2 and gpt_bigcode."""

    def transformer_settings(self, c: Config) -> dict[str, Any]:
        heads = c["n_head"]
        return {
            "num_layers": c["n_layer"],
            "hidden_size": c["n_embd"],
            "ffn_hidden_size": c["n_inner"] or 4 * c["n_embd"],
            "num_attention_heads": heads,
            "num_query_groups": 1 if c.get("multi_query") else heads,
            "kv_channels": c["n_embd"] // heads,
            "add_bias_linear": True,
            **_layer_norm(c, c["activation_function"], c["layer_norm_epsilon"]),
        }

    def model_settings(self, c: Config) -> dict[str, Any]:
        return {
            "max_sequence_length": c["n_positions"],
            "share_embeddings_and_output_weights": c["tie_word_embeddings"],
            "position_embedding_type": "learned_absolute",
        }


class Starcoder2(Settings):
    """Llama's arrangement with LayerNorm, biases and no gate."""

    def transformer_settings(self, c: Config) -> dict[str, Any]:
        common = super().transformer_settings(c | {"rms_norm_eps": c["norm_epsilon"]})
        common["add_bias_linear"] = c["use_bias"]
        return common | _layer_norm(c, c["hidden_act"], c["norm_epsilon"])


class NeoxSerial(Settings):
    """GPT-NeoX with use_parallel_residual false."""

    def transformer_settings(self, c: Config) -> dict[str, Any]:
        assert not c["use_parallel_residual"], "GPTModel has no parallel residual"
        common = super().transformer_settings(c | {"rms_norm_eps": c["layer_norm_eps"]})
        common["add_bias_linear"] = True
        return common | _layer_norm(c, c["hidden_act"], c["layer_norm_eps"])

    def model_settings(self, c: Config) -> dict[str, Any]:
        return super().model_settings(c | {"rope_theta": c["rotary_emb_base"]}) | {"rotary_percent": c["rotary_pct"]}


def masks(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(1 for tokens and 0 for padding, 0 for the first sentence and 1 for the rest) of [b, s] token ids."""
    ends = (ids == SEPARATOR).long()
    return (ids != PAD).long(), ((ends.cumsum(1) - ends) > 0).long()


class MegatronBert(Settings):
    """BERT with norms before attention and MLP."""

    def transformer_settings(self, c: Config) -> dict[str, Any]:
        common = super().transformer_settings(c | {"rms_norm_eps": c["layer_norm_eps"]})
        common["add_bias_linear"] = True
        return common | _layer_norm(c, c["hidden_act"], c["layer_norm_eps"])

    def model_settings(self, c: Config) -> dict[str, Any]:
        return {
            "max_sequence_length": c["max_position_embeddings"],
            "share_embeddings_and_output_weights": c["tie_word_embeddings"],
            "position_embedding_type": "learned_absolute",
        }

    def layer_spec(self, c: Config, config: Any) -> Any:
        from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec

        return bert_layer_local_spec

    def model(self, c: Config, config: Any, layers: Any, **common: Any) -> Any:
        from megatron.core.models.bert.bert_model import BertModel

        binary = c["architectures"][0].endswith("BertForPreTraining")
        heads = {"num_tokentypes": c["type_vocab_size"], "add_binary_head": binary}
        return BertModel(config, transformer_layer_spec=layers, **heads, **common, **self.model_settings(c))

    def run(self, model: Any, ids: torch.Tensor) -> dict[str, Any]:
        mask, types = masks(ids)
        out = model(ids, mask, tokentype_ids=types)
        if not model.post_process:
            return {"": out}
        return {"": out[0], **({" binary": out[1]} if model.binary_head else {})}


SETTINGS: dict[str, Settings] = {
    "gpt2": Gpt2(),
    "gpt_bigcode": Gpt2(),
    "starcoder2": Starcoder2(),
    "gpt_neox": NeoxSerial(),
    "megatron-bert": MegatronBert(),
}
