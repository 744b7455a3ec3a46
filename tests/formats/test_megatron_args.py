"""The Namespace and the flags of known models, written by hand, and the laws of `formats.megatron_args`."""

from __future__ import annotations

import dataclasses
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
from ckptconv.spec import MLA, ModelSpec, MoE, Rope
from megatron_models import BERT, BIASED, IN_CODE, MLA_MODEL, MODELS, SMALL, V3_MOE

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
        "dense_bias": True, "mlp_bias": True, "tied": True, "model_type": "GPT",
        "rope": Rope(), "sliding_window": None, "window_layers": None, "rope_layers": None, "learned_positions": False,
        "sinks": False, "softmax_scale": None, "activation_clamp": None, "gate_offset": 0.0, "qk_norm": None,
        "mtp_layers": 0, "moe": None,
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
        ({"multi_latent_attention": True}, "latent attention without norms"),
        ({"multi_latent_attention": True, "qk_layernorm": True, "position_embedding_type": "learned_absolute",
          "use_rotary_position_embeddings": False}, "positions beside those"),
        ({"qk_layernorm": True, "normalization": "LayerNorm"}, "norms with biases on queries and keys"),
        ({"qk_l2_norm": True}, "L2 norms"),
        ({"position_embedding_type": "mrope", "use_rotary_position_embeddings": False}, "are read"),
        ({"softmax_type": "off-by-one"}, "a sink that is not trained"),
        ({"use_te_activation_func": True}, "Transformer Engine's activations"),
        ({"activation_func_clamp_value": 7.0}, "fused swiglu"),
        ({"activation_func_clamp_value": 7.0, "swiglu": False}, "without a gated MLP"),
        ({"enable_gpt_oss": True}, "numbers are in Megatron's code"),
        ({"moe_router_score_function": "sqrtsoftplus"}, "scores of the router"),
        ({"moe_router_topk_limited_devices": 2}, "by device"),
        ({"num_experts": 8, "moe_router_load_balancing_type": "sinkhorn"}, "by balance"),
        ({"num_experts": 8, "moe_router_topk": 6, "moe_router_group_topk": 2}, "the sum of their best 3 logits"),
        ({"num_experts": 8, "moe_router_topk": 4, "moe_router_group_topk": 2}, "the sum of their best 2 logits"),
        ({"moe_latent_size": 64}, "smaller space"),
        ({"moe_mlp_glu_interleave_size": 32}, "in turn"),
        ({"moe_single_grouped_weight": True}, "in one tensor"),
        ({"mla_down_proj_fusion": True}, "in one tensor"),
        ({"mtp_use_repeated_layer": True}, "again and again"),
        ({"hybrid_override_pattern": "M*-"}, "hybrid"),
        ({"heterogeneous_layers_config_path": "x.json"}, "differ in shape"),
        ({"apply_residual_connection_post_layernorm": True}, "after the norm"),
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
        ({"rope": Rope(kind="yarn")}, "without a factor"),
        ({"rope": Rope(kind="yarn", scaling={"factor": 4.0}, percent=0.5)}, "part of the head"),
        ({"rope": Rope(kind="yarn", scaling={"factor": 4.0}, interleaved=True)}, "interleaved"),
        ({"rope": Rope(kind="yarn", scaling={"factor": 1.0, "attention_factor": 1.2})}, "attention_factor 1.2"),
        ({"rope": Rope(kind="longrope")}, "rope kind longrope"),
        ({"learned_positions": True}, "learned positions beside rope"),
        ({"activation": "xielu"}, "activation xielu"),
        ({"activation_clamp": 7.0, "gated": False}, "without gate"),
        ({"norm": "ScaleNorm"}, "norm ScaleNorm"),
        ({"norm": "LayerNorm", "qk_norm": "head"}, "LayerNorm on queries and keys"),
        ({"model_type": "T5"}, "model_type T5"),
        ({"model_type": "BERT", "rope": None, "learned_positions": True}, "language model head False"),
        ({"position_offset": 2}, "2 rows of positions"),
        ({"encoder_layers": 4}, "an encoder"),
        ({"num_tokentypes": 2}, "token types"),
        ({"alibi": True}, "alibi"),
        ({"residual_multiplier": 0.2}, "residuals multiplied by 0.2"),
        ({"logit_multiplier": 0.2}, "logits multiplied by 0.2"),
        ({"moe": MoE(8, 2, 8, (1,) * 32, score="sigmoid", normalize=False)}, "norm_topk_prob False"),
        ({"moe": MoE(8, 1, 8, (1,) * 32, score="sigmoid")}, "norm_topk_prob True and top 1"),
        ({"moe": MoE(8, 1, 8, (1,) * 32)}, "one expert per token"),
        ({"moe": MoE(8, 2, 8, (1,) * 32, score_bias=True)}, "score correction bias"),
        ({"moe": MoE(8, 2, 8, (1,) * 32, score="relu")}, "router scores relu"),
        ({"moe": MoE(8, 6, 8, (1,) * 32, normalize=False, num_groups=4, topk_groups=3)}, "by max"),
        ({"moe": MoE(9, 4, 8, (1,) * 32, normalize=False, num_groups=4, topk_groups=4)}, "of 4 groups"),
        ({"moe": MoE(8, 4, 8, (1,) * 32, num_groups=4, topk_groups=2, group_score="top2")}, "adds logits"),
        ({"moe": MoE(8, 2, 8, (1,) * 32), "dense_bias": True, "qkv_bias": True}, "biases on some of"),
        ({"moe": MoE(8, 2, 8, (1,) * 32, router_bias=True, shared_ffn_hidden_size=8), "dense_bias": True,
          "qkv_bias": True, "mlp_bias": True}, "shared experts beside linear biases"),
    ],
)  # fmt: skip
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


