"""How far two tensors are apart, against the same said in one line of torch over whole tensors."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ckptconv import comparing
from ckptconv.comparing import Tolerance, compare
from ckptconv.lazy import LazyTensor, Literal, Transposed, as_bytes, as_numpy


def lazy(tensor: torch.Tensor) -> Literal:
    name = str(tensor.dtype).removeprefix("torch.")
    return Literal(bytes(as_bytes(as_numpy(tensor))), name, tuple(tensor.shape))


@pytest.fixture(params=["whole", "in blocks"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in blocks":
        monkeypatch.setattr(comparing, "BLOCK", 100)
        monkeypatch.setattr(comparing, "VALUES", 7)


def pair(dtype: torch.dtype, shape: tuple[int, ...] = (6, 5, 8)) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(1)
    one = torch.randn(shape, generator=made)
    other = one.clone()
    for place in (37, 38, 199):
        other.view(-1)[place] *= 1.5
    return one.to(dtype), other.to(dtype)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_figures(dtype: torch.dtype) -> None:
    one, other = pair(dtype)
    found = compare(lazy(one), lazy(other), Tolerance())
    a, b = one.double().flatten(), other.double().flatten()
    assert found is not None
    assert (found.different, found.elements, found.first) == (3, 240, (0, 4, 5))
    assert found.max_abs == float((a - b).abs().max())
    assert found.max_rel == float(((a - b).abs() / torch.maximum(a.abs(), b.abs())).max())
    assert found.values == (float(a[37]), float(b[37]))
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-12)


@pytest.mark.usefixtures("cut")
def test_threads_give_the_same_figures() -> None:
    one, other = map(lazy, pair(torch.float32))
    with ThreadPoolExecutor(3) as pool:
        assert compare(one, other, Tolerance(), pool.map) == compare(one, other, Tolerance())


@pytest.mark.usefixtures("cut")
def test_equal() -> None:
    one, _ = pair(torch.bfloat16)
    one[1, 2, 3] = math.nan
    for tolerance in (Tolerance(), Tolerance(exact=False)):
        assert compare(lazy(one), lazy(one.clone()), tolerance) is None


@pytest.mark.usefixtures("cut")
def test_one_side_transposed() -> None:
    one = torch.arange(35.0).reshape(5, 7)
    other = one.clone()
    other[3, 2] = 0
    seen: LazyTensor = Transposed(lazy(one.T.contiguous()))
    assert compare(seen, lazy(one), Tolerance()) is None
    found = compare(seen, lazy(other), Tolerance())
    assert found is not None and (found.first, found.values) == ((3, 2), (23.0, 0.0))


@pytest.mark.parametrize(("rtol", "atol"), [(0.0, 0.5), (0.34, 0.0), (0.2, 0.3), (0.0, 0.0), (0.01, 0.01)])
def test_tolerances(rtol: float, atol: float) -> None:
    one, other = pair(torch.float32)
    a, b = one.double(), other.double()
    wrong = int(((a - b).abs() > atol + rtol * torch.maximum(a.abs(), b.abs())).sum())
    found = compare(lazy(one), lazy(other), Tolerance(rtol, atol, exact=False))
    assert (found.different if found else 0) == wrong
    turned = compare(lazy(other), lazy(one), Tolerance(rtol, atol, exact=False))
    assert (turned.different if turned else 0) == wrong


def test_element_types_are_part_of_what_is_exact() -> None:
    one = torch.tensor([1.0, 2.5, -4.0])
    found = compare(lazy(one), lazy(one.bfloat16()), Tolerance())
    assert found is not None and found.different == 0
    assert str(found) == "float32 != bfloat16, the values are equal"
    assert compare(lazy(one), lazy(one.bfloat16()), Tolerance(exact=False)) is None


@pytest.mark.parametrize(
    ("one", "other", "exact", "loose"),
    [
        (0.0, -0.0, True, False),  # (values, differ in bits, differ in value)
        (math.nan, 1.0, True, True),
        (math.inf, math.inf, False, False),
        (math.inf, -math.inf, True, True),
        (math.inf, 1.0, True, True),
    ],
)
def test_special_values(one: float, other: float, exact: bool, loose: bool) -> None:
    left, right = lazy(torch.tensor([1.0, one])), lazy(torch.tensor([1.0, other]))
    assert (compare(left, right, Tolerance()) is not None) == exact
    assert (compare(left, right, Tolerance(0.5, 0.5, exact=False)) is not None) == loose


def test_nan_is_told_as_such_and_zeros_have_no_angle() -> None:
    found = compare(lazy(torch.tensor([1.0, 2.0])), lazy(torch.tensor([math.nan, 7.0])), Tolerance())
    assert found is not None and math.isnan(found.max_abs) and math.isnan(found.cosine) and found.first == (0,)
    found = compare(lazy(torch.zeros(3)), lazy(torch.ones(3)), Tolerance())
    assert found is not None and math.isnan(found.cosine) and (found.max_abs, found.max_rel) == (1.0, 1.0)
