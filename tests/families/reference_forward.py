"""Logits computed from what crosses the queue: a ModelSpec and the tensors of its messages. Written from the legend of
messages.py and the field comments of spec.py, with no table of ckptconv and no other library's model.

Where it gives the logits of transformers, a family's rows and fields say what they have to; and it is the only forward
here for models that stock megatron-core cannot build. Everything is fp32 and unhurried.

Shape legend: b batch, s tokens, h hidden, a query heads, g query groups, d head dim, e experts, v vocabulary.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional

from ckptconv import lazy, metadata
from ckptconv.spec import ModelSpec, Rope

Tensor = torch.Tensor
Message = dict[str, Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "squared_relu": lambda x: functional.relu(x).square(),
}


class _Collect:
    """A queue that keeps what is put on it."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def put(self, item: Any) -> None:
        self.items.append(item)


def messages(loader: ModuleType, directory: Path) -> tuple[ModelSpec, dict[str, Message]]:
    """(spec, messages by name) that a loader of ours sends for a directory, in fp32."""
    parser = ArgumentParser()
    loader.add_arguments(parser)
    queue = _Collect()
    loader.load_checkpoint(queue, Namespace(load_dir=str(directory), **vars(parser.parse_args([]))))
    first, *others, done = queue.items
    assert done == "done"
    described = metadata.read(first)
    assert described is not None
    sent = {
        item["name"]: {key: lazy.to_torch(value).float() for key, value in item.items() if key != "name"}
        for item in others
    }
    return described.spec, sent


def logits(spec: ModelSpec, sent: dict[str, Message], ids: Tensor) -> Tensor:
    """[b, s] token ids -> [b, s, v]."""
    embedding = sent["embeddings"]["word embeddings"]
    x = embedding[ids] * spec.embedding_multiplier
    for layer in range(spec.num_layers):
        x = _layer(spec, sent[f"transformer layer {layer}"], layer, x)
    x = _norm(spec, sent["final norm"], "", x)
    head = embedding if spec.tied else sent["output layer"]["weight"]
    return _capped(x @ head.T * spec.logit_multiplier, spec.logit_softcap)


def _norm(spec: ModelSpec, message: Message, name: str, x: Tensor) -> Tensor:
    """name: what stands before `weight` and `bias`, a space included."""
    weight = message[f"{name}weight"] + (1 if spec.norm_offset else 0)
    if spec.norm == "LayerNorm":
        return functional.layer_norm(x, weight.shape, weight, message.get(f"{name}bias"), spec.norm_epsilon)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.norm_epsilon) * weight


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else torch.tanh(x / cap) * cap


def _layer(spec: ModelSpec, m: Message, layer: int, x: Tensor) -> Tensor:
    def before(name: str, value: Tensor) -> Tensor:
        return value if spec.norms == "output" else _norm(spec, m, name, value)

    def behind(name: str, value: Tensor) -> Tensor:
        own = value if spec.norms == "pre" else _norm(spec, m, name, value)
        return own * spec.residual_multiplier

    attended = behind("attention output norm ", _attention(spec, m, layer, before("input norm ", x)))
    read = x if spec.parallel_residual else x + attended
    normed = before("input norm " if spec.shared_norm else "post norm ", read)
    return x + attended + behind("mlp output norm ", _mlp(spec, m, layer, normed))


# Attention