EVERYTHING = {**MODELS, **IN_CODE}


@pytest.mark.parametrize("name", EVERYTHING)
def test_models_are_read_back(name: str) -> None:
    spec = EVERYTHING[name]
    args = written(spec, 256, tp=1)
    assert refusals(spec) == []
    assert unsupported(args) == []
    assert read(spec, args) == spec


#: name -> attributes, flags present, flags absent; by hand from `mcore-families`' tables and Megatron's parser.
SAID: dict[str, tuple[dict[str, object], list[str], list[str]]] = {
    "mixtral": (
        {"num_experts": 8, "moe_router_topk": 2, "moe_layer_freq": 1, "moe_ffn_hidden_size": 88,
         "moe_router_pre_softmax": False, "sequence_parallel": True, "expert_tensor_parallel_size": 2},
        ["--num-experts 8", "--moe-router-topk 2", "--moe-layer-freq 1", "--moe-ffn-hidden-size 88"],
        ["--moe-router-pre-softmax", "--moe-router-dtype", "--moe-shared-expert-intermediate-size"],
    ),
    "qwen2 moe": (
        {"moe_layer_freq": [0, 1, 0, 1], "moe_router_pre_softmax": True, "moe_shared_expert_gate": True,
         "add_qkv_bias": True, "add_bias_linear": False, "ffn_hidden_size": 88, "moe_ffn_hidden_size": 24},
        ["--moe-layer-freq [0,1,0,1]", "--moe-router-pre-softmax", "--moe-shared-expert-gate",
         "--moe-shared-expert-intermediate-size 40"],
        [],
    ),
    "deepseek v3": (
        {"multi_latent_attention": True, "qk_layernorm": True, "rope_type": "yarn", "rotary_scaling_factor": 40.0,
         "mscale": 1.0, "mscale_all_dim": 1.0, "q_lora_rank": 20, "kv_lora_rank": 18, "qk_head_dim": 8,
         "qk_pos_emb_head_dim": 6, "v_head_dim": 10, "rotary_interleaved": False, "apply_rope_fusion": False,
         "position_embedding_type": "rope", "moe_router_num_groups": 4, "moe_router_group_topk": 2,
         "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "mtp_num_layers": 1,
         "moe_router_topk_scaling_factor": 2.5, "moe_router_dtype": "fp32", "moe_layer_freq": [0, 1, 1, 1],
         "original_max_position_embeddings": 4096, "group_query_attention": False},
        ["--multi-latent-attention", "--qk-layernorm", "--rope-type yarn", "--rotary-scaling-factor 40.0",
         "--mtp-num-layers 1", "--moe-router-dtype fp32", "--no-rope-fusion"],
        ["--rotary-interleaved", "--yarn-beta-fast", "--group-query-attention"],
    ),
    "moonlight": ({"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale_all_dim": 0.0},
                  ["--rope-type rope", "--no-rope-fusion"], ["--mscale-all-dim"]),
    "gpt-oss": (
        {"quick_geglu": True, "swiglu": False, "glu_linear_offset": 1.0, "activation_func_clamp_value": 7.0,
         "softmax_type": "learnable", "window_size": (7, 0), "window_attn_skip_freq": [1, 0, 1, 0],
         "add_bias_linear": True, "add_qkv_bias": True, "expert_tensor_parallel_size": 1,
         "position_embedding_type": "yarn", "use_rotary_position_embeddings": False, "rotary_base": 150000,
         "rotary_scaling_factor": 32.0, "yarn_original_max_position_embeddings": 4096, "yarn_beta_fast": 32.0,
         "yarn_beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0, "yarn_correction_range_round_to_int": False,
         "bias_gelu_fusion": True},
        ["--position-embedding-type yarn", "--quick-geglu", "--softmax-type learnable",
         "--window-attn-skip-freq [1,0,1,0]", "--no-yarn-correction-range-round-to-int"],
        ["--no-bias-gelu-fusion", "--disable-bias-linear", "--no-rope-freq"],
    ),
    "gpt2": (
        {"position_embedding_type": "learned_absolute", "use_rotary_position_embeddings": False,
         "bias_gelu_fusion": True, "swiglu": False, "normalization": "LayerNorm", "add_bias_linear": True},
        ["--position-embedding-type learned_absolute"],
        ["--no-bias-gelu-fusion", "--swiglu", "--disable-bias-linear", "--rotary-base", "--norm-epsilon x"],
    ),
    "gpt neox, serial": ({"bias_gelu_fusion": False}, ["--no-bias-gelu-fusion", "--rotary-percent 0.5"], ["--swiglu"]),
    "erf without biases": ({"bias_gelu_fusion": False}, ["--disable-bias-linear"], ["--no-bias-gelu-fusion"]),
    "nope layers": ({"no_rope_freq": [0, 0, 0, 1]}, ["--no-rope-freq [0,0,0,1]"], []),
    "no positions": ({"position_embedding_type": "none"}, ["--position-embedding-type none"], ["--rotary-base"]),
    "nemotron": ({"squared_relu": True, "apply_layernorm_1p": True},
                 ["--squared-relu", "--apply-layernorm-1p"], ["--swiglu", "--no-bias-gelu-fusion"]),
    "squared relu, biases": ({}, ["--squared-relu", "--no-bias-gelu-fusion"], []),
    "quick geglu, biases": ({}, ["--quick-geglu", "--no-bias-gelu-fusion"], []),
    "clamped swiglu": ({"bias_swiglu_fusion": False}, ["--swiglu", "--no-bias-swiglu-fusion"], []),
    "opt": ({"activation_func": "relu", "gated_linear_unit": False}, ["--no-bias-gelu-fusion"], []),
    "gemma without caps": (
        {"softmax_scale": 0.0625, "activation_func": "gelu_tanh", "gated_linear_unit": True}, [], [],
    ),
    "kimi k2": ({"beta_fast": 1.0, "rotary_base": 50000}, [], ["--beta-fast"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_what_models_say(name: str) -> None:
    spec, (attributes, present, absent) = EVERYTHING[name], SAID[name]
    args = written(spec, 256, tp=1 if linear_bias(spec) else 2)
    assert {key: args.get(key) for key in attributes} == attributes
    lines = spelled(spec)
    assert set(present) <= set(lines)
    assert not {line.split()[0] for line in lines} & set(absent)


def test_settings_without_a_flag_are_only_there_when_they_say_something() -> None:
    """core_transformer_config_from_args would take a None for a function."""
    names = {"activation_func", "gated_linear_unit", "softmax_scale"}
    assert not names & set(written(LLAMA2_7B))
    assert names <= set(written(IN_CODE["gemma without caps"]))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("opt", ["args.activation_func = torch.nn.functional.relu before"]),
        ("geglu erf", ["args.activation_func = torch.nn.functional.gelu and args.gated_linear_unit = True"]),
        ("gelu tanh without biases", ["approximate='tanh') before"]),
        ("gemma without caps", ["--window-size", "--window-attn-skip-freq", "--apply-layernorm-1p", "gated_linear_unit",
                                "args.softmax_scale = 0.0625"]),
        ("kimi k2", ["use 0.14", "args.beta_fast"]),
        ("deepseek v3", ["use 0.14"]),
        ("moonlight", ["--norm-epsilon 1e-05 in the norms of the latent"]),
        ("deepseek v2", ["use 0.14"]),
        ("gpt-oss", ["0.19", "--window-size", "--window-attn-skip-freq", "--softmax-type", "--quick-geglu", "router"]),
        ("nope layers", ["--no-rope-freq exists from Megatron-LM 0.13"]),
        ("gpt2", []),
        ("starcoder2", ["--window-size"]),
        ("mixtral", []),
        ("qwen2 moe", ["--moe-shared-expert-gate exists from Megatron-LM 0.16"]),
    ],
)  # fmt: skip
def test_limits_of_models(name: str, said: list[str]) -> None:
    found = limits(EVERYTHING[name])
    assert len(found) == len(said)
    assert all(part in sentence for part, sentence in zip(said, found, strict=True))


def test_limits_of_multi_token_prediction() -> None:
    assert "before 0.19" in limits(BIASED.replace(rope=None, learned_positions=True, mtp_layers=1))[0]
    assert "validate_args" in limits(MODELS["yarn"].replace(mtp_layers=1))[-1]


@pytest.mark.parametrize(
    "changes",
    [
        {"norms": "sandwich"}, {"norms": "output"}, {"parallel_residual": True},
        {"parallel_residual": True, "shared_norm": True}, {"qk_norm": "full"}, {"attention_softcap": 50.0},
        {"logit_softcap": 30.0}, {"embedding_multiplier": 8.0}, {"local_rope": Rope()},
    ],
)  # fmt: skip
def test_custom_layers_lift_what_they_provide(changes: dict[str, Any]) -> None:
    spec = LLAMA2_7B.replace(**changes)
    assert len(refusals(spec)) == 1
    assert refusals(spec, custom=True) == []
    with pytest.raises(TargetError, match="cannot express"):
        written(spec)
    assert written(spec, spec_module=("module", "object"))["spec"] == ["module", "object"]
    assert "--spec module object" in spelled(spec, spec_module=("module", "object"))


def test_custom_layers_do_not_lift_the_rest() -> None:
    assert refusals(LLAMA2_7B.replace(alibi=True), custom=True)
    assert limits(SMALL.replace(softmax_scale=0.1))
    assert limits(SMALL.replace(softmax_scale=0.1), custom=True) == []


def test_experts_with_biases_have_one_tensor_rank() -> None:
    spec = MODELS["gpt-oss"]
    assert refusals(spec) == []
    assert "tensor parallel size 2" in refusals(spec, tp=2)[0]
    with pytest.raises(TargetError, match="experts with biases"):
        written(spec, 256, tp=2)
    assert refusals(MODELS["mixtral"], tp=2) == []


@pytest.mark.parametrize(
    ("stored", "window", "layers"),
    [
        (None, 8, None), (2, 8, (1, 0, 1, 0)), (4, 8, (1, 1, 1, 0)), (1, None, None), (5, 8, None),
        ([0, 1, 1, 0], 8, (0, 1, 1, 0)), ((1, 1, 1, 1), 8, None), ([0, 0, 0, 0], None, None),
    ],
)  # fmt: skip
def test_windows_on_some_layers(stored: object, window: int | None, layers: tuple[int, ...] | None) -> None:
    """n: every layer but those whose number from 1 is a multiple of n (core/transformer/utils.py)."""
    found = spec_of({**written(SMALL, 256), "window_size": (7, 0), "window_attn_skip_freq": stored}, "test")
    assert (found["sliding_window"], found["window_layers"]) == (window, layers)


@pytest.mark.parametrize(
    ("stored", "layers"),
    [(None, None), (0, None), (2, (1, 0, 1, 0)), (4, (1, 1, 1, 0)), (1, (0, 0, 0, 0)), ([0, 1, 0, 0], (1, 0, 1, 1)),
     ([0, 0, 0, 0], None)],
)  # fmt: skip
def test_layers_without_rope(stored: object, layers: tuple[int, ...] | None) -> None:
    """n: none on every nth; a list has 1 where there is none (transformer_config.py, attention.py)."""
    assert spec_of({**written(SMALL, 256), "no_rope_freq": stored}, "test")["rope_layers"] == layers


@pytest.mark.parametrize("attr", ["window_attn_skip_freq", "moe_layer_freq"])
def test_a_frequency_of_nothing_is_named(attr: str) -> None:
    args = {**written(MODELS["mixtral"], 256), "window_size": (7, 0), attr: 0}
    with pytest.raises(SourceError, match=f"args.{attr} is 0"):
        spec_of(args, "test")


@pytest.mark.parametrize(("stored", "layers"), [(1, (1, 1, 1, 1)), (2, (1, 0, 1, 0)), ([0, 1, 1, 1], (0, 1, 1, 1))])
def test_layers_with_experts(stored: object, layers: tuple[int, ...]) -> None:
    """n: every nth layer counted from 0."""
    moe = spec_of({**written(MODELS["mixtral"], 256), "moe_layer_freq": stored}, "test")["moe"]
    assert isinstance(moe, MoE)
    assert moe.layers == layers


class Function:
    """Stands for a function that was not unpickled."""

    module, name = "torch._C._nn", "relu"


@pytest.mark.parametrize(
    ("stored", "activation", "gated"),
    [
        ({}, "gelu_tanh", False),
        ({"bias_gelu_fusion": None}, "gelu_tanh", False),
        ({"bias_gelu_fusion": False}, "gelu", False),
        ({"add_bias_linear": False}, "gelu", False),
        ({"disable_bias_linear": True}, "gelu", False),
        ({"activation_func": Function()}, "relu", False),
        ({"gated_linear_unit": True}, "gelu_tanh", True),
        ({"gated_linear_unit": True, "bias_gelu_fusion": False}, "gelu", True),
        ({"squared_relu": True}, "squared_relu", False),
        ({"quick_geglu": True}, "quick_gelu", True),
    ],
)
def test_activations_as_megatron_takes_them(stored: dict[str, object], activation: str, gated: bool) -> None:
    """core_transformer_config_from_args and mlp.py: what F.gelu is depends on the fusion."""
    found = spec_of(written(MODELS["gpt2"], 256) | stored, "test")
    assert (found["activation"], found["gated"]) == (activation, gated)


def test_an_unknown_function_is_named() -> None:
    with pytest.raises(SourceError, match="activation_func is <inert>, expected an activation function"):
        spec_of({**written(MODELS["gpt2"], 256), "activation_func": Inert()}, "test")


def test_yarn_of_releases_without_a_rope_type() -> None:
    """Up to 0.13 there was no --rope-type, the type was yarn, and it started from max_position_embeddings."""
    args = written(MODELS["deepseek v3"], 256)
    del args["rope_type"]
    rope = spec_of(args, "test")["rope"]
    assert isinstance(rope, Rope)
    assert (rope.kind, rope.scaling["original_max_position_embeddings"]) == ("yarn", 163840)
    args["rotary_scaling_factor"] = 1.0
    assert spec_of(args, "test")["rope"] == Rope(10000.0, interleaved=True)


@pytest.mark.parametrize(
    ("latent", "given", "one", "every"),
    [
        (False, {}, 1.0, 0.0),
        (False, {"mscale": 0.7}, 1.0, 0.0),  # transformers reads it only together with mscale_all_dim
        (False, {"mscale": 0.7, "mscale_all_dim": 0.5}, 0.7, 0.5),
        (False, {"mscale_all_dim": 0.5}, 1.0, 0.0),
        (False, {"attention_factor": 1.0}, 0.0, 0.0),
        (False, {"attention_factor": 2.0, "mscale": 0.7, "mscale_all_dim": 0.5}, 2.1714724095162588, 0.0),
        (True, {"mscale": 0.707, "mscale_all_dim": 0.707}, 0.707, 0.707),
        (True, {"mscale_all_dim": 0.5}, 1.7302585092994045, 0.5),
        (True, {"mscale": 1.0, "mscale_all_dim": 0.0}, 1.0, 0.0),
    ],
)
def test_factors_of_yarn(latent: bool, given: dict[str, float], one: float, every: float) -> None:
    """factor 100, so L = 0.46051701859880917; cos and sin get what transformers' attention factor is."""
    scaling = {"factor": 100.0, "original_max_position_embeddings": 4096, **given}
    model = MLA_MODEL if latent else SMALL
    args = written(model.replace(rope=Rope(kind="yarn", scaling=scaling, interleaved=latent)), 256)
    assert args["mscale"] == pytest.approx(one)
    assert args["mscale_all_dim"] == every
    again = spec_of(args, "test")["rope"]
    assert isinstance(again, Rope)
    twice = written(model.replace(rope=again), 256)
    assert twice["mscale"] == pytest.approx(one)
    assert twice["mscale_all_dim"] == every


def test_bert() -> None:
    args = written(BERT, 256)
    want = {"bert_binary_head": True, "position_embedding_type": "learned_absolute", "bias_gelu_fusion": False,
            "spec": None}  # fmt: skip
    assert {key: args[key] for key in want} == want
    assert refusals(BERT) == []
    assert ["up to 0.17" in sentence for sentence in limits(BERT)] == [True]
    assert {"--norm-epsilon 1e-12", "--no-bias-gelu-fusion"} <= set(again(BERT)) <= set(spelled(BERT))
    assert "--bert-no-binary-head" not in spelled(BERT)
    local = written(BERT, 256, transformer_impl="local")
    assert local["spec"] == ["local"]
    assert "--spec local" in spelled(BERT, transformer_impl="local")
    assert unsupported(local, "BERT") == []
    assert "--spec" in unsupported(local)[0]
    assert ModelSpec(**{"family": BERT.family, "dtype": "bfloat16", **spec_of(local, "x", "BERT")}) == BERT  # type: ignore[arg-type]


def test_bert_without_a_binary_head_has_no_token_types() -> None:
    spec = BERT.replace(num_tokentypes=0, binary_head=False, pooler=False)
    assert "--bert-no-binary-head" in spelled(spec)
    assert spec_of(written(spec, 256), "x", "BERT")["num_tokentypes"] == 0
    for other in (BERT.replace(pooler=False), BERT.replace(lm_head=False), BERT.replace(binary_head=False)):
        assert "a BERT with" in refusals(other)[0]
    masked = BERT.replace(binary_head=False, pooler=False)
    assert refusals(masked) == []
    assert "num_tokentypes = 2" in limits(masked)[1]
    assert "side" in refusals(BERT.replace(parallel_residual=True))[0]
    assert refusals(BERT.replace(norms="post"))
    assert refusals(BERT.replace(norms="post"), custom=True) == []


SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "vocab_size",
         "max_position_embeddings", "seq_length")  # fmt: skip
