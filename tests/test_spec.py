"""ModelSpec: checks and JSON."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from ckptconv.errors import SourceError
from ckptconv.spec import ModelSpec, Rope, differences

SIZES: dict[str, Any] = {
    "family": "llama", "num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 88, "num_attention_heads": 6,
    "num_query_groups": 2, "kv_channels": 16, "vocab_size": 131, "max_position_embeddings": 64, "seq_length": 64,
    "dtype": "bfloat16",
}  # fmt: skip
LLAMA3 = Rope(500000.0, "llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0})


@pytest.mark.parametrize(
    "changes", [{}, {"rope": LLAMA3}, {"rope": None, "norm": "LayerNorm"}, {"sliding_window": 8, "tied": True}]
)
def test_json_round_trip(changes: dict[str, Any]) -> None:
    spec = ModelSpec(**SIZES | changes)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_derived_sizes() -> None:
    spec = ModelSpec(**SIZES)
    assert (spec.heads_per_group, spec.qkv_rows, spec.norm_has_bias) == (3, (6 + 2 * 2) * 16, False)
    assert spec.replace(norm="LayerNorm").norm_has_bias


@pytest.mark.parametrize("value", [0, -1, None, 1.5, "4", True])
@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "kv_channels", "vocab_size", "num_query_groups"])
def test_sizes_are_whole_numbers_above_zero(name: str, value: object) -> None:
    with pytest.raises(SourceError, match=re.escape(f"{name} is {value!r}, expected a whole number above 0")):
        ModelSpec(**SIZES | {name: value})


def test_heads_divide_into_groups() -> None:
    with pytest.raises(SourceError, match=r"6 attention heads do not divide into 4 query groups"):
        ModelSpec(**SIZES | {"num_query_groups": 4})


def test_a_field_of_a_newer_version_is_named() -> None:
    with pytest.raises(SourceError, match=r"here: unknown field 'num_layer'. Did you mean 'num_layers'\?"):
        ModelSpec.from_json(SIZES | {"num_layer": 1}, "here")


def test_a_missing_field_is_named() -> None:
    with pytest.raises(SourceError, match=r"here: .*hidden_size"):
        ModelSpec.from_json({k: v for k, v in SIZES.items() if k != "hidden_size"}, "here")


def test_differences_name_field_and_values() -> None:
    one, other = ModelSpec(**SIZES), ModelSpec(**SIZES | {"num_layers": 2, "tied": True})
    assert differences(one, other) == ["num_layers: 4 != 2", "tied: False != True"]
    assert differences(one, other, ("num_layers",)) == ["tied: False != True"]
