"""Ops and views by hand, and laws over the rows of every family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from ckptconv import lazy, messages, ops
from ckptconv.errors import TableError
from ckptconv.families import FAMILIES
from ckptconv.families.family import Family, Row
from ckptconv.families.llama import LLAMA
from ckptconv.families.mixtral import MIXTRAL
from ckptconv.lazy import LazyTensor, Shape, Zeros
from ckptconv.messages import Expected, expected
from ckptconv.ops import ALTERNATE, BESIDE, FUSE_QKV, JOINED_QKV, PER_EXPERT, STACK, TRANSPOSE, EachExpert, Op, Then
from ckptconv.spec import ModelSpec
from fixtures import config
from samples import SPECS, bits, counting, covered, held, noise, of_part, of_whole

HEADS = [(4, 4, 3), (4, 2, 3), (8, 1, 2), (6, 2, 5), (1, 1, 1)]
ANY = next(iter(SPECS.values()))


def heads(a: int, g: int, d: int) -> ModelSpec:
    return SPECS["llama2"].replace(num_attention_heads=a, num_query_groups=g, kv_channels=d, hidden_size=7)


def fuse(op: Op, parts: list[torch.Tensor], keys: list[Shape], spec: ModelSpec = ANY) -> list[torch.Tensor]:
    return [lazy.to_torch(key) for key in ops.fuse(op, list(map(held, parts)), keys, spec)]


def split(op: Op, keys: list[torch.Tensor], spec: ModelSpec = ANY) -> list[torch.Tensor]:
    return [lazy.to_torch(part) for part in ops.split(op, list(map(held, keys)), spec)]


@pytest.mark.parametrize(("a", "g", "d"), HEADS)
def test_fused_rows_are_megatrons(a: int, g: int, d: int) -> None:
    """q head j*r + t, dim k -> row (j*(r+2) + t)*d + k; k head j -> (j*(r+2) + r)*d + k; v head j -> one d later."""
    r, h = a // g, 7
    q, k, v = counting(a * d, h), counting(g * d, h, start=10000), counting(g * d, h, start=20000)
    (fused,) = fuse(FUSE_QKV, [q, k, v], [((a + 2 * g) * d, h)], heads(a, g, d))
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
    (fused,) = fuse(FUSE_QKV, [q, k, v], [((a + 2 * g) * d,)], heads(a, g, d))
    assert torch.equal(fused, torch.cat([q.view(g, -1), k.view(g, d), v.view(g, d)], dim=1).reshape(-1))


@pytest.mark.parametrize("rest", [(), (7,)])
@pytest.mark.parametrize(("a", "g", "d"), HEADS)
def test_joined_qkv_is_q_over_k_over_v(a: int, g: int, d: int, rest: Shape) -> None:
    q, k, v = (counting(n * d, *rest, start=s) for n, s in ((a, 0), (g, 10000), (g, 20000)))
    (joined,) = fuse(JOINED_QKV, [torch.cat([q, k, v])], [((a + 2 * g) * d, *rest)], heads(a, g, d))
    (apart,) = fuse(FUSE_QKV, [q, k, v], [((a + 2 * g) * d, *rest)], heads(a, g, d))
    assert torch.equal(joined, apart)
    (back,) = split(JOINED_QKV, [joined], heads(a, g, d))
    assert torch.equal(back, torch.cat([q, k, v]))


def test_a_copy_is_the_tensor_itself() -> None:
    one, other = Zeros("float32", (3, 2)), Zeros("float32", (5,))
    assert ops.fuse(ops.COPY, [one, other], [(3, 2), (5,)], ANY) == [one, other]
    assert ops.split(ops.COPY, [one], ANY)[0] is one


def test_stack_is_one_key_below_the_other() -> None:
    w, v = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6]])
    stored = torch.tensor([[1, 2], [3, 4], [5, 6]])
    assert [key.tolist() for key in fuse(STACK, [stored], [(2, 2), (1, 2)])] == [w.tolist(), v.tolist()]
    assert split(STACK, [w, v])[0].tolist() == stored.tolist()
    assert split(STACK, [w[:, 0], v[:, 0]])[0].tolist() == [1, 3, 5]
    assert split(STACK, [counting(2, 3, 4), counting(1, 3, 4, start=24)])[0].tolist() == counting(3, 3, 4).tolist()


def test_beside_is_one_key_next_to_the_other() -> None:
    w, v = torch.tensor([[1, 2], [4, 5]]), torch.tensor([[3], [6]])
    stored = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert [key.tolist() for key in fuse(BESIDE, [stored], [(2, 2), (2, 1)])] == [w.tolist(), v.tolist()]
    assert split(BESIDE, [w, v])[0].tolist() == stored.tolist()
    one, other = counting(3, 2, 2), counting(3, 2, 5, start=100)
    assert torch.equal(split(BESIDE, [one, other])[0], torch.cat([one, other], 2))


def test_per_expert_parts_follow_each_other_expert_by_expert() -> None:
    parts = [counting(2, 3, start=100 * expert) for expert in range(4)]
    (key,) = fuse(PER_EXPERT, parts, [(4, 2, 3)])
    assert torch.equal(key, torch.stack(parts))
    assert all(torch.equal(b, p) for b, p in zip(split(PER_EXPERT, [key]), parts, strict=True))


def test_per_expert_with_two_keys_in_each_part() -> None:
    gates, ups = counting(3, 2, 5), counting(3, 2, 5, start=1000)
    parts = split(ops.PerExpert(STACK), [gates, ups])
    assert [part.tolist() for part in parts] == [torch.cat([gates[e], ups[e]]).tolist() for e in range(3)]
    found = fuse(ops.PerExpert(STACK), parts, [(3, 2, 5), (3, 2, 5)])
    assert torch.equal(found[0], gates)
    assert torch.equal(found[1], ups)


def test_per_expert_with_several_parts_for_each() -> None:
    """Parts of a row are named expert by expert: all of expert 0, then all of expert 1."""
    gates, ups = counting(3, 2, 5), counting(3, 4, 5, start=1000)
    parts = split(PER_EXPERT, [gates, ups])
    assert [tuple(part.shape) for part in parts] == [(2, 5), (4, 5)] * 3
    assert torch.equal(parts[2], gates[1])
    assert torch.equal(parts[5], ups[2])


@pytest.mark.parametrize(("op", "dim"), [(STACK, 1), (BESIDE, 2)])
def test_each_expert_is_one_tensor_with_what_the_op_makes_of_each(op: Op, dim: int) -> None:
    gates, ups = counting(3, 2, 5), counting(3, 2, 5, start=1000)
    (stored,) = split(EachExpert(op), [gates, ups])
    assert torch.equal(stored, torch.cat([gates, ups], dim))
    found = fuse(EachExpert(op), [stored], [(3, 2, 5), (3, 2, 5)])
    assert torch.equal(found[0], gates)
    assert torch.equal(found[1], ups)


def test_biases_of_all_experts_lie_side_by_side() -> None:
    """Keys [e, m] are matrices with a row per expert: BESIDE is what EachExpert(STACK) is for their weights."""
    gates, ups = counting(3, 4), counting(3, 4, start=100)
    (stored,) = split(BESIDE, [gates, ups])
    assert torch.equal(stored, torch.cat([gates, ups], 1))
    assert [key.tolist() for key in fuse(BESIDE, [stored], [(3, 4), (3, 4)])] == [gates.tolist(), ups.tolist()]
    with pytest.raises(TableError):
        split(EachExpert(STACK), [gates, ups])


def test_parts_of_different_types_are_refused() -> None:
    a, g, d = 4, 2, 3
    parts = [Zeros("float32", (a * d, 7)), Zeros("bfloat16", (g * d, 7)), Zeros("float32", (g * d, 7))]
    with pytest.raises(TableError, match="bfloat16, float32"):
        ops.fuse(FUSE_QKV, parts, [((a + 2 * g) * d, 7)], heads(a, g, d))


# Views


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2, 3, 5), (4, 1, 2), (2, 3, 4, 5)])
def test_transposed_are_the_last_two_dimensions(shape: Shape) -> None:
    stored = noise(shape, 1)
    seen = TRANSPOSE.seen(held(stored))
    assert seen.shape == tuple(stored.transpose(-1, -2).shape)
    assert TRANSPOSE.shape(seen.shape) == shape
    assert torch.equal(bits(seen), stored.transpose(-1, -2))
    assert torch.equal(bits(TRANSPOSE.stored(seen)), stored)
    assert torch.equal(bits(TRANSPOSE.stored(held(bits(seen)))), stored)


@pytest.mark.parametrize("shape", [(2, 6), (1, 2), (3, 2, 8)])
def test_alternate_takes_every_other_column(shape: Shape) -> None:
    stored = noise(shape, 2)
    seen = ALTERNATE.seen(held(stored))
    assert seen.shape == ALTERNATE.shape(shape) == shape
    assert torch.equal(bits(seen), torch.cat([stored[..., 0::2], stored[..., 1::2]], -1))
    assert torch.equal(bits(ALTERNATE.stored(seen)), stored)
    assert torch.equal(bits(ALTERNATE.stored(held(bits(seen)))), stored)


def test_alternate_by_hand() -> None:
    stored = torch.tensor([[1, 10, 2, 20, 3, 30]], dtype=torch.int32)
    assert bits(ALTERNATE.seen(held(stored))).tolist() == [[1, 2, 3, 10, 20, 30]]
    seen = torch.tensor([[1, 2, 3, 10, 20, 30]], dtype=torch.int32)
    assert bits(ALTERNATE.stored(held(seen))).tolist() == stored.tolist()


@pytest.mark.parametrize("shape", [(5, 6), (3, 5, 4)])
def test_one_view_then_another(shape: Shape) -> None:
    """Stored [..., in, gate and up in turn] -> gates and ups -> [..., gates above ups, in], as gpt-oss needs."""
    view = Then(ALTERNATE, TRANSPOSE)
    stored = noise(shape, 3)
    seen = view.seen(held(stored))
    expected_ = torch.cat([stored[..., 0::2], stored[..., 1::2]], -1).transpose(-1, -2)
    assert seen.shape == tuple(expected_.shape)
    assert view.shape(seen.shape) == shape
    assert torch.equal(bits(seen), expected_)
    assert torch.equal(bits(view.stored(seen)), stored)
    assert torch.equal(bits(view.stored(held(expected_))), stored)


def test_any_rectangle_of_a_view() -> None:
    """Blocks end anywhere: a view reads what it is asked for."""
    view = Then(ALTERNATE, TRANSPOSE)
    stored = noise((2, 4, 6), 4)
    seen = view.seen(held(stored))
    whole = torch.cat([stored[..., 0::2], stored[..., 1::2]], -1).transpose(-1, -2).reshape(12, 4)
    for row in range(12):
        for col in range(4):
            out = lazy.as_numpy(torch.zeros(12 - row, 4 - col, dtype=torch.int32))
            seen.read(out, row, col)
            assert torch.equal(lazy.as_torch(out, "int32"), whole[row:, col:])


# Laws. A family is in them by being registered, a model by being a fixture.


def sayable(family: str) -> dict[str, ModelSpec]:
    """The fixture models that a family's config.json can say."""
    return {name: spec for name, spec in SPECS.items() if not FAMILIES[family].refusals(spec)}