#: field -> a value other than SMALL's or its default.
OTHER: dict[str, Any] = {
    **dict.fromkeys(SIZES, 28), "num_query_groups": 1, "family": "x", "dtype": "float32", "model_type": "T5",
    "norm": "LayerNorm", "norm_epsilon": 1e-7, "norm_offset": True, "norms": "sandwich", "qk_norm": "head",
    "activation": "relu", "gated": False, "activation_clamp": 7.0, "gate_offset": 1.0, "qkv_bias": True,
    "dense_bias": True, "mlp_bias": True, "tied": True, "rope": Rope(1.0), "rope_layers": (1, 0, 0, 1),
    "local_rope": Rope(), "learned_positions": True, "alibi": True, "alibi_scaled": True, "sliding_window": 5,
    "window_layers": (1, 0, 0, 0), "sinks": True, "softmax_scale": 0.1, "attention_softcap": 1.0, "logit_softcap": 1.0,
    "embedding_multiplier": 2.0, "residual_multiplier": 2.0, "logit_multiplier": 2.0, "parallel_residual": True,
    "shared_norm": True, "moe": MoE(4, 2, 8, (1, 1, 0, 1)), "mla": MLA(None, 8, 4, 4, 12), "mtp_layers": 2,
    "num_tokentypes": 2, "lm_head": True, "head_activation": "relu", "binary_head": True, "pooler": True,
    "norm_bias": False, "qkv_clip": 8.0,
    "position_offset": 2, "encoder_layers": 2, "relative_buckets": 8, "relative_distance": 16,
}  # fmt: skip
MOE_OTHER: dict[str, Any] = {
    "num_experts": 12, "topk": 5, "ffn_hidden_size": 7, "layers": (1, 1, 1, 1), "score": "softmax", "normalize": False,
    "scaling_factor": 3.0, "score_bias": False, "num_groups": 2, "topk_groups": 1, "group_score": "max",
    "router_bias": True, "router_fp32": False, "shared_ffn_hidden_size": 9, "shared_gate": True,
}  # fmt: skip
MLA_OTHER: dict[str, Any] = {
    "q_lora_rank": 3, "kv_lora_rank": 3, "qk_head_dim": 3, "qk_rope_head_dim": 4, "v_head_dim": 10,
}  # fmt: skip
ROPE_OTHER: dict[str, Any] = {
    "theta": 7.0, "kind": "linear", "scaling": {"factor": 3.0}, "percent": 0.25, "interleaved": True,
}  # fmt: skip


