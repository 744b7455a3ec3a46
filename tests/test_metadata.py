"""A ModelSpec from the first messages of loaders that only know Megatron's fields, and back into those fields."""

from __future__ import annotations

import argparse
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ckptconv import metadata
from ckptconv.errors import ProtocolError
from ckptconv.metadata import Metadata, Origin
from ckptconv.spec import MoE, Rope
from megatron_models import BERT, MODELS, SMALL


def told(**changes: Any) -> SimpleNamespace:
    """Megatron's metadata of SMALL, as loader_mixtral_hf.py fills it (core_v0.16.1): no qkv_bias."""
    fields: dict[str, Any] = {
        "model_type": "GPT", "num_layers": 4, "hidden_size": 48, "seq_length": 24, "num_attention_heads": 4,
        "max_position_embeddings": 96, "tokenizer_type": "Llama2Tokenizer", "iteration": 1,
        "params_dtype": torch.bfloat16, "bert_binary_head": False, "output_layer": True,
        "position_embedding_type": "rope", "linear_bias": False, "norm_has_bias": False, "swiglu": True,
        "previous_tensor_parallel_size": 1, "previous_pipeline_parallel_size": 1, "true_vocab_size": 131,
        "make_vocab_size_divisible_by": None,
    }  # fmt: skip
    return SimpleNamespace(**(fields | changes))


def args(**changes: Any) -> argparse.Namespace:
    """checkpoint_args as Megatron's loaders make them: the parser's defaults, converter's flags among them."""
    fields: dict[str, Any] = {
        "num_layers": 4, "kv_channels": 12, "num_query_groups": 2, "group_query_attention": True,
        "ffn_hidden_size": 88, "norm_epsilon": 1e-5, "rotary_base": 1000000.0, "swiglu": True, "num_experts": 8,
        "moe_router_topk": 3, "moe_layer_freq": 1, "bias_gelu_fusion": False, "tokenizer_model": "/t.model",
        "virtual_pipeline_model_parallel_size": None, "spec": None,
    }  # fmt: skip
    return argparse.Namespace(**(fields | changes))


FIRST = {"name": "embeddings", "word embeddings": torch.empty(131, 48)}
DENSE = {
    "name": "transformer layer 0", "input norm weight": torch.empty(48), "post norm weight": torch.empty(48),
    "qkv weight": torch.empty(96, 48), "dense weight": torch.empty(48, 48), "mlp l0 weight W": torch.empty(88, 48),
    "mlp l0 weight V": torch.empty(88, 48), "mlp l1 weight": torch.empty(48, 88),
}  # fmt: skip
EXPERTS = DENSE | {
    "router weight": torch.empty(8, 48), "mlp l0 weight W": torch.empty(8, 24, 48),
    "mlp l0 weight V": torch.empty(8, 24, 48), "mlp l1 weight": torch.empty(8, 48, 24),
}  # fmt: skip
MIXTRAL = SMALL.replace(family="", ffn_hidden_size=24, moe=MoE(8, 2, 24, (1, 1, 1, 1)))


def completed(namespace: Any, layer: dict[str, Any], first: dict[str, Any] = FIRST) -> Any:
    return metadata.complete(namespace, first, layer, "x").spec


def test_a_dense_model_by_its_shapes() -> None:
    assert completed(told(kv_channels=12), DENSE) == SMALL.replace(family="")


def test_experts_with_checkpoint_args() -> None:
    spec = completed(told(num_experts=8, checkpoint_args=args(moe_ffn_hidden_size=24)), EXPERTS)
    assert spec == MIXTRAL.replace(ffn_hidden_size=88, rope=Rope(1e6), moe=MoE(8, 3, 24, (1, 1, 1, 1)))


@pytest.mark.parametrize("fields", [{}, {"num_experts": 8}, {"moe_router_topk": 2}])
def test_experts_by_their_shapes(fields: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert completed(told(kv_channels=12, **fields), EXPERTS) == MIXTRAL
    assert ("moe_router_topk: 2, Megatron's default, is assumed" in caplog.text) == ("moe_router_topk" not in fields)


def test_extensions_in_the_first_layer() -> None:
    layer = EXPERTS | {
        "router score correction bias": torch.empty(8), "shared mlp l1 weight": torch.empty(48, 40),
        "q norm weight": torch.empty(12), "k norm weight": torch.empty(12),
    }  # fmt: skip
    spec = completed(told(kv_channels=12, moe_router_topk=2), layer)
    assert spec.qk_norm == "head"
    assert spec.moe == MoE(8, 2, 24, (1,) * 4, score="sigmoid", score_bias=True, shared_ffn_hidden_size=40)


def test_dense_layers_in_front_need_to_be_told() -> None:
    with pytest.raises(ProtocolError, match="moe_layer_freq"):
        completed(told(num_experts=8, kv_channels=12), DENSE)
    with pytest.raises(ProtocolError, match="moe_layer_freq"):
        completed(told(num_experts=8, checkpoint_args=args()), DENSE)
    known = args(moe_layer_freq=[0, 1, 1, 1], moe_ffn_hidden_size=24)
    spec = completed(told(num_experts=8, checkpoint_args=known), DENSE)
    assert spec.moe == MoE(8, 3, 24, (0, 1, 1, 1))
    assert spec.ffn_hidden_size == 88


def test_a_dense_model_has_no_experts_whatever_the_args_default_to() -> None:
    assert completed(told(checkpoint_args=args(num_experts=None)), DENSE).moe is None


def test_which_gelu_is_not_what_the_converter_was_started_with(caplog: pytest.LogCaptureFixture) -> None:
    layer = DENSE | {"mlp l0 weight": torch.empty(88, 48), "dense bias": torch.empty(48)}
    del layer["mlp l0 weight W"], layer["mlp l0 weight V"]
    known = args(swiglu=False, num_experts=None)
    with caplog.at_level(logging.WARNING):
        spec = completed(told(swiglu=False, linear_bias=True, qkv_bias=True, checkpoint_args=known), layer)
    assert (spec.activation, spec.gated) == ("gelu_tanh", False)
    assert "does not say which GELU: gelu_tanh is assumed" in caplog.text
    assert completed(told(swiglu=False, checkpoint_args=known), layer).activation == "gelu"


def test_bert() -> None:
    layer = {key: value for key, value in DENSE.items() if "mlp l0" not in key}
    layer |= {"mlp l0 weight": torch.empty(88, 48), "qkv weight": torch.empty(144, 48)}
    first = FIRST | {"position embeddings": torch.empty(96, 48), "token type embeddings": torch.empty(2, 48)}
    fields: dict[str, Any] = {
        "model_type": "BERT", "bert_binary_head": True, "position_embedding_type": "learned_absolute",
        "linear_bias": True, "qkv_bias": True, "norm_has_bias": True, "swiglu": False, "output_layer": False,
    }  # fmt: skip
    spec = completed(told(**fields), layer, first)
    assert spec == BERT.replace(family="", norm_epsilon=1e-5, activation="gelu_tanh")
    del first["token type embeddings"]
    assert completed(told(**fields), layer, first).num_tokentypes == 0
    assert not completed(told(**fields | {"bert_binary_head": False}), layer, first).pooler


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "T5"}, "model_type is 'T5'; only GPT and BERT"),
        ({"num_layers": None}, "no 'num_layers'"),
        ({"params_dtype": None}, "no 'params_dtype'"),
        ({"checkpoint_args": args(num_experts=None, qk_l2_norm=True)}, "not supported: qk_l2_norm=True"),
        ({"checkpoint_args": args(num_experts=None, spec=["module", "layers"])}, "layers of its own"),
        ({"swiglu": False}, "lacks 'qkv weight' or 'mlp l0 weight'"),
    ],
)
def test_what_cannot_be_completed_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        completed(told(**changes), DENSE)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_the_wire_form_carries_the_spec(name: str) -> None:
    spec = MODELS[name]
    wire = metadata.build(Metadata(spec, Origin("x", "/x"), tp=1, pp=2, ep=4))
    known = metadata.read(wire)
    assert known is not None
    assert known.spec == spec
    # Megatron's savers print it into --num-experts, or 0 where it is absent.
    assert vars(wire).get("num_experts", 0) == (spec.moe.num_experts if spec.moe else 0)
    theirs = metadata.for_plugin(wire)
    assert not hasattr(theirs, metadata.OURS)
    assert theirs.checkpoint_args.num_experts == (spec.moe.num_experts if spec.moe else None)
    assert theirs.checkpoint_args.expert_model_parallel_size == 4
    assert theirs.params_dtype is torch.bfloat16


@pytest.mark.parametrize("changes", [{"alibi": True}, {"norms": "sandwich"}, {"model_type": "T5"}])
def test_savers_of_others_get_models_megatron_cannot_express(changes: dict[str, Any]) -> None:
    wire = metadata.build(Metadata(SMALL.replace(**changes), Origin("x", "/x")))
    assert metadata.for_plugin(wire).checkpoint_args.num_layers == 4


def test_the_wire_form_of_bert() -> None:
    wire = metadata.build(Metadata(BERT, Origin("x", "/x")))
    assert (wire.model_type, wire.bert_binary_head, wire.position_embedding_type) == ("BERT", True, "learned_absolute")