PAIRS = [(family, name) for family in FAMILIES for name in sayable(family)]


def disk(family: Family, spec: ModelSpec) -> list[str]:
    """Every name a model of the family has on disk, duplicates apart."""
    return [
        name
        for message in expected(spec)
        for row in family.rows_of(message, spec)
        for name in row.stored(message.layer, spec)
    ]


def different(spec: ModelSpec) -> Iterator[Expected]:
    """One message of every kind: layers of the same keys are the same."""
    seen = set()
    for message in expected(spec):
        kind = (message.template, tuple(message.shapes.items()), message.layer is not None and message.layer % 4)
        if kind not in seen:
            seen.add(kind)
            yield message


def rows(family: str, spec: ModelSpec, message: Expected) -> list[Row]:
    """The rows that make a message, and the variants that could."""
    own = FAMILIES[family].rows_of(message, spec)
    return own + [row for row in FAMILIES[family].variants if row.fits(message, spec)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_fixtures_of_its_own(family: str) -> None:
    own = [name for name, spec in SPECS.items() if spec.family == family]
    assert own
    assert set(own) <= set(sayable(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_of_known_messages_and_keys(family: str) -> None:
    known = {(template, key.name) for template, key in messages.schema()}
    for row in (*FAMILIES[family].rows, *FAMILIES[family].variants):
        assert {(row.message, key) for key in row.keys} <= known, row
        assert "{i}" in row.message or not any("{i}" in name for name in row.names), row
        assert len({"{e}" in name for name in row.names}) <= 1, row
    for duplicate in FAMILIES[family].duplicates:
        assert (duplicate.message, duplicate.key) in known


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_used(family: str) -> None:
    """By a fixture of the family, or by one it shares rows with: a row that nothing reads is not tested either."""
    used = {
        row.names
        for base, name in PAIRS
        for message in expected(SPECS[name])
        for row in FAMILIES[base].rows_of(message, SPECS[name])
    }
    own = SPECS.values()
    unused = [row for row in FAMILIES[family].rows if row.names not in used]
    reachable = [
        row for row in unused if any(row.fits(m, spec) for spec in own if spec.family == family for m in expected(spec))
    ]
    assert not reachable


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_every_key_has_one_row(family: str, name: str) -> None:
    for message in expected(SPECS[name]):
        made = [key for row in FAMILIES[family].rows_of(message, SPECS[name]) for key in row.keys]
        assert sorted(made) == sorted(message.shapes), message.name


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_no_name_twice(family: str, name: str) -> None:
    spec = SPECS[name]
    names = disk(FAMILIES[family], spec)
    assert len(names) == len(set(names))
    layers = range(spec.num_layers + spec.mtp_layers)
    ignored = {rule.name.format(i=layer) for rule in FAMILIES[family].ignore for layer in layers}
    again = [name for duplicate in FAMILIES[family].duplicates for name in duplicate.stored(spec)]
    assert len(again) == len(set(again))
    assert not ignored & set(names)
    assert not ignored & set(again)
    assert not set(again) & set(names)


@pytest.mark.parametrize("name", SPECS)
def test_the_names_and_shapes_are_those_of_the_fixture(name: str) -> None:
    """What transformers loads strictly (fixtures.logits): nothing more, nothing less, of the same shape."""
    from fixtures import shapes

    spec = SPECS[name]
    family = FAMILIES[spec.family]
    found: dict[str, Shape] = {}
    for message in expected(spec):
        for row in family.rows_of(message, spec):
            parts = row.op.part_shapes(row.shapes(message), spec)
            found |= dict(zip(row.stored(message.layer, spec), map(row.view.shape, parts), strict=True))
        for duplicate in family.duplicates:
            if duplicate.message == message.name:
                found |= {n: message.shapes[duplicate.key] for n in duplicate.stored(spec) if duplicate.written}
    stored = dict(shapes(config(name)))
    if not any(n.startswith(family.prefix) for n in stored):  # a model saved without its head
        found = {n.removeprefix(family.prefix): shape for n, shape in found.items()}
    optional = {n for duplicate in family.duplicates for n in duplicate.stored(spec)}
    ignored = {rule.name.format(i=layer) for rule in family.ignore for layer in range(spec.num_layers)}
    assert {k: v for k, v in found.items() if k not in optional} == {
        k: tuple(v) for k, v in stored.items() if k not in optional | ignored
    }
    assert all(found[n] == tuple(stored[n]) for n in optional & set(found) & set(stored))


def shapes_of(row: Row, message: Expected, spec: ModelSpec) -> list[Shape]:
    parts = row.op.part_shapes(row.shapes(message), spec)
    assert len(parts) == len(row.stored(message.layer, spec)), row
    return [row.view.shape(part) for part in parts]


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_split_undoes_fuse(family: str, name: str) -> None:
    """From stored tensors to keys and back, views included, bit for bit; and shapes match."""
    spec = SPECS[name]
    for message in different(spec):
        for row in rows(family, spec, message):
            keys, stored = row.shapes(message), shapes_of(row, message, spec)
            parts = [noise(shape, seed) for seed, shape in enumerate(stored)]
            seen: list[LazyTensor] = [row.view.seen(held(part)) for part in parts]
            fused = ops.fuse(row.op, seen, keys, spec)
            assert [key.shape for key in fused] == keys, row
            back = [row.view.stored(part) for part in ops.split(row.op, [held(bits(key)) for key in fused], spec)]
            assert [part.shape for part in back] == stored, row
            assert all(torch.equal(bits(b), p) for b, p in zip(back, parts, strict=True)), row


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_tiles_cover_wholes_and_parts_exactly_once(family: str, name: str) -> None:
    spec = SPECS[name]
    for message in different(spec):
        for row in rows(family, spec, message):
            keys = row.shapes(message)
            if isinstance(row.op, ops.Constant):
                continue  # not stored
            tiles = [row.op.tiles(keys, index, spec) for index in range(len(keys))]
            for key, own in zip(keys, tiles, strict=True):
                assert covered(key, list(map(of_whole, own))), row
            for number, part in enumerate(row.op.part_shapes(keys, spec)):
                assert covered(part, [of_part(t) for own in tiles for t in own if t.part == number]), row


def test_a_key_without_a_row_is_an_error() -> None:
    family = LLAMA
    bare = replace(family, rows=tuple(row for row in family.rows if "dense weight" not in row.keys))
    message = list(expected(SPECS["llama2"]))[1]
    with pytest.raises(TableError, match="family llama: no row for 'dense weight' of 'transformer layer 0'"):
        bare.rows_of(message, SPECS["llama2"])


def test_variants_are_taken_where_the_files_have_their_names() -> None:
    """Mixtral as transformers 5 holds it in memory: the experts in one tensor, under another name."""
    spec = MIXTRAL.spec(
        {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 2,
         "num_key_value_heads": 1, "vocab_size": 11, "num_local_experts": 3}, "here",
    )  # fmt: skip
    message = list(expected(spec))[1]
    gate, down = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
    router = "model.layers.0.mlp.gate.weight"

    def names(there: set[str]) -> set[str]:
        made = MIXTRAL.rows_of(message, spec, lambda name: name in there)
        assert sorted(key for row in made for key in row.keys) == sorted(message.shapes)
        return {name for row in made for name in row.stored(0, spec)}

    own = names(set())
    assert {gate, down, router} & own == set()
    fused = names({gate, down, router})
    assert {gate, down, router} <= fused
    assert not any("block_sparse_moe" in name for name in fused)
    half = names({gate, router})  # what is not there is asked for under the usual name
    assert "model.layers.0.block_sparse_moe.experts.2.w2.weight" in half
    assert not any(".w1." in name or ".w3." in name for name in half)
