"""Attention of a decoder's layer: grouped heads or multi-latent, with everything a ModelSpec can say of them.

Source: transformers 5.23 modeling files; ALiBi's slopes as in `models/falcon`.

Legend: s tokens, h hidden, a query heads, g query groups, d head dim; multi-latent attention: n, p numbers of a query
head without and with rope, w of a value head.
"""

from __future__ import annotations

import math

import torch

from ckptconv.forward import rope
from ckptconv.forward.norm import norm, normed
from ckptconv.forward.weights import Weights
from ckptconv.spec import MLA, ModelSpec

Tensor = torch.Tensor

#: Of the norms inside multi-latent attention, whatever `norm_epsilon` says (transformers `models/deepseek_v3`).
LATENT_EPSILON = 1e-6


def attention(spec: ModelSpec, m: Weights, layer: int, x: Tensor) -> Tensor:
    """x [s, h] -> [s, h]."""
    if spec.mla:
        q, k, v = _latent(spec, spec.mla, m, x)
        scale = spec.mla.q_head_dim**-0.5 if spec.softmax_scale is None else spec.softmax_scale
        scale *= rope.score_gain(spec.rope)
    else:
        q, k, v = _grouped(spec, m, layer, x)
        scale = spec.kv_channels**-0.5 if spec.softmax_scale is None else spec.softmax_scale
    sinks = m.vector("attention sinks") if spec.sinks else None
    out = _attended(spec, q, k, v, scale, _windowed(spec, layer), sinks)
    return m.linear(out, "dense weight", "dense bias")


def _windowed(spec: ModelSpec, layer: int) -> bool:
    return spec.sliding_window is not None and (spec.window_layers is None or bool(spec.window_layers[layer]))


def _grouped(spec: ModelSpec, m: Weights, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [s, a, d], keys and values [s, g, d]."""
    g, d, r = spec.num_query_groups, spec.kv_channels, spec.heads_per_group
    qkv = m.linear(x, "qkv weight", "qkv bias").view(len(x), g, r + 2, d)
    if spec.qkv_clip is not None:
        qkv = qkv.clamp(-spec.qkv_clip, spec.qkv_clip)
    q, k, v = qkv[:, :, :r].reshape(len(x), g * r, d), qkv[:, :, r], qkv[:, :, r + 1]
    if spec.qk_norm == "full":
        q = norm(spec, m, "q norm ", q.flatten(1)).view_as(q)
        k = norm(spec, m, "k norm ", k.flatten(1)).view_as(k)
    elif spec.qk_norm == "head":
        q, k = norm(spec, m, "q norm ", q), norm(spec, m, "k norm ", k)
    used = spec.local_rope if spec.local_rope and _windowed(spec, layer) else spec.rope
    if used and (spec.rope_layers is None or spec.rope_layers[layer]):
        positions = spec.max_position_embeddings
        q, k = (rope.rotated(one, used, positions, used.interleaved) for one in (q, k))
    return q, k, v


def _latent(spec: ModelSpec, mla: MLA, m: Weights, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [s, a, n + p], values [s, a, w]."""
    s, a, n, p = len(x), spec.num_attention_heads, mla.qk_head_dim, mla.qk_rope_head_dim
    if mla.q_lora_rank is None:
        q = m.linear(x, "q proj weight")
    else:
        down = normed(spec, m, "q down norm ", m.linear(x, "q down weight"), LATENT_EPSILON)
        q = m.linear(down, "q up weight")
    q = q.view(s, a, n + p)
    latent, shared = torch.split(m.linear(x, "kv down weight"), [mla.kv_lora_rank, p], -1)
    up = m.linear(normed(spec, m, "kv down norm ", latent, LATENT_EPSILON), "kv up weight").view(s, a, -1)
    k, v = torch.split(up, [n, mla.v_head_dim], -1)
    turned, shared = q[..., n:], shared[:, None]
    if spec.rope:  # rows are in pairs, whatever the family's files have
        positions = spec.max_position_embeddings
        turned, shared = (rope.rotated(one, spec.rope, positions, True) for one in (turned, shared))
    return torch.cat([q[..., :n], turned], -1), torch.cat([k, shared.expand(-1, a, -1)], -1), v


def _attended(
    spec: ModelSpec, q: Tensor, k: Tensor, v: Tensor, scale: float, windowed: bool, sinks: Tensor | None
) -> Tensor:
    """What every query sees of earlier tokens: [s, a * d]."""
    s, a = q.shape[:2]
    q, k, v = (one.transpose(0, 1) for one in (q, k, v))
    k, v = (one.repeat_interleave(a // len(one), 0) for one in (k, v))
    distance = torch.arange(s)[:, None] - torch.arange(s)
    scores = q @ k.transpose(1, 2) * scale
    if spec.attention_softcap is not None:
        scores = torch.tanh(scores / spec.attention_softcap) * spec.attention_softcap
    if spec.alibi:
        slopes = alibi_slopes(a) * (scale if spec.alibi_scaled else 1)
        scores = scores - slopes[:, None, None] * distance
    unseen = distance < 0
    if windowed and spec.sliding_window:
        unseen |= distance >= spec.sliding_window
    scores = scores.masked_fill(unseen, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(a, 1, 1).expand(-1, s, 1)], -1)
    return (scores.softmax(-1)[..., :s] @ v).transpose(0, 1).flatten(1)


def alibi_slopes(heads: int) -> Tensor:
    """One slope per head: powers of one number, then, where heads are no power of 2, every other one of the next."""
    count = 1 << (heads.bit_length() - 1)
    base, finer = 2 ** (-8 / count), 2 ** (-4 / count)
    slopes = [base ** (n + 1) for n in range(count)]
    return torch.tensor(slopes + [finer ** (2 * n + 1) for n in range(heads - count)])
