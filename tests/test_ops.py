"""Ops by hand, and laws over the rows of every family."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ckptconv import families, lazy, messages, ops
from ckptconv.errors import TableError
from ckptconv.families import FAMILIES
from ckptconv.lazy import LazyTensor, Literal, Zeros
from ckptconv.messages import expected
from ckptconv.spec import ModelSpec
from fixtures import FIXTURES, config

FUSE = families.LLAMA.row("transformer layer {i}", "qkv weight").op
HEADS = [(4, 4, 3), (4, 2, 3), (8, 1, 2), (6, 2, 5), (1, 1, 1)]


def spec_of(name: str) -> ModelSpec:
    """The model of a fixture, as its family reads config.json."""
    data = config(name)
    return families.of_config(data, name).spec(data, name)


SPECS = {name: spec_of(name) for name in FIXTURES}


def held(tensor: torch.Tensor) -> LazyTensor:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return Literal(data, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def counting(*shape: int, start: int = 0) -> torch.Tensor:
    return start + torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)


def heads(a: int, g: int, d: int) -> ModelSpec:
    return SPECS["llama2"].replace(num_attention_heads=a, num_query_groups=g, kv_channels=d, hidden_size=7)


@pytest.mark.parametrize(("a", "g", "d"), HEADS)
def test_fused_rows_are_megatrons(a: int, g: int, d: int) -> None:
    """q head j*r + t, dim k -> row (j*(r+2) + t)*d + k; k head j -> (j*(r+2) + r)*d + k; v head j -> one d later."""
    r, h = a // g, 7
    q, k, v = counting(a * d, h), counting(g * d, h, start=10000), counting(g * d, h, start=20000)
    fused = lazy.to_torch(ops.fuse(FUSE, [held(q), held(k), held(v)], ((a + 2 * g) * d, h), heads(a, g, d)))
    seen = []
    for j in range(g):
        for n in range(d):
            for t in range(r):
                row = (j * (r + 2) + t) * d + n
                assert torch.equal(fused[row], q[(j * r + t) * d + n])
                seen.append(row)
            rows = ((j * (r + 2) + r) * d + n, (j * (r + 2) + r + 1) * d + n)
            assert torch.equal(fused[rows[0]], k[j * d + n])
            assert torch.equal(fused[rows[1]], v[j * d + n])
            seen += rows
    assert sorted(seen) == list(range((a + 2 * g) * d))


@pytest.mark.parametrize(("a", "g", "d"), HEADS)
def test_fused_bias_is_the_same_without_h(a: int, g: int, d: int) -> None:
    """The loader of Megatron-LM: cat([q.view(g, r*d), k.view(g, d), v.view(g, d)], dim=1).reshape(-1)."""
    q, k, v = counting(a * d), counting(g * d, start=1000), counting(g * d, start=2000)
    fused = lazy.to_torch(ops.fuse(FUSE, [held(q), held(k), held(v)], ((a + 2 * g) * d,), heads(a, g, d)))
    assert torch.equal(fused, torch.cat([q.view(g, -1), k.view(g, d), v.view(g, d)], dim=1).reshape(-1))


def test_a_copy_is_the_tensor_itself() -> None:
    tensor = Zeros("float32", (3, 2))
    assert ops.fuse(ops.COPY, [tensor], (3, 2), SPECS["llama2"]) is tensor
    assert ops.split(ops.COPY, tensor, SPECS["llama2"]) == [tensor]


def test_parts_of_different_types_are_refused() -> None:
    a, g, d = 4, 2, 3
    parts = [Zeros("float32", (a * d, 7)), Zeros("bfloat16", (g * d, 7)), Zeros("float32", (g * d, 7))]
    with pytest.raises(TableError, match="bfloat16, float32"):
        ops.fuse(FUSE, parts, ((a + 2 * g) * d, 7), heads(a, g, d))


# Laws. A family is in them by being registered, a model by being a fixture.


def sayable(family: str) -> dict[str, ModelSpec]:
    """The fixture models that a family's config.json can say."""
    return {name: spec for name, spec in SPECS.items() if not FAMILIES[family].refusals(spec)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_fixtures_of_its_own(family: str) -> None:
    own = [name for name, spec in SPECS.items() if spec.family == family]
    assert own
    assert set(own) <= set(sayable(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_name_and_no_key_twice(family: str) -> None:
    rows = FAMILIES[family].rows
    names = [name for row in rows for name in row.names] + [rule.name for rule in FAMILIES[family].ignore]
    assert len(names) == len(set(names))
    assert len({(row.message, row.key) for row in rows}) == len(rows)
    assert all(len(row.names) == row.op.parts for row in rows)
    for spec in sayable(family).values():
        disk = [n.format(i=m.layer) for m in expected(spec) for k in m.shapes
                for n in FAMILIES[family].row(m.template, k).names]  # fmt: skip
        assert len(disk) == len(set(disk))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_of_known_messages_and_keys(family: str) -> None:
    known = {(template, key.name) for template, key in messages.schema()}
    assert {(row.message, row.key) for row in FAMILIES[family].rows} <= known
    for row in FAMILIES[family].rows:
        assert all(("{i}" in name) == ("{i}" in row.message) for name in row.names), row


@pytest.mark.parametrize(("family", "name"), [(f, name) for f in FAMILIES for name in sayable(f)])
def test_split_undoes_fuse_and_shapes_match(family: str, name: str) -> None:
    spec = SPECS[name]
    for message in list(expected(spec))[:2] + list(expected(spec))[-2:]:
        for key, shape in message.shapes.items():
            row = FAMILIES[family].row(message.template, key)
            shapes = row.op.part_shapes(shape, spec)
            parts = [counting(*s, start=1000000 * n) for n, s in enumerate(shapes)]
            whole = ops.fuse(row.op, [held(p) for p in parts], shape, spec)
            assert whole.shape == shape
            back = ops.split(row.op, held(lazy.to_torch(whole)), spec)
            assert [b.shape for b in back] == shapes
            assert all(torch.equal(lazy.to_torch(b), p) for b, p in zip(back, parts, strict=True)), (message.name, key)


def counts(shape: tuple[int, ...], rectangles: list[tuple[int, int, int, int]]) -> Any:
    seen = np.zeros(lazy.matrix(shape), int)
    for row, col, rows, cols in rectangles:
        seen[row : row + rows, col : col + cols] += 1
    return seen


@pytest.mark.parametrize(("family", "name"), [(f, name) for f in FAMILIES for name in sayable(f)])
def test_tiles_cover_whole_and_parts_exactly_once(family: str, name: str) -> None:
    spec = SPECS[name]
    for message in list(expected(spec))[:2]:
        for key, shape in message.shapes.items():
            op = FAMILIES[family].row(message.template, key).op
            tiles = op.tiles(shape, spec)
            assert (counts(shape, [(t.row, t.col, t.rows, t.cols) for t in tiles]) == 1).all()
            for n, part in enumerate(op.part_shapes(shape, spec)):
                own = [(t.part_row, t.part_col, t.rows, t.cols) for t in tiles if t.part == n]
                assert (counts(part, own) == 1).all()
