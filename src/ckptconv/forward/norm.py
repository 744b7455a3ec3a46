"""Norms: RMSNorm and LayerNorm, with or without biases, with weights stored as they are or less 1."""

from __future__ import annotations

import torch
from torch.nn import functional

from ckptconv.forward.weights import Weights
from ckptconv.spec import ModelSpec

Tensor = torch.Tensor


def norm(spec: ModelSpec, m: Weights, name: str, x: Tensor) -> Tensor:
    """The norm of the last axis. name: what stands before `weight` and `bias` in the keys, a space included."""
    return normed(spec, m, name, x, spec.norm_epsilon)


def normed(spec: ModelSpec, m: Weights, name: str, x: Tensor, epsilon: float) -> Tensor:
    """The same with an epsilon of its own."""
    weight = m.vector(f"{name}weight") + float(spec.norm_offset)
    if spec.norm == "LayerNorm":
        return functional.layer_norm(x, weight.shape, weight, m.optional(f"{name}bias"), epsilon)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight
