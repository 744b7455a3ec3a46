"""What crosses the queue: names, order, keys, shapes, checks and older names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ckptconv import messages
from ckptconv.errors import ProtocolError
from ckptconv.messages import canonical, check, expected
from ckptconv.spec import MLA, ModelSpec, MoE
from samples import SPECS

#: h 12, f 20, a 4, g 2, d 5, v 31, s 64: qkv has (4 + 2 * 2) * 5 = 40 rows, dense 4 * 5 = 20 columns.
SPEC = ModelSpec(
    family="llama", num_layers=2, hidden_size=12, ffn_hidden_size=20, num_attention_heads=4, num_query_groups=2,
    kv_channels=5, vocab_size=31, max_position_embeddings=64, seq_length=64, dtype="float32",
)  # fmt: skip
LAYER = {
    "input norm weight": (12,), "qkv weight": (40, 12), "dense weight": (12, 20), "post norm weight": (12,),
    "mlp l0 weight W": (20, 12), "mlp l0 weight V": (20, 12), "mlp l1 weight": (12, 20),
}  # fmt: skip

#: m 7 of each of 3 experts, in layer 1 only; with shared experts of 9 in all.
EXPERTS = MoE(3, 2, 7, (0, 1))
SHARED = MoE(3, 2, 7, (0, 1), shared_ffn_hidden_size=9, shared_gate=True, router_bias=True, score_bias=True)
ROUTED = {
    "router weight": (3, 12), "mlp l0 weight W": (3, 7, 12), "mlp l0 weight V": (3, 7, 12), "mlp l1 weight": (3, 12, 7),
}  # fmt: skip
#: n 6, p 3, w 5 (= d), ql 8, kl 10: a query head is 9 rows, a key and value 11.
LATENT: dict[str, Any] = {"mla": MLA(8, 10, 6, 3, 5), "num_query_groups": 4}
WITHOUT_Q_LORA: dict[str, Any] = {"mla": MLA(None, 10, 6, 3, 5), "num_query_groups": 4}
LATENT_KEYS = {"kv down weight": (13, 12), "kv down norm weight": (10,), "kv up weight": (44, 10)}


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
        ({"rope": None}, 0, {}, ()),
        ({"learned_positions": True}, 0, {"position embeddings": (64, 12)}, ()),
        ({"num_tokentypes": 3}, 0, {"token type embeddings": (3, 12)}, ()),
        ({"qk_norm": "head"}, 1, {"q norm weight": (5,), "k norm weight": (5,)}, ()),
        ({"qk_norm": "full"}, 1, {"q norm weight": (20,), "k norm weight": (10,)}, ()),
        ({"sinks": True}, 1, {"attention sinks": (4,)}, ()),
        ({"norms": "sandwich"}, 1, {"attention output norm weight": (12,), "mlp output norm weight": (12,)}, ()),
        (
            {"norms": "output"},
            1,
            {"attention output norm weight": (12,), "mlp output norm weight": (12,)},
            ("input norm weight", "post norm weight"),
        ),
        ({"norms": "post", "norm": "LayerNorm"}, 1, {"input norm bias": (12,), "post norm bias": (12,)}, ()),
        ({"parallel_residual": True}, 1, {}, ()),
        ({"parallel_residual": True, "shared_norm": True}, 1, {}, ("post norm weight",)),
        (
            {"shared_norm": True, "norm": "LayerNorm"},
            1,
            {"input norm bias": (12,)},
            ("post norm weight",),
        ),
        # An MLP that is a mixture keeps its keys, with an axis e in front.
        ({"moe": EXPERTS}, 1, {}, ()),
        ({"moe": EXPERTS}, 2, ROUTED, ()),
        ({"moe": EXPERTS, "mlp_bias": True}, 2, ROUTED | {"mlp l0 bias W": (3, 7), "mlp l0 bias V": (3, 7),
                                                          "mlp l1 bias": (3, 12)}, ()),
        (
            {"moe": EXPERTS, "gated": False},
            2,
            {"router weight": (3, 12), "mlp l0 weight": (3, 7, 12), "mlp l1 weight": (3, 12, 7)},
            ("mlp l0 weight W", "mlp l0 weight V"),
        ),
        (
            {"moe": SHARED},
            2,
            ROUTED | {"router bias": (3,), "router score correction bias": (3,), "shared mlp l0 weight W": (9, 12),
                      "shared mlp l0 weight V": (9, 12), "shared mlp l1 weight": (12, 9),
                      "shared gate weight": (1, 12)},
            (),
        ),
        ({"moe": SHARED}, 1, {}, ()),
        (LATENT, 1, LATENT_KEYS | {"q down weight": (8, 12), "q down norm weight": (8,), "q up weight": (36, 8)},
         ("qkv weight",)),
        (WITHOUT_Q_LORA, 1, LATENT_KEYS | {"q proj weight": (36, 12)}, ("qkv weight",)),
        (LATENT | {"qkv_bias": True}, 1, LATENT_KEYS | {"q down weight": (8, 12), "q down norm weight": (8,),
                                                        "q up weight": (36, 8)}, ("qkv weight",)),
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


def test_the_order_of_the_keys_of_a_layer_with_everything() -> None:
    spec = SPEC.replace(moe=SHARED, norms="sandwich", sinks=True, qk_norm="head", qkv_bias=True, dense_bias=True)
    assert list(list(expected(spec))[2].shapes) == [
        "input norm weight", "qkv weight", "qkv bias", "q norm weight", "k norm weight", "attention sinks",
        "dense weight", "dense bias", "attention output norm weight", "post norm weight", "router weight",
        "router bias", "router score correction bias", "mlp l0 weight W", "mlp l0 weight V", "mlp l1 weight",
        "shared mlp l0 weight W", "shared mlp l0 weight V", "shared mlp l1 weight", "shared gate weight",
        "mlp output norm weight",
    ]  # fmt: skip
    assert list(list(expected(SPEC.replace(**LATENT)))[1].shapes) == [
        "input norm weight", "q down weight", "q down norm weight", "q up weight", "kv down weight",
        "kv down norm weight", "kv up weight", "dense weight", "post norm weight", "mlp l0 weight W",
        "mlp l0 weight V", "mlp l1 weight",
    ]  # fmt: skip


def test_layers_that_predict_a_token_further() -> None:
    """Sent behind the output layer; numbered from 0, but as a layer the number goes on: they are of the last's kind."""
    stream = list(expected(SPEC.replace(mtp_layers=2, moe=EXPERTS)))
    assert [(m.name, m.template, m.layer, m.index) for m in stream[3:]] == [
        ("final norm", "final norm", None, 0),
        ("output layer", "output layer", None, 0),
        ("mtp layer 0", "mtp layer {i}", 2, 0),
        ("mtp layer 1", "mtp layer {i}", 3, 1),
    ]
    own = {"enorm weight": (12,), "hnorm weight": (12,), "eh proj weight": (12, 24)}
    experts = {key: ROUTED.get(key, shape) for key, shape in stream[2].shapes.items()}
    assert stream[5].shapes == own | experts | {"final norm weight": (12,)}
    assert list(stream[5].shapes) == [*own, *stream[2].shapes, "final norm weight"]
    dense = list(expected(SPEC.replace(mtp_layers=1, moe=MoE(3, 2, 7, (1, 0)))))[-1]
    assert "router weight" not in dense.shapes
    assert dense.shapes["mlp l1 weight"] == (12, 20)


def test_the_stream_of_a_bert() -> None:
    spec = SPEC.replace(model_type="BERT", norm="LayerNorm", norms="post", gated=False, tied=True, num_tokentypes=2,
                        learned_positions=True, rope=None, pooler=True, lm_head=True, binary_head=True)  # fmt: skip
    assert [(m.name, m.shapes) for m in expected(spec) if m.layer is None] == [
        ("embeddings", {"word embeddings": (31, 12), "position embeddings": (64, 12),
                        "token type embeddings": (2, 12)}),
        ("final norm", {"weight": (12,), "bias": (12,)}),
        ("pooler", {"weight": (12, 12), "bias": (12,)}),
        ("lm head", {"dense weight": (12, 12), "dense bias": (12,), "norm weight": (12,), "norm bias": (12,),
                     "vocab bias": (31,)}),
        ("binary head", {"weight": (2, 12), "bias": (2,)}),
    ]  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_no_message_and_no_key_twice(name: str) -> None:
    """A key may stand in a table for several shapes; in no model are two of them there at once."""
    names = [template for template, _, _ in messages.MESSAGES]
    assert len(names) == len(set(names))
    stream = list(expected(SPECS[name]))
    assert len({message.name for message in stream}) == len(stream)
    for message in stream:
        table = next(keys for template, keys, _ in messages.MESSAGES if template == message.template)
        there = [key.name for key in table if key.when(SPECS[name], message.layer)]
        assert there == list(message.shapes)
        assert all(size > 0 for shape in message.shapes.values() for size in shape)


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
