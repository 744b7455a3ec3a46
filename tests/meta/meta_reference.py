"""Meta's format by itself: a writer of `consolidated.NN.pth`, and a forward that computes on the shards as they lie.

Both follow Meta's model code (llama, llama3, llama-models: `model.py`) and share nothing with ckptconv. No shard is
ever joined: column-parallel products stay apart, row-parallel ones are summed, as the ranks of fairscale do.

Legend: h dim, f ffn, a heads, g kv heads, d head dim, v vocabulary, n shards, b batch, s length.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

Weights = dict[str, torch.Tensor]

#: Hugging Face's names in a layer, and the dimension that shards cut (None: every shard has it whole).
LAYER = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}


def pairs(weight: torch.Tensor, d: int) -> torch.Tensor:
    """Rows of every head [n * d, h] from (j, j + d/2) to (2j, 2j + 1), row by row."""
    rows = []
    for head in range(weight.shape[0] // d):
        for row in range(d):
            j, second = divmod(row, 2)
            rows.append(weight[head * d + j + second * (d // 2)])
    return torch.stack(rows)


def build(
    folder: Path, weights: Weights, config: dict[str, Any], params: dict[str, Any], shards: int, rows: bool
) -> Path:
    """Write a model of Hugging Face's names as Meta would; `rows`: the embedding is cut on dim 0."""
    d = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    embedding = weights["model.embed_tokens.weight"]
    whole: dict[str, tuple[torch.Tensor, int | None]] = {
        "tok_embeddings.weight": (embedding, 0 if rows else 1),
        "norm.weight": (weights["model.norm.weight"], None),
        "output.weight": (weights.get("lm_head.weight", embedding), 0),
    }
    for i in range(config["num_hidden_layers"]):
        for name, (theirs, dim) in LAYER.items():
            weight = weights[f"model.layers.{i}.{theirs}.weight"]
            whole[f"layers.{i}.{name}.weight"] = (pairs(weight, d) if name[-2:] in ("wq", "wk") else weight, dim)
    folder.mkdir(parents=True)
    for n in range(shards):
        shard = {
            name: (weight if dim is None else weight.chunk(shards, dim)[n]).clone()
            for name, (weight, dim) in whole.items()
        }
        if not rows:
            shard["rope.freqs"] = 1.0 / params.get("rope_theta", 1e4) ** (torch.arange(0, d, 2).float() / d)
        torch.save(shard, folder / f"consolidated.{n:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def frequencies(d: int, theta: float, factor: float | None) -> torch.Tensor:
    """Angles per position [d/2]; those of long waves are divided by `factor`, with a ramp between."""
    found = []
    for j in range(d // 2):
        plain = theta ** (-2 * j / d)
        turns = 8192 * plain / (2 * math.pi)  # in the context the model was first trained with
        share = min(max((turns - 1) / (4 - 1), 0.0), 1.0)
        found.append(plain if factor is None else share * plain + (1 - share) * plain / factor)
    return torch.tensor(found)


def logits(folder: Path, ids: torch.Tensor, factor: float = 8.0) -> torch.Tensor:
    """What Meta's code computes in fp32 for [b, s] token ids: [b, s, v]. `factor` is that of a scaled rope."""
    params = json.loads((folder / "params.json").read_text())
    files = sorted(folder.glob("consolidated.*.pth"))
    shards = [{k: v.float() for k, v in torch.load(f, weights_only=True).items()} for f in files]
    n, h, eps = len(shards), params["dim"], params["norm_eps"]
    a, g = params["n_heads"], params.get("n_kv_heads") or params["n_heads"]
    d = params.get("head_dim") or h // a
    f = int(2 * (4 * h) / 3)
    if params.get("ffn_dim_multiplier") is not None:
        f = int(params["ffn_dim_multiplier"] * f)
    f = params["multiple_of"] * math.ceil(f / params["multiple_of"])
    assert shards[0]["layers.0.feed_forward.w1.weight"].shape == (f // n, h)
    assert len({k.split(".")[1] for k in shards[0] if k.startswith("layers.")}) == params["n_layers"]
    scaled = factor if params.get("use_scaled_rope") else None
    turn = torch.outer(torch.arange(ids.shape[1]).float(), frequencies(d, params.get("rope_theta", 1e4), scaled))
    turn = torch.polar(torch.ones_like(turn), turn)[None, :, None]
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    if params.get("sliding_window"):
        mask &= ~torch.ones_like(mask).tril(-params["sliding_window"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        assert all(torch.equal(shard[name], shards[0][name]) for shard in shards)
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * shards[0][name]

    def heads(x: torch.Tensor, weight: torch.Tensor, count: int, rotate: bool) -> torch.Tensor:
        out = (x @ weight.T).unflatten(-1, (count, d))
        if rotate:
            out = torch.view_as_real(torch.view_as_complex(out.unflatten(-1, (d // 2, 2))) * turn).flatten(-2)
        return out.transpose(1, 2)

    x = _embedded(shards, ids, h)
    for i in range(params["n_layers"]):
        at = f"layers.{i}."
        y = norm(x, at + "attention_norm.weight")
        for shard in shards:
            q = heads(y, shard[at + "attention.wq.weight"], a // n, True)
            k = heads(y, shard[at + "attention.wk.weight"], g // n, True).repeat_interleave(a // g, 1)
            v = heads(y, shard[at + "attention.wv.weight"], g // n, False).repeat_interleave(a // g, 1)
            scores = (q @ k.transpose(2, 3) / d**0.5).masked_fill(~mask, float("-inf")).softmax(-1)
            x = x + (scores @ v).transpose(1, 2).flatten(2) @ shard[at + "attention.wo.weight"].T
        y = norm(x, at + "ffn_norm.weight")
        for shard in shards:
            w1, w2, w3 = (shard[at + f"feed_forward.w{m}.weight"] for m in (1, 2, 3))
            x = x + (torch.nn.functional.silu(y @ w1.T) * (y @ w3.T)) @ w2.T
    x = norm(x, "norm.weight")
    return torch.cat([x @ shard["output.weight"].T for shard in shards], -1)


def _embedded(shards: list[Weights], ids: torch.Tensor, h: int) -> torch.Tensor:
    """[b, s, h]: columns side by side, or summed over shards that know a range of the tokens each."""
    tables = [shard["tok_embeddings.weight"] for shard in shards]
    if len(shards) > 1 and tables[0].shape[1] * len(shards) == h:
        return torch.cat([table[ids] for table in tables], -1)
    out = torch.zeros(*ids.shape, h)
    for n, table in enumerate(tables):
        mine = ids - n * table.shape[0]
        known = (mine >= 0) & (mine < table.shape[0])
        out += table[mine.clamp(0, table.shape[0] - 1)] * known[..., None]
    return out
