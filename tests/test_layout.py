"""Layers over stages, and which tensor lies on which rank."""

from __future__ import annotations

from typing import Any

import pytest

from ckptconv import families
from ckptconv.errors import LayoutError
from ckptconv.formats import mcore
from ckptconv.layout import Layout
from ckptconv.sharding import placements
from ckptconv.spec import ModelSpec, MoE
from fixtures import config

L, A, M = "decoder.layers.{}.", "decoder.layers.{}.self_attention.", "decoder.layers.{}.mlp."
#: megatron.md 3.2 and 3.3: names and full shapes of a dense layer; h 48, f 88, a 4, g 2, d 12.
LOCAL = {
    L + "input_layernorm.weight": (48,), A + "linear_qkv.weight": (96, 48), A + "linear_proj.weight": (48, 48),
    L + "pre_mlp_layernorm.weight": (48,), M + "linear_fc1.weight": (176, 48), M + "linear_fc2.weight": (48, 88),
}  # fmt: skip
TE = {
    A + "linear_qkv.layer_norm_weight": (48,), A + "linear_qkv.weight": (96, 48), A + "linear_proj.weight": (48, 48),
    M + "linear_fc1.layer_norm_weight": (48,), M + "linear_fc1.weight": (176, 48), M + "linear_fc2.weight": (48, 88),
}  # fmt: skip


def spec_of(name: str, **overrides: Any) -> ModelSpec:
    data = config(name, **overrides)
    return families.of_config(data, name).spec(data, name)


def stages(spec: ModelSpec, tp: int, pp: int, table: str = "local") -> list[dict[str, tuple[int, ...]]]:
    """Name -> shape on one rank, for every stage."""
    found: list[dict[str, tuple[int, ...]]] = [{} for _ in range(pp)]
    for placement in placements(mcore.table(table), spec, Layout(spec.num_layers, tp, pp), 256):
        assert placement.name not in found[placement.stage]
        found[placement.stage][placement.name] = placement.part_shape
    return found


@pytest.mark.parametrize(
    ("layers", "pp", "expected"),
    [
        (4, 1, [(0, 0), (0, 1), (0, 2), (0, 3)]),
        (4, 2, [(0, 0), (0, 1), (1, 0), (1, 1)]),
        (4, 4, [(0, 0), (1, 0), (2, 0), (3, 0)]),
        (6, 3, [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]),
    ],
)
def test_layers_over_stages(layers: int, pp: int, expected: list[tuple[int, int]]) -> None:
    layout = Layout(layers, pp=pp)
    assert [layout.home_of(layer) for layer in range(layers)] == [(stage, 0, local) for stage, local in expected]
    assert [layer for stage in range(pp) for layer in layout.layers_of(stage)] == list(range(layers))
    assert all(layout.home_of(layer)[0] == stage for stage in range(pp) for layer in layout.layers_of(stage))


def test_ranks_stage_by_stage() -> None:
    """(tp rank, stage, ep rank)."""
    assert list(Layout(4, 2, 2).ranks()) == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert list(Layout(4, 2, 1, 2, 4).ranks()) == [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)]
    assert len(set(Layout(4, 3, 2, 5, 10).ranks())) == 3 * 2 * 5


@pytest.mark.parametrize(
    ("experts", "ep", "expected"),
    [
        (4, 1, [(0, 0), (0, 1), (0, 2), (0, 3)]),
        (4, 2, [(0, 0), (0, 1), (1, 0), (1, 1)]),
        (3, 3, [(0, 0), (1, 0), (2, 0)]),
        (6, 2, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]),
    ],
)
def test_experts_over_ranks(experts: int, ep: int, expected: list[tuple[int, int]]) -> None:
    """Contiguous runs, as megatron-core's local_expert_indices."""
    layout = Layout(4, ep=ep, num_experts=experts)
    assert [layout.expert_of(expert) for expert in range(experts)] == expected


