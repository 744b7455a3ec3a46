"""The Namespace and the flags of known models, written by hand, and the laws of `formats.megatron_args`."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from ckptconv.errors import SourceError, TargetError
from ckptconv.formats.megatron_args import (
    CONSTANTS,
    ROWS,
    UNSUPPORTED,
    flags,
    limits,
    linear_bias,
    namespace,
    qkv_bias,
    refusals,
    repeated,
    spec_of,
    unsupported,
)
from ckptconv.spec import ModelSpec, Rope

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA2_7B = ModelSpec(
    family="llama", num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, num_query_groups=32,
    kv_channels=128, vocab_size=32000, max_position_embeddings=4096, seq_length=4096, dtype="bfloat16",
)  # fmt: skip
LLAMA31_8B = LLAMA2_7B.replace(
    ffn_hidden_size=14336, num_query_groups=8, vocab_size=128256, max_position_embeddings=131072, seq_length=8192,
    rope=Rope(500000.0, "llama3", {"factor": 8.0, **LLAMA3}),
)  # fmt: skip
LLAMA32_1B = LLAMA31_8B.replace(
    num_layers=16, hidden_size=2048, ffn_hidden_size=8192, kv_channels=64, tied=True,
    rope=Rope(500000.0, "llama3", {"factor": 32.0, **LLAMA3}),
)  # fmt: skip
MISTRAL_7B = LLAMA2_7B.replace(
    family="mistral", ffn_hidden_size=14336, num_query_groups=8, max_position_embeddings=32768, seq_length=8192,
    sliding_window=4096,
)  # fmt: skip
QWEN2_7B = LLAMA2_7B.replace(
    family="qwen2", num_layers=28, hidden_size=3584, ffn_hidden_size=18944, num_attention_heads=28, num_query_groups=4,
    vocab_size=152064, max_position_embeddings=131072, seq_length=8192, norm_epsilon=1e-6, qkv_bias=True,
    rope=Rope(1000000.0),
)  # fmt: skip

#: What the five have in common, then what each has of its own.
COMMON: dict[str, object] = {
    "position_embedding_type": "rope", "use_rotary_position_embeddings": True, "add_position_embedding": True,
    "rotary_percent": 1.0, "rotary_interleaved": False, "rotary_seq_len_interpolation_factor": None,
    "normalization": "RMSNorm", "apply_layernorm_1p": False, "layernorm_zero_centered_gamma": False,
    "swiglu": True, "squared_relu": False, "add_bias_linear": False, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "sequence_parallel": False, "apply_query_key_layer_scaling": False, "num_experts": None, "ckpt_format": "torch",
    "use_mcore_models": True, "use_legacy_models": False, "virtual_pipeline_model_parallel_size": None,
    "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4, "world_size": 8,
    "expert_model_parallel_size": 1, "make_vocab_size_divisible_by": 128,
    "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "/tokenizer", "transformer_impl": "transformer_engine",
    "bf16": True, "fp16": False, "params_dtype": "dtype", "iteration": 7,
    "consumed_train_samples": 0, "consumed_valid_samples": 0,
}  # fmt: skip
EXPECTED: dict[str, tuple[ModelSpec, int, dict[str, object]]] = {
    "Llama-2-7B": (LLAMA2_7B, 32000, {
        "num_layers": 32, "encoder_num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 11008, "kv_channels": 128,
        "num_attention_heads": 32, "group_query_attention": False, "num_query_groups": 32, "seq_length": 4096,
        "max_position_embeddings": 4096, "rotary_base": 10000, "use_rope_scaling": False, "rope_scaling_factor": 8.0,
        "norm_epsilon": 1e-5, "layernorm_epsilon": 1e-5, "untie_embeddings_and_output_weights": True,
        "add_qkv_bias": False, "window_size": None, "vocab_size": 32000, "padded_vocab_size": 32000,
    }),
    "Llama-3.1-8B": (LLAMA31_8B, 128256, {
        "ffn_hidden_size": 14336, "group_query_attention": True, "num_query_groups": 8, "rotary_base": 500000,
        "use_rope_scaling": True, "rope_scaling_factor": 8.0, "max_position_embeddings": 131072, "seq_length": 8192,
        "vocab_size": 128256, "padded_vocab_size": 128256, "untie_embeddings_and_output_weights": True,
    }),
    "Llama-3.2-1B": (LLAMA32_1B, 128256, {
        "num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192, "kv_channels": 64, "num_query_groups": 8,
        "use_rope_scaling": True, "rope_scaling_factor": 32.0, "untie_embeddings_and_output_weights": False,
    }),
    "Mistral-7B": (MISTRAL_7B, 32000, {
        "window_size": (4095, 0), "num_query_groups": 8, "group_query_attention": True, "rotary_base": 10000,
        "max_position_embeddings": 32768, "norm_epsilon": 1e-5,
    }),
    "Qwen2-7B": (QWEN2_7B, 152064, {
        "num_layers": 28, "hidden_size": 3584, "ffn_hidden_size": 18944, "num_attention_heads": 28, "kv_channels": 128,
        "num_query_groups": 4, "add_qkv_bias": True, "norm_epsilon": 1e-6, "layernorm_epsilon": 1e-6,
        "rotary_base": 1000000, "window_size": None, "vocab_size": 152064,
    }),
}  # fmt: skip


def written(spec: ModelSpec, padded: int | None = None, **changes: Any) -> dict[str, object]:
    given: dict[str, Any] = {
        "tp": 2, "pp": 4, "padded_vocab_size": padded or spec.vocab_size, "make_vocab_size_divisible_by": 128,
        "transformer_impl": "transformer_engine", "iteration": 7, "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": "/tokenizer", "params_dtype": "dtype",
    }  # fmt: skip
    return namespace(spec, **(given | changes))


def spelled(spec: ModelSpec, **changes: Any) -> list[str]:
    given: dict[str, Any] = {
        "tp": 1, "pp": 1, "make_vocab_size_divisible_by": 128, "transformer_impl": "transformer_engine",
        "tokenizer_type": None, "tokenizer_model": None,
    }  # fmt: skip
    return flags(spec, **(given | changes))


def again(spec: ModelSpec, impl: str = "transformer_engine") -> list[str]:
    return repeated(spec, tp=1, pp=1, make_vocab_size_divisible_by=128, transformer_impl=impl)


def read(spec: ModelSpec, args: dict[str, object]) -> ModelSpec:
    fields: dict[str, Any] = spec_of(args, "test")
    return ModelSpec(**{"family": spec.family, "dtype": spec.dtype, **fields})


@pytest.mark.parametrize("name", EXPECTED)
def test_namespace_of_known_models(name: str) -> None:
    spec, padded, own = EXPECTED[name]
    args = written(spec, padded)
    want = COMMON | own
    assert {key: args[key] for key in want} == want
    assert type(args["rotary_base"]) is int


def test_attributes_that_upstream_reads_without_a_default_are_there() -> None:
    """check_checkpoint_args, load_checkpoint and tools/checkpoint loader_base, saver_base; core_v0.12.0."""
    assert written(LLAMA2_7B).keys() >= {
        "num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "make_vocab_size_divisible_by",
        "padded_vocab_size", "tokenizer_type", "data_parallel_random_init", "tensor_model_parallel_size",
        "pipeline_model_parallel_size", "fp16", "bf16", "normalization", "sequence_parallel",
        "apply_query_key_layer_scaling", "bert_binary_head",
    }  # fmt: skip


def test_flags_of_llama_2() -> None:
    assert spelled(LLAMA2_7B, tp=2, pp=4, tokenizer_type="Llama2Tokenizer", tokenizer_model="/t.model") == [
        "--num-layers 32", "--hidden-size 4096", "--ffn-hidden-size 11008", "--num-attention-heads 32",
        "--kv-channels 128", "--seq-length 4096", "--max-position-embeddings 4096", "--position-embedding-type rope",
        "--rotary-base 10000", "--rotary-percent 1.0", "--normalization RMSNorm", "--norm-epsilon 1e-05", "--swiglu",
        "--disable-bias-linear", "--untie-embeddings-and-output-weights", "--hidden-dropout 0.0",
        "--attention-dropout 0.0", "--bf16", "--vocab-size 32000", "--make-vocab-size-divisible-by 128",
        "--padded-vocab-size 32000", "--tokenizer-type Llama2Tokenizer", "--tokenizer-model /t.model",
        "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 4", "--transformer-impl transformer_engine",
        "--ckpt-format torch",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "present", "absent"),
    [
        (LLAMA31_8B, ["--group-query-attention", "--num-query-groups 8", "--rotary-base 500000", "--use-rope-scaling",
                      "--rope-scaling-factor 8.0"], ["--window-size", "--add-qkv-bias"]),
        (LLAMA32_1B, ["--rope-scaling-factor 32.0", "--kv-channels 64"], ["--untie-embeddings-and-output-weights"]),
        (MISTRAL_7B, ["--window-size 4095,0"], ["--use-rope-scaling", "--rope-scaling-factor"]),
        (QWEN2_7B, ["--add-qkv-bias", "--disable-bias-linear", "--norm-epsilon 1e-06"], ["--window-size"]),
        (LLAMA2_7B.replace(qkv_bias=True, dense_bias=True, mlp_bias=True, dtype="float16"), ["--fp16"],
         ["--disable-bias-linear", "--bf16"]),
        (LLAMA2_7B.replace(dtype="float32"), [], ["--bf16", "--fp16"]),
        (LLAMA2_7B.replace(rope=Rope(kind="linear", scaling={"factor": 4.0})),
         ["--rotary-seq-len-interpolation-factor 4"], ["--use-rope-scaling"]),
    ],
)  # fmt: skip
def test_flags_that_differ(spec: ModelSpec, present: list[str], absent: list[str]) -> None:
    lines = spelled(spec)
    assert set(present) <= set(lines)
    assert not {line.split()[0] for line in lines} & set(absent)


def test_flags_to_repeat_are_those_that_are_not_restored() -> None:
    layout = spelled(LLAMA2_7B)[spelled(LLAMA2_7B).index("--bf16") :]
    assert again(LLAMA2_7B) == ["--norm-epsilon 1e-05", *layout]
    assert again(MISTRAL_7B)[:2] == ["--window-size 4095,0", "--norm-epsilon 1e-05"]
    assert again(LLAMA31_8B)[:3] == ["--use-rope-scaling", "--rope-scaling-factor 8.0", "--norm-epsilon 1e-05"]
    assert set(again(QWEN2_7B)) <= set(spelled(QWEN2_7B))
    assert "--no-persist-layer-norm" in again(LLAMA2_7B, "local")


def test_padded_size_follows_the_target_layout_unless_it_is_given() -> None:
    odd = LLAMA2_7B.replace(vocab_size=32001)
    assert "--padded-vocab-size 32128" in spelled(odd)
    assert "--padded-vocab-size 32256" in spelled(odd, tp=4, make_vocab_size_divisible_by=64)
    assert "--padded-vocab-size 33000" in spelled(odd, padded_vocab_size=33000)


ROPES = [
    Rope(), Rope(500000.0), Rope(10000.5, percent=0.5), Rope(interleaved=True),
    Rope(kind="linear", scaling={"factor": 4.0}), Rope(kind="linear", scaling={"factor": 2.5}),
    Rope(500000.0, "llama3", {"factor": 32.0, **LLAMA3}),
]  # fmt: skip
SHAPES: list[dict[str, Any]] = [
    {}, {"num_query_groups": 1}, {"num_query_groups": 8, "kv_channels": 96},
    {"num_attention_heads": 1, "num_query_groups": 1},
]  # fmt: skip
BIASES: list[dict[str, Any]] = [{}, {"qkv_bias": True}, {"qkv_bias": True, "dense_bias": True, "mlp_bias": True}]
OTHERS: list[dict[str, Any]] = [
    {}, {"tied": True}, {"sliding_window": 1}, {"sliding_window": 4096}, {"norm": "LayerNorm", "norm_offset": True},
    {"norm_epsilon": 1e-12, "seq_length": 17, "vocab_size": 131},
]  # fmt: skip
GRID = [
    LLAMA2_7B.replace(rope=rope, **shape, **bias, **other)
    for rope, shape, bias, other in itertools.product(ROPES, SHAPES, BIASES, OTHERS)
]


def test_reading_undoes_writing() -> None:
    assert len(GRID) == 504
    for spec in [*GRID, *(spec for spec, _, _ in EXPECTED.values())]:
        args = written(spec, 1 << 20)
        assert refusals(spec) == []
        assert read(spec, args) == spec
        assert unsupported(args) == []


def test_both_generations_of_names_are_written_and_read() -> None:
    spec = LLAMA2_7B.replace(norm="LayerNorm", norm_offset=True, norm_epsilon=1e-6)
    args = written(spec)
    old = {key: value for key, value in args.items() if not key.startswith("layernorm_")}
    new = {key: value for key, value in args.items() if key not in ("norm_epsilon", "apply_layernorm_1p")}
    assert read(spec, old) == read(spec, new) == spec


def test_rows_are_consistent() -> None:
    names = [name for row in ROWS for name in row.attrs]
    assert len(names) == len(set(names))
    assert not set(names) & set(CONSTANTS)
    assert len({row.fact for row in ROWS}) == len(ROWS)
    for i, row in enumerate(ROWS):
        assert not row.when or row.when in {other.fact for other in ROWS[:i]}
    for attr, unused, _ in UNSUPPORTED:
        assert CONSTANTS.get(attr) in (None, *unused)


def test_absent_attributes_have_the_defaults_of_megatron() -> None:
    least: dict[str, object] = {
        "num_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 64,
        "padded_vocab_size": 256, "position_embedding_type": "rope", "swiglu": True,
    }  # fmt: skip
    fields = spec_of(least, "test")
    assert fields == {
        "num_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 64,
        "ffn_hidden_size": 640,  # int(4 * 256 * 2 / 3 / 64) * 64
        "max_position_embeddings": 64, "seq_length": 64, "norm": "LayerNorm", "norm_epsilon": 1e-5,
        "norm_offset": False, "activation": "silu", "gated": True, "qkv_bias": True,
        "dense_bias": True, "mlp_bias": True, "tied": True,
        "rope": Rope(), "sliding_window": None,
    }  # fmt: skip
    assert spec_of({**least, "swiglu": False}, "test")["ffn_hidden_size"] == 1024
    assert spec_of({**least, "disable_bias_linear": True}, "test")["dense_bias"] is False
    # Without group_query_attention every release ignores the number of groups, whose default is 1.
    assert spec_of({**least, "group_query_attention": False, "num_query_groups": 1}, "test")["num_query_groups"] == 4
    assert "vocab_size" not in fields
    assert "vocab_size" not in spec_of({**least, "vocab_size": 257}, "test")
    assert spec_of({**least, "vocab_size": 131}, "test")["vocab_size"] == 131
    # Before position_embedding_type there was only the switch.
    old = {**least, "position_embedding_type": None, "use_rotary_position_embeddings": True}
    assert spec_of(old, "test")["rope"] == Rope()
    assert unsupported(old) == []


@pytest.mark.parametrize(
    ("stored", "window"), [((4095, 0), 4096), ([7, 0], 8), (7, 8), (None, None), ((-1, 0), None), ((-1, -1), None)]
)
def test_windows_in_all_spellings(stored: object, window: int | None) -> None:
    assert spec_of({**written(LLAMA2_7B), "window_size": stored}, "test")["sliding_window"] == window


def test_llama3_scaling_has_the_names_of_hugging_face() -> None:
    rope = spec_of(written(LLAMA32_1B), "test")["rope"]
    assert isinstance(rope, Rope)
    assert rope.kind == "llama3"
    assert rope.scaling == {
        "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip


class Inert:
    """Stands for an enum or class that was not unpickled."""

    def __repr__(self) -> str:
        return "<inert>"


def test_objects_that_do_not_count_are_ignored() -> None:
    args = {**written(LLAMA2_7B), "attention_backend": Inert(), "params_dtype": Inert(), "model_type": Inert()}
    assert read(LLAMA2_7B, args) == LLAMA2_7B
    assert unsupported(args) == []


@pytest.mark.parametrize(
    ("attr", "value", "said"),
    [
        ("num_layers", None, "no num_layers"),
        ("hidden_size", None, "no hidden_size"),
        ("num_attention_heads", None, "no num_attention_heads"),
        ("max_position_embeddings", None, "no max_position_embeddings"),
        ("padded_vocab_size", None, "args.padded_vocab_size is None"),
        ("hidden_size", "4096", "args.hidden_size is '4096', expected a whole number"),
        ("num_layers", True, "args.num_layers is True, expected a whole number"),
        ("normalization", Inert(), "args.normalization is <inert>, expected a string"),
        ("rotary_base", Inert(), "args.rotary_base is <inert>, expected a number"),
        ("window_size", "7,0", "expected a window"),
    ],
)
def test_wrong_attributes_are_named(attr: str, value: object, said: str) -> None:
    args = {**written(LLAMA2_7B), attr: value}
    if attr == "num_layers" and value is None:
        args["encoder_num_layers"] = None
    with pytest.raises(SourceError, match=r"^mp_rank_00: ") as caught:
        spec_of({**args, "layernorm_epsilon": 1e-5}, "mp_rank_00")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts": 8}, "mixture of experts"),
        ({"multi_latent_attention": True}, "latent"),
        ({"qk_layernorm": True}, "queries and keys"),
        ({"mtp_num_layers": 1}, "multi-token"),
        ({"position_embedding_type": "yarn", "use_rotary_position_embeddings": False}, "only rope"),
        ({"virtual_pipeline_model_parallel_size": 2}, "virtual"),
        ({"squared_relu": True, "swiglu": False}, "squared ReLU"),
        ({"quick_geglu": True, "swiglu": False}, "quick GELU"),
        ({"swiglu": False}, "GELU"),
        ({"hybrid_override_pattern": "M*-"}, "hybrid"),
        ({"heterogeneous_layers_config_path": "x.json"}, "differ in shape"),
        ({"window_attn_skip_freq": [1, 0]}, "some layers"),
        ({"window_size": (7, 7)}, "looks ahead"),
        ({"normalization": "L2Norm"}, "only RMSNorm"),
        ({"spec": ["module", "name"]}, "--spec"),
        ({"rotary_seq_len_interpolation_factor": 4, "use_rope_scaling": True}, "two rope scalings"),
    ],
)
def test_models_that_are_not_read_are_named(changes: dict[str, object], said: str) -> None:
    reasons = unsupported(written(LLAMA2_7B) | changes)
    assert len(reasons) == 1
    assert said in reasons[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"rope": Rope(kind="llama3", scaling={"factor": 8.0, **LLAMA3, "original_max_position_embeddings": 4096})},
            "8192",
        ),
        ({"rope": Rope(kind="llama3", scaling={"factor": 8.0})}, "8192"),
        ({"rope": Rope(kind="linear")}, "without a factor"),
        ({"rope": Rope(kind="yarn", scaling={"factor": 4.0})}, "yarn"),
        ({"rope": Rope(kind="longrope")}, "rope kind longrope"),
        ({"rope": None}, "learned absolute positions"),
        ({"activation": "gelu", "gated": False}, "activation gelu"),
        ({"activation": "gelu_tanh"}, "activation gelu_tanh"),
        ({"norm": "ScaleNorm"}, "norm ScaleNorm"),
        ({"model_type": "BERT"}, "model_type BERT"),
    ],
)
def test_refusals_name_the_property(changes: dict[str, Any], said: str) -> None:
    spec = LLAMA2_7B.replace(**changes)
    reasons = refusals(spec)
    assert len(reasons) == 1
    assert said in reasons[0]
    with pytest.raises(TargetError, match="cannot express"):
        written(spec)
    limits(spec)


def test_only_the_ratios_of_llama3_scaling_matter() -> None:
    same = {"factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 2.0, "original_max_position_embeddings": 4096}
    assert refusals(LLAMA2_7B.replace(rope=Rope(kind="llama3", scaling=same))) == []


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (LLAMA2_7B, []),
        (LLAMA31_8B, []),
        (QWEN2_7B, []),
        (LLAMA32_1B, ["uses 8 instead of 32.0"]),
        (MISTRAL_7B, ["--window-size exists from Megatron-LM 0.15"]),
        (
            LLAMA2_7B.replace(rope=Rope(kind="linear", scaling={"factor": 2.5})),
            ["Before Megatron-LM 0.19", "whole numbers"],
        ),
        (LLAMA2_7B.replace(rope=Rope(kind="dynamic", scaling={"factor": 2.0})), ["no dynamic rope"]),
        (LLAMA2_7B.replace(rope=Rope(10000.5)), ["restores 10000.5"]),
        (LLAMA2_7B.replace(norm_offset=True), ["--apply-layernorm-1p"]),
        (LLAMA2_7B.replace(qkv_bias=True, dense_bias=True), ["zeros in the checkpoint"]),
        (LLAMA2_7B.replace(qkv_bias=True, dense_bias=True, mlp_bias=True), []),
    ],
)
def test_limits(spec: ModelSpec, said: list[str]) -> None:
    found = limits(spec)
    assert len(found) == len(said)
    assert all(part in sentence for part, sentence in zip(said, found, strict=True))


@pytest.mark.parametrize(
    ("qkv", "dense", "mlp", "linear"),
    [(False, False, False, False), (True, False, False, False), (True, True, False, True), (False, False, True, True)],
)
def test_biases_of_the_megatron_model(qkv: bool, dense: bool, mlp: bool, linear: bool) -> None:
    spec = LLAMA2_7B.replace(qkv_bias=qkv, dense_bias=dense, mlp_bias=mlp)
    args = written(spec)
    assert linear_bias(spec) is args["add_bias_linear"] is linear
    assert qkv_bias(spec) is args["add_qkv_bias"] is (qkv or linear)
