"""What `formats.megatron_args` writes, sent through Megatron-LM's own parser, once from a checkpoint and once as flags.

Needs one or more Megatron-LM checkouts in CKPTCONV_MEGATRON_LM, separated by ':' (run with core_v0.12.0, 0.13.0,
0.14.0, 0.15.0, 0.16.1, 0.17.1, 0.18.0 and 0.19.0). Each release runs in a process of its own (trainer.py); the
expected values below are written from the ModelSpec by hand, not with the tables under test.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from ckptconv.formats import megatron_args
from ckptconv.spec import ModelSpec, Rope
from megatron_models import BERT, IN_CODE, MODELS, SMALL

CHECKOUTS = [path for path in os.environ.get("CKPTCONV_MEGATRON_LM", "").split(":") if path]
pytestmark = pytest.mark.skipif(not CHECKOUTS, reason="CKPTCONV_MEGATRON_LM names no Megatron-LM checkout")

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SPECS = {
    "llama 2 7B": SMALL.replace(
        num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, num_query_groups=32,
        kv_channels=128, vocab_size=32000, max_position_embeddings=4096, seq_length=4096,
    ),
    "llama 3.1 8B": SMALL.replace(
        num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
        kv_channels=128, vocab_size=128256, max_position_embeddings=131072, seq_length=8192,
        rope=Rope(500000.0, "llama3", {"factor": 8.0, **LLAMA3}),
    ),
    "llama 3.2 1B": SMALL.replace(
        num_layers=16, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=32, num_query_groups=8,
        kv_channels=64, vocab_size=128256, max_position_embeddings=131072, seq_length=8192, tied=True,
        rope=Rope(500000.0, "llama3", {"factor": 32.0, **LLAMA3}),
    ),
    "mistral 7B": SMALL.replace(
        num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
        kv_channels=128, vocab_size=32000, max_position_embeddings=32768, seq_length=8192, sliding_window=4096,
    ),
    "qwen2 7B": SMALL.replace(
        num_layers=28, hidden_size=3584, ffn_hidden_size=18944, num_attention_heads=28, num_query_groups=4,
        kv_channels=128, vocab_size=152064, max_position_embeddings=131072, seq_length=8192, norm_epsilon=1e-6,
        qkv_bias=True, rope=Rope(1000000.0),
    ),
    "code llama 7B": SMALL.replace(rope=Rope(1000000.0), vocab_size=32016),
    "all biases": SMALL.replace(qkv_bias=True, dense_bias=True, mlp_bias=True),
    "one query group": SMALL.replace(num_query_groups=1),
    "wide heads, float16": SMALL.replace(kv_channels=32, dtype="float16"),
    "linear rope": SMALL.replace(rope=Rope(10000.0, "linear", {"factor": 4.0})),
    "odd rope, float32": SMALL.replace(rope=Rope(10000.0, percent=0.5, interleaved=True), dtype="float32"),
    "layer norm": SMALL.replace(norm="LayerNorm", norm_epsilon=1e-6, tied=True),
    "norm offset": SMALL.replace(norm="LayerNorm", norm_offset=True),
    **MODELS,
    "gpt-oss without yarn": MODELS["gpt-oss"].replace(rope=Rope(150000.0)),
}  # fmt: skip
#: name -> tp, pp, ep
LAYOUTS = {
    "llama 3.1 8B": (2, 4, 1), "mistral 7B": (4, 1, 1), "qwen2 7B": (1, 2, 1), "mixtral": (2, 1, 4),
    "qwen2 moe": (1, 2, 2), "deepseek v3": (2, 1, 2), "gpt2": (2, 2, 1), "gpt-oss": (1, 1, 4),
}  # fmt: skip
RUN = [
    "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-4", "--use-cpu-initialization",
    "--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--attention-backend", "unfused",
    "--no-load-optim", "--no-load-rng",
]  # fmt: skip
TOKENIZER: dict[str, Any] = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "/none/such"}


@dataclass(frozen=True)
class Wanted:
    """A model in Megatron's words: TransformerConfig fields, Namespace attributes, GPTModel arguments."""

    config: dict[str, Any]
    args: dict[str, Any]
    model: dict[str, Any]


