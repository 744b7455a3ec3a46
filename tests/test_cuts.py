"""Cuts by hand, and laws over the rows of every format table, alone and placed on ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ckptconv import cuts, lazy, messages, ops
from ckptconv.cuts import Cut
from ckptconv.errors import LayoutError, TableError
from ckptconv.formats import mcore, mcore_bert, megatron_args
from ckptconv.formats.table import Row, rows_of
from ckptconv.layout import Layout
from ckptconv.lazy import LazyTensor, Shape
from ckptconv.messages import Expected, expected
from ckptconv.ops import Tile
from ckptconv.sharding import Placement, placements
from ckptconv.spec import MLA, ModelSpec, MoE
from samples import SPECS as HF_SPECS
from samples import counting as numbers
from samples import covered, held, noise, of_part, of_whole

#: Every dialect of every format.
TABLES = {
    " ".join((impl, "grouped" * grouped, module)): mcore.table(impl, grouped, module)
    for impl, grouped, module in itertools.product(mcore.IMPLEMENTATIONS, (False, True), mcore.MTP_MODULES)
} | {f"bert {impl}": mcore.table(impl, bert=True) for impl in mcore.IMPLEMENTATIONS}
TP = (1, 2, 4, 8)


def wide(spec: ModelSpec) -> ModelSpec:
    """The model as Megatron stores it, with 8 heads so that it can be cut in 8."""
    groups = 8 if spec.num_query_groups == spec.num_attention_heads else spec.num_query_groups
    changes: dict[str, Any] = {"num_attention_heads": 8, "num_query_groups": groups, "kv_channels": 8}
    if spec.mla:
        down = -(-spec.mla.kv_lora_rank // 8) * 8 + -spec.mla.qk_rope_head_dim % 8
        mla = replace(spec.mla, q_lora_rank=spec.mla.q_lora_rank and 24, kv_lora_rank=down)
        changes |= {"mla": mla, "kv_channels": mla.v_head_dim}
    return mcore.target_spec(spec.replace(**changes))


#: The models that Megatron can express, some of them with layers of one's own.
SPECS = {name: wide(spec) for name, spec in HF_SPECS.items() if not megatron_args.refusals(spec, custom=True)}
EXPERTS = MoE(8, 2, 16, (0, 1, 1, 1), shared_ffn_hidden_size=24, shared_gate=True, router_bias=True, score_bias=True)
LATENT = MLA(24, 16, 8, 4, 8)
#: What the tables say of models that no family has yet, or that a fixture may not have.
OTHER = {
    "layer_norm": SPECS["llama_both_bias"].replace(norm="LayerNorm"),
    "plain_mlp": SPECS["llama_both_bias"].replace(gated=False, activation="gelu"),
    "learned": SPECS["llama2"].replace(rope=None, learned_positions=True, max_position_embeddings=10),
    "sinks": SPECS["llama2"].replace(sinks=True, qk_norm="head"),
    "experts": SPECS["llama2"].replace(moe=EXPERTS),
    "experts_bias": SPECS["llama_both_bias"].replace(moe=EXPERTS, norm="LayerNorm"),
    "plain_experts": SPECS["llama_both_bias"].replace(moe=EXPERTS, gated=False, activation="gelu"),
    "latent": SPECS["llama1"].replace(mla=LATENT, kv_channels=8),
    "latent_q": SPECS["llama1"].replace(mla=MLA(None, 16, 8, 4, 8), kv_channels=8, moe=EXPERTS),
    "latent_layer_norm": SPECS["llama1"].replace(mla=LATENT, kv_channels=8, norm="LayerNorm"),
    "sandwich": SPECS["llama2"].replace(norms="sandwich"),
    "sandwich_experts": SPECS["llama2"].replace(norms="sandwich", moe=EXPERTS),
    "one_norm": SPECS["llama2"].replace(norm="LayerNorm", parallel_residual=True, shared_norm=True),
    "one_norm_experts": SPECS["llama2"].replace(norm="LayerNorm", shared_norm=True, moe=EXPERTS),
    "bert": SPECS["llama_both_bias"].replace(
        model_type="BERT", norm="LayerNorm", norms="post", gated=False, tied=True, learned_positions=True, rope=None,
        num_tokentypes=2, pooler=True, lm_head=True, binary_head=True, max_position_embeddings=10,
    ),
    "bert_before": SPECS["llama_both_bias"].replace(
        model_type="BERT", norm="LayerNorm", gated=False, tied=True, learned_positions=True, rope=None,
        num_tokentypes=2, lm_head=True, max_position_embeddings=10,
    ),
    "mtp": SPECS["llama2"].replace(mtp_layers=2),
    "mtp_all": SPECS["llama1"].replace(mtp_layers=2, mla=LATENT, kv_channels=8, moe=EXPERTS, tied=True),
}
ALL = SPECS | OTHER


def tables(spec: ModelSpec) -> list[str]:
    """The dialects a model can be in."""
    return [name for name in TABLES if name.startswith("bert ") == (spec.model_type == "BERT")]


def counting(shape: Shape, start: int = 0) -> torch.Tensor:
    return numbers(*shape, start=start)


def cut(kind: Cut, keys: list[torch.Tensor], tp: int) -> list[torch.Tensor]:
    """The part of every rank."""
    shapes = [tuple(key.shape) for key in keys]
    parts = []
    for rank in range(tp):
        tiles = [
            Tile(n, t.part_row, t.part_col, t.row, t.col, t.rows, t.cols)
            for n in range(len(keys)) for t in kind.tiles(shapes, n, tp) if t.part == rank
        ]  # fmt: skip
        parts.append(lazy.to_torch(ops.assemble(tiles, list(map(held, keys)), kind.shape(shapes, tp))))
    return parts


def test_column_parallel_is_rows() -> None:
    weight = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]])
    assert [p.tolist() for p in cut(cuts.COLUMN, [weight], 2)] == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    bias = torch.tensor([1.0, 2, 3, 4])
    assert [p.tolist() for p in cut(cuts.COLUMN, [bias], 4)] == [[1], [2], [3], [4]]


def test_row_parallel_is_columns() -> None:
    weight = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    assert [p.tolist() for p in cut(cuts.ROW, [weight], 2)] == [[[1, 2], [5, 6]], [[3, 4], [7, 8]]]


def test_row_parallel_with_several_keys() -> None:
    """Side by side on every rank: rank t holds [W_t V_t] of each row, not the t-th run of [W V]."""
    w, v = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[10.0, 20, 30, 40]])
    assert [p.tolist() for p in cut(cuts.ROW, [w, v], 1)] == [[[1, 2, 3, 4, 10, 20, 30, 40]]]
    assert [p.tolist() for p in cut(cuts.ROW, [w, v], 2)] == [[[1, 2, 10, 20]], [[3, 4, 30, 40]]]
    wide_, narrow = counting((3, 8)), counting((3, 4), 100)
    parts = cut(cuts.ROW, [wide_, narrow], 4)
    assert all(
        torch.equal(part, torch.cat([a, b], 1))
        for part, a, b in zip(parts, wide_.chunk(4, 1), narrow.chunk(4, 1), strict=True)
    )


def test_column_parallel_of_three_dimensions() -> None:
    """Dim 0 is dim 0, however many follow."""
    weight = counting((4, 3, 2))
    assert all(torch.equal(p, c) for p, c in zip(cut(cuts.COLUMN, [weight], 2), weight.chunk(2), strict=True))


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


@pytest.mark.parametrize(("a", "tp", "fits"), [(8, 8, True), (6, 3, True), (6, 4, False), (4, 8, False)])
def test_multi_latent_projections_are_cut_in_whole_heads(a: int, tp: int, fits: bool) -> None:
    """24 rows per head: tp 4 would divide the 144 rows of 6 heads, but inside heads."""
    spec = SPECS["llama1"].replace(num_attention_heads=a, num_query_groups=a)
    if fits:
        cuts.HEADS_COLUMN.check("q up", [(24 * a, 16)], tp, spec)
        parts = cut(cuts.HEADS_COLUMN, [counting((24 * a, 2))], tp)
        assert all(torch.equal(p, c) for p, c in zip(parts, counting((24 * a, 2)).chunk(tp), strict=True))
    else:
        with pytest.raises(LayoutError, match=f"q up: tp {tp} does not divide {a} attention heads"):
            cuts.HEADS_COLUMN.check("q up", [(24 * a, 16)], tp, spec)


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


# Laws. A format is in them by being registered, a model by being a fixture.


def kinds(spec: ModelSpec) -> Iterator[Expected]:
    """One message of every kind."""
    seen = set()
    for message in expected(spec):
        kind = (message.template, tuple(message.shapes.items()))
        if kind not in seen:
            seen.add(kind)
            yield message


def used(table: str, spec: ModelSpec) -> Iterator[tuple[Row, tuple[Shape, ...]]]:
    """Every row a model needs, with the shapes of what one tensor holds; the vocabulary padded to 136."""
    for message in kinds(spec):
        for row in rows_of(TABLES[table], message, spec):
            shapes = tuple(message.shapes[key] for key in row.keys)
            if row.expert:  # one expert's slice, of a bias as one row
                shapes = tuple(s[1:] if len(s) > 2 else (1, *s[1:]) for s in shapes)
            yield row, tuple((136, *s[1:]) if row.vocab else s for s in shapes)


@pytest.mark.parametrize("name", ALL)
def test_join_undoes_cut(name: str) -> None:
    rows = {(row.cut, shapes): row for table in tables(ALL[name]) for row, shapes in used(table, ALL[name])}
    for tp, ((_, shapes), row) in itertools.product(TP, rows.items()):
        if tp == 8 and any(n % 8 for shape in shapes for n in shape):
            continue  # fixtures are made to be cut in 4
        row.cut.check(row.name, shapes, tp, ALL[name])
        keys = [counting(shape, 100000 * n) for n, shape in enumerate(shapes)]
        parts = cut(row.cut, keys, tp)
        assert all(tuple(part.shape) == row.cut.shape(shapes, tp) for part in parts)
        for n, key in enumerate(keys):
            tiles = row.cut.tiles(shapes, n, tp)[: 1 if row.cut.replicated else None]
            assert torch.equal(lazy.to_torch(ops.assemble(tiles, [held(p) for p in parts], shapes[n])), key), row


@pytest.mark.parametrize("name", ALL)
def test_every_key_is_stored_once(name: str) -> None:
    """Once, but for copies that the reader wants; outside the layers under names that differ."""
    for table in map(TABLES.__getitem__, tables(ALL[name])):
        once: list[str] = []
        for message in expected(ALL[name]):
            rows = [row for row in rows_of(table, message, ALL[name]) if not row.copy]
            assert sorted(key for row in rows for key in row.keys) == sorted(message.shapes)
            once += [row.name for row in rows if "{i}" not in row.name]
        assert len(once) == len(set(once))


@pytest.mark.parametrize("table", TABLES)
def test_rows_are_of_known_messages_and_keys(table: str) -> None:
    known = {(template, key.name) for template, key in messages.schema()}
    for row in TABLES[table]:
        assert {(row.message, key) for key in row.keys} <= known
        assert ("{i}" in row.name) == ("{i}" in row.message)
        assert not row.vector or (row.expert and row.cut in (cuts.ROW, cuts.REPLICATED)), row


@pytest.mark.parametrize("table", TABLES)
def test_every_row_is_used_by_a_model(table: str) -> None:
    """Else its name and cut are never tried. Rows of a layer are repeated for MTP layers, GPT's for BERT."""
    tried = {row for spec in ALL.values() if table in tables(spec)
             for message in kinds(spec) for row in rows_of(TABLES[table], message, spec)}  # fmt: skip
    own = mcore_bert.ROWS if table.startswith("bert ") else TABLES[table]
    assert [row for row in own if row not in tried and row.message != "mtp layer {i}"] == []


