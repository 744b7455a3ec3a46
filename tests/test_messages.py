"""What crosses the queue: names, order, keys, shapes, checks and older names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ckptconv import messages
from ckptconv.errors import ProtocolError
from ckptconv.messages import canonical, check, expected
from ckptconv.spec import ModelSpec

#: h 12, f 20, a 4, g 2, d 5, v 31, s 64: qkv has (4 + 2 * 2) * 5 = 40 rows, dense 4 * 5 = 20 columns.
SPEC = ModelSpec(
    family="llama", num_layers=2, hidden_size=12, ffn_hidden_size=20, num_attention_heads=4, num_query_groups=2,
    kv_channels=5, vocab_size=31, max_position_embeddings=64, seq_length=64, dtype="float32",
)  # fmt: skip
LAYER = {
    "input norm weight": (12,), "qkv weight": (40, 12), "dense weight": (12, 20), "post norm weight": (12,),
    "mlp l0 weight W": (20, 12), "mlp l0 weight V": (20, 12), "mlp l1 weight": (12, 20),
}  # fmt: skip


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    return {key: SimpleNamespace(shape=shape) for key, shape in shapes.items()}


def test_the_stream_of_a_llama() -> None:
    assert [(m.name, m.template, m.layer, m.shapes) for m in expected(SPEC)] == [
        ("embeddings", "embeddings", None, {"word embeddings": (31, 12)}),
        ("transformer layer 0", "transformer layer {i}", 0, LAYER),
        ("transformer layer 1", "transformer layer {i}", 1, LAYER),
        ("final norm", "final norm", None, {"weight": (12,)}),
        ("output layer", "output layer", None, {"weight": (31, 12)}),
    ]


@pytest.mark.parametrize(
    ("changes", "message", "added", "gone"),
    [
        ({"qkv_bias": True}, 1, {"qkv bias": (40,)}, ()),
        ({"dense_bias": True}, 1, {"dense bias": (12,)}, ()),
        ({"mlp_bias": True}, 1, {"mlp l0 bias W": (20,), "mlp l0 bias V": (20,), "mlp l1 bias": (12,)}, ()),
        ({"norm": "LayerNorm"}, 1, {"input norm bias": (12,), "post norm bias": (12,)}, ()),
        ({"norm": "LayerNorm"}, 3, {"bias": (12,)}, ()),
        ({"gated": False}, 1, {"mlp l0 weight": (20, 12)}, ("mlp l0 weight W", "mlp l0 weight V")),
        (
            {"gated": False, "mlp_bias": True},
            1,
            {"mlp l0 weight": (20, 12), "mlp l0 bias": (20,), "mlp l1 bias": (12,)},
            ("mlp l0 weight W", "mlp l0 weight V"),
        ),
        ({"rope": None}, 0, {"position embeddings": (64, 12)}, ()),
    ],
)
def test_switches_add_and_remove_keys(
    changes: dict[str, Any], message: int, added: dict[str, Any], gone: tuple[str, ...]
) -> None:
    before = list(expected(SPEC))[message].shapes
    after = list(expected(SPEC.replace(**changes)))[message].shapes
    assert after == {key: shape for key, shape in before.items() if key not in gone} | added


def test_a_tied_model_has_no_output_layer() -> None:
    assert [m.name for m in expected(SPEC.replace(tied=True))][-1] == "final norm"


def test_no_message_and_no_key_twice() -> None:
    names = [template for template, _, _ in messages.MESSAGES]
    assert len(names) == len(set(names))
    for template, keys, _ in messages.MESSAGES:
        assert len({key.name for key in keys}) == len(keys), template


def test_older_names_stand_for_names_there_are() -> None:
    assert set(messages.MESSAGE_ALIASES.values()) <= {template for template, _, _ in messages.MESSAGES}
    keys = {key.name for _, key in messages.schema()}
    assert set(messages.KEY_ALIASES.values()) <= keys
    assert not set(messages.KEY_ALIASES) & keys


def test_check_returns_the_tensors_in_order() -> None:
    want = list(expected(SPEC))[1]
    there = tensors(dict(reversed(LAYER.items())))
    assert list(check({"name": "transformer layer 0", **there}, want)) == list(LAYER)


@pytest.mark.parametrize("checking", [True, False])
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {key: shape for key, shape in LAYER.items() if key != "dense weight"} | {"dense_weight": (12, 20)},
            r"'transformer layer 0' lacks dense weight; it has .*Did you mean 'dense_weight'\?",
        ),
        (LAYER | {"qkv weight": (12, 40)}, r"'qkv weight' is \[12, 40\], expected \[40, 12\]"),
        (LAYER | {"input norm weight": (12, 1)}, r"'input norm weight' is \[12, 1\], expected \[12\]"),
    ],
)
def test_missing_keys_and_wrong_shapes_are_always_errors(checking: bool, shapes: Any, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        check({"name": "transformer layer 0", **tensors(shapes)}, list(expected(SPEC))[1], checking)


@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    [
        ("transformer layer 1", LAYER, "'transformer layer 1' came where 'transformer layer 0' was expected"),
        (None, LAYER, "None came where"),
        (
            "transformer layer 0",
            LAYER | {"qkv_weight": (40, 12)},
            "unexpected qkv_weight; .*Did you mean 'qkv weight'.*--no-checking",
        ),
    ],
)
def test_names_and_unknown_keys_are_errors_unless_checking_is_off(name: str, shapes: Any, message: str) -> None:
    want = list(expected(SPEC))[1]
    with pytest.raises(ProtocolError, match=message):
        check({"name": name, **tensors(shapes)}, want)
    assert list(check({"name": name, **tensors(shapes)}, want, checking=False)) == list(LAYER)


@pytest.mark.parametrize("name", ["final norm", "final layernorm", "final layer norm"])
def test_canonical_message_names(name: str) -> None:
    assert canonical({"name": name, "weight": 1}) == {"name": "final norm", "weight": 1}


def test_canonical_keys() -> None:
    old = {"name": "transformer layer 7", "input layernorm weight": 1, "input layernorm bias": 2,
           "post layernorm weight": 3, "post layernorm bias": 4, "qkv weight": 5}  # fmt: skip
    assert canonical(old) == {
        "name": "transformer layer 7", "input norm weight": 1, "input norm bias": 2, "post norm weight": 3,
        "post norm bias": 4, "qkv weight": 5,
    }  # fmt: skip