def since(spec: ModelSpec) -> tuple[int, int]:
    """The first release whose trainer can build a model, but for a window, as old trainers do without."""
    rope = spec.rope
    if rope and rope.kind == "yarn":
        return (0, 14) if spec.mla else (0, 19)
    if spec.moe and spec.moe.shared_gate:
        return (0, 16)
    if spec.sinks or spec.activation == "quick_gelu" or spec.activation_clamp or spec.window_layers:
        return (0, 15)
    return (0, 13) if spec.rope_layers else (0, 12)


def wanted_attention(spec: ModelSpec, release: tuple[int, int]) -> dict[str, Any]:
    """TransformerConfig fields of windows, sinks and latent attention."""
    latent = spec.mla is not None
    found: dict[str, Any] = {"qk_layernorm": latent or spec.qk_norm == "head", "multi_latent_attention": latent}
    if release >= (0, 13):
        found["no_rope_freq"] = [0 if has else 1 for has in spec.rope_layers] if spec.rope_layers else None
    if release >= (0, 15):
        window = None if spec.sliding_window is None else [spec.sliding_window - 1, 0]
        found |= {
            "window_size": window, "softmax_type": "learnable" if spec.sinks else "vanilla", "softmax_scale": None,
            "window_attn_skip_freq": list(spec.window_layers) if spec.window_layers else None,
        }  # fmt: skip
    if spec.mla and spec.rope:
        yarn = spec.rope.kind == "yarn"
        found |= {
            "q_lora_rank": spec.mla.q_lora_rank, "kv_lora_rank": spec.mla.kv_lora_rank,
            "qk_head_dim": spec.mla.qk_head_dim, "qk_pos_emb_head_dim": spec.mla.qk_rope_head_dim,
            "v_head_dim": spec.mla.v_head_dim, "apply_rope_fusion": False, "rotary_base": spec.rope.theta,
            "rotary_scaling_factor": spec.rope.scaling["factor"] if yarn else 1.0,
        }  # fmt: skip
        if release >= (0, 14):
            found |= {"rope_type": "yarn" if yarn else "rope", "beta_fast": 32, "beta_slow": 1}
            found["original_max_position_embeddings"] = 4096
        if yarn:
            found |= {name: spec.rope.scaling[name] for name in ("mscale", "mscale_all_dim")}
    elif spec.rope and spec.rope.kind == "yarn":
        scaling = spec.rope.scaling
        found |= {f"yarn_{name}": scaling[name] for name in ("beta_fast", "beta_slow")} | {
            "yarn_rotary_scaling_factor": scaling["factor"], "yarn_mscale_all_dim": 0.0,
            "yarn_original_max_position_embeddings": scaling["original_max_position_embeddings"],
            "yarn_correction_range_round_to_int": scaling.get("truncate", True),
            # (m L + 1) is 1.3 with L = 0.1 ln 4; without an attention_factor m is 1.
            "yarn_mscale": pytest.approx(2.1640425613334453) if "attention_factor" in scaling else 1.0,
        }  # fmt: skip
    return found


def wanted_mlp(spec: ModelSpec, release: tuple[int, int]) -> dict[str, Any]:
    """TransformerConfig fields of activations and experts."""
    functions = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu", "squared_relu": "squared_relu",
                 "quick_gelu": "quick_gelu"}  # fmt: skip
    found: dict[str, Any] = {"activation_func": functions[spec.activation], "gated_linear_unit": spec.gated}
    if spec.activation in ("gelu", "gelu_tanh"):
        found["bias_activation_fusion"] = spec.activation == "gelu_tanh"
    if spec.activation == "silu" and spec.activation_clamp:
        found["bias_activation_fusion"] = False
    if release >= (0, 15):
        found |= {"activation_func_clamp_value": spec.activation_clamp, "glu_linear_offset": spec.gate_offset}
    if moe := spec.moe:
        dense = 0 in moe.layers
        found |= {
            "moe_layer_freq": list(moe.layers) if dense else 1, "moe_ffn_hidden_size": moe.ffn_hidden_size,
            "moe_router_topk": moe.topk, "moe_router_score_function": moe.score,
            "moe_router_pre_softmax": moe.score == "softmax" and not moe.normalize,
            "moe_router_enable_expert_bias": moe.score_bias, "moe_router_num_groups": moe.num_groups,
            "moe_router_topk_scaling_factor": None if moe.scaling_factor == 1 else moe.scaling_factor,
            "moe_router_group_topk": moe.topk_groups, "moe_router_dtype": "fp32" if moe.router_fp32 else None,
            "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size,
        }  # fmt: skip
        if release >= (0, 16):
            found["moe_shared_expert_gate"] = moe.shared_gate
    return found


