"""config.json <-> ModelSpec: both styles of transformers, class defaults, refusals.

Expected values: transformers itself (`AutoConfig`), and for transformers 4, which is not installed, its rules: flat
`rope_theta` and `rope_scaling`, `torch_dtype` up to 4.55 and `dtype` after, an absent tie key is the class default.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fixtures_moe
import fixtures_older
from ckptconv import families
from ckptconv.errors import SourceError, TargetError
from ckptconv.families import FAMILIES
from ckptconv.families.family import NOT_IN_CONFIG
from ckptconv.spec import ModelSpec, Rope, differences
from fixtures import FIXTURES, LLAMA3_ROPE, config, logits
from inprocess import main

Hf = Callable[..., Path]


def spec_of(data: dict[str, Any]) -> ModelSpec:
    return families.of_config(data, "config.json").spec(data, "config.json")


#: Model types whose config has Llama's keys, so that what transformers says can be read off by name.
PLAIN = ("llama", "mistral", "qwen2", "mixtral")


#: Spec fields of which transformers 5 says something else than it was told. Every T5 is tied there; what is stored
#: decides, so nothing is lost.
FORGOTTEN = {"t5": ("tied",)}
#: Models of code of their own -> what reads the same config in transformers.
SAME_AS = {"kimi_k2": "deepseek_v3"}


def of_kinds(*kinds: str) -> list[str]:
    return [name for name in FIXTURES if FIXTURES[name]["model_type"] in kinds]


def transformers_says(data: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The fields of a spec as the installed transformers reads a config.json, rope apart."""
    from transformers import AutoConfig

    (tmp_path / "read").mkdir(exist_ok=True)
    (tmp_path / "read" / "config.json").write_text(json.dumps(data))
    c: Any = AutoConfig.from_pretrained(tmp_path / "read")
    window = getattr(c, "sliding_window", None)
    if c.model_type == "qwen2" and "sliding_attention" not in c.layer_types:
        window = None
    rope = dict(c.rope_parameters)
    rope.pop("type", None)
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    return {
        "num_layers": c.num_hidden_layers, "hidden_size": c.hidden_size, "ffn_hidden_size": c.intermediate_size,
        "num_attention_heads": c.num_attention_heads, "num_query_groups": c.num_key_value_heads,
        "kv_channels": getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_position_embeddings,
        "norm_epsilon": c.rms_norm_eps, "activation": c.hidden_act, "tied": c.tie_word_embeddings,
        "qkv_bias": c.model_type == "qwen2" or bool(getattr(c, "attention_bias", False)),
        "dense_bias": bool(getattr(c, "attention_bias", False)), "mlp_bias": bool(getattr(c, "mlp_bias", False)),
        "sliding_window": window, "rope": Rope(theta, kind, rope),
    }  # fmt: skip


def we_say(data: dict[str, Any]) -> dict[str, Any]:
    spec = spec_of(data)
    names = (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
        "vocab_size", "max_position_embeddings", "norm_epsilon", "activation", "tied", "qkv_bias", "dense_bias",
        "mlp_bias", "sliding_window", "rope",
    )  # fmt: skip
    return {name: getattr(spec, name) for name in names}


def as_v5(data: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """What transformers 5 writes after reading `data`."""
    from transformers import AutoConfig

    kind = data["model_type"]
    (tmp_path / "v4").mkdir(exist_ok=True)
    (tmp_path / "v4" / "config.json").write_text(json.dumps(data | {"model_type": SAME_AS.get(kind, kind)}))
    AutoConfig.from_pretrained(tmp_path / "v4").save_pretrained(tmp_path / "v5")
    written: dict[str, Any] = json.loads((tmp_path / "v5" / "config.json").read_text())
    return written | {"model_type": kind}


# Reading


@pytest.mark.parametrize("name", FIXTURES)
def test_both_styles_are_the_same_model(name: str, tmp_path: Path) -> None:
    flat = config(name)
    new = as_v5(flat, tmp_path)
    assert differences(spec_of(flat), spec_of(new), FORGOTTEN.get(flat["model_type"], ())) == []


@pytest.mark.parametrize("name", of_kinds(*PLAIN))
def test_what_we_read_is_what_transformers_reads(name: str, tmp_path: Path) -> None:
    flat = config(name)
    new = as_v5(flat, tmp_path)
    assert "rope_theta" not in new
    assert "rope_parameters" in new
    assert we_say(flat) == we_say(new) == transformers_says(flat, tmp_path)


def filled(data: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """A config.json with every key its class knows, absent ones with the class's defaults; None if it refuses."""
    from transformers import AutoConfig

    kind = data["model_type"]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data | {"model_type": SAME_AS.get(kind, kind)}))
    try:
        known: dict[str, Any] = AutoConfig.from_pretrained(folder).to_dict()
    except Exception:  # whatever that class does without the key
        return None
    return json.loads(json.dumps(known)) | {"model_type": kind}  # type: ignore[no-any-return]


