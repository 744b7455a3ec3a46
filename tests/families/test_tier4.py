"""Gemma, GLM, Phi-3, gpt-oss and others: what their messages mean, there and back, config.json, refusals.

Expected values: transformers (logits, and `AutoConfig` for what absent keys mean), through reference_forward, which
knows none of ckptconv's tables. tests/oracle/test_tier4_logits.py has the real megatron-core.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference_forward
import torch
from safetensors.torch import load_file

from ckptconv import families
from ckptconv.errors import SourceError
from ckptconv.families import FAMILIES
from ckptconv.families.family import NOT_IN_CONFIG
from ckptconv.families.rope import dual
from ckptconv.loaders import hf as hf_loader
from ckptconv.loaders import megatron_mcore as mcore_loader
from ckptconv.spec import ModelSpec, Rope, differences
from commands import convert
from fixtures import config, logits
from fixtures_tier4 import FIXTURES
from inprocess import main

Hf = Callable[..., Path]
Config = dict[str, Any]

#: Beside other kernels, sums in another order.
TOLERANCE = 2e-5
IDS = torch.randint(3, 130, (2, 24), generator=torch.Generator().manual_seed(1))  # three windows of 8 tokens
#: Stock megatron-core cannot build these: fixture -> what the refusal names.
REFUSED = {
    "gemma": ["embeddings multiplied by 6.928"],
    "gemma2": ["norms at other places", "soft cap on attention scores", "soft cap on logits", "embeddings multiplied"],
    "gemma3_text": ["norms at other places", "a rope of their own for windowed layers", "embeddings multiplied"],
    "glm4": ["norms at other places"],
    "phi3_longrope": ["rope kind longrope"],
    "olmo2": ["norms at other places", "norms over all query heads together"],
    "granite": ["residuals multiplied by 0.22", "logits multiplied by", "embeddings multiplied by 12"],
    "stablelm_parallel": ["parallel residual"],
}
STOCK = [name for name in FIXTURES if name not in REFUSED]


def spec_of(data: Config) -> ModelSpec:
    return families.of_config(data, "config.json").spec(data, "config.json")


@pytest.fixture(scope="module")
def expected(hf: Hf) -> Callable[[str], torch.Tensor]:
    """Logits of transformers for a fixture, computed once."""
    made: dict[str, torch.Tensor] = {}

    def get(name: str) -> torch.Tensor:
        if name not in made:
            made[name] = logits(hf(name), IDS)
        return made[name]

    return get


# What the messages mean


@pytest.mark.parametrize("name", FIXTURES)
def test_messages_mean_the_model_of_transformers(
    hf: Hf, expected: Callable[[str], torch.Tensor], name: str
) -> None:
    spec, sent = reference_forward.messages(hf_loader, hf(name))
    torch.testing.assert_close(
        reference_forward.logits(spec, sent, IDS), expected(name), atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma", {"embedding_multiplier": 1.0}),
        ("gemma", {"norm_offset": False}),
        ("gemma2", {"softmax_scale": None}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"logit_softcap": None}),
        ("gemma2", {"window_layers": None}),
        ("gemma2", {"norms": "pre"}),
        ("gemma3_text", {"local_rope": None}),
        ("gemma3_text", {"rope": Rope(1e6)}),
        ("gemma3_text", {"qk_norm": None}),
        ("glm4", {"rope": Rope(percent=0.5)}),
        ("phi3_partial", {"rope": Rope()}),
        ("gpt_oss", {"sinks": False}),
        ("gpt_oss", {"activation_clamp": None}),
        ("gpt_oss", {"gate_offset": 0.0}),
        ("gpt_oss", {"rope": Rope(150000.0)}),
        ("qwen2_windows", {"window_layers": (1, 1, 0, 0)}),
        ("granite", {"residual_multiplier": 1.0}),
        ("granite", {"logit_multiplier": 1.0}),
        ("granite", {"softmax_scale": None}),
        ("smollm3", {"rope_layers": None}),
        ("nemotron", {"activation": "relu"}),
        ("stablelm_parallel", {"parallel_residual": False}),
    ],
)  # fmt: skip
def test_every_setting_counts(
    hf: Hf, expected: Callable[[str], torch.Tensor], name: str, changes: dict[str, Any]
) -> None:
    """Otherwise the test above would prove nothing about it."""
    spec, sent = reference_forward.messages(hf_loader, hf(name))
    wrong = reference_forward.logits(spec.replace(**changes), sent, IDS)
    assert float((wrong - expected(name)).abs().max()) > 100 * TOLERANCE


# There and back


def layout(name: str, tp: int, pp: int, impl: str) -> tuple[object, ...]:
    """Experts with biases are cut over expert ranks instead of tensor ranks."""
    sizes = ("--target-ep", tp) if name == "gpt_oss" else ("--target-tp", tp)
    return *sizes, "--target-pp", pp, "--saver-transformer-impl", impl


def same(back: Path, source: Path, expected: torch.Tensor) -> None:
    found, wanted = load_file(back / "model.safetensors"), load_file(source / "model.safetensors")
    assert sorted(found) == sorted(wanted)
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, back))
    assert {key: after[key] for key in before} == before
    assert torch.equal(logits(back, IDS), expected)


@pytest.mark.parametrize(
    ("tp", "pp", "impl"), [(2, 2, "local"), (4, 1, "transformer_engine")]
)
@pytest.mark.parametrize("name", STOCK)
def test_there_and_back(
    hf: Hf, expected: Callable[[str], torch.Tensor], tmp_path: Path, name: str, tp: int, pp: int, impl: str
) -> None:
    there = convert(hf(name), tmp_path / "there", "megatron_mcore", *layout(name, tp, pp, impl))
    same(convert(there, tmp_path / "back", "hf"), hf(name), expected(name))
    spec, sent = reference_forward.messages(mcore_loader, there)
    assert differences(spec, spec_of(config(name)), ("dtype", "seq_length")) == []
    torch.testing.assert_close(reference_forward.logits(spec, sent, IDS), expected(name), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize("name", [name for name in REFUSED if name != "phi3_longrope"])
def test_there_and_back_with_layers_of_our_own(
    hf: Hf, expected: Callable[[str], torch.Tensor], tmp_path: Path, name: str, impl: str
) -> None:
    there = convert(
        hf(name), tmp_path / "there", "megatron_mcore", *layout(name, 2, 2, impl), "--custom-layers"
    )
    same(convert(there, tmp_path / "back", "hf"), hf(name), expected(name))
    spec, sent = reference_forward.messages(mcore_loader, there)
    torch.testing.assert_close(reference_forward.logits(spec, sent, IDS), expected(name), atol=TOLERANCE, rtol=0)


def test_experts_in_one_module(hf: Hf, expected: Callable[[str], torch.Tensor], tmp_path: Path) -> None:
    flags = (*layout("gpt_oss", 2, 2, "transformer_engine"), "--moe-grouped-gemm")
    there = convert(hf("gpt_oss"), tmp_path / "there", "megatron_mcore", *flags)
    same(convert(there, tmp_path / "back", "hf"), hf("gpt_oss"), expected("gpt_oss"))


@pytest.mark.parametrize("name", REFUSED)
def test_what_megatron_cannot_build_is_refused_by_name(
    hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "out"
    assert main(["--saver", "megatron_mcore", "--load-dir", str(hf(name)), "--save-dir", str(out)]) == 7
    said = capsys.readouterr().err
    assert all(reason in said for reason in REFUSED[name]), said
    assert not out.exists()


def test_expert_biases_are_refused_with_tensor_ranks(
    hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(hf("gpt_oss")), str(tmp_path / "out")
    assert main(["--saver", "megatron_mcore", "--load-dir", source, "--save-dir", out, "--target-tp", "2"]) == 7
    assert "experts with biases at tensor parallel size 2" in capsys.readouterr().err


def test_experts_of_gpt_oss_by_hand(hf: Hf, tmp_path: Path) -> None:
    """Even columns are gates, odd ones ups; Megatron has gates above ups, out by in."""
    source = load_file(hf("gpt_oss") / "model.safetensors")
    there = convert(hf("gpt_oss"), tmp_path / "there", "megatron_mcore", *layout("gpt_oss", 2, 1, "local"))
    rank = torch.load(there / "iter_0000001" / "mp_rank_00_001" / "model_optim_rng.pt", weights_only=False)["model"]
    own, prefix = "model.layers.3.mlp.experts.", "decoder.layers.3.mlp.experts.local_experts.1."
    gate_up, bias = source[own + "gate_up_proj"][3], source[own + "gate_up_proj_bias"][3]
    assert torch.equal(rank[prefix + "linear_fc1.weight"], torch.cat([gate_up[:, ::2].T, gate_up[:, 1::2].T]))
    assert torch.equal(rank[prefix + "linear_fc1.bias"], torch.cat([bias[::2], bias[1::2]]))
    assert torch.equal(rank[prefix + "linear_fc2.weight"], source[own + "down_proj"][3].T)
    assert torch.equal(rank[prefix + "linear_fc2.bias"], source[own + "down_proj_bias"][3])


def test_norms_of_gemma_are_copied(hf: Hf, tmp_path: Path) -> None:
    source = load_file(hf("gemma2") / "model.safetensors")
    there = convert(hf("gemma2"), tmp_path / "there", "megatron_mcore", "--custom-layers")
    rank = torch.load(there / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)["model"]
    layer = "decoder.layers.2."
    for theirs, ours in (
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm"),
        ("self_attention.linear_proj.post_layernorm.weight", "post_attention_layernorm"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_feedforward_layernorm"),
        ("mlp.linear_fc2.post_layernorm.weight", "post_feedforward_layernorm"),
    ):
        assert torch.equal(rank[layer + theirs], source[f"model.layers.2.{ours}.weight"]), ours


# config.json


def as_v5(data: Config, folder: Path) -> Config:
    """What transformers 5 writes after reading `data`."""
    from transformers import AutoConfig

    (folder / "v4").mkdir()
    (folder / "v4" / "config.json").write_text(json.dumps(data))
    AutoConfig.from_pretrained(folder / "v4").save_pretrained(folder / "v5")
    written: Config = json.loads((folder / "v5" / "config.json").read_text())
    return written


@pytest.mark.parametrize("name", FIXTURES)
def test_both_styles_are_the_same_model(name: str, tmp_path: Path) -> None:
    flat = config(name)
    new = as_v5(flat, tmp_path)
    assert "rope_theta" not in new
    assert differences(spec_of(flat), spec_of(new)) == []
    # The flat keys that transformers 4 needs come back as they were.
    family = FAMILIES[spec_of(flat).family]
    added = dual(new, family.rope, family.tied_by_default)
    for key in ("rope_theta", "rope_local_base_freq", "partial_rotary_factor", "original_max_position_embeddings"):
        if key in flat:
            assert added[key] == flat[key], key
    kind = {"rope_type": "linear"} if name == "gemma3_text" else {}
    if flat.get("rope_scaling"):
        assert {**added["rope_scaling"], **kind} | flat["rope_scaling"] == added["rope_scaling"]
    else:
        assert added["rope_scaling"] is None


@pytest.mark.parametrize("name", FIXTURES)
def test_a_rebuilt_config_is_the_same_model(
    hf: Hf, expected: Callable[[str], torch.Tensor], name: str, tmp_path: Path
) -> None:
    spec = spec_of(config(name))
    written = FAMILIES[spec.family].config(spec)
    assert FAMILIES[spec.family].refusals(spec) == []
    assert written["architectures"] == config(name)["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    os.link(hf(name) / "model.safetensors", tmp_path / "model.safetensors")
    assert torch.equal(logits(tmp_path, IDS), expected(name))


def test_longrope_is_written_as_transformers_4_wants_it() -> None:
    """It refuses another number of fields in rope_scaling, and reads the original length beside it."""
    written = FAMILIES["phi3"].config(spec_of(config("phi3_longrope")))
    assert sorted(written["rope_scaling"]) == ["long_factor", "short_factor", "type"]
    assert written["original_max_position_embeddings"] == 16


@pytest.mark.parametrize("word", ["su", "yarn", "longrope"])
def test_old_words_for_longrope(word: str) -> None:
    data = config("phi3_longrope")
    data["rope_scaling"] = data["rope_scaling"] | {"type": word}
    assert spec_of(data).rope == spec_of(config("phi3_longrope")).rope


#: Sizes that go with every class default, and nothing else.
SIZES = {
    "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 32, "vocab_size": 131,
}  # fmt: skip
MODEL_TYPES = sorted({data["model_type"] for data in FIXTURES.values()})


def transformers_says(data: Config, folder: Path) -> dict[str, Any]:
    """Spec fields as the installed transformers reads a config.json."""
    from transformers import AutoConfig

    (folder / "config.json").write_text(json.dumps(data))
    c: Any = AutoConfig.from_pretrained(folder)
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    eps = (getattr(c, key) for key in ("rms_norm_eps", "norm_eps", "layer_norm_eps") if hasattr(c, key))
    return {
        "num_query_groups": c.num_key_value_heads or c.num_attention_heads,
        "kv_channels": getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        "max_position_embeddings": c.max_position_embeddings,
        "norm_epsilon": next(eps, 1e-5),  # OLMo's is in its code
        "tied": c.tie_word_embeddings,
        "theta": rope["rope_theta"],
        "kind": rope["rope_type"],
        "percent": rope.get("partial_rotary_factor", 1.0),
        "windows": [kind == "sliding_attention" for kind in getattr(c, "layer_types", None) or []],
        "window": c.sliding_window if getattr(c, "use_sliding_window", True) and hasattr(c, "sliding_window") else None,
        "qkv_bias": bool(c.model_type == "qwen2" or getattr(c, "use_qkv_bias", getattr(c, "attention_bias", False))),
    }


def we_say(data: Config, like: dict[str, Any]) -> dict[str, Any]:
    spec = spec_of(data)
    assert spec.rope is not None
    windowed = spec.window_layers or (int(spec.sliding_window is not None),) * spec.num_layers
    return {name: getattr(spec, name) for name in like if hasattr(spec, name)} | {
        "theta": spec.rope.theta,
        "kind": spec.rope.kind,
        "percent": spec.rope.percent,
        "windows": list(map(bool, windowed)) if like["windows"] else [],
        "window": spec.sliding_window,
    }


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_absent_keys_are_what_transformers_takes_them_for(kind: str, tmp_path: Path) -> None:
    data = {"model_type": kind, **SIZES}
    said = transformers_says(data, tmp_path)
    assert we_say(data, said) == said


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gemma", {"num_query_groups": 16, "kv_channels": 256, "norm_epsilon": 1e-6, "tied": True}),
        ("gemma2", {"num_query_groups": 4, "sliding_window": 4096, "window_layers": (1, 0, 1, 0), "tied": True,
                    "attention_softcap": 50.0, "logit_softcap": 30.0, "softmax_scale": None}),
        ("gemma3_text", {"window_layers": None, "rope": Rope(1e6), "local_rope": Rope(1e4), "logit_softcap": None}),
        ("glm4", {"num_query_groups": 2, "kv_channels": 128, "norm_epsilon": 1.5625e-7, "qkv_bias": True,
                  "rope": Rope(percent=0.5, interleaved=True)}),
        ("phi3", {"num_query_groups": 32, "norm_epsilon": 1e-5, "sliding_window": None}),
        ("gpt_oss", {"num_query_groups": 8, "kv_channels": 64, "sliding_window": 128, "window_layers": (1, 0, 1, 0),
                     "activation_clamp": 7.0, "gate_offset": 1.0, "tied": False}),
        ("granite", {"softmax_scale": 1.0, "logit_multiplier": 1.0, "embedding_multiplier": 1.0}),
        ("smollm3", {"rope_layers": (1, 1, 1, 0), "sliding_window": None, "num_query_groups": 4}),
        ("nemotron", {"norm": "LayerNorm", "norm_offset": True, "gated": False, "activation": "squared_relu"}),
    ],
)  # fmt: skip
def test_class_defaults_by_hand(kind: str, expected: dict[str, Any]) -> None:
    spec = spec_of({"model_type": kind, **SIZES})
    assert {name: getattr(spec, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "changes", "spec"),
    [
        ("gemma", {"hidden_act": "gelu", "hidden_activation": None}, {"activation": "gelu_tanh"}),
        ("gemma2", {"final_logit_softcapping": None}, {"logit_softcap": None}),
        ("gemma2", {"attn_logit_softcapping": None}, {"attention_softcap": None}),
        ("gemma2", {"query_pre_attn_scalar": 16}, {"softmax_scale": None}),
        ("gemma2", {"sliding_window": None}, {"sliding_window": None, "window_layers": None}),
        ("gemma3_text", {"sliding_window_pattern": 1}, {"sliding_window": None, "local_rope": None}),
        ("gemma3_text", {"layer_types": ["full_attention", *["sliding_attention"] * 3]},
         {"window_layers": (0, 1, 1, 1)}),
        ("qwen2_windows", {"max_window_layers": 0}, {"sliding_window": 8, "window_layers": None}),
        ("qwen2_windows", {"use_sliding_window": False}, {"sliding_window": None, "window_layers": None}),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}, {"rope_layers": (1, 0, 1, 0)}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": None},
         {"sliding_window": 8, "window_layers": (0, 0, 0, 1)}),
        ("gpt_oss", {"attention_bias": False}, {"qkv_bias": False, "dense_bias": False, "mlp_bias": True}),
    ],
)  # fmt: skip
def test_settings(name: str, changes: Config, spec: dict[str, Any], tmp_path: Path) -> None:
    data = config(name) | changes
    found = spec_of(data)
    assert {key: getattr(found, key) for key in spec} == spec
    assert differences(spec_of(as_v5(data, tmp_path)), found) == []
    assert differences(spec_of(FAMILIES[found.family].config(found)), found, NOT_IN_CONFIG) == []


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True: attention to later"),
        ("gemma", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma3_text", {"model_type": "gemma3", "vision_config": {}}, "model_type is 'gemma3', a multimodal model"),
        ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha is 1.5"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm is True"),
        ("olmo", {"clip_qkv": 8.0}, "clip_qkv is 8.0: queries, keys and values clipped"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is unknown, expected one of"),
        ("ministral", {"model_type": "mistral"}, "layer_types has layers without a window.*ministral"),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 4}, "layer_types is"),
        ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention"]}, "window_layers has 2 entries"),
        ("smollm3", {"no_rope_layers": [1, 1]}, "no_rope_layers is"),
        ("granite", {"logits_scaling": 0}, "logits_scaling is 0, expected a number above 0"),
        ("gemma2", {"query_pre_attn_scalar": "many"}, "query_pre_attn_scalar is 'many', expected a whole number"),
    ],
)  # fmt: skip
def test_refusals(name: str, changes: Config, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        spec_of(config(name) | changes)


def test_trained_norms_of_olmo_are_not_lost(
    hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OLMo 1 stores no norms: Megatron gets ones and zeros, and training may change them."""
    there = convert(hf("olmo"), tmp_path / "there", "megatron_mcore", "--saver-transformer-impl", "local")
    path = there / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    root = torch.load(path, weights_only=False)
    norm = root["model"]["decoder.layers.2.pre_mlp_layernorm.weight"]
    assert bool((norm == 1).all())
    norm[3] = 1.5
    torch.save(root, path)
    out = tmp_path / "back"
    assert main(["--saver", "hf", "--load-dir", str(there), "--save-dir", str(out)]) == 7
    assert "'post norm weight' is not 1 everywhere" in capsys.readouterr().err
    assert not out.exists()