def _attention(spec: ModelSpec, m: Message, layer: int, x: Tensor) -> Tensor:
    b, s, _ = x.shape
    a, g, d = spec.num_attention_heads, spec.num_query_groups, spec.kv_channels
    qkv = functional.linear(x, m["qkv weight"], m.get("qkv bias")).view(b, s, g, a // g + 2, d)
    if spec.qkv_clip is not None:
        qkv = qkv.clamp(-spec.qkv_clip, spec.qkv_clip)
    q, k, v = qkv[..., :-2, :].reshape(b, s, a, d), qkv[..., -2, :], qkv[..., -1, :]
    if spec.qk_norm == "full":
        q = _norm(spec, m, "q norm ", q.flatten(2)).view(b, s, a, d)
        k = _norm(spec, m, "k norm ", k.flatten(2)).view(b, s, g, d)
    elif spec.qk_norm == "head":
        q, k = _norm(spec, m, "q norm ", q), _norm(spec, m, "k norm ", k)
    windowed = spec.sliding_window is not None and (spec.window_layers is None or bool(spec.window_layers[layer]))
    rope = spec.local_rope if windowed and spec.local_rope else spec.rope
    if rope and (spec.rope_layers is None or spec.rope_layers[layer]):
        q, k = _rotated(spec, rope, q), _rotated(spec, rope, k)
    k, v = (one.repeat_interleave(a // g, dim=2) for one in (k, v))
    scale = d**-0.5 if spec.softmax_scale is None else spec.softmax_scale
    scores = _capped(torch.einsum("bqad,bkad->baqk", q, k) * scale, spec.attention_softcap)
    distance = torch.arange(s)[:, None] - torch.arange(s)[None]
    seen = distance >= 0
    if windowed:
        seen &= distance < (spec.sliding_window or 0)
    scores = scores.masked_fill(~seen, float("-inf"))
    if spec.sinks:
        scores = torch.cat([scores, m["attention sinks"].view(1, a, 1, 1).expand(b, a, s, 1)], dim=-1)
    weights = scores.softmax(-1)[..., :s]
    out = torch.einsum("baqk,bkad->bqad", weights, v).flatten(2)
    return functional.linear(out, m["dense weight"], m.get("dense bias"))


def _rotated(spec: ModelSpec, rope: Rope, x: Tensor) -> Tensor:
    """[b, s, heads, d] with the first `percent` of each head rotated."""
    size = int(x.shape[-1] * rope.percent)
    frequencies, gain = _frequencies(spec, rope, size, x.shape[1])
    angles = torch.arange(x.shape[1])[:, None] * frequencies
    cos, sin = (part[None, :, None] * gain for part in (angles.cos(), angles.sin()))
    turned, rest = x[..., :size], x[..., size:]
    first, second = (turned[..., ::2], turned[..., 1::2]) if rope.interleaved else turned.chunk(2, -1)
    one, other = first * cos - second * sin, second * cos + first * sin
    joined = torch.stack([one, other], -1).flatten(-2) if rope.interleaved else torch.cat([one, other], -1)
    return torch.cat([joined, rest], -1)


def _frequencies(spec: ModelSpec, rope: Rope, size: int, length: int) -> tuple[Tensor, float]:
    """(one per pair, gain of both coordinates)."""
    plain, said = rope.theta ** -(torch.arange(0, size, 2) / size), rope.scaling
    if rope.kind == "default":
        return plain, 1.0
    if rope.kind == "linear":
        return plain / said["factor"], 1.0
    original = said["original_max_position_embeddings"]
    if rope.kind == "longrope":
        stretch = torch.tensor(said["long_factor" if length > original else "short_factor"])
        factor = spec.max_position_embeddings / original
        return plain / stretch, math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    assert rope.kind == "yarn", f"no forward for rope {rope.kind}"

    def turns(count: float) -> float:  # the pair that turns so often within the original positions
        return size * math.log(original / (count * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = turns(said["beta_fast"]), turns(said["beta_slow"])
    if said.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    stretched = ((torch.arange(size // 2) - low) / (high - low)).clamp(0, 1)
    return plain * (1 - stretched) + plain / said["factor"] * stretched, 0.1 * math.log(said["factor"]) + 1


# MLP


def _mlp(spec: ModelSpec, m: Message, layer: int, x: Tensor) -> Tensor:
    if not spec.has_experts(layer):
        return _one_mlp(spec, {key: value for key, value in m.items() if key.startswith("mlp ")}, x)
    moe = spec.moe
    assert moe is not None and moe.score == "softmax" and moe.normalize and not moe.shared_ffn_hidden_size
    chosen, which = functional.linear(x, m["router weight"], m.get("router bias")).topk(moe.topk, dim=-1)
    weights = chosen.softmax(-1)
    out = torch.zeros_like(x)
    for expert in range(moe.num_experts):
        own = {key: value[expert] for key, value in m.items() if key.startswith("mlp l")}
        out += (weights * (which == expert)).sum(-1, keepdim=True) * _one_mlp(spec, own, x)
    return out


def _one_mlp(spec: ModelSpec, m: Message, x: Tensor) -> Tensor:
    act = ACTIVATIONS[spec.activation]
    if spec.gated:
        gate = functional.linear(x, m["mlp l0 weight W"], m.get("mlp l0 bias W"))
        up = functional.linear(x, m["mlp l0 weight V"], m.get("mlp l0 bias V"))
        if spec.activation_clamp is not None:
            gate, up = gate.clamp(max=spec.activation_clamp), up.clamp(-spec.activation_clamp, spec.activation_clamp)
        inner = act(gate) * (up + spec.gate_offset)
    else:
        inner = act(functional.linear(x, m["mlp l0 weight"], m.get("mlp l0 bias")))
    return functional.linear(inner, m["mlp l1 weight"], m.get("mlp l1 bias"))