#: A fixture of every family, with the keys of config.json that its table reads.
KEYS = [
    (name, field.key)
    for family in FAMILIES.values()
    for name in [n for n in FIXTURES if FIXTURES[n]["model_type"] == family.model_type][:1]
    for field in family.fields
    if field.key and field.key in FIXTURES[name]
]


@pytest.mark.parametrize(("name", "key"), list(dict.fromkeys(KEYS)))
def test_an_absent_key_is_the_classs_default(name: str, key: str, tmp_path: Path) -> None:
    """Every key of every family, one at a time: what transformers fills in, or a refusal, never another guess."""
    data = {k: v for k, v in config(name).items() if k != key}
    full = filled(data, tmp_path / "full")
    if full is None:
        return
    try:
        said = spec_of(data)
    except SourceError as error:
        assert key in str(error) or "config.json" in str(error)
        return
    # Where their number is absent transformers assumes one MTP layer, which it never loads; the files decide.
    assert differences(said, spec_of(full), ("mtp_layers",)) == []


#: Sizes that go with every class default.
SIZES = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 32, "vocab_size": 131,
}  # fmt: skip


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("spoken", [{}, {"num_key_value_heads": None, "head_dim": None, "sliding_window": None}])
def test_absent_and_null_keys_are_what_transformers_takes_them_for(
    kind: str, spoken: dict[str, Any], tmp_path: Path
) -> None:
    data = {"model_type": kind, **SIZES, **spoken}
    if kind != "llama" and spoken:
        del data["num_key_value_heads"]  # transformers 5 refuses a null there
    if kind == "qwen2" and spoken:
        del data["head_dim"]
    assert we_say(data) == transformers_says(data, tmp_path)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", {"num_query_groups": 32, "sliding_window": None, "max_position_embeddings": 2048}),
        ("mistral", {"num_query_groups": 8, "sliding_window": 4096, "max_position_embeddings": 131072}),
        ("qwen2", {"num_query_groups": 32, "sliding_window": None, "max_position_embeddings": 32768}),
    ],
)
def test_class_defaults_by_hand(kind: str, expected: dict[str, Any]) -> None:
    """huggingface-meta.md 1.4."""
    common = {"norm_epsilon": 1e-6, "tied": False, "activation": "silu", "kv_channels": 2, "rope": Rope(10000.0)}
    said = we_say({"model_type": kind, **SIZES})
    assert {name: said[name] for name in expected | common} == expected | common


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"rope_theta": 5e5}, Rope(5e5)),
        ({"rope_theta": 500000}, Rope(5e5)),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}}, Rope(1e4, "linear", {"factor": 4.0})),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, Rope(1e4, "dynamic", {"factor": 2.0})),
        ({"rope_scaling": {"rope_type": "default"}}, Rope(1e4)),
        ({"rope_scaling": None}, Rope(1e4)),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
            Rope(5e5, "llama3", {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_type"}),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, Rope(1e6)),
        ({"rope_theta": 2.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, Rope(1e6)),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}},
            Rope(1e6, "linear", {"factor": 4.0}),
        ),
        # a non-empty rope_scaling wins, also in transformers 5
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 1e6,
             "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}},
            Rope(1e6, "linear", {"factor": 4.0}),
        ),
    ],
)  # fmt: skip
def test_rope(changes: dict[str, Any], rope: Rope, tmp_path: Path) -> None:
    data = {k: v for k, v in config("llama2").items() if not k.startswith("rope")} | changes
    assert spec_of(data).rope == rope
    assert transformers_says(data, tmp_path)["rope"] == rope


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, 8),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}, None),
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "max_window_layers": 0}, 4096),
    ],
)
def test_windows_of_qwen2(changes: dict[str, Any], window: int | None, tmp_path: Path) -> None:
    data = {k: v for k, v in config("qwen2").items() if "window" not in k} | changes
    assert transformers_says(data, tmp_path)["sliding_window"] == window
    assert spec_of(data).sliding_window == window


