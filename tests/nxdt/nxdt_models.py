"""Tiny sources whose rows tell where they come from, and expected layouts worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

#: The model of the worked example: head dim 4, one query head for each rank of tp 4 with two copies of kv heads.
EXAMPLE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 24, "vocab_size": 32, "num_hidden_layers": 4, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "torch_dtype": "float32",
}  # fmt: skip
MIXTRAL = EXAMPLE | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4,
    "num_experts_per_tok": 2, "sliding_window": None,
}  # fmt: skip


def weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every element is a number of its own."""
    h, f, v, a = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"))
    kv = config["num_key_value_heads"] * (h // a)
    shapes = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, h)
    for i in range(config["num_hidden_layers"]):
        own = {"self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
               "self_attn.o_proj": (h, h), "input_layernorm": (h,), "post_attention_layernorm": (h,)}  # fmt: skip
        if "num_local_experts" in config:
            own["block_sparse_moe.gate"] = (config["num_local_experts"], h)
            for e in range(config["num_local_experts"]):
                expert = f"block_sparse_moe.experts.{e}."
                own |= {expert + "w1": (f, h), expert + "w2": (h, f), expert + "w3": (f, h)}
        else:
            own |= {"mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in own.items()}
    out, start = {}, 1
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        out[name] = torch.arange(start, start + size, dtype=torch.float64).to(torch.float32).reshape(shape)
        start += size
    assert start < 1 << 24
    return out


def build(folder: Path, config: dict[str, Any] = EXAMPLE, file: str = "pytorch_model.bin", **changes: Any) -> Path:
    """A directory with config.json and one file of weights; None takes a key away."""
    made = {key: value for key, value in {**config, **changes}.items() if value is not None}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(made))
    torch.save(weights({**config, **changes}), folder / file)
    return folder


def full(folder: Path) -> dict[str, torch.Tensor]:
    """What `build` wrote."""
    found: dict[str, torch.Tensor] = torch.load(folder / "pytorch_model.bin", weights_only=True)
    return found


def rows(part: torch.Tensor, whole: torch.Tensor) -> list[int]:
    """Which rows of `whole` those of `part` are; -1 for zeros."""
    known = {tuple(row.tolist()): n for n, row in enumerate(whole)}
    return [-1 if not row.any() else known[tuple(row.tolist())] for row in part]


def heads(part: torch.Tensor, whole: torch.Tensor, d: int) -> list[int]:
    """The same in heads of d rows, whose order inside must be unchanged."""
    found = rows(part, whole)
    assert all(n == -1 or n % d == i % d for i, n in enumerate(found))
    return [n // d if n >= 0 else -1 for n in found[::d]]
