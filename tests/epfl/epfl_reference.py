"""A forward of Megatron-LLM's models that computes on the rank files as they lie, and shares nothing with ckptconv.

It follows the model code of epfLLM/Megatron-LLM at 806a833 (`megatron/model`): rotary pairs as complex numbers, the
second half of a gated MLP through the activation, column-parallel products apart on every rank and row-parallel ones
summed. What no published Megatron-LLM has (Gemma) is as the args say it.

Legend: h hidden, a heads, g kv heads, d head dim, v padded vocabulary, b batch, s length, t tensor rank.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

Tensor = torch.Tensor
Weights = dict[str, Tensor]


class Model:
    """A checkpoint directory: `args`, and the weights of every tensor rank of every stage."""

    def __init__(self, top: Path) -> None:
        folder = (top / "latest_checkpointed_iteration.txt").read_text()
        folder = folder if folder == "release" else f"iter_{int(folder):07d}"
        names = sorted(path.parent.name for path in (top / folder).glob("mp_rank_*/model_optim_rng.pt"))
        files = {name: torch.load(top / folder / name / "model_optim_rng.pt", weights_only=False) for name in names}
        self.args: Namespace = files[names[0]]["args"]
        self.tp, self.pp = self.args.tensor_model_parallel_size, self.args.pipeline_model_parallel_size
        pipeline = [[f"mp_rank_{t:02d}" + (f"_{p:03d}" if self.pp > 1 else "") for t in range(self.tp)]
                    for p in range(self.pp)]  # fmt: skip
        assert sorted(name for stage in pipeline for name in stage) == names
        self.models = [[files[name]["model"] for name in stage] for stage in pipeline]

    def embedding(self, t: int) -> Weights:
        """The embedding of the first stage, as the trainer's Embedding.load_state_dict finds it."""
        found: Any = self.models[0][t]["language_model"]["embedding"]
        if "word_embeddings" not in found:
            return dict(found)
        return {f"{module}.{name}": tensor for module, parts in found.items() for name, tensor in parts.items()}

    def encoder(self, p: int, t: int) -> Weights:
        """The layers of a stage, as TransformerLanguageModel.load_state_dict finds them."""
        model = self.models[p][t]["language_model"]
        found = model["encoder"] if "encoder" in model else model["transformer"]
        return {name.replace(".attention.", ".self_attention."): tensor for name, tensor in found.items()}

    def head(self, t: int) -> Tensor:
        """The rows of the output layer on a rank."""
        last = self.models[-1][t]
        if not self.args.tie_embed_logits:
            return last["language_model"]["lm_head"]
        if self.pp > 1:
            return last["word_embeddings_for_head"]["weight"]
        return self.embedding(t)["word_embeddings.weight"]

    def logits(self, ids: Tensor) -> Tensor:
        """[b, s] -> [b, s, v]."""
        rows = torch.cat([self.embedding(t)["word_embeddings.weight"] for t in range(self.tp)])
        x = functional.embedding(ids, rows)
        if self.args.position_embedding_type == "absolute":
            x = x + self.embedding(0)["position_embeddings.weight"][: ids.shape[1]]
        x = x * getattr(self.args, "embedding_multiplier", 1.0)
        for p in range(self.pp):
            ranks = [self.encoder(p, t) for t in range(self.tp)]
            numbers = {int(name.split(".")[1]) for name in ranks[0] if name.startswith("layers.")}
            for number in sorted(numbers):
                start = f"layers.{number}."
                x = self.layer([{n.removeprefix(start): w for n, w in r.items() if n.startswith(start)} for r in ranks],
                               x)  # fmt: skip
        x = self.norm(self.encoder(self.pp - 1, 0), "final_layernorm", x)
        return torch.cat([x @ self.head(t).T for t in range(self.tp)], -1)

    def layer(self, ranks: list[Weights], x: Tensor) -> Tensor:
        normed = self.norm(ranks[0], "input_layernorm", x)
        attention = self.summed(ranks, "self_attention.dense", [self.attention(w, normed) for w in ranks])
        if self.args.parallel_attn:
            normed = self.norm(ranks[0], "mlp_layernorm", x) if self.args.parallel_layernorm else normed
            return x + attention + self.mlp(ranks, normed)
        x = x + attention
        return x + self.mlp(ranks, self.norm(ranks[0], "post_attention_layernorm", x))

    def norm(self, weights: Weights, name: str, x: Tensor) -> Tensor:
        weight, eps = weights[f"{name}.weight"], self.args.layernorm_epsilon
        if not self.args.use_rms_norm:
            return functional.layer_norm(x, x.shape[-1:], weight, weights[f"{name}.bias"], eps)
        weight = weight + 1 if getattr(self.args, "apply_layernorm_1p", False) else weight
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def column(self, weights: Weights, name: str, x: Tensor) -> Tensor:
        assert (f"{name}.bias" in weights) == self.args.use_bias
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def summed(self, ranks: list[Weights], name: str, parts: list[Tensor]) -> Tensor:
        total = sum(part @ weights[f"{name}.weight"].T for part, weights in zip(parts, ranks, strict=True))
        assert isinstance(total, Tensor)
        return total + ranks[0][f"{name}.bias"] if self.args.use_bias else total

    def attention(self, weights: Weights, x: Tensor) -> Tensor:
        """What a rank's heads see: [b, s, h] -> [b, s, a/tp * d]."""
        args, (b, s, _) = self.args, x.shape
        per_group, d = args.num_attention_heads // args.num_attention_heads_kv, args.kv_channels
        mixed = self.column(weights, "self_attention.query_key_value", x).view(b, s, -1, per_group + 2, d)
        q, k, v = mixed[:, :, :, :-2], mixed[:, :, :, [-2]], mixed[:, :, :, [-1]]
        q, k, v = (part.expand(q.shape).reshape(b, s, -1, d).transpose(1, 2) for part in (q, k, v))
        if args.position_embedding_type == "rotary":
            q, k = self.rotated(q), self.rotated(k)
        scores = q @ k.transpose(-1, -2) / d**0.5
        row, col = torch.arange(s)[:, None], torch.arange(s)
        seen = col <= row
        if args.sliding_window_size is not None:
            seen &= col >= row - args.sliding_window_size
        scores = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return (scores @ v).transpose(1, 2).reshape(b, s, -1)

    def rotated(self, x: Tensor) -> Tensor:
        d, s = x.shape[-1], x.shape[-2]
        frequencies = 1.0 / self.args.rope_theta ** (torch.arange(0, d, 2).float() / d)
        angles = torch.outer(torch.arange(s).float() / self.args.rope_scaling_factor, frequencies)
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(-2)

    def mlp(self, ranks: list[Weights], x: Tensor) -> Tensor:
        parts = [self.activated(self.column(weights, "mlp.dense_h_to_4h", x)) for weights in ranks]
        return self.summed(ranks, "mlp.dense_4h_to_h", parts)

    def activated(self, x: Tensor) -> Tensor:
        args = self.args
        if args.glu_activation is None:
            fused = args.bias_gelu_fusion and args.use_bias  # the kernel's formula is the approximation
            return functional.gelu(x, approximate="tanh" if fused else "none")
        up, gate = x.chunk(2, -1)
        if args.glu_activation == "swiglu":
            return up * functional.silu(gate)
        assert args.glu_activation == "geglu"
        tanh = getattr(args, "approximate_gelu", False)
        return up * functional.gelu(gate, approximate="tanh" if tanh else "none")
