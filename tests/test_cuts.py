"""Cuts by hand, and laws over the rows of every format table."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ckptconv import cuts, families, lazy, messages, ops
from ckptconv.cuts import Cut
from ckptconv.errors import LayoutError, TableError
from ckptconv.formats import mcore
from ckptconv.formats.table import Row, rows_of
from ckptconv.lazy import LazyTensor, Literal, Shape
from ckptconv.messages import expected
from ckptconv.ops import Tile
from ckptconv.spec import ModelSpec
from fixtures import FIXTURES, config

TABLES = mcore.TABLES
TP = (1, 2, 4, 8)


def spec_of(name: str) -> ModelSpec:
    """The model of a fixture as Megatron stores it, with 8 heads so that it can be cut in 8."""
    data = config(name)
    groups = {"llama1": 8, "llama_mqa": 1, "mistral": 4}.get(name, 2)
    spec = families.of_config(data, name).spec(data, name)
    return mcore.target_spec(spec.replace(num_attention_heads=8, num_query_groups=groups, kv_channels=8))


SPECS = {name: spec_of(name) for name in FIXTURES}
#: What the tables say of models that no family has yet.
OTHER = {
    "layer_norm": SPECS["llama_both_bias"].replace(norm="LayerNorm"),
    "plain_mlp": SPECS["llama_both_bias"].replace(gated=False, activation="gelu"),
    "learned": SPECS["llama2"].replace(rope=None, max_position_embeddings=10),
}
ALL = SPECS | OTHER


def held(tensor: torch.Tensor) -> LazyTensor:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return Literal(data, "float32", tuple(tensor.shape))


def counting(shape: Shape, start: int = 0) -> torch.Tensor:
    return start + torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)


def cut(kind: Cut, keys: list[torch.Tensor], tp: int) -> list[torch.Tensor]:
    """The part of every rank."""
    shapes = [tuple(key.shape) for key in keys]
    whole = held(torch.cat(keys))
    above = np.cumsum([0, *(lazy.matrix(s)[0] for s in shapes)])
    parts = []
    for rank in range(tp):
        tiles = [
            Tile(0, t.part_row, t.part_col, int(above[n]) + t.row, t.col, t.rows, t.cols)
            for n in range(len(keys)) for t in kind.tiles(shapes, n, tp) if t.part == rank
        ]  # fmt: skip
        parts.append(lazy.to_torch(ops.assemble(tiles, [whole], kind.shape(shapes, tp))))
    return parts


def test_column_parallel_is_rows() -> None:
    weight = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]])
    assert [p.tolist() for p in cut(cuts.COLUMN, [weight], 2)] == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    bias = torch.tensor([1.0, 2, 3, 4])
    assert [p.tolist() for p in cut(cuts.COLUMN, [bias], 4)] == [[1], [2], [3], [4]]


def test_row_parallel_is_columns() -> None:
    weight = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    assert [p.tolist() for p in cut(cuts.ROW, [weight], 2)] == [[[1, 2], [5, 6]], [[3, 4], [7, 8]]]


def test_replicated_is_the_whole_everywhere() -> None:
    norm = torch.tensor([1.0, 2])
    assert [p.tolist() for p in cut(cuts.REPLICATED, [norm], 3)] == [[1, 2]] * 3


def test_gated_is_w_over_v_on_every_rank() -> None:
    """Rank t holds [W_t; V_t], not the t-th run of [W; V]."""
    w, v = torch.tensor([[1.0], [2], [3], [4]]), torch.tensor([[10.0], [20], [30], [40]])
    assert [p.flatten().tolist() for p in cut(cuts.GATED_COLUMN, [w, v], 1)] == [[1, 2, 3, 4, 10, 20, 30, 40]]
    assert [p.flatten().tolist() for p in cut(cuts.GATED_COLUMN, [w, v], 2)] == [[1, 2, 10, 20], [3, 4, 30, 40]]
    assert [p.flatten().tolist() for p in cut(cuts.GATED_COLUMN, [w, v], 4)] == [[n, 10 * n] for n in (1, 2, 3, 4)]
    assert [p.tolist() for p in cut(cuts.GATED_COLUMN, [w[:, 0], v[:, 0]], 2)] == [[1, 2, 10, 20], [3, 4, 30, 40]]


@pytest.mark.parametrize("tp", TP)
def test_qkv_is_equal_runs_even_inside_a_group(tp: int) -> None:
    """a 8, g 2, d 3: 36 rows, of which tp 4 and 8 cut inside a group of 18."""
    fused = counting((36, 5))
    parts = cut(cuts.QKV_COLUMN, [fused], tp) if 36 % tp == 0 else []
    if tp == 8:
        with pytest.raises(LayoutError):
            cuts.QKV_COLUMN.check("qkv", [(36, 5)], 8, SPECS["llama2"].replace(kv_channels=3))
        return
    assert all(torch.equal(part, run) for part, run in zip(parts, fused.chunk(tp), strict=True))


@pytest.mark.parametrize(
    ("a", "g", "tp", "fits"),
    [
        (8, 8, 8, True), (8, 4, 2, True), (8, 2, 4, True), (8, 1, 8, True), (8, 2, 8, True),
        (8, 8, 3, False), (12, 2, 3, False), (12, 3, 2, False), (6, 2, 4, False), (4, 4, 8, False),
    ],
)  # fmt: skip
def test_which_tp_divide_heads_and_groups(a: int, g: int, tp: int, fits: bool) -> None:
    spec = SPECS["llama2"].replace(num_attention_heads=a, num_query_groups=g, kv_channels=24)
    shape = [(spec.qkv_rows, 48)]
    if fits:
        cuts.QKV_COLUMN.check("qkv", shape, tp, spec)
    else:
        with pytest.raises(LayoutError, match=f"qkv: tp {tp} does not divide {a} attention heads in {g} query groups"):
            cuts.QKV_COLUMN.check("qkv", shape, tp, spec)


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        (cuts.COLUMN, (90, 48), "name: 90 rows do not divide by tp 4"),
        (cuts.ROW, (48, 90), "name: 90 columns do not divide by tp 4"),
    ],
)
def test_what_does_not_divide_is_refused(kind: Cut, shape: Shape, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        kind.check("name", [shape], 4, SPECS["llama2"])
    kind.check("name", [shape], 2, SPECS["llama2"])


def test_each_gated_half_must_divide() -> None:
    """2 * 6 rows divide by 4, but each half of 6 does not."""
    with pytest.raises(LayoutError, match="6 rows"):
        cuts.GATED_COLUMN.check("fc1", [(6, 2), (6, 2)], 4, SPECS["llama2"])


# Laws. A format is in them by being registered.


def used(table: str, spec: ModelSpec) -> Iterator[tuple[Row, tuple[Shape, ...]]]:
    """Every row a model needs, with the shapes of its keys; the vocabulary padded to 136."""
    for message in list(expected(spec))[:2] + list(expected(spec))[1 + spec.num_layers :]:
        for row in rows_of(TABLES[table], message, spec):
            shapes = tuple(message.shapes[key] for key in row.keys)
            yield row, tuple((136, *s[1:]) if row.vocab else s for s in shapes)


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("table", TABLES)
def test_join_undoes_cut(table: str, name: str, tp: int) -> None:
    for row, shapes in used(table, ALL[name]):
        row.cut.check(row.name, shapes, tp, ALL[name])
        keys = [counting(shape, 100000 * n) for n, shape in enumerate(shapes)]
        parts = cut(row.cut, keys, tp)
        assert all(tuple(part.shape) == row.cut.shape(shapes, tp) for part in parts)
        for n, key in enumerate(keys):
            tiles = row.cut.tiles(shapes, n, tp)[: 1 if row.cut.replicated else None]
            assert torch.equal(lazy.to_torch(ops.assemble(tiles, [held(p) for p in parts], shapes[n])), key), row


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("table", TABLES)
def test_every_key_is_stored_once(table: str, name: str) -> None:
    """Once, but for the copy of a tied embedding on the last stage; under names that differ."""
    for message in list(expected(ALL[name])):
        rows = [row for row in rows_of(TABLES[table], message, ALL[name]) if not row.last_stage]
        assert sorted(key for row in rows for key in row.keys) == sorted(message.shapes)
    names = [row.name for row, _ in used(table, ALL[name])]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("table", TABLES)
def test_rows_are_of_known_messages_and_keys(table: str) -> None:
    known = {(template, key.name) for template, key in messages.schema()}
    for row in TABLES[table]:
        assert {(row.message, key) for key in row.keys} <= known
        assert ("{i}" in row.name) == ("{i}" in row.message)


@pytest.mark.parametrize("table", TABLES)
def test_every_key_that_can_be_sent_has_a_row(table: str) -> None:
    known = {(template, key.name) for template, key in messages.schema()}
    assert known == {(row.message, key) for row in TABLES[table] for key in row.keys}


def test_a_key_without_a_row_is_an_error() -> None:
    message = next(iter(expected(SPECS["llama2"])))
    with pytest.raises(TableError, match="no row for 'word embeddings' of 'embeddings'"):
        rows_of([], message, SPECS["llama2"])
