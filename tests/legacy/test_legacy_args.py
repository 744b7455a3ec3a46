"""What a model says is in the args of legacy models, or it is refused: nothing is lost on the way."""

from __future__ import annotations

import pytest

from ckptconv.formats import megatron_args, megatron_legacy
from ckptconv.formats.megatron_legacy import canonical, flags, refusals
from ckptconv.spec import ModelSpec, Rope
from megatron_models import BERT, BIASED, IN_CODE, MODELS, SMALL

WRITTEN = {
    "llama": SMALL,
    "linear rope": SMALL.replace(rope=Rope(10000.0, "linear", {"factor": 4.0})),
    "partial rope": BIASED.replace(rope=Rope(percent=0.5), tied=False),
    "gpt2": MODELS["gpt2"],
    "nemotron": MODELS["nemotron"],
    "squared relu, biases": MODELS["squared relu, biases"],
    "erf without biases": MODELS["erf without biases"],
    "gelu tanh without biases": IN_CODE["gelu tanh without biases"],
    "no positions": MODELS["no positions"],
    "bert": BERT,
    "bert, exact head": BERT.replace(activation="gelu_tanh", head_activation="gelu"),
    "bert, tanh": BERT.replace(activation="gelu_tanh"),
    "bert without the binary head": BERT.replace(num_tokentypes=0, binary_head=False, pooler=False),
}  # fmt: skip
#: name -> what the refusal says
REFUSED = {
    "mixtral": "experts.", "qwen3 moe": "norms on queries and keys.", "deepseek v3": "multi-token prediction.",
    "gpt-oss": "attention sinks.", "yarn": "rope kind yarn.", "starcoder2": "window of 16",
    "nope layers": "layers without rope.", "quick geglu": "activation quick_gelu",
    "clamped swiglu": "clamped or shifted", "glm": "interleaved pairs", "gemma": "norm offset",
    "silu without gate": "activation silu, gated False", "opt": "activation relu", "geglu erf": "gated True",
    "gemma without caps": "a softmax scale",
}  # fmt: skip


def read(spec: ModelSpec) -> ModelSpec:
    said = megatron_args.namespace(
        spec, tp=1, pp=1, padded_vocab_size=spec.vocab_size, make_vocab_size_divisible_by=1, transformer_impl="local",
        iteration=1, tokenizer_type=None, tokenizer_model=None, params_dtype=None, inexact=True,
    )  # fmt: skip
    said |= megatron_legacy.arguments(spec)
    assert not megatron_legacy.unsupported(said)
    core = megatron_legacy.core_arguments(said)
    assert not megatron_args.unsupported(core, spec.model_type)
    # The tensors tell which heads there are, and which of them has which GELU is the loader's part.
    heads = {"head_activation": spec.head_activation}
    return spec.replace(**megatron_args.spec_of(core, "here", spec.model_type) | heads)


@pytest.mark.parametrize("name", WRITTEN)
def test_args_say_the_model(name: str) -> None:
    spec = WRITTEN[name]
    assert not refusals(spec)
    assert read(spec) == spec
    assert "--use-legacy-models" in flags(spec, [])


@pytest.mark.parametrize("name", [name for name in MODELS | IN_CODE if name not in WRITTEN])
def test_what_args_cannot_say_is_refused(name: str) -> None:
    spec = (MODELS | IN_CODE)[name]
    found = refusals(spec)
    assert found or read(spec) == spec
    assert any(REFUSED.get(name, "") in sentence for sentence in found) or name not in REFUSED


def test_layouts() -> None:
    assert "whole groups" in refusals(SMALL, tp=4)[0]
    assert not refusals(SMALL, tp=2)
    assert any("tensor parallel size 2" in sentence for sentence in megatron_legacy.limits(SMALL, 1))
    assert not any("tensor parallel size 2" in sentence for sentence in megatron_legacy.limits(SMALL, 2))
    assert "0.12 only" in megatron_legacy.limits(SMALL, 2, 2)[-1]


@pytest.mark.parametrize(
    ("older", "name"),
    [
        ("module.module.language_model.transformer.layers.11.attention.query_key_value.weight",
         "language_model.encoder.layers.11.self_attention.query_key_value.weight"),
        ("language_model.encoder.layers.0.input_layernorm.bias", "language_model.encoder.layers.0.input_norm.bias"),
        ("language_model.transformer.layers.0.post_attention_layernorm.weight",
         "language_model.encoder.layers.0.post_attention_norm.weight"),
        ("language_model.transformer.final_layernorm.weight", "language_model.encoder.final_norm.weight"),
        ("language_model.tokentype_embeddings.weight", "language_model.embedding.tokentype_embeddings.weight"),
        ("lm_head.layernorm.weight", "lm_head.norm.weight"),
        ("language_model.encoder.layers.1.self_attention.layernorm_qkv.weight",
         "language_model.encoder.layers.1.self_attention.layernorm_qkv.weight"),
    ],
)  # fmt: skip
def test_older_spellings(older: str, name: str) -> None:
    assert canonical(older) == canonical(name) == name
