"""A tiny DBRX: what `fixtures` has for Llama.

Facts: config.json of databricks' release; names and shapes on disk of transformers 4.57 and 5.23 `models/dbrx`.
`rope_theta` at the top is what transformers 5 reads, that in `attn_config` what all others do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Shape = tuple[int, ...]

DBRX: dict[str, Any] = {
    "model_type": "dbrx",
    "d_model": 48,
    "n_heads": 4,
    "n_layers": 4,
    "max_seq_len": 4096,
    "vocab_size": 131,
    "rope_theta": 500000.0,
    "attn_config": {"clip_qkv": 0.5, "kv_n_heads": 2, "rope_theta": 500000.0},
    "ffn_config": {
        "ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2,
        "moe_loss_weight": 0.05, "moe_normalize_expert_weights": 1.0,
    },
    "initializer_range": 0.02,
    "output_router_logits": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
    "tie_word_embeddings": False,
    "transformers_version": "4.45.2",
}  # fmt: skip
FIXTURES = {"dbrx": DBRX}
ARCHITECTURES = {"dbrx": "DbrxForCausalLM"}


def shapes(c: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor on disk."""
    h, v, a = c["d_model"], c["vocab_size"], c["n_heads"]
    ffn, kv = c["ffn_config"], c["attn_config"]["kv_n_heads"] * (h // a)
    e, m = ffn["moe_num_experts"], ffn["ffn_hidden_size"]
    yield "transformer.wte.weight", (v, h)
    for i in range(c["n_layers"]):
        block = f"transformer.blocks.{i}."
        yield block + "norm_attn_norm.norm_1.weight", (h,)
        yield block + "norm_attn_norm.attn.Wqkv.weight", (h + 2 * kv, h)
        yield block + "norm_attn_norm.attn.out_proj.weight", (h, h)
        yield block + "norm_attn_norm.norm_2.weight", (h,)
        yield block + "ffn.router.layer.weight", (e, h)
        for name in ("w1", "v1", "w2"):
            yield block + "ffn.experts.mlp." + name, (e * m, h)
    yield "transformer.norm_f.weight", (h,)
    yield "lm_head.weight", (v, h)


SHAPES = {"dbrx": shapes}
