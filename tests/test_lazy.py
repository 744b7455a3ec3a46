"""Lazy tensors: reading rectangles, assemblies and conversions, against numpy and torch."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckptconv import dtypes, files, lazy
from ckptconv.errors import SourceError, TableError
from ckptconv.lazy import Assembly, Cast, FileTensor, LazyTensor, Literal, Piece, Strided, Transposed, Zeros

Stored = Callable[..., FileTensor]


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """`stored(tensor)`: the tensor in a file of its own, behind 7 bytes of something else."""

    def write(tensor: torch.Tensor) -> FileTensor:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.bin"
        path.write_bytes(b"\xff" * 7 + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return FileTensor(str(path), 7, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    return write


def counting(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(1, 1 + int(np.prod(shape)), dtype=dtype).reshape(shape)


def rectangle(tensor: LazyTensor, row: int, col: int, rows: int, cols: int) -> torch.Tensor:
    out = np.full((rows, cols), 0xEE, dtypes.opaque(tensor.dtype))
    tensor.read(out, row, col)
    return lazy.as_torch(out, tensor.dtype)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((), (1, 1)), ((5,), (5, 1)), ((2, 3), (2, 3)), ((4, 2, 3), (8, 3)), ((0, 3), (0, 3)), ((1,), (1, 1))],
)
def test_matrix(shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    assert lazy.matrix(shape) == expected


@pytest.mark.parametrize(
    ("row", "col", "rows", "cols"),
    [(0, 0, 5, 4), (2, 0, 3, 4), (1, 1, 3, 2), (4, 3, 1, 1), (0, 3, 5, 1), (3, 0, 1, 4)],
)
def test_a_rectangle_of_a_file_is_the_slice_of_the_tensor(
    stored: Stored, row: int, col: int, rows: int, cols: int
) -> None:
    whole = counting(5, 4)
    assert torch.equal(rectangle(stored(whole), row, col, rows, cols), whole[row : row + rows, col : col + cols])


def test_a_file_is_read_into_a_part_of_a_larger_array(stored: Stored) -> None:
    out = np.zeros((5, 6), np.uint32)
    stored(counting(3, 4)).read(out[1:4, 1:5], 0, 0)
    assert torch.equal(lazy.as_torch(out[1:4, 1:5].copy(), "float32"), counting(3, 4))
    assert not out[0].any()
    assert not out[:, 0].any()
    assert not out[:, 5].any()


@pytest.mark.parametrize("name", list(dtypes.BY_NAME))
def test_every_element_type_is_read_back_as_it_was(stored: Stored, name: str) -> None:
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtypes.of_torch(name))
    read = lazy.to_torch(stored(tensor))
    assert read.dtype == tensor.dtype
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 5)])
def test_other_ranks_keep_their_shape(stored: Stored, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    assert torch.equal(lazy.to_torch(stored(tensor), block_bytes=8), tensor)


def test_a_truncated_file_is_named(stored: Stored) -> None:
    tensor = stored(counting(3, 4))
    with open(tensor.path, "r+b") as file:
        file.truncate(20)
    with pytest.raises(SourceError, match=r"\.bin: ends at byte 20, but a tensor needs bytes 7 to 55"):
        lazy.to_torch(tensor)


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", ["float64", "float32", "bfloat16", "float16"])
def test_cast_is_torchs_own(stored: Stored, source: str, target: str) -> None:
    special = torch.tensor([0.0, -0.0, 1e-45, 65519.9, 65520.0, 3.4e38, float("inf"), -float("inf"), 1 + 2**-8])
    values = torch.cat([special, torch.randn(55)]).reshape(8, 8).to(dtypes.of_torch(source))
    read = lazy.to_torch(Cast(stored(values), target), block_bytes=16)
    assert torch.equal(read, values.to(dtypes.of_torch(target)))


def test_cast_keeps_nan(stored: Stored) -> None:
    cast = Cast(stored(torch.tensor([[float("nan"), 1.0]])), "bfloat16")
    assert lazy.to_torch(cast).isnan().tolist() == [[True, False]]


def test_transposed(stored: Stored) -> None:
    whole = counting(3, 5)
    tensor = Transposed(stored(whole))
    assert tensor.shape == (5, 3)
    assert torch.equal(lazy.to_torch(tensor, block_bytes=24), whole.T)
    assert torch.equal(rectangle(tensor, 1, 1, 3, 2), whole.T[1:4, 1:3])


@pytest.mark.parametrize("shape", [(4, 6), (2, 12), (12, 2), (24,), (1, 24), (3, 2, 4), (8, 3)])
def test_any_tensor_is_seen_in_another_shape(stored: Stored, shape: tuple[int, ...]) -> None:
    """Also where rows of the one end within rows of the other."""
    whole = counting(4, 6)
    seen = Transposed(stored(whole.T)).seen(shape)
    want = whole.reshape(shape)
    assert torch.equal(lazy.to_torch(seen, block_bytes=16), want)
    flat = want.reshape(seen.rows, seen.cols)
    for row in range(seen.rows):
        for col in range(seen.cols):
            rows, cols = min(2, seen.rows - row), min(3, seen.cols - col)
            assert torch.equal(rectangle(seen, row, col, rows, cols), flat[row : row + rows, col : col + cols])
    with pytest.raises(TableError):
        seen.seen((5, 5))


@pytest.mark.parametrize(("rows", "cols"), [(3, 7), (1, 1), (4, 6), (2, 1)])
@pytest.mark.parametrize("step", [1, 2, 3, 5])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_strided_is_every_nth_column(stored: Stored, rows: int, cols: int, step: int, start: int) -> None:
    if start >= cols:
        return
    whole = counting(rows, cols)
    tensor = Strided(stored(whole), start, step)
    assert tensor.shape == tuple(whole[:, start::step].shape)
    assert torch.equal(lazy.to_torch(tensor, block_bytes=16), whole[:, start::step])


@pytest.mark.parametrize(("cols", "step"), [(6, 3), (6, 2), (6, 1), (6, 6), (8, 4), (2, 1), (15, 5)])
def test_strided_with_wrap_goes_round_until_all_columns_are_taken(stored: Stored, cols: int, step: int) -> None:
    """cols / step columns of the first round, then the same one further: a matrix [cols / step, step] transposed."""
    whole = counting(3, cols)
    tensor = Strided(stored(whole), 0, step, wrap=True)
    assert tensor.shape == (3, cols)
    expected = whole.reshape(3, cols // step, step).transpose(1, 2).reshape(3, cols)
    assert torch.equal(lazy.to_torch(tensor, block_bytes=8), expected)
    assert sorted(lazy.to_torch(tensor)[0].tolist()) == whole[0].tolist()


@pytest.mark.parametrize("wrap", [False, True])
def test_any_rectangle_of_strided_columns(stored: Stored, wrap: bool) -> None:
    tensor = Strided(stored(counting(4, 12)), 0, 3, wrap)
    whole = lazy.to_torch(tensor)
    for row in range(4):
        for col in range(tensor.cols):
            for last in range(col + 1, tensor.cols + 1):
                assert torch.equal(rectangle(tensor, row, col, 4 - row, last - col), whole[row:, col:last])


def test_strided_columns_of_three_dimensions(stored: Stored) -> None:
    whole = counting(2, 3, 9)
    tensor = Strided(stored(whole), 1, 2)
    assert tensor.shape == (2, 3, 4)
    assert torch.equal(lazy.to_torch(tensor, block_bytes=16), whole[..., 1::2])
    assert pickle.loads(pickle.dumps(tensor)) == tensor


@pytest.mark.parametrize(("cols", "wanted"), [(3, 1), (4, 1), (5, 1), (64, 16), (64, 15), (64, 17), (64, 1)])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "uint8"])
def test_narrow_columns_of_wide_tensors(stored: Stored, cols: int, wanted: int, name: str) -> None:
    """On both sides of FAR, where a read per row takes the place of one over all rows."""
    whole = (counting(7, cols) % 251).to(dtypes.of_torch(name))
    for col in (0, (cols - wanted) // 2, cols - wanted):
        found = rectangle(stored(whole), 1, col, 5, wanted)
        assert torch.equal(found, whole[1:6, col : col + wanted])


def test_far_columns_are_read_without_what_lies_between(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    real = files.read_exactly

    def noted(path: str, offset: int, out: memoryview) -> None:
        reads.append(len(out))
        real(path, offset, out)

    monkeypatch.setattr(lazy, "read_exactly", noted)
    tensor = stored(counting(6, 4 * lazy.FAR))
    rectangle(tensor, 0, 3, 6, 4)
    assert reads == [4 * 4] * 6
    reads.clear()
    rectangle(tensor, 0, 3, 6, 5)
    assert reads == [(5 * 4 * lazy.FAR + 5) * 4]
    reads.clear()
    rectangle(tensor, 2, 0, 4, 4 * lazy.FAR)
    assert reads == [4 * 4 * lazy.FAR * 4]


def test_a_narrow_column_at_the_end_of_a_truncated_file_is_named(stored: Stored) -> None:
    tensor = stored(counting(3, 8))
    with open(tensor.path, "r+b") as file:
        file.truncate(7 + 3 * 8 * 4 - 1)
    with pytest.raises(SourceError, match=r"\.bin: ends at byte 102"):
        rectangle(tensor, 0, 7, 3, 1)


def test_a_vector_seen_as_one_row(stored: Stored) -> None:
    """A bias is n rows of one column, or one row of a stacked tensor."""
    vector = stored(counting(6))
    assert (vector.rows, vector.cols) == (6, 1)
    row = vector.seen((1, 6))
    assert (row.rows, row.cols) == (1, 6)
    assert torch.equal(rectangle(row, 0, 2, 1, 3), counting(6)[None, 2:5])
    assert torch.equal(lazy.to_torch(row.seen((2, 3))), counting(2, 3))
    with pytest.raises(TableError, match=r"a Zeros of shape \[6\] cannot be seen as \[1, 5\]"):
        Zeros("float32", (6,)).seen((1, 5))


def test_zeros_and_literal() -> None:
    assert lazy.to_torch(Zeros("bfloat16", (3, 2))).tolist() == [[0, 0]] * 3
    row = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    literal = Literal(row.view(torch.uint8).numpy().tobytes(), "bfloat16", (1, 2))
    assert lazy.to_torch(literal).tolist() == [[1.5, -2.0]]
    assert rectangle(literal, 0, 1, 1, 1).tolist() == [[-2.0]]


@pytest.mark.parametrize("block", [1, 24, 1 << 20])
def test_concat_and_narrow(stored: Stored, block: int) -> None:
    one, two = counting(2, 3), 100 + counting(3, 3)
    pieces = (Piece(0, 0, 2, 3, stored(one), 0, 0), Piece(2, 0, 3, 3, stored(two), 0, 0))
    both = Assembly("float32", (5, 3), pieces)
    assert both.shape == (5, 3)
    assert torch.equal(lazy.to_torch(both, block), torch.cat([one, two]))
    assert torch.equal(lazy.to_torch(both.narrow_rows(1, 3), block), torch.cat([one, two])[1:4])


def test_narrow_rows_counts_indices_of_the_first_dimension(stored: Stored) -> None:
    experts = counting(4, 2, 3)
    assert torch.equal(lazy.to_torch(stored(experts).narrow_rows(1, 2)), experts[1:3])
    assert torch.equal(lazy.to_torch(stored(counting(6)).narrow_rows(2, 3)), counting(6)[2:5])


def test_an_assembly_puts_rectangles_where_they_belong(stored: Stored) -> None:
    """[A A B]
    [A A B]
    [C C C], and rectangles that cross all of them."""
    a, b, c = counting(2, 2), 10 * counting(2, 1), 100 * counting(4, 3)
    pieces = (
        Piece(2, 0, 1, 3, stored(c), 3, 0),
        Piece(0, 0, 2, 2, stored(a), 0, 0),
        Piece(0, 2, 2, 1, stored(b), 0, 0),
    )
    whole = Assembly("float32", (3, 3), pieces)
    expected = torch.tensor([[1.0, 2, 10], [3, 4, 20], [1000, 1100, 1200]])
    assert torch.equal(lazy.to_torch(whole), expected)
    for row in range(3):
        for col in range(3):
            assert torch.equal(rectangle(whole, row, col, 3 - row, 3 - col), expected[row:, col:])
    assert torch.equal(lazy.to_torch(pickle.loads(pickle.dumps(whole))), expected)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ((0, 0, 2, 3), "cover 6 of 9"),
        ((1, 0, 3, 3), "does not fit"),
        ((0, 1, 3, 3), "does not fit"),
    ],
)
def test_an_assembly_that_does_not_cover_is_refused(piece: tuple[int, int, int, int], message: str) -> None:
    row, col, rows, cols = piece
    with pytest.raises(TableError, match=message):
        Assembly("float32", (3, 3), (Piece(row, col, rows, cols, Zeros("float32", (3, 3)), 0, 0),))


def test_an_assembly_of_other_elements_or_beyond_a_part_is_refused() -> None:
    for part in (Zeros("bfloat16", (3, 3)), Zeros("float32", (2, 3))):
        with pytest.raises(TableError, match="does not fit"):
            Assembly("float32", (3, 3), (Piece(0, 0, 3, 3, part, 0, 0),))


@pytest.mark.parametrize(
    ("limit", "breaks", "expected"),
    [
        (1 << 20, (), [(0, 10)]),
        (4 * 8, (), [(0, 4), (4, 4), (8, 2)]),
        (1, (), [(n, 1) for n in range(10)]),
        (4 * 8, (3, 9), [(0, 3), (3, 4), (7, 2), (9, 1)]),
        (1 << 20, (0, 5, 5, 10, 12), [(0, 5), (5, 5)]),
    ],
)
def test_blocks(limit: int, breaks: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    assert list(lazy.blocks(Zeros("float32", (10, 2)), limit, breaks)) == expected


def test_equal_compares_bits(stored: Stored) -> None:
    nan = torch.tensor([[float("nan"), 0.0]])
    assert lazy.equal(stored(nan), stored(nan))
    assert not lazy.equal(stored(torch.tensor([[0.0]])), stored(torch.tensor([[-0.0]])))
    assert not lazy.equal(Zeros("float32", (2, 2)), Zeros("float32", (4, 1)))
    assert not lazy.equal(Zeros("float32", (2, 2)), Zeros("bfloat16", (2, 2)))
    late = counting(5, 4)
    late[4, 3] = 0
    assert not lazy.equal(stored(counting(5, 4)), stored(late), block_bytes=16)


def test_all_zero(stored: Stored) -> None:
    bias = torch.zeros(9)
    assert lazy.all_zero(stored(bias))
    bias[8] = 1e-45
    assert not lazy.all_zero(stored(bias), block_bytes=8)


def test_what_crosses_the_queue_is_small(stored: Stored) -> None:
    tensor: Any = stored(counting(1000, 100))
    assert len(pickle.dumps(tensor)) < 500
    assert pickle.loads(pickle.dumps(tensor)) == tensor
