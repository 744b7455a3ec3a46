"""ModelSpec: checks and JSON."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from ckptconv.errors import SourceError
from ckptconv.spec import MLA, ModelSpec, MoE, Rope, differences
from samples import SPECS

SIZES: dict[str, Any] = {
    "family": "llama", "num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 88, "num_attention_heads": 6,
    "num_query_groups": 2, "kv_channels": 16, "vocab_size": 131, "max_position_embeddings": 64, "seq_length": 64,
    "dtype": "bfloat16",
}  # fmt: skip
LLAMA3 = Rope(500000.0, "llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0})


YARN = Rope(1e4, "yarn", {"factor": 40.0, "beta_fast": 32, "mscale": 1.0}, percent=0.5, interleaved=True)
EXPERTS = MoE(8, 2, 24, (0, 1, 1, 0), score="sigmoid", scaling_factor=2.5, score_bias=True, num_groups=4,
              topk_groups=2, group_score="top2", shared_ffn_hidden_size=48)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"rope": LLAMA3}, {"rope": None, "norm": "LayerNorm"}, {"sliding_window": 8, "tied": True},
        {"moe": EXPERTS}, {"mla": MLA(None, 16, 8, 4, 8)}, {"moe": EXPERTS, "mla": MLA(24, 16, 8, 4, 8), "rope": YARN},
        {"window_layers": (1, 0, 1, 0), "rope_layers": (1, 1, 1, 0), "local_rope": Rope(1e6), "sliding_window": 4},
    ],
)  # fmt: skip
def test_json_round_trip(changes: dict[str, Any]) -> None:
    spec = ModelSpec(**SIZES | changes)
    back = ModelSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert back == spec
    assert type(back.moe) is type(spec.moe)
    assert type(back.mla) is type(spec.mla)
    assert type(back.local_rope) is type(spec.local_rope)
    assert back.moe is None or isinstance(back.moe.layers, tuple)


@pytest.mark.parametrize("name", SPECS)
def test_every_model_survives_json(name: str) -> None:
    assert ModelSpec.from_json(json.loads(json.dumps(SPECS[name].to_json()))) == SPECS[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_layers": (1, 0)}, "window_layers has 2 entries, expected one for each of 4 layers"),
        ({"rope_layers": (1,) * 5}, "rope_layers has 5 entries, expected one for each of 4 layers"),
        ({"moe": MoE(8, 2, 24, (1, 1))}, "moe.layers has 2 entries, expected one for each of 4 layers"),
        ({"moe": MoE(2, 3, 24, (1,) * 4)}, "top 3 of 2 experts"),
        ({"moe": MoE(2, 0, 24, (1,) * 4)}, "top 0 of 2 experts"),
    ],
)
def test_what_layers_say_has_an_entry_for_each(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        ModelSpec(**SIZES | changes)


@pytest.mark.parametrize("part", ["rope", "moe", "mla"])
def test_a_field_of_a_part_that_is_unknown_is_named(part: str) -> None:
    spec = ModelSpec(**SIZES | {"moe": EXPERTS, "mla": MLA(24, 16, 8, 4, 8)})
    data = spec.to_json()
    data[part]["later"] = 1
    with pytest.raises(SourceError, match=r"here: .*later"):
        ModelSpec.from_json(data, "here")


def test_which_layers_have_experts() -> None:
    spec = ModelSpec(**SIZES | {"moe": EXPERTS})
    assert [spec.has_experts(layer) for layer in (None, 0, 1, 2, 3, 4)] == [False, False, True, True, False, False]
    assert spec.replace(moe=MoE(8, 2, 24, (0, 0, 0, 1))).has_experts(5), "MTP layers are of the last layer's kind"
    assert not any(ModelSpec(**SIZES).has_experts(layer) for layer in range(5))


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