def wanted(spec: ModelSpec, tp: int, pp: int, ep: int, release: tuple[int, int]) -> Wanted:
    rope, all_biases = spec.rope or Rope(), spec.dense_bias or spec.mlp_bias
    padded = (spec.vocab_size + 128 * tp - 1) // (128 * tp) * (128 * tp)
    position = "learned_absolute" if spec.learned_positions else "rope" if spec.rope else "none"
    if rope.kind == "yarn" and spec.mla is None:
        position = "yarn"
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    config = {name: getattr(spec, name) for name in names} | {
        "normalization": spec.norm,
        "layernorm_epsilon": spec.norm_epsilon, "layernorm_zero_centered_gamma": spec.norm_offset,
        "add_bias_linear": all_biases, "add_qkv_bias": all_biases or spec.qkv_bias, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "rotary_interleaved": rope.interleaved and spec.mla is None,
        "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": tp, "num_moe_experts": spec.moe.num_experts if spec.moe else None,
        "mtp_num_layers": spec.mtp_layers or None, "sequence_parallel": spec.moe is not None and tp > 1,
        "apply_query_key_layer_scaling": False, "bf16": spec.dtype == "bfloat16", "fp16": spec.dtype == "float16",
        "params_dtype": f"torch.{spec.dtype}", "persist_layer_norm": False,
        **wanted_attention(spec, release), **wanted_mlp(spec, release),
    }  # fmt: skip
    args = {
        "seq_length": spec.seq_length, "max_position_embeddings": spec.max_position_embeddings,
        "untie_embeddings_and_output_weights": not spec.tied, "position_embedding_type": position,
        "rotary_base": rope.theta, "rotary_percent": rope.percent, "use_rope_scaling": rope.kind == "llama3",
        "rope_scaling_factor": rope.scaling["factor"] if rope.kind == "llama3" else 8.0,
        "rotary_seq_len_interpolation_factor": rope.scaling["factor"] if rope.kind == "linear" else None,
        "padded_vocab_size": padded, "swiglu": (spec.activation, spec.gated) == ("silu", True),
        "group_query_attention": spec.num_query_groups < spec.num_attention_heads,
        "transformer_impl": "local", "ckpt_format": "torch", **TOKENIZER,
    }  # fmt: skip
    model = {
        "vocab_size": padded, "max_sequence_length": spec.max_position_embeddings, "rotary_base": rope.theta,
        "rotary_percent": rope.percent, "rope_scaling": rope.kind == "llama3", "position_embedding_type": position,
        "share_embeddings_and_output_weights": spec.tied,
    }  # fmt: skip
    if spec.mla and release >= (0, 19):
        del model["rotary_base"]  # latent attention reads that of the config
    return Wanted(config, args, model)


def words(lines: list[str]) -> list[str]:
    return [word for line in lines for word in line.split(" ", 1)]