def test_a_key_without_a_row_is_an_error() -> None:
    message = next(iter(expected(SPECS["llama2"])))
    with pytest.raises(TableError, match="no row for 'word embeddings' of 'embeddings'"):
        rows_of([], message, SPECS["llama2"])


LAYOUTS = [(1, 1, 1), (2, 2, 2), (4, 1, 1), (1, 4, 1), (1, 2, 4), (2, 1, 2)]


def placed(table: str, spec: ModelSpec, tp: int, pp: int, ep: int) -> tuple[Layout, list[Placement]]:
    experts = spec.moe.num_experts if spec.moe else 0
    layout = Layout(spec.num_layers, tp, pp, ep if experts % ep == 0 and experts else 1, experts)
    return layout, list(placements(TABLES[table], spec, layout, 136))


def rectangles(own: list[Placement], key: str) -> list[Tile]:
    """The rectangles of a key on the ranks it is joined from."""
    return [
        tile for p in own if key in p.keys and not p.row.copy
        for tile in p.tiles(key) if tile.part == 0 or not p.row.cut.replicated
    ]  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_every_key_lies_once_on_the_ranks_and_no_name_twice_on_one(name: str) -> None:
    for table, sizes in itertools.product(tables(ALL[name]), LAYOUTS):
        check_placement(table, name, sizes)