@pytest.mark.parametrize(("key", "value"), [("dtype", "bfloat16"), ("torch_dtype", "bfloat16"), ("torch_dtype", None)])
def test_element_type(key: str, value: str | None) -> None:
    data = {k: v for k, v in config("llama2").items() if k != "torch_dtype"} | {key: value}
    assert spec_of(data).dtype == (value or "float32")


def test_architectures_name_the_family_when_there_is_no_model_type() -> None:
    data = {k: v for k, v in config("qwen2").items() if k != "model_type"}
    assert spec_of(data).family == "qwen2"


# Refusals


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama2", {"model_type": "lama"}, r"config.json: model_type is 'lama'.*Did you mean 'llama'\?"),
        ("llama2", {"model_type": "mamba"}, "model_type is 'mamba', which is none of the supported families"),
        ("llama2", {"hidden_size": None}, "config.json: hidden_size is missing"),
        ("llama2", {"num_key_value_heads": 3}, "config.json: .*4 attention heads do not divide into 3 query groups"),
        ("llama2", {"num_hidden_layers": "4"}, "config.json: .*num_layers is '4'"),
        ("llama2", {"rope_scaling": {"type": "magic"}}, "rope type 'magic' is unknown"),
        ("llama2", {"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object or null"),
        ("llama2", {"rope_theta": "much"}, "rope settings are not numbers"),
        ("llama2", {"torch_dtype": "float33"}, "unknown element type 'float33'"),
        (
            "llama2",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            "rope_parameters differ by layer type",
        ),
    ],
)
def test_refusals(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        spec_of(config(name) | changes)


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"use_sliding_window": True, "max_window_layers": 2}, (0, 0, 1, 1)),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2, "use_sliding_window": True}, (0, 1, 0, 1)),
    ],
)
def test_windows_on_some_layers(changes: dict[str, Any], layers: tuple[int, ...], tmp_path: Path) -> None:
    """What transformers makes `layer_types` of; every layer without the window is as it says."""
    from transformers import AutoConfig

    data = config("qwen2") | changes
    (tmp_path / "config.json").write_text(json.dumps(data))
    types: Any = AutoConfig.from_pretrained(tmp_path)
    assert tuple(int(kind == "sliding_attention") for kind in types.layer_types) == layers
    assert (spec_of(data).sliding_window, spec_of(data).window_layers) == (8, layers)


