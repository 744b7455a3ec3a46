"""Weights stored in blocks of codes: reading and writing them, against transformers' own functions and exact numbers.

transformers' loader takes the size of a block from the shapes, so it reads only weights that divide into blocks; for
others the expected values are those of its function for the backward pass, which is given the size.
"""

from __future__ import annotations

import json
import tracemalloc
from bisect import bisect_left
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ckptconv import cli, dtypes, lazy, quantised
from ckptconv.errors import SourceError, TargetError
from ckptconv.lazy import FileTensor, LazyTensor
from ckptconv.quantised import E2M1, E4M3, Dequantised, Fp8Codes, Fp8Scales, rounded
from inprocess import main

Weights = dict[str, torch.Tensor]
Stored = Callable[[torch.Tensor], FileTensor]
Convert = Callable[..., int]

BLOCK = (128, 128)
ODD = [(1, 1), (128, 128), (130, 7), (300, 200), (256, 384), (576, 140), (5, 513)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
#: E2M1 by hand, from the table of OCP Microscaling Formats 1.0.
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP4 += [-value for value in FP4]


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """`stored(tensor)`: the tensor in a file of its own, behind 7 bytes of something else."""

    def write(tensor: torch.Tensor) -> FileTensor:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.bin"
        path.write_bytes(b"\xff" * 7 + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return FileTensor(str(path), 7, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    return write


def grid(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, ...]:
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes_of(*shape: int) -> torch.Tensor:
    """All 256 codes, over and over."""
    count = int(np.prod(shape))
    return torch.arange(count).mul(7919).remainder(256).to(torch.uint8).reshape(shape)


def spread(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random scales of many magnitudes."""
    return (10 ** (torch.randn(shape, generator=seeded()) * 3)).to(dtype)


def fp8(stored: Stored, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype,
        block: tuple[int, int] = BLOCK) -> Dequantised:  # fmt: skip
    name = str(dtype).removeprefix("torch.")
    held = stored(codes.view(torch.float8_e4m3fn))
    return Dequantised(held, stored(scales), E4M3, block, name, tuple(codes.shape), "w_scale_inv")


def mxfp4(stored: Stored, blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> Dequantised:
    shape = (*blocks.shape[:-2], 32 * blocks.shape[-2])
    packed = stored(blocks).seen((*shape[:-1], shape[-1] // 2))
    return Dequantised(packed, stored(scales), E2M1, (1, 32), str(dtype).removeprefix("torch."), shape, "w_scales")


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the bit, except which NaN."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    bits = {2: torch.int16, 4: torch.int32}[found.element_size()]
    assert torch.equal(found.masked_fill(nan, 0).view(bits), expected.masked_fill(nan, 0).view(bits))


def loaded_by_transformers(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    loading: Any = Fp8Dequantize
    result: torch.Tensor = loading(None)._dequantize_one(codes.view(torch.float8_e4m3fn), scales, dtype)
    return result


def by_transformers(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype,
                    block: tuple[int, int] = BLOCK) -> torch.Tensor:  # fmt: skip
    """The product in float32, rounded once."""
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    wide: torch.Tensor = _dequantize_fp8_weight(codes.view(torch.float8_e4m3fn), scales, list(block), torch.float32)
    return wide.to(dtype)


def rectangle(tensor: LazyTensor, row: int, col: int, rows: int, cols: int) -> torch.Tensor:
    out = np.full((rows, cols), 0xEE, dtypes.opaque(tensor.dtype))
    tensor.read(out, row, col)
    return lazy.as_torch(out, tensor.dtype)


# Reading fp8


def test_every_code() -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    same(torch.from_numpy(quantised._values(E4M3)), expected)
    assert quantised._values(E2M1).tolist() == FP4
    assert np.signbit(quantised._values(E2M1)[8])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ODD)
def test_fp8_is_what_transformers_computes(stored: Stored, shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes, scales = codes_of(*shape), spread(*grid(shape))
    found = lazy.to_torch(fp8(stored, codes, scales, dtype), block_bytes=3000)
    same(found, by_transformers(codes, scales, dtype))
    if not any(size % 128 and size > 128 for size in shape) and shape[0] * shape[1] > 1 and shape != (130, 7):
        same(found, loaded_by_transformers(codes, scales, dtype))


def test_transformers_loader_cannot_take_what_does_not_divide(stored: Stored) -> None:
    """DeepSeek-V3's kv_a_proj_with_mqa is [576, 7168] with 5 rows of scales; others it reads with blocks of 100."""
    with pytest.raises(ValueError, match="not divisible"):
        loaded_by_transformers(codes_of(576, 128), spread(5, 1), torch.bfloat16)
    codes, scales = codes_of(300, 128) % 127, spread(3, 1)
    assert not torch.equal(loaded_by_transformers(codes, scales, torch.float32),
                           lazy.to_torch(fp8(stored, codes, scales, torch.float32)))  # fmt: skip


def test_its_loader_and_its_function_agree_where_both_apply() -> None:
    codes, scales = codes_of(256, 384), spread(2, 3)
    for dtype in DTYPES:
        same(by_transformers(codes, scales, dtype), loaded_by_transformers(codes, scales, dtype))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_scales_of_other_types(stored: Stored, kind: torch.dtype) -> None:
    codes, scales = codes_of(256, 128), torch.tensor([[0.37], [1.9]]).to(kind)
    found = lazy.to_torch(fp8(stored, codes, scales, torch.bfloat16))
    same(found, by_transformers(codes, scales.float(), torch.bfloat16))


@pytest.mark.parametrize("block", [(64, 32), (1, 128), (128, 1), (7, 5)])
def test_other_blocks(stored: Stored, block: tuple[int, int]) -> None:
    codes = codes_of(150, 70)
    scales = spread(*grid((150, 70), block))
    found = lazy.to_torch(fp8(stored, codes, scales, torch.float32, block))
    same(found, by_transformers(codes, scales, torch.float32, block))


def test_experts_on_a_leading_axis(stored: Stored) -> None:
    codes, scales = codes_of(3, 130, 140), spread(3, 2, 2)
    found = lazy.to_torch(fp8(stored, codes, scales, torch.bfloat16), block_bytes=4000)
    for n in range(3):
        same(found[n], by_transformers(codes[n], scales[n], torch.bfloat16))


def test_zeros_keep_their_sign_and_nan_is_one_nan(stored: Stored) -> None:
    codes = torch.tensor([[0x00, 0x80, 0x7F, 0xFF, 0x01, 0x81]], dtype=torch.uint8)
    found = lazy.to_torch(fp8(stored, codes, torch.tensor([[2.0]]), torch.bfloat16))
    assert found.view(torch.int16)[0].tolist() == [0, -0x8000, 0x7FC0, 0x7FC0, 0x3B80, 0x3B80 - 0x8000]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_named(stored: Stored, value: float) -> None:
    scales = torch.ones(2, 3)
    scales[1, 2] = value
    tensor = fp8(stored, codes_of(200, 300), scales, torch.bfloat16)
    rectangle(tensor, 0, 0, 128, 300)
    with pytest.raises(SourceError, match=rf"\.bin: w_scale_inv: the scale at \[1, 2\] is {value}, expected a finite"):
        lazy.to_torch(tensor)


# Reading mxfp4


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_is_what_transformers_computes(stored: Stored, dtype: torch.dtype) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = codes_of(3, 85, 3, 16), torch.arange(765).remainder(255).to(torch.uint8).reshape(3, 85, 3)
    found = lazy.to_torch(mxfp4(stored, blocks, scales, dtype), block_bytes=2000)
    same(found.transpose(1, 2).contiguous(), convert_moe_packed_tensors(blocks, scales, dtype=dtype))


def test_mxfp4_by_hand(stored: Stored) -> None:
    blocks = torch.arange(16, dtype=torch.uint8).mul(16).add(torch.arange(15, -1, -1, dtype=torch.uint8))
    found = lazy.to_torch(mxfp4(stored, blocks.reshape(1, 1, 1, 16), torch.tensor([[[128]]], dtype=torch.uint8),
                                torch.bfloat16))  # fmt: skip
    expected = [2 * FP4[code] for high in range(16) for code in (15 - high, high)]
    assert found.flatten().tolist() == expected


def test_an_mxfp4_scale_that_is_no_number_is_named(stored: Stored) -> None:
    scales = torch.full((1, 2, 2), 127, dtype=torch.uint8)
    scales[0, 1, 1] = 255
    with pytest.raises(SourceError, match=r"\.bin: w_scales: the scale at \[1, 1\] is NaN"):
        lazy.to_torch(mxfp4(stored, codes_of(1, 2, 2, 16), scales, torch.bfloat16))


# Any rectangle is that of the whole; memory


def inside(data: st.DataObject, rows: int, cols: int) -> tuple[int, int, int, int]:
    row, col = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    return row, col, data.draw(st.integers(1, rows - row)), data.draw(st.integers(1, cols - col))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["fp8", "fp8 experts", "mxfp4", "codes", "scales", "rounded"]))
def test_any_rectangle(stored: Stored, data: st.DataObject, kind: str) -> None:
    numbers = torch.randn(300, 261, generator=seeded())
    made: dict[str, Callable[[], LazyTensor]] = {
        "fp8": lambda: fp8(stored, codes_of(300, 261), spread(3, 3), torch.bfloat16),
        "fp8 experts": lambda: fp8(stored, codes_of(2, 130, 140), spread(2, 2, 2), torch.float32),
        "mxfp4": lambda: mxfp4(stored, codes_of(2, 33, 3, 16), codes_of(2, 33, 3) % 200, torch.bfloat16),
        "codes": lambda: Fp8Codes(stored(numbers), BLOCK, "w"),
        "scales": lambda: Fp8Scales(stored(numbers), (64, 32), "w"),
        "rounded": lambda: rounded(stored(numbers.bfloat16()), BLOCK, "bfloat16", "w"),
    }
    if kind not in WHOLES:
        tensor = made[kind]()
        WHOLES[kind] = (tensor, lazy.to_torch(tensor))
    tensor, whole = WHOLES[kind]
    row, col, rows, cols = inside(data, tensor.rows, tensor.cols)
    found = rectangle(tensor, row, col, rows, cols)
    expected = whole.reshape(tensor.rows, tensor.cols)[row : row + rows, col : col + cols]
    assert np.array_equal(lazy.as_numpy(found), lazy.as_numpy(expected))


WHOLES: dict[str, tuple[LazyTensor, torch.Tensor]] = {}


@pytest.mark.parametrize("what", ["dequantised", "codes", "scales"])
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path, what: str) -> None:
    rows, cols = 1 << 16, 1 << 15
    for name, size in (("codes", rows * cols * 2), ("scales", rows // 128 * cols // 128 * 4)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
    codes = FileTensor(str(tmp_path / "codes"), 0, "float8_e4m3fn", (rows, cols))
    scales = FileTensor(str(tmp_path / "scales"), 0, "float32", (rows // 128, cols // 128))
    numbers = FileTensor(str(tmp_path / "codes"), 0, "bfloat16", (rows, cols))
    tensor: LazyTensor = {
        "dequantised": Dequantised(codes, scales, E4M3, BLOCK, "bfloat16", (rows, cols), "w"),
        "codes": Fp8Codes(numbers, BLOCK, "w"),
        "scales": Fp8Scales(numbers, BLOCK, "w"),
    }[what]
    tensor.read(np.empty((1, 1), dtypes.opaque(tensor.dtype)), 0, 0)  # imports and tables
    tracemalloc.start()
    for row, count in list(lazy.blocks(tensor, 1 << 20))[:2]:
        out = np.empty((min(count, 128), tensor.cols), dtypes.opaque(tensor.dtype))
        tensor.read(out[: 2 if what == "scales" else None], row, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20  # a band of 128 rows of these is 8 MiB


# Writing fp8


CODES = [Fraction(float(value)) for value in quantised._values(E4M3)[:127]]


def nearest(value: float, scale: float) -> int:
    """The code of value / scale by exact arithmetic: nearest, ties to the even code, at most 448."""
    ratio = abs(Fraction(value)) / Fraction(scale)
    at = bisect_left(CODES, ratio)
    if at >= len(CODES):
        at = len(CODES) - 1
    elif CODES[at] != ratio:
        below, above = ratio - CODES[at - 1], CODES[at] - ratio
        at = at - 1 if below < above or (below == above and at % 2) else at
    return at | (128 if np.signbit(value) else 0)


def all_nearest(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The same for many: halfway between codes times a scale is exact in double precision, so comparing is."""
    codes = np.array(CODES, np.float64)
    halfway = (codes[:-1] + codes[1:]) / 2 * float(scale)
    sizes = values.double().abs().numpy()
    below, above = np.searchsorted(halfway, sizes, "left"), np.searchsorted(halfway, sizes, "right")
    found = np.where(below % 2, above, below) | np.where(np.signbit(values.float().numpy()), 128, 0)
    return torch.from_numpy(found.astype(np.uint8))


def check_written(weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    assert codes.dtype == torch.float8_e4m3fn
    assert scales.dtype == torch.float32
    assert tuple(scales.shape) == grid(tuple(weight.shape))
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            block = slice(128 * r, 128 * r + 128), slice(128 * c, 128 * c + 128)
            most = weight[block].abs().max().float()
            least = torch.tensor(2.0**-126)
            assert scales[r, c] == (torch.maximum(most / 448, least) if most else 1.0)
            expected = all_nearest(weight[block], scales[r, c])
            assert torch.equal(codes[block].contiguous().view(torch.uint8), expected)
            one = weight[block][0, 0].float().item()
            assert nearest(one, float(scales[r, c])) == expected[0, 0]


SAMPLES: dict[str, Callable[[], torch.Tensor]] = {
    "random": lambda: torch.randn(150, 140, generator=seeded()),
    "bf16": lambda: torch.randn(150, 140, generator=seeded()).bfloat16(),
    "fp16": lambda: torch.randn(130, 40, generator=seeded()).half(),
    "wide range": lambda: torch.randn(150, 40, generator=seeded()) * spread(150, 40),
    # scale 1, values on, beside and halfway between codes
    "ties": lambda: torch.cat([torch.tensor([448.0]), torch.randint(-3584, 3584, (2599,), generator=seeded()) / 8])
    .reshape(130, 20),
    "small ties": lambda: torch.cat([torch.tensor([448.0]), torch.arange(-1500, 1500) * 2.0**-13]).reshape(-1, 1),
    "zeros": lambda: torch.zeros(130, 130) * torch.tensor([1.0, -1.0]).repeat(65),
    "smallest": lambda: torch.randint(-9, 9, (20, 20), generator=seeded()) * 2.0**-149,
    "largest": lambda: torch.full((3, 3), 3.4e38),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_codes_are_the_nearest(stored: Stored, name: str) -> None:
    weight = SAMPLES[name]()
    base = stored(weight)
    codes, scales = lazy.to_torch(Fp8Codes(base, BLOCK, "w")), lazy.to_torch(Fp8Scales(base, BLOCK, "w"))
    check_written(weight, codes, scales)
    for dtype in DTYPES:
        read = lazy.to_torch(rounded(base, BLOCK, str(dtype).removeprefix("torch."), "w"))
        same(read, by_transformers(codes.view(torch.uint8), scales, dtype))


@settings(max_examples=300, deadline=None)
@given(st.floats(2.0**-100, 2.0**100, width=32), st.floats(0, 1), st.integers(-2, 2), st.sampled_from(range(127)))
def test_near_ties(largest: float, share: float, ulps: int, code: int) -> None:
    """Numbers a few ulps around halfway between two codes: rounding twice would take some to the wrong one."""
    scale = np.float32(largest) / np.float32(448)
    high = CODES[min(code + 1, 126)]
    value = np.float32(float((CODES[code] + high) / 2 * Fraction(float(scale)))) if share < 0.9 else scale * share
    for _ in range(abs(ulps)):
        value = np.nextafter(np.float32(value), np.float32(np.inf if ulps > 0 else 0))
    values = np.array([[value, -value]], np.float32)
    found = quantised._encode(values, np.array([scale], np.float32), 128)
    assert found.tolist() == [[nearest(float(value), float(scale)), nearest(-float(value), float(scale))]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_quantised(stored: Stored, value: float) -> None:
    weight = torch.randn(140, 10)
    weight[135, 3] = value
    for kind in (Fp8Codes, Fp8Scales):
        with pytest.raises(TargetError, match="layer 3: holds NaN or infinite"):
            lazy.to_torch(kind(stored(weight), BLOCK, "layer 3"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_written_again_it_is_the_same(stored: Stored, dtype: torch.dtype) -> None:
    """Codes and scales made of bf16 or fp16 weights come out again when they are read as such and written."""
    name = str(dtype).removeprefix("torch.")
    base = stored(torch.randn(300, 200, generator=seeded(3)).to(dtype))
    again = rounded(base, BLOCK, name, "w")
    for kind in (Fp8Codes, Fp8Scales):
        assert lazy.equal(kind(base, BLOCK, "w"), kind(again, BLOCK, "w"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_codes_of_others_the_codes_stay(stored: Stored, dtype: torch.dtype) -> None:
    """With a code of 448 in every block: then the scale is the old one but for its rounding, and so are values."""
    codes = codes_of(256, 256) % 127
    codes[::64, ::64] = 0x7E
    scales = torch.rand(2, 2, generator=seeded()) + 0.5
    read = fp8(stored, codes, scales, dtype)
    found = lazy.to_torch(Fp8Scales(read, BLOCK, "w"))
    assert torch.equal(lazy.to_torch(Fp8Codes(read, BLOCK, "w")).view(torch.uint8), codes)
    assert ((found / scales - 1).abs() <= torch.finfo(dtype).eps / 2 + 2.0**-23).all()


# The command line: DeepSeek-V3 and gpt-oss

DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "vocab_size": 131, "hidden_size": 160, "intermediate_size": 264, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 136, "kv_lora_rank": 144,
    "qk_nope_head_dim": 40, "qk_rope_head_dim": 24, "v_head_dim": 36, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 132, "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 2,
    "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "num_nextn_predict_layers": 1, "hidden_act": "silu", "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
#: As in the release, where it is all that config.json says.
FP8: dict[str, Any] = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
}  # fmt: skip


def deepseek_shapes() -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name, shape and whether the release has it in fp8."""
    c = DEEPSEEK
    h, a, q, k = (c[key] for key in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank"))
    n, p, v, e = (c[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts"))

    def mlp(prefix: str, f: int) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        yield f"{prefix}.gate_proj.weight", (f, h), True
        yield f"{prefix}.up_proj.weight", (f, h), True
        yield f"{prefix}.down_proj.weight", (h, f), True

    yield "model.embed_tokens.weight", (131, h), False
    for i in range(3):
        layer = f"model.layers.{i}."
        yield f"{layer}input_layernorm.weight", (h,), False
        yield f"{layer}post_attention_layernorm.weight", (h,), False
        yield f"{layer}self_attn.q_a_proj.weight", (q, h), True
        yield f"{layer}self_attn.q_a_layernorm.weight", (q,), False
        yield f"{layer}self_attn.q_b_proj.weight", (a * (n + p), q), True
        yield f"{layer}self_attn.kv_a_proj_with_mqa.weight", (k + p, h), True
        yield f"{layer}self_attn.kv_a_layernorm.weight", (k,), False
        yield f"{layer}self_attn.kv_b_proj.weight", (a * (n + v), k), True
        yield f"{layer}self_attn.o_proj.weight", (h, a * v), True
        if i < 1:
            yield from mlp(f"{layer}mlp", c["intermediate_size"])
            continue
        yield f"{layer}mlp.gate.weight", (e, h), False
        yield f"{layer}mlp.gate.e_score_correction_bias", (e,), False
        for expert in range(e):
            yield from mlp(f"{layer}mlp.experts.{expert}", c["moe_intermediate_size"])
        yield from mlp(f"{layer}mlp.shared_experts", c["moe_intermediate_size"])
    yield "model.layers.2.enorm.weight", (h,), False
    yield "model.layers.2.hnorm.weight", (h,), False
    yield "model.layers.2.eh_proj.weight", (h, 2 * h), False
    yield "model.layers.2.shared_head.norm.weight", (h,), False
    yield "model.norm.weight", (h,), False
    yield "lm_head.weight", (131, h), False


def deepseek(coded: bool) -> Weights:
    """Weights of the tiny DeepSeek-V3; `coded`: linears as codes and scales."""
    weights: Weights = {}
    for seed, (name, shape, linear) in enumerate(deepseek_shapes()):
        value = torch.randn(shape, generator=seeded(seed))
        if linear and coded:
            scales = torch.rand(grid(shape), generator=seeded(seed)) / 1000 + 1e-4
            weights[name] = (value * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scales
        else:
            weights[name] = value if name.endswith("correction_bias") else value.bfloat16()
    weights["model.layers.2.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.2.shared_head.head.weight"] = weights["lm_head.weight"].clone()
    return weights


def write(folder: Path, config: dict[str, Any], weights: Weights) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def read(folder: Path) -> Weights:
    weights: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


def unquantised(weights: Weights, dtype: torch.dtype, cast: bool = False) -> Weights:
    """What is expected of fp8 weights; `cast`: the other tensors are converted too."""
    plain: Weights = {}
    for name, tensor in weights.items():
        if f"{name}_scale_inv" in weights:
            plain[name] = by_transformers(tensor.view(torch.uint8), weights[f"{name}_scale_inv"], dtype)
        elif not name.endswith("_scale_inv"):
            plain[name] = tensor.to(dtype) if cast else tensor
    return plain


def all_same(found: Weights, expected: Weights) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def provenance(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "ckptconv.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 in fp8."""
    folder = tmp_path_factory.mktemp("deepseek") / "fp8"
    return write(folder, DEEPSEEK | {"quantization_config": FP8}, deepseek(coded=True))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 in bf16."""
    return write(tmp_path_factory.mktemp("deepseek") / "bf16", DEEPSEEK, deepseek(coded=False))


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """`convert(source, name, *flags)`: to `tmp_path / name`, which is a Hugging Face directory without --saver."""

    def run(source: Path, name: str, *flags: object) -> int:
        words = ["--saver", "hf", "--no-progress", "--load-dir", source, "--save-dir", tmp_path / name, *flags]
        return main([str(word) for word in words])

    return run


def test_deepseek_to_hf(coded: Path, convert: Convert, tmp_path: Path) -> None:
    assert convert(coded, "out", "--verify") == 0
    all_same(read(tmp_path / "out"), unquantised(deepseek(coded=True), torch.bfloat16))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    noted = provenance(tmp_path / "out")
    assert "dequantised 48 weights from 8-bit codes (E4M3) with a scale per 128x128 block to bfloat16" in noted["notes"]
    assert noted["spec"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(("flag", "dtype"), zip(["bf16", "fp16", "fp32"], DTYPES, strict=True))
def test_deepseek_to_another_type(
    coded: Path, convert: Convert, tmp_path: Path, flag: str, dtype: torch.dtype
) -> None:
    assert convert(coded, "out", "--dtype", flag, "--verify") == 0
    wanted = unquantised(deepseek(coded=True), dtype, cast=True)
    # The correction of scores stays in fp32, as every framework keeps it.
    wanted |= {name: t for name, t in deepseek(coded=True).items() if name.endswith("e_score_correction_bias")}
    all_same(read(tmp_path / "out"), wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_the_type_is_that_of_config_json(convert: Convert, tmp_path: Path) -> None:
    config = DEEPSEEK | {"quantization_config": FP8, "torch_dtype": "float16"}
    weights = {name: t.half() if t.dtype == torch.bfloat16 else t for name, t in deepseek(coded=True).items()}
    assert convert(write(tmp_path / "in", config, weights), "out", "--verify") == 0
    all_same(read(tmp_path / "out"), unquantised(weights, torch.float16))


def test_modules_that_are_not_converted(convert: Convert, tmp_path: Path) -> None:
    weights = deepseek(coded=True)
    kept = "model.layers.1.self_attn.o_proj"
    weights[f"{kept}.weight"] = by_transformers(
        weights[f"{kept}.weight"].view(torch.uint8), weights.pop(f"{kept}.weight_scale_inv"), torch.bfloat16
    )
    quantization = FP8 | {"modules_to_not_convert": [kept]}
    config = DEEPSEEK | {"quantization_config": quantization}
    assert convert(write(tmp_path / "in", config, weights), "out") == 0
    all_same(read(tmp_path / "out"), unquantised(weights, torch.bfloat16))


def test_deepseek_to_megatron(coded: Path, convert: Convert, tmp_path: Path) -> None:
    parallel = ("--target-tp", 2, "--target-ep", 2)
    assert convert(coded, "ranks", "--saver", "megatron_mcore", "--verify", *parallel) == 0
    path = tmp_path / "ranks" / "iter_0000001" / "mp_rank_01_001" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    assert state["args"].params_dtype == torch.bfloat16
    expected = unquantised(deepseek(coded=True), torch.bfloat16)["model.layers.1.self_attn.o_proj.weight"]
    found = state["model"]["decoder.layers.1.self_attention.linear_proj.weight"]
    assert torch.equal(found, expected[:, expected.shape[1] // 2 :])
    assert convert(tmp_path / "ranks", "out", "--verify") == 0
    all_same(read(tmp_path / "out"), unquantised(deepseek(coded=True), torch.bfloat16))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 131, "hidden_size": 64,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8, "max_position_embeddings": 96, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "attention_bias": True, "swiglu_limit": 7.0, "rope_theta": 150000, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 24,
    },
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
}  # fmt: skip


def gpt_oss() -> Weights:
    h, f, e, a, g, d = 64, 32, 4, 4, 2, 16
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (131, h)}
    for i in range(2):
        layer, experts = f"model.layers.{i}.", f"model.layers.{i}.mlp.experts."
        for name, rows in (("q", a * d), ("k", g * d), ("v", g * d)):
            shapes |= {f"{layer}self_attn.{name}_proj.weight": (rows, h), f"{layer}self_attn.{name}_proj.bias": (rows,)}
        shapes |= {
            f"{layer}self_attn.o_proj.weight": (h, a * d), f"{layer}self_attn.o_proj.bias": (h,),
            f"{layer}self_attn.sinks": (a,), f"{layer}input_layernorm.weight": (h,),
            f"{layer}post_attention_layernorm.weight": (h,),
            f"{layer}mlp.router.weight": (e, h), f"{layer}mlp.router.bias": (e,),
            f"{experts}gate_up_proj_bias": (e, 2 * f), f"{experts}down_proj_bias": (e, h),
        }  # fmt: skip
        for name, rows, columns in (("gate_up_proj", 2 * f, h), ("down_proj", h, f)):
            scales = (e, rows, columns // 32)
            shapes |= {f"{experts}{name}_blocks": (*scales, 16), f"{experts}{name}_scales": scales}
    shapes |= {"model.norm.weight": (h,), "lm_head.weight": (131, h)}
    weights: Weights = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        if name.endswith("_blocks"):
            weights[name] = torch.randint(0, 256, shape, generator=seeded(seed)).to(torch.uint8)
        elif name.endswith("_scales"):
            weights[name] = torch.randint(115, 125, shape, generator=seeded(seed)).to(torch.uint8)
        else:
            weights[name] = torch.randn(shape, generator=seeded(seed)).bfloat16()
    return weights


def test_gpt_oss(convert: Convert, tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    weights = gpt_oss()
    expected: Weights = {}
    for name, tensor in weights.items():
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            expected[stem] = convert_moe_packed_tensors(tensor, weights[f"{stem}_scales"])
        elif not name.endswith("_scales"):
            expected[name] = tensor
    source = write(tmp_path / "in", GPT_OSS, weights)
    assert convert(source, "out", "--verify") == 0
    all_same(read(tmp_path / "out"), expected)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    note = "dequantised 4 weights from 4-bit codes (E2M1) with a scale per 1x32 block to bfloat16"
    assert note in provenance(tmp_path / "out")["notes"]


# The command line: --quantize


def test_quantize(plain: Path, convert: Convert, tmp_path: Path) -> None:
    assert convert(plain, "out", "--quantize", "fp8", "--verify") == 0
    source, found = deepseek(coded=False), read(tmp_path / "out")
    linears = {name for name, _, linear in deepseek_shapes() if linear}
    assert sorted(found) == sorted([*source, *(f"{name}_scale_inv" for name in linears)])
    for name in linears:
        check_written(source[name], found[name], found[f"{name}_scale_inv"])
    for name in source.keys() - linears:
        assert torch.equal(found[name], source[name])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == FP8
    assert config["torch_dtype"] == "bfloat16"


def test_quantize_what_was_dequantised(plain: Path, convert: Convert, tmp_path: Path) -> None:
    """What --quantize wrote of bf16 weights comes out of bf16 again as it was, file for file."""
    assert convert(plain, "one", "--quantize", "fp8") == 0
    assert convert(tmp_path / "one", "two", "--quantize", "fp8", "--verify") == 0
    assert convert(tmp_path / "one", "bf16") == 0
    assert convert(tmp_path / "bf16", "three", "--quantize", "fp8") == 0
    for name in ("two", "three"):
        all_same(read(tmp_path / name), read(tmp_path / "one"))


def test_quantize_after_megatron(plain: Path, convert: Convert, tmp_path: Path) -> None:
    assert convert(plain, "ranks", "--saver", "megatron_mcore", "--target-tp", 2, "--target-ep", 2) == 0
    assert convert(tmp_path / "ranks", "fp8", "--quantize", "fp8", "--verify", "--max-shard-size", "100KB") == 0
    assert convert(plain, "direct", "--quantize", "fp8") == 0
    all_same(read(tmp_path / "fp8"), read(tmp_path / "direct"))
    index = json.loads((tmp_path / "fp8" / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(read(tmp_path / "fp8"))


def test_a_written_file_that_changed_is_noticed(plain: Path, convert: Convert, tmp_path: Path) -> None:
    from ckptconv.errors import VerifyError
    from ckptconv.verify import verify

    assert convert(plain, "out", "--quantize", "fp8") == 0
    digests = provenance(tmp_path / "out")["digests"]
    verify(str(tmp_path / "out"), "hf", digests, 1)
    found = read(tmp_path / "out")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    found[name].view(torch.uint8)[3, 5] ^= 1
    save_file(found, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerifyError, match="transformer layer 1/mlp l0 weight V"):
        verify(str(tmp_path / "out"), "hf", digests, 1)


STOPPING = """
from ckptconv.errors import TargetError
from ckptconv.savers import hf
from ckptconv.staging import Staging

add_arguments = hf.add_arguments

def save_checkpoint(queue, args):
    done = Staging.done
    def stop(self, *rest):
        done(self, *rest)
        raise TargetError("the disk is full")
    Staging.done = stop
    return hf.save_checkpoint(queue, args)
"""


def test_resume(plain: Path, convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    (tmp_path / "saver_stopping.py").write_text(STOPPING)
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = ("--quantize", "fp8", "--max-shard-size", "200KB")
    words = ["--saver", "stopping", "--no-progress", "--load-dir", str(plain), "--save-dir", str(tmp_path / "out")]
    assert cli.main([*words, *flags]) == TargetError.exit_code  # in a process of its own, which the saver meddles with
    assert "finished files are kept" in capsys.readouterr().err
    assert convert(plain, "out", "--resume", *flags[2:]) != 0  # not the same conversion
    assert convert(plain, "out", "--resume", "--verify", *flags) == 0
    assert convert(plain, "whole", *flags) == 0
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_quantize_other_families(convert: Convert, tmp_path: Path, hf: Callable[..., Path],
                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """A list of what stays, where there is something that a reader would not expect; other layouts are refused."""
    assert convert(hf("llama_attention_bias"), "llama", "--quantize", "fp8", "--verify") == 0
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert config["quantization_config"] == FP8
    found = read(tmp_path / "llama")
    assert {name for name, t in found.items() if t.dtype == torch.float8_e4m3fn} == {
        name for name in found if name.endswith("_proj.weight")
    }
    assert convert(write(tmp_path / "oss", GPT_OSS, gpt_oss()), "refused", "--quantize", "fp8") == TargetError.exit_code
    assert "gpt_oss stores model.layers.{i}.mlp.experts.gate_up_proj" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


# What is refused of a source

Change = Callable[[dict[str, Any], Weights], object]
NAME = "model.layers.1.mlp.experts.2.up_proj.weight"
SCALE = f"{NAME}_scale_inv"


def quantization(**changes: Any) -> Change:
    return lambda c, w: c.update(quantization_config=FP8 | changes)


def tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda c, w: w.update({name: make(w[name])})


def dequantised(config: dict[str, Any], weights: Weights) -> None:
    weights.clear()
    weights.update(deepseek(coded=False))


BAD: dict[str, tuple[Change, str]] = {
    "no scale": (lambda c, w: w.pop(SCALE), f"model.safetensors: {NAME} is quantised (float8_e4m3fn), but {SCALE}"),
    "no weight": (lambda c, w: w.pop(NAME), f"model.safetensors: {SCALE} has no {NAME} to scale"),
    "shape": (tensor(SCALE, lambda t: t[:1]),
              f"model.safetensors: {SCALE} is [1, 2], expected [2, 2] for [132, 160] in blocks of 128x128"),
    "scale type": (tensor(SCALE, lambda t: t.to(torch.int32)), f"{SCALE} is of type int32, expected float32"),
    "other block": (quantization(weight_block_size=[64, 128]), "in blocks of 64x128"),
    "block of one number": (quantization(weight_block_size=[128]), "weight_block_size of quantization_config is [128]"),
    "block of zeros": (quantization(weight_block_size=[0, 128]), "of quantization_config is [0, 128], expected two"),
    "no block": (quantization(weight_block_size=None), "weight_block_size of quantization_config is None"),
    "e5m2": (quantization(fmt="e5m2"), "fmt of quantization_config is 'e5m2', expected 'e4m3'"),
    "e5m2 weight": (tensor(NAME, lambda t: t.to(torch.float8_e5m2)), f"{NAME} is of type float8_e5m2, expected float8"),
    "plain weight": (tensor(NAME, lambda t: t.bfloat16()), f"{NAME} is of type bfloat16, expected float8_e4m3fn"),
    "scale is NaN": (tensor(SCALE, lambda t: t / 0 * 0), f"model.safetensors: {SCALE}: the scale at [0, 0] is nan"),
    "no config": (lambda c, w: c.pop("quantization_config"), "most weights are float8_e4m3fn"),
    "nothing quantised": (dequantised, "the files hold none that are"),
    "mxfp4": (quantization(quant_method="mxfp4"), "the files hold none that are"),
    **{kind: (quantization(quant_method=kind), f"the weights are quantised ({kind}), which is not supported")
       for kind in ("awq", "gptq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8")},
    "not an object": (lambda c, w: c.update(quantization_config="fp8"), "the weights are quantised (fp8), which is"),
    "a list": (quantization(quant_method=["fp8"]), "the weights are quantised (['fp8']), which is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_source(convert: Convert, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    change, message = BAD[name]
    config, weights = DEEPSEEK | {"quantization_config": FP8}, deepseek(coded=True)
    change(config, weights)
    assert convert(write(tmp_path / "in", config, weights), "out") == SourceError.exit_code
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "out").exists()


E = "model.layers.1.mlp.experts.gate_up_proj"
BAD_MXFP4: dict[str, tuple[Change, str]] = {
    "no scales": (lambda c, w: w.pop(f"{E}_scales"), f"{E}_blocks is quantised (uint8), but {E}_scales is in no file"),
    "no blocks": (lambda c, w: w.pop(f"{E}_blocks"), f"{E}_scales has no {E}_blocks to scale"),
    "shape": (tensor(f"{E}_scales", lambda t: t[:, :, :1]), f"{E}_scales is [4, 64, 1], expected [4, 64, 2] as"),
    "blocks": (tensor(f"{E}_blocks", lambda t: t[..., :8]), f"{E}_blocks is [4, 64, 2, 8], expected [..., rows,"),
    "type": (tensor(f"{E}_scales", lambda t: t.float()), f"{E}_scales is of type float32, expected uint8"),
    "NaN": (tensor(f"{E}_scales", lambda t: t.fill_(255)), f"{E}_scales: the scale at"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MXFP4)
def test_bad_mxfp4_source(convert: Convert, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    change, message = BAD_MXFP4[name]
    config, weights = dict(GPT_OSS), gpt_oss()
    change(config, weights)
    assert convert(write(tmp_path / "in", config, weights), "out") == SourceError.exit_code
    assert message in capsys.readouterr().err
