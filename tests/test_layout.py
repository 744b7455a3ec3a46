"""Layers over stages, and which tensor lies on which rank."""

from __future__ import annotations

from typing import Any

import pytest

from ckptconv import families
from ckptconv.errors import LayoutError
from ckptconv.formats import mcore
from ckptconv.layout import Layout
from ckptconv.sharding import placements
from ckptconv.spec import ModelSpec
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
    for placement in placements(mcore.TABLES[table], spec, Layout(spec.num_layers, tp, pp), 256):
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
    assert [layout.stage_of(layer) for layer in range(layers)] == expected
    assert [layer for stage in range(pp) for layer in layout.layers_of(stage)] == list(range(layers))
    assert all(layout.stage_of(layer)[0] == stage for stage in range(pp) for layer in layout.layers_of(stage))


def test_ranks_stage_by_stage() -> None:
    assert list(Layout(4, 2, 2).ranks()) == [(0, 0), (1, 0), (0, 1), (1, 1)]


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
        list(placements(mcore.LOCAL, spec_of("llama2", **overrides), Layout(4, tp), 384))


@pytest.mark.parametrize(
    ("size", "divisor", "tp", "expected"),
    [(131, 128, 1, 256), (131, 128, 2, 256), (131, 128, 4, 512), (128, 128, 1, 128), (131, 1, 1, 131), (131, 1, 2, 132),
     (32000, 128, 8, 32768), (32000, 128, 1, 32000)],
)  # fmt: skip
def test_padded_vocabulary(size: int, divisor: int, tp: int, expected: int) -> None:
    assert mcore.padded_vocab(size, divisor, tp) == expected