def save(folder: Path, attributes: dict[str, object], model: dict[str, torch.Tensor]) -> list[str]:
    """A checkpoint whose rank 0 file has these args; the flags that load it."""
    rank = folder / "release" / ("mp_rank_00" if attributes["pipeline_model_parallel_size"] == 1 else "mp_rank_00_000")
    rank.mkdir(parents=True)
    saved = {"args": argparse.Namespace(**attributes), "checkpoint_version": 3.0, "iteration": 0, "model": model}
    torch.save(saved, rank / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    return ["--use-checkpoint-args", "--load", str(folder)]


def run(checkout: str, folder: Path, jobs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """trainer.py on some jobs, in a process of its own."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("trainer.py")
    command = [sys.executable, "-W", "ignore", str(script), str(folder / "jobs.json"), str(folder / "results.json")]
    environment = {**os.environ, "PYTHONPATH": checkout}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return found


def jobs_for(name: str, spec: ModelSpec, folder: Path, release: tuple[int, int]) -> list[dict[str, Any]]:
    """From a checkpoint with the flags to repeat; from the same checkpoint without; from the flags alone."""
    tp, pp, ep = LAYOUTS.get(name, (1, 1, 1))
    layout: dict[str, Any] = {
        "tp": tp, "pp": pp, "ep": ep, "make_vocab_size_divisible_by": 128, "transformer_impl": "local",
    }  # fmt: skip
    padded = wanted(spec, tp, pp, ep, release).args["padded_vocab_size"]
    attributes = megatron_args.namespace(
        spec, **layout, **TOKENIZER, padded_vocab_size=padded, iteration=0, params_dtype=getattr(torch, spec.dtype)
    )
    load = save(folder / name, attributes, {})
    repeated = words(megatron_args.repeated(spec, **layout))
    flags = words(megatron_args.flags(spec, **layout, **TOKENIZER))
    bare = ["--ckpt-format", "torch", "--transformer-impl", "local", "--no-rope-fusion"]
    bare += ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    bare += ["--expert-model-parallel-size", str(ep), *(["--sequence-parallel"] if spec.moe and tp > 1 else [])]
    ways = {"checkpoint": load + repeated, "bare": load + bare, "flags": flags}
    # Fused rope needs Transformer Engine. That latent attention needs it unfused, our flags have to say.
    fusion = [] if spec.mla else ["--no-rope-fusion"]
    # From 0.15 on every flag has to exist; before, --window-size and --padded-vocab-size do not.
    return [
        {"name": f"{name}: {way}", "argv": argv + RUN + fusion, "lenient": release < (0, 15), "world": tp * pp * ep}
        for way, argv in ways.items()
    ]


def version(checkout: str) -> tuple[int, int]:
    text = Path(checkout, "megatron/core/package_info.py").read_text()
    major, minor = (int(re.findall(rf"^{part} = (\d+)", text, re.MULTILINE)[0]) for part in ("MAJOR", "MINOR"))
    return major, minor


@cache
def results(checkout: str) -> dict[str, dict[str, Any]]:
    """All jobs of one release, by `name: way`."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        release = version(checkout)
        able = {name: spec for name, spec in SPECS.items() if release >= since(spec)}
        return run(checkout, folder, [job for name in able for job in jobs_for(name, able[name], folder, release)])


def result(checkout: str, name: str, way: str) -> dict[str, Any]:
    if version(checkout) < since(SPECS[name]):
        pytest.skip("this release cannot build the model")
    found = results(checkout)[f"{name}: {way}"]
    assert "error" not in found, found["error"]
    return found


def hugging_face(spec: ModelSpec) -> Any:
    """A random Llama of transformers for a spec, float32, no biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    assert spec.rope is not None
    torch.manual_seed(0)
    rope = {"rope_type": spec.rope.kind, "rope_theta": spec.rope.theta, **spec.rope.scaling}
    model: Any = LlamaForCausalLM(LlamaConfig(
        vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, intermediate_size=spec.ffn_hidden_size,
        num_hidden_layers=spec.num_layers, num_attention_heads=spec.num_attention_heads, head_dim=spec.kv_channels,
        num_key_value_heads=spec.num_query_groups, max_position_embeddings=spec.max_position_embeddings,
        rms_norm_eps=spec.norm_epsilon, tie_word_embeddings=spec.tied, rope_parameters=rope, initializer_range=0.2,
    ))  # fmt: skip
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(weight, 1.0, 0.3)
    return model.float().eval()


def by_hand(h: dict[str, torch.Tensor], spec: ModelSpec, padded: int) -> dict[str, torch.Tensor]:
    """Megatron's names and layouts for the weights of a Llama, tp 1, pp 1."""
    rows = torch.zeros(padded - spec.vocab_size, spec.hidden_size)
    out = {
        "embedding.word_embeddings.weight": torch.cat([h["model.embed_tokens.weight"], rows]),
        "decoder.final_layernorm.weight": h["model.norm.weight"],
        "output_layer.weight": torch.cat([h["lm_head.weight"], rows]),
    }
    for i in range(spec.num_layers):
        old, new = f"model.layers.{i}.", f"decoder.layers.{i}."
        q, k, v = (
            h[f"{old}self_attn.{x}_proj.weight"].reshape(spec.num_query_groups, -1, spec.hidden_size) for x in "qkv"
        )
        gate, up = h[old + "mlp.gate_proj.weight"], h[old + "mlp.up_proj.weight"]
        out |= {
            new + "input_layernorm.weight": h[old + "input_layernorm.weight"],
            new + "pre_mlp_layernorm.weight": h[old + "post_attention_layernorm.weight"],
            new + "self_attention.linear_qkv.weight": torch.cat([q, k, v], 1).reshape(-1, spec.hidden_size),
            new + "self_attention.linear_proj.weight": h[old + "self_attn.o_proj.weight"],
            new + "mlp.linear_fc1.weight": torch.cat([gate, up]),
            new + "mlp.linear_fc2.weight": h[old + "mlp.down_proj.weight"],
        }
    return out


releases = pytest.mark.parametrize("checkout", CHECKOUTS or ["none"])
specs = pytest.mark.parametrize("name", SPECS)


@pytest.mark.parametrize("way", ["checkpoint", "flags"])
@specs
@releases
def test_trainer_has_the_model_of_the_spec(checkout: str, name: str, way: str) -> None:
    release = version(checkout)
    found, want = result(checkout, name, way), wanted(SPECS[name], *LAYOUTS.get(name, (1, 1, 1)), release)
    if release < (0, 14) and way == "flags":
        want.args["padded_vocab_size"] = None  # no flag; the tokenizer decides
    unknown = {"mtp_num_layers"} if release < (0, 13) else set()
    assert {key: found["config"].get(key) for key in want.config} == want.config
    assert {key: found["args"].get(key) for key in want.args.keys() - unknown} == {
        key: value for key, value in want.args.items() if key not in unknown
    }
    if release >= (0, 15):
        assert {key: found["model"][key] for key in want.model} == want.model


@specs
@releases
def test_both_ways_give_the_same_config(checkout: str, name: str) -> None:
    one, other = (result(checkout, name, way)["config"] for way in ("checkpoint", "flags"))
    same = {key for key in one if "init_method" not in key}  # partial objects print their address
    assert {key: one[key] for key in same} == {key: other[key] for key in same}


@specs
@releases
def test_namespace_of_the_trainer_is_read_back(checkout: str, name: str) -> None:
    """The reader on Namespaces that Megatron's parser made, not ours."""
    spec = SPECS[name]
    args = result(checkout, name, "flags")["args"]
    fields: dict[str, Any] = megatron_args.spec_of(
        {"padded_vocab_size": 1 << 20} | {k: v for k, v in args.items() if v is not None}, "x"
    )
    if version(checkout) < (0, 15):
        spec = spec.replace(sliding_window=None)
    assert ModelSpec(**{"family": spec.family, "dtype": spec.dtype, **fields}) == spec
    assert megatron_args.unsupported(args) == []


#: Facts that are not restored -> the first release with a flag, or with a model here that uses it; NO_FLAG has none.
NEW_FLAGS = {
    "sliding_window": (0, 15), "window_skip": (0, 15), "softmax_type": (0, 15), "quick_geglu": (0, 15),
    "activation_clamp": (0, 15), "gate_offset": (0, 15), "no_rope": (0, 13), "mla_rope_type": (0, 14),
    "yarn_factor": (0, 14), "yarn_mscale": (0, 14), "yarn_mscale_all_dim": (0, 14), "swiglu_fusion": (0, 15),
    "moe_shared_gate": (0, 16), "yarn_original": (0, 19), "yarn_beta_fast": (0, 19), "yarn_beta_slow": (0, 19),
    "yarn_round": (0, 19),
}  # fmt: skip
NO_FLAG = {"activation_func", "gated_linear_unit", "softmax_scale", "mla_original", "mla_beta_fast", "mla_beta_slow"}


@releases
def test_flags_to_repeat_are_not_restored(checkout: str) -> None:
    """Rows marked as not restored are lost without their flag; every other row survives (first test)."""
    release, lost = version(checkout), set()
    for name in SPECS:
        if release < since(SPECS[name]):
            continue
        bare = results(checkout)[f"{name}: bare"]
        if "error" in bare:  # a config that nobody asked for: other models lose the same flags
            continue
        args = result(checkout, name, "checkpoint")["args"]
        lost |= {
            row.fact
            for row in megatron_args.ROWS
            if [args.get(a) for a in row.attrs] != [bare["args"].get(a) for a in row.attrs]
        }
    marked = {row.fact for row in megatron_args.ROWS if not row.restored} - NO_FLAG - {"rope_fusion"}  # see jobs_for
    marked -= {fact for fact, first in NEW_FLAGS.items() if release < first}
    marked -= {"norm_offset"} if release < (0, 16) else {"moe_score", "moe_score_bias", "moe_scaling"}
    marked -= {"mtp_layers"} if release >= (0, 17) else set()
    assert lost == marked


@releases
def test_limits_are_as_described(checkout: str) -> None:
    """The llama3 factor reaches the model in no release, the linear factor from 0.19 on."""
    release = version(checkout)
    if release < (0, 15):
        pytest.skip("the builder of this release is not asked")
    scaled, linear = (result(checkout, name, "flags")["model"] for name in ("llama 3.2 1B", "linear rope"))
    assert scaled.get("rope_scaling_factor", 8.0) == 8.0
    assert linear.get("seq_len_interpolation_factor") == (4.0 if release >= (0, 19) else None)


@cache
def told(checkout: str) -> dict[str, dict[str, Any]]:
    """Models for which code has to set what no flag says, with exactly the assignments that `limits` spells out."""
    jobs = []
    for name, spec in IN_CODE.items():
        code = {
            attribute: expression
            for sentence in megatron_args.limits(spec) if sentence.startswith("Set ")
            for attribute, expression in re.findall(r"args\.(\w+) = (.+?)(?= and args|  ?before)", sentence)
        }  # fmt: skip
        if name == "kimi k2":
            code = {"beta_fast": "1.0"}
        for way, extra in (("code", code), ("flags", {})):
            flags = words(megatron_args.flags(
                spec, tp=1, pp=1, make_vocab_size_divisible_by=128, transformer_impl="local", **TOKENIZER
            ))  # fmt: skip
            jobs.append({
                "name": f"{name}: {way}", "argv": [*flags, *RUN, *([] if spec.mla else ["--no-rope-fusion"])],
                "lenient": version(checkout) < (0, 15), "world": 1, "code": extra,
            })  # fmt: skip
    with TemporaryDirectory() as temporary:
        return run(checkout, Path(temporary), jobs)


@pytest.mark.parametrize(
    ("name", "want", "without"),
    [
        ("opt", {"activation_func": "relu", "gated_linear_unit": False, "bias_activation_fusion": False},
         {"activation_func": "gelu"}),
        ("gemma", {"activation_func": "functools.partial(<built-in function gelu>, approximate='tanh')",
                   "gated_linear_unit": True, "bias_activation_fusion": False}, {"gated_linear_unit": False}),
        ("gemma without caps", {"softmax_scale": 0.0625, "gated_linear_unit": True}, {"softmax_scale": None}),
        ("geglu erf", {"activation_func": "gelu", "gated_linear_unit": True, "bias_activation_fusion": False},
         {"gated_linear_unit": False}),
        ("gelu tanh without biases", {"activation_func": "functools.partial(<built-in function gelu>, "
                                      "approximate='tanh')", "gated_linear_unit": False}, {"activation_func": "gelu"}),
        ("silu without gate", {"activation_func": "silu", "gated_linear_unit": False}, {"activation_func": "gelu"}),
        ("kimi k2", {"beta_fast": 1.0, "rope_type": "yarn"}, {"beta_fast": 32}),
    ],
)  # fmt: skip
@releases
def test_what_no_flag_says_can_be_set_in_code(
    checkout: str, name: str, want: dict[str, Any], without: dict[str, Any]
) -> None:
    if version(checkout) < (0, 14):
        want = {key: value for key, value in want.items() if key != "rope_type"}
    for way, values in (("code", want), ("flags", without)):
        found = told(checkout)[f"{name}: {way}"]
        assert "error" not in found, found["error"]
        assert {key: found["config"][key] for key in values} == values


@pytest.mark.parametrize("binary", [True, False])
@releases
def test_bert(checkout: str, binary: bool, tmp_path: Path) -> None:
    """Both ways give pretrain_bert.py, which goes by args.spec, the same args and config."""
    spec = BERT.replace(num_tokentypes=2 * binary, binary_head=binary, pooler=binary)
    layout: dict[str, Any] = {"tp": 1, "pp": 1, "make_vocab_size_divisible_by": 128, "transformer_impl": "local"}
    attributes = megatron_args.namespace(
        spec, **layout, **TOKENIZER, padded_vocab_size=256, iteration=0, params_dtype=torch.bfloat16
    )
    ways = {
        "flags": words(megatron_args.flags(spec, **layout, **TOKENIZER)),
        "checkpoint": save(tmp_path / "checkpoint", attributes, {}) + words(megatron_args.repeated(spec, **layout)),
    }
    found = run(checkout, tmp_path, [
        {"name": way, "argv": argv + RUN, "lenient": version(checkout) < (0, 15), "world": 1, "bert": True}
        for way, argv in ways.items()
    ])  # fmt: skip
    want = wanted(spec, 1, 1, 1, version(checkout))
    args = {"bert_binary_head": binary, "spec": ["local"], "position_embedding_type": "learned_absolute"}
    for way, result in found.items():
        assert "error" not in result, way + result["error"]
        assert {key: result["config"].get(key) for key in want.config} == want.config
        assert {key: result["args"][key] for key in args} == args


@pytest.mark.parametrize("rope", [Rope(500000.0), Rope(500000.0, "llama3", {"factor": 8.0, **LLAMA3})])
@releases
def test_model_that_the_trainer_builds_computes_the_logits_of_transformers(
    checkout: str, rope: Rope, tmp_path: Path
) -> None:
    """Namespace and weights in a checkpoint, the stock builder, a strict load, 512 positions."""
    if not (0, 15) <= version(checkout) < (0, 19):
        pytest.skip("this release has no gpt_builder that pretrain_gpt.py uses")
    spec = SMALL.replace(dtype="float32", norm_epsilon=1e-6, rope=rope, max_position_embeddings=512, seq_length=512)
    reference = hugging_face(spec)
    ids = torch.randint(0, spec.vocab_size, (2, 512), generator=torch.Generator().manual_seed(1))
    layout: dict[str, Any] = {"tp": 1, "pp": 1, "make_vocab_size_divisible_by": 128, "transformer_impl": "local"}
    attributes = megatron_args.namespace(
        spec, **layout, **TOKENIZER, padded_vocab_size=256, iteration=0, params_dtype=torch.float32
    )
    load = save(tmp_path / "checkpoint", attributes, by_hand(dict(reference.state_dict()), spec, 256))
    argv = [*load, *words(megatron_args.repeated(spec, **layout)), *RUN, "--no-rope-fusion"]
    job = {
        "name": "x",
        "argv": argv,
        "lenient": False,
        "world": 1,
        "ids": ids.tolist(),
        "logits": str(tmp_path / "out.pt"),
    }
    found = run(checkout, tmp_path, [job])["x"]
    assert "error" not in found, found["error"]
    with torch.no_grad():
        want = reference(input_ids=ids, use_cache=False).logits
    assert torch.allclose(torch.load(tmp_path / "out.pt")[..., : spec.vocab_size], want, atol=1e-4)
