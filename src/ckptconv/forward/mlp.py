"""The MLP of a decoder's layer, and mixtures of experts: every chosen expert is read, used and dropped by itself.

Source: transformers 5.23 modeling files; routers as in `models/deepseek_v2`, `models/deepseek_v3`, `models/qwen2_moe`.

Legend: s tokens, h hidden, e experts, t chosen of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from ckptconv.forward.weights import Weights
from ckptconv.spec import ModelSpec, MoE

Tensor = torch.Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "squared_relu": lambda x: functional.relu(x).square(),
}


def mlp(spec: ModelSpec, m: Weights, x: Tensor, prefix: str = "mlp ") -> Tensor:
    """x [s, h] -> [s, h] through one MLP: a dense layer's, an expert's, or (prefix) that of the shared experts."""
    act = ACTIVATIONS[spec.activation]
    if not spec.gated:
        inner = act(m.linear(x, f"{prefix}l0 weight", f"{prefix}l0 bias"))
        return m.linear(inner, f"{prefix}l1 weight", f"{prefix}l1 bias")
    gate = m.linear(x, f"{prefix}l0 weight W", f"{prefix}l0 bias W")
    up = m.linear(x, f"{prefix}l0 weight V", f"{prefix}l0 bias V")
    if spec.activation_clamp is not None:
        gate, up = gate.clamp(max=spec.activation_clamp), up.clamp(-spec.activation_clamp, spec.activation_clamp)
    return m.linear(act(gate) * (up + spec.gate_offset), f"{prefix}l1 weight", f"{prefix}l1 bias")


@dataclass
class Choice:
    """The experts of every token, and what they have added up to. which, share: [s, t]; out: [s, h]."""

    which: Tensor
    share: Tensor
    out: Tensor


def choose(spec: ModelSpec, moe: MoE, m: Weights, x: Tensor) -> Choice:
    """What the router says; the shared experts, which it has no say in, are in already."""
    logits = m.linear(x, "router weight", "router bias")
    scores = logits.sigmoid() if moe.score == "sigmoid" else logits.softmax(-1)
    ranking = scores + m.vector("router score correction bias") if moe.score_bias else scores
    if moe.num_groups and moe.topk_groups:
        ranking = _of_best_groups(ranking, moe.num_groups, moe.topk_groups, moe.group_score)
    which = ranking.topk(moe.topk, -1).indices
    share = scores.gather(-1, which)
    if moe.normalize:
        share = share / (share.sum(-1, keepdim=True) + (1e-20 if moe.score == "sigmoid" else 0))
    out = torch.zeros_like(x)
    if moe.shared_ffn_hidden_size:
        out = mlp(spec, m, x, "shared mlp ")
        if moe.shared_gate:
            out = out * m.linear(x, "shared gate weight").sigmoid()
    return Choice(which, share * moe.scaling_factor, out)


def _of_best_groups(ranking: Tensor, groups: int, best: int, score: str) -> Tensor:
    """The ranking [s, e] with the experts of all but the best groups out of the question."""
    grouped = ranking.view(len(ranking), groups, -1)
    of_group = grouped.topk(2, -1).values.sum(-1) if score == "top2" else grouped.amax(-1)
    left = torch.ones_like(of_group, dtype=torch.bool).scatter(-1, of_group.topk(best, -1).indices, False)
    return grouped.masked_fill(left[..., None], -math.inf).flatten(-2)


def add_experts(spec: ModelSpec, m: Weights, x: Tensor, choice: Choice, experts: range) -> None:
    """Add what the experts of a range, whose tensors are `m`, make of the tokens that chose them."""
    for number, expert in enumerate(experts):
        token, place = torch.where(choice.which == expert)
        if len(token):
            made = mlp(spec, m.of_expert(number), x[token])
            choice.out.index_add_(0, token, made * choice.share[token, place, None])