def check_placement(table: str, name: str, sizes: tuple[int, int, int]) -> None:
    layout, found = placed(table, ALL[name], *sizes)
    for stage, ep_rank in itertools.product(range(layout.pp), range(layout.ep)):
        names = [p.name for p in found if p.stage == stage and ep_rank in p.ep_ranks]
        assert len(names) == len(set(names))
        assert names, "a stage without tensors"
    vocabulary = {"word embeddings", "weight", "vocab bias"}
    for message in expected(ALL[name]):
        own = [p for p in found if p.message == message.name]
        for key, shape in message.shapes.items():
            padded = any(p.row.vocab for p in own if key in p.keys)
            assert padded == (shape[0] == ALL[name].vocab_size and key in vocabulary)
            stored = (136, *shape[1:]) if padded else shape
            assert covered(stored, list(map(of_whole, rectangles(own, key)))), (message.name, key)
        for p in own:
            tiles = [tile for key in p.keys for tile in p.tiles(key)]
            for rank in range(layout.tp):
                assert covered(p.seen_shape, [of_part(t) for t in tiles if t.part == rank]), p.name
            assert np.prod(p.part_shape) == np.prod(p.seen_shape)


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_is_joined_from_its_ranks_bit_for_bit(name: str) -> None:
    """One layer of each kind: cut as the saver does, joined as the loader does."""
    for table, sizes in itertools.product(tables(ALL[name]), [(1, 1, 1), (2, 2, 2), (2, 1, 4)]):
        check_join(table, name, sizes)