def convert(source: Path, out: Path, *flags: str, saver: str = "megatron_mcore") -> int:
    return main(["--saver", saver, "--load-dir", str(source), "--save-dir", str(out), *flags])


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"hidden_act": "tanh"}, 7, "activation tanh"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0, "long_factor": [1], "short_factor": [1]}}, 7,
         "longrope"),
        ({"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 2.0}}, 7, "low_freq_factor"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, 3, "quantised (gptq)"),
        ({"model_type": "mamba"}, 3, "model_type is 'mamba'"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_before_anything_is_written(
    hf: Hf, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], code: int, message: str
) -> None:
    shutil.copytree(hf("llama2"), tmp_path / "in")
    (tmp_path / "in" / "config.json").write_text(json.dumps(config("llama2") | changes))
    assert convert(tmp_path / "in", tmp_path / "out") == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Writing


def rope_of_v4(data: dict[str, Any]) -> Rope:
    """Rope as transformers 4.57 understands a config.json: flat keys, `type` an older spelling of `rope_type`."""
    scaling = dict(data.get("rope_scaling") or {})
    old, new = scaling.pop("type", None), scaling.pop("rope_type", None)
    return Rope(float(data.get("rope_theta", 10000.0)), new or old or "default", scaling)


def check_for_both(data: dict[str, Any], spec: ModelSpec, tmp_path: Path) -> None:
    """`data` says `spec` to transformers 4 and 5, and says it outright."""
    said = transformers_says(data, tmp_path)
    assert said == {name: getattr(spec, name) for name in said}
    assert rope_of_v4(data) == spec.rope
    assert data["torch_dtype"] == data["dtype"] == spec.dtype
    assert data["tie_word_embeddings"] is spec.tied


@pytest.mark.parametrize("name", FIXTURES)
def test_a_rebuilt_config_says_the_same_and_stays_as_it_is(name: str, tmp_path: Path) -> None:
    """config -> spec -> config -> spec, by way of JSON; and transformers understands it as we do."""
    spec = spec_of(config(name, dtype="bfloat16"))
    written = json.loads(json.dumps(FAMILIES[spec.family].config(spec)))
    assert differences(spec_of(written), spec) == []
    assert FAMILIES[spec.family].config(spec_of(written)) == FAMILIES[spec.family].config(spec)
    assert (written["torch_dtype"], written["dtype"]) == ("bfloat16", "bfloat16")
    new = as_v5(written, tmp_path)
    assert differences(spec_of(new), spec, FORGOTTEN.get(written["model_type"], ())) == []


@pytest.mark.parametrize("name", of_kinds(*PLAIN))
def test_a_rebuilt_config_is_read_right_by_both(name: str, tmp_path: Path) -> None:
    spec = spec_of(config(name, dtype="bfloat16"))
    written = FAMILIES[spec.family].config(spec)
    check_for_both(written, spec, tmp_path)
    assert written["architectures"] == config(name)["architectures"]


@pytest.mark.parametrize("name", [*fixtures_moe.FIXTURES, *fixtures_older.FIXTURES])
def test_a_rebuilt_config_computes_the_same(hf: Hf, tmp_path: Path, name: str) -> None:
    """The config that is written when none came with the weights, read by transformers."""
    spec = spec_of(config(name))
    data = FAMILIES[spec.family].config(spec)
    shutil.copytree(hf(name), tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(data))
    assert spec_of(data) == spec
    ids = torch.randint(3, 131, (2, 24), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(logits(tmp_path / "out", ids), logits(hf(name), ids), atol=1e-5)


def says(family: str, spec: ModelSpec) -> ModelSpec | None:
    """What a family's config.json for a model is read as; None where it is not."""
    try:
        return FAMILIES[family].spec(json.loads(json.dumps(FAMILIES[family].config(spec))), family)
    except SourceError:
        return None


@pytest.mark.parametrize("name", FIXTURES)
def test_a_family_says_exactly_what_it_does_not_refuse(name: str) -> None:
    spec = spec_of(config(name))
    for family, table in FAMILIES.items():
        refused = table.refusals(spec)
        parts = [any(f.spec.startswith(part) for f in table.fields) for part in ("moe.", "mla.")]
        if parts != [spec.moe is not None, spec.mla is not None]:
            assert refused, family
            continue
        said = says(family, spec)
        assert bool(refused) == (said is None or bool(differences(said, spec, NOT_IN_CONFIG))), (family, refused)
        assert not refused or family != spec.family, refused


@pytest.mark.parametrize("name", FIXTURES)
def test_a_model_that_names_no_family_gets_one_that_says_it(name: str) -> None:
    spec = spec_of(config(name))
    said = says(families.for_spec(spec.replace(family="")).name, spec)
    assert said is not None
    assert differences(said, spec, NOT_IN_CONFIG) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [("llama2", "llama"), ("llama31", "llama"), ("mistral", "mistral"), ("qwen2", "qwen2"),
     ("llama_mlp_bias", "llama")],
)  # fmt: skip
def test_a_family_is_found_for_a_model_that_names_none(name: str, expected: str) -> None:
    assert families.for_spec(spec_of(config(name)).replace(family="")).name == expected


def test_a_model_of_no_family_says_why() -> None:
    with pytest.raises(TargetError, match=r"llama: alibi: False != True; mistral: .*mlp_bias"):
        families.for_spec(spec_of(config("llama_mlp_bias")).replace(alibi=True))


@pytest.mark.parametrize("name", ["llama31", "llama_linear_rope", "codellama", "mistral", "qwen2_tied"])
def test_a_config_in_the_new_style_gets_the_flat_keys(hf: Hf, tmp_path: Path, name: str) -> None:
    shutil.copytree(hf(name), tmp_path / "in")
    new = as_v5(config(name), tmp_path)
    (tmp_path / "in" / "config.json").write_text(json.dumps(new))
    assert convert(tmp_path / "in", tmp_path / "out", saver="hf") == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written[key] for key in new} == new
    check_for_both(written, spec_of(config(name)), tmp_path)


@pytest.mark.parametrize("name", ["llama2", "qwen2"])
def test_an_absent_tie_key_is_written_out(hf: Hf, tmp_path: Path, name: str) -> None:
    shutil.copytree(hf(name), tmp_path / "in")
    data = {k: v for k, v in config(name).items() if k != "tie_word_embeddings"}
    (tmp_path / "in" / "config.json").write_text(json.dumps(data))
    assert convert(tmp_path / "in", tmp_path / "out", saver="hf") == 0
    check_for_both(json.loads((tmp_path / "out" / "config.json").read_text()), spec_of(config(name)), tmp_path)