def kept_or_refused(spec: ModelSpec) -> bool:
    return bool(refusals(spec)) or read(spec, written(spec, spec.vocab_size, tp=1)) == spec


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ModelSpec)])
def test_no_property_is_lost(field: str) -> None:
    """Whatever a spec says is in the Namespace, or the spec is refused, or a sentence tells what becomes of it."""
    assert OTHER[field] != getattr(SMALL, field)
    spec = SMALL.replace(**{field: OTHER[field]} | ({"moe": None} if field == "num_layers" else {}))
    if field in ("dense_bias", "mlp_bias"):
        assert "zeros" in limits(spec)[0]
    elif field not in ("alibi_scaled", "window_layers", "mla", "norm_bias"):  # nothing alone: see below
        assert kept_or_refused(spec)


def test_no_property_is_lost_together() -> None:
    assert kept_or_refused(SMALL.replace(sliding_window=5, window_layers=(1, 0, 0, 0)))
    assert refusals(SMALL.replace(alibi=True, alibi_scaled=True))
    assert refusals(SMALL.replace(norm="LayerNorm", norm_bias=False))


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(MoE)])
def test_no_property_of_experts_is_lost(field: str) -> None:
    names = ("num_groups", "topk_groups", "group_score") if field in ("num_groups", "topk_groups") else (field,)
    for base in (V3_MOE, MoE(8, 2, 8, (1, 0, 1, 0))):
        assert kept_or_refused(SMALL.replace(moe=dataclasses.replace(base, **{n: MOE_OTHER[n] for n in names})))
    assert MOE_OTHER[field] != getattr(V3_MOE, field)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(MLA)])
def test_no_property_of_latent_attention_is_lost(field: str) -> None:
    assert MLA_MODEL.mla is not None
    spec = MLA_MODEL.replace(mla=dataclasses.replace(MLA_MODEL.mla, **{field: MLA_OTHER[field]}))
    assert kept_or_refused(spec)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Rope)])
def test_no_property_of_rope_is_lost(field: str) -> None:
    rope = Rope(kind="linear", scaling={"factor": 2.0}) if field == "scaling" else Rope()
    scaling = {"factor": 2.0} if field == "kind" else rope.scaling
    rope = dataclasses.replace(rope, **{"scaling": scaling, field: ROPE_OTHER[field]})
    for model in (SMALL, MLA_MODEL):
        changed = dataclasses.replace(rope, interleaved=True) if model.mla else rope
        assert kept_or_refused(model.replace(rope=changed))
