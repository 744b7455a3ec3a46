"""Rotary position embedding of every kind a ModelSpec can say.

Source: transformers 5.23 `modeling_rope_utils.py` (kinds) and its modeling files (which numbers make a pair).

Legend: s tokens, n heads, d numbers of a head, of which r are rotated.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ckptconv.errors import SourceError
from ckptconv.spec import Rope

Tensor = torch.Tensor


def rotated(x: Tensor, rope: Rope, positions: int, interleaved: bool) -> Tensor:
    """x [s, n, d] with the first r numbers of each head turned by their position.

    positions: how many the model is made for; interleaved: pairs are (2j, 2j + 1) instead of (j, j + r/2).
    """
    frequencies, gain = _frequencies(rope, int(x.shape[-1] * rope.percent), len(x), positions)
    size = 2 * len(frequencies)  # one more than the percentage says where that is odd
    angles = torch.outer(torch.arange(len(x), dtype=torch.float32), frequencies)[:, None]
    cos, sin = angles.cos() * gain, angles.sin() * gain
    turned, rest = x[..., :size], x[..., size:]
    one, other = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = one * cos - other * sin, other * cos + one * sin
    joined = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([joined, rest], -1)


def score_gain(rope: Rope | None) -> float:
    """What multi-latent attention multiplies its scores by, beside the scale."""
    if rope is None or rope.kind == "default" or not rope.scaling.get("mscale_all_dim"):
        return 1.0
    return _mscale(rope.scaling["factor"], rope.scaling["mscale_all_dim"]) ** 2


#: Kinds of scaling that are known.
KINDS = ("default", "linear", "dynamic", "llama3", "longrope", "yarn")


def _frequencies(rope: Rope, size: int, length: int, positions: int) -> tuple[Tensor, float]:
    """(one frequency per pair [r/2], gain of both coordinates)."""
    said, exponents = rope.scaling, torch.arange(0, size, 2, dtype=torch.float32) / size
    plain = 1 / rope.theta**exponents
    try:
        if rope.kind == "default":
            return plain, 1.0
        if rope.kind == "linear":
            return plain / said["factor"], 1.0
        if rope.kind == "dynamic":
            stretch = said["factor"] * max(length, positions) / positions - (said["factor"] - 1)
            return 1 / (rope.theta * stretch ** (size / (size - 2))) ** exponents, 1.0
        if rope.kind == "llama3":
            return _llama3(plain, said), 1.0
        if rope.kind == "longrope":
            return _longrope(plain, said, length, positions)
        if rope.kind == "yarn":
            return _yarn(rope, plain, size, positions)
    except KeyError as error:
        raise SourceError(f"model config: rope kind {rope.kind} needs {error.args[0]}, found {said}.") from error
    raise SourceError(f"model config: rope kind {rope.kind!r} is unknown, expected one of {', '.join(KINDS)}.")


def _llama3(plain: Tensor, said: dict[str, Any]) -> Tensor:
    """Long waves are stretched, short ones kept, those between mixed."""
    low, high = said["low_freq_factor"], said["high_freq_factor"]
    turns = plain * said["original_max_position_embeddings"] / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    mixed: Tensor = plain * kept + plain / said["factor"] * (1 - kept)
    return mixed


def _longrope(plain: Tensor, said: dict[str, Any], length: int, positions: int) -> tuple[Tensor, float]:
    original = said["original_max_position_embeddings"]
    stretch = torch.tensor(said["long_factor" if length > original else "short_factor"], dtype=torch.float32)
    factor, gain = said.get("factor"), said.get("attention_factor")
    factor = positions / original if factor is None else factor
    if gain is None:
        gain = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return plain / stretch, gain


def _yarn(rope: Rope, plain: Tensor, size: int, positions: int) -> tuple[Tensor, float]:
    """Pairs that turn often within the original positions are kept, those that hardly turn are stretched."""
    said, original = rope.scaling, rope.scaling["original_max_position_embeddings"]
    factor = said.get("factor")
    factor = positions / original if factor is None else factor

    def pair(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(said.get("beta_fast") or 32), pair(said.get("beta_slow") or 1)
    if said.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    stretched = ramp.clamp(0, 1)
    gain, mscale, all_dim = said.get("attention_factor"), said.get("mscale"), said.get("mscale_all_dim")
    if gain is None:
        gain = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1)
    return plain * (1 - stretched) + plain / factor * stretched, gain


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0