def check_join(table: str, name: str, sizes: tuple[int, int, int]) -> None:
    layout, found = placed(table, ALL[name], *sizes)
    for message in kinds(ALL[name]):
        own = [p for p in found if p.message == message.name]
        shapes = {key: (136, *shape[1:]) if any(p.row.vocab for p in own if key in p.keys) else shape
                  for key, shape in message.shapes.items()}  # fmt: skip
        whole = {key: noise(shape, n) for n, (key, shape) in enumerate(shapes.items())}
        ranks: dict[tuple[str, int, int, int], torch.Tensor] = {}
        for p, rank, ep_rank in ((one, t, e) for one in own for t in range(layout.tp) for e in one.ep_ranks):
            tiles = [Tile(n, t.part_row, t.part_col, t.row, t.col, t.rows, t.cols)
                     for n, key in enumerate(p.keys) for t in p.tiles(key) if t.part == rank]  # fmt: skip
            made = ops.assemble(tiles, [held(whole[key]) for key in p.keys], p.seen_shape)
            ranks[p.name, p.stage, rank, ep_rank] = lazy.to_torch(made).reshape(p.part_shape)
        for key, tensor in whole.items():
            joined: list[Tile] = []
            parts: list[LazyTensor] = []
            for p in own:
                if key not in p.keys or p.row.copy:
                    continue
                for tile in p.tiles(key):
                    if tile.part and p.row.cut.replicated:
                        continue
                    joined.append(Tile(len(parts), *of_whole(tile)[:2], *of_part(tile)))
                    part = ranks[p.name, p.stage, tile.part, p.ep_ranks[0]]
                    parts.append(held(part.reshape(p.seen_shape)))
            assert torch.equal(lazy.to_torch(ops.assemble(joined, parts, shapes[key])), tensor), (message.name, key)