@pytest.mark.parametrize(
    ("ep", "experts", "message"),
    [
        (3, 4, "ep 3 does not divide 4 experts"),
        (8, 4, "ep 8 does not divide 4 experts"),
        (2, 0, "ep 2: this model has no experts"),
        (0, 4, "ep is 0"),
    ],
)
def test_impossible_expert_parallel_sizes_are_refused(ep: int, experts: int, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        Layout(4, ep=ep, num_experts=experts)
    Layout(4, ep=1, num_experts=experts)


@pytest.mark.parametrize(
    ("layers", "tp", "pp", "message"),
    [
        (4, 1, 3, "4 layers do not divide into pp 3"),
        (4, 1, 8, "4 layers do not divide into pp 8"),
        (4, 0, 1, "tp is 0"),
        (4, 1, -1, "pp is -1"),
    ],
)
def test_impossible_sizes_are_refused(layers: int, tp: int, pp: int, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        Layout(layers, tp, pp)


@pytest.mark.parametrize(("table", "layer"), [("local", LOCAL), ("transformer_engine", TE)])
def test_names_and_shapes_of_one_rank(table: str, layer: dict[str, tuple[int, ...]]) -> None:
    whole = {"embedding.word_embeddings.weight": (256, 48), "decoder.final_layernorm.weight": (48,),
             "output_layer.weight": (256, 48)}  # fmt: skip
    expected = whole | {name.format(i): shape for i in range(4) for name, shape in layer.items()}
    assert stages(spec_of("llama2"), 1, 1, table) == [expected]


@pytest.mark.parametrize(("table", "layer"), [("local", LOCAL), ("transformer_engine", TE)])
def test_names_and_shapes_of_two_by_two(table: str, layer: dict[str, tuple[int, ...]]) -> None:
    """Column parallel halves rows, row parallel columns; layers are numbered within their stage."""
    halved = {
        A + "linear_qkv.weight": (48, 48), A + "linear_proj.weight": (48, 24),
        M + "linear_fc1.weight": (88, 48), M + "linear_fc2.weight": (48, 44),
    }  # fmt: skip
    layers = {name.format(i): shape for i in range(2) for name, shape in (layer | halved).items()}
    assert stages(spec_of("llama2"), 2, 2, table) == [
        {"embedding.word_embeddings.weight": (128, 48), **layers},
        {**layers, "decoder.final_layernorm.weight": (48,), "output_layer.weight": (128, 48)},
    ]


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_a_tied_head_is_a_copy_on_the_last_of_several_stages(pp: int) -> None:
    found = stages(spec_of("qwen2_tied"), 1, pp)
    assert ["output_layer.weight" in stage for stage in found] == [False] * (pp - 1) + [pp > 1]
    assert "embedding.word_embeddings.weight" in found[0]


def test_biases_and_their_cuts() -> None:
    found = stages(spec_of("llama_both_bias"), 2, 1)[0]
    assert {name: shape for name, shape in found.items() if name.startswith("decoder.layers.0") and "bias" in name} == {
        "decoder.layers.0.self_attention.linear_qkv.bias": (48,),  # half of 96
        "decoder.layers.0.self_attention.linear_proj.bias": (48,),  # whole
        "decoder.layers.0.mlp.linear_fc1.bias": (88,),  # half of 176
        "decoder.layers.0.mlp.linear_fc2.bias": (48,),  # whole
    }


#: e 4 experts of m 24 behind one dense layer; 2 expert ranks with 2 tensor ranks: each has 2 experts, halved.
EXPERTS = MoE(4, 2, 24, (0, 1, 1, 1))
E = M + "experts."
ROUTED = {M + "router.weight": (4, 48)}


@pytest.mark.parametrize(
    ("grouped", "names"),
    [
        (False, {E + "local_experts.{e}.linear_fc1.weight": (24, 48),
                 E + "local_experts.{e}.linear_fc2.weight": (48, 12)}),
        (True, {E + "linear_fc1.weight{e}": (24, 48), E + "linear_fc2.weight{e}": (48, 12)}),
    ],
)  # fmt: skip
def test_names_and_shapes_of_experts(grouped: bool, names: dict[str, tuple[int, ...]]) -> None:
    """Experts are numbered within their rank; [W_t; V_t] of one expert are 2 * 24 / 2 rows."""
    spec = spec_of("llama2").replace(moe=EXPERTS)
    table = mcore.table("local", grouped)
    found = list(placements(table, spec, Layout(4, 2, 2, 2, 4), 256))
    for ep_rank in range(2):
        own = [p for p in found if p.stage == 1 and ep_rank in p.ep_ranks]
        there = {p.name: p.part_shape for p in own if "layers.0.mlp" in p.name}
        experts = {n.replace("{e}", str(e)): shape for n, shape in names.items() for e in range(2)}
        assert there == {n.replace("{}", "0"): shape for n, shape in (ROUTED | experts).items()}
        dense = {p.name for p in found if p.stage == 0 and "layers.0.mlp" in p.name}
        assert dense == {"decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc2.weight"}
    fc1 = next(name.replace("{}", "0").replace("{e}", "1") for name in names if "fc1" in name)
    first = next(p for p in found if p.expert == 3 and p.message == "transformer layer 2" and "fc1" in p.name)
    assert (first.name, first.ep_rank, list(first.ep_ranks)) == (fc1, 1, [1])
    # Row 3 * 24 of the stacked gates is where expert 3 begins; tensor rank 1 has its second half.
    for key, below in (("mlp l0 weight W", 0), ("mlp l0 weight V", 12)):
        tiles = [(t.part, t.row, t.rows, t.part_row) for t in first.tiles(key)]
        assert tiles == [(0, 72, 12, below), (1, 84, 12, below)]


def test_a_bias_of_an_expert_is_a_vector_in_the_file_and_a_row_of_its_message() -> None:
    spec = mcore.target_spec(spec_of("llama_mlp_bias")).replace(moe=EXPERTS)
    found = [p for p in placements(mcore.table("local"), spec, Layout(4, 2, 1, 2, 4), 256)
             if p.message == "transformer layer 1" and p.expert == 3]  # fmt: skip
    fc1 = next(p for p in found if p.name.endswith("fc1.bias"))
    assert (fc1.name, fc1.part_shape, fc1.seen_shape) == (
        "decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.bias", (24,), (1, 24)
    )  # fmt: skip
    assert [(t.part, t.row, t.col, t.rows, t.cols, t.part_row, t.part_col) for t in fc1.tiles("mlp l0 bias V")] == [
        (0, 3, 0, 1, 12, 0, 12), (1, 3, 12, 1, 12, 0, 12)
    ]  # fmt: skip
    fc2 = next(p for p in found if p.name.endswith("fc2.bias"))
    assert (fc2.part_shape, fc2.seen_shape, fc2.row.cut.replicated) == ((48,), (1, 48), True)
    assert [(t.part, t.row, t.col, t.cols) for t in fc2.tiles("mlp l1 bias")] == [(0, 3, 0, 48), (1, 3, 0, 48)]


def test_multi_token_prediction_lies_on_the_last_stage_with_a_copy_of_the_embedding() -> None:
    """Its number begins at 0 there, whatever comes before; a copy only where the first stage is another."""
    spec = spec_of("llama2").replace(mtp_layers=2)
    for pp in (1, 2, 4):
        found = stages(spec, 1, pp)
        own = [name for name in found[-1] if name.startswith("mtp.")]
        assert {name.split(".")[2] for name in own} == {"0", "1"}
        assert found[-1]["mtp.layers.1.eh_proj.weight"] == (48, 96)
        assert "mtp.layers.1.mtp_model_layer.self_attention.linear_qkv.weight" in own
        assert not any(name.startswith("mtp.") for stage in found[:-1] for name in stage)
        assert ["embedding.word_embeddings.weight" in stage for stage in found] == (
            [True, *[False] * (pp - 2), True] if pp > 1 else [True]
        )


@pytest.mark.parametrize(
    ("overrides", "tp", "message"),
    [
        ({}, 3, r"linear_qkv.weight: tp 3 does not divide 4 attention heads"),
        ({"intermediate_size": 90}, 4, r"linear_fc1.weight: 90 rows do not divide by tp 4"),
        ({"num_attention_heads": 8, "num_key_value_heads": 8}, 16, "8 attention heads"),
    ],
)
def test_what_does_not_divide_is_named(overrides: dict[str, Any], tp: int, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        list(placements(mcore.table("local"), spec_of("llama2", **overrides), Layout(4, tp), 384))


@pytest.mark.parametrize(
    ("size", "divisor", "tp", "expected"),
    [(131, 128, 1, 256), (131, 128, 2, 256), (131, 128, 4, 512), (128, 128, 1, 128), (131, 1, 1, 131), (131, 1, 2, 132),
     (32000, 128, 8, 32768), (32000, 128, 1, 32000)],
)  # fmt: skip
def test_padded_vocabulary(size: int, divisor: int, tp: int, expected: int) -> None:
    assert mcore.padded_vocab(size, divisor, tp) == expected
