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

CHECKOUTS = [path for path in os.environ.get("CKPTCONV_MEGATRON_LM", "").split(":") if path]
pytestmark = pytest.mark.skipif(not CHECKOUTS, reason="CKPTCONV_MEGATRON_LM names no Megatron-LM checkout")

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SMALL = ModelSpec(
    family="llama", num_layers=4, hidden_size=48, ffn_hidden_size=88, num_attention_heads=4, num_query_groups=2,
    kv_channels=12, vocab_size=131, max_position_embeddings=96, seq_length=24, dtype="bfloat16",
)  # fmt: skip
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
}  # fmt: skip
PIPELINE = {"llama 3.1 8B": (2, 4), "mistral 7B": (4, 1), "qwen2 7B": (1, 2)}
RUN = [
    "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-4", "--use-cpu-initialization",
    "--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--attention-backend", "unfused",
    "--no-rope-fusion", "--no-load-optim", "--no-load-rng",
]  # fmt: skip
TOKENIZER: dict[str, Any] = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "/none/such"}


@dataclass(frozen=True)
class Wanted:
    """A model in Megatron's words: TransformerConfig fields, Namespace attributes, GPTModel arguments."""

    config: dict[str, Any]
    args: dict[str, Any]
    model: dict[str, Any]


def wanted(spec: ModelSpec, tp: int, pp: int, release: tuple[int, int]) -> Wanted:
    rope, all_biases = spec.rope, spec.dense_bias or spec.mlp_bias
    assert rope is not None
    padded = (spec.vocab_size + 128 * tp - 1) // (128 * tp) * (128 * tp)
    window = None if spec.sliding_window is None or release < (0, 15) else [spec.sliding_window - 1, 0]
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    config = {name: getattr(spec, name) for name in names} | {
        "activation_func": "silu", "gated_linear_unit": True, "normalization": spec.norm, "window_size": window,
        "layernorm_epsilon": spec.norm_epsilon, "layernorm_zero_centered_gamma": spec.norm_offset,
        "add_bias_linear": all_biases, "add_qkv_bias": all_biases or spec.qkv_bias, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "rotary_interleaved": rope.interleaved, "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp, "num_moe_experts": None, "qk_layernorm": False, "mtp_num_layers": None,
        "apply_query_key_layer_scaling": False, "bf16": spec.dtype == "bfloat16", "fp16": spec.dtype == "float16",
        "params_dtype": f"torch.{spec.dtype}", "persist_layer_norm": False, "multi_latent_attention": False,
    }  # fmt: skip
    args = {
        "seq_length": spec.seq_length, "max_position_embeddings": spec.max_position_embeddings,
        "untie_embeddings_and_output_weights": not spec.tied, "position_embedding_type": "rope",
        "rotary_base": rope.theta, "rotary_percent": rope.percent, "use_rope_scaling": rope.kind == "llama3",
        "rope_scaling_factor": rope.scaling["factor"] if rope.kind == "llama3" else 8.0,
        "rotary_seq_len_interpolation_factor": rope.scaling["factor"] if rope.kind == "linear" else None,
        "padded_vocab_size": padded, "swiglu": True,
        "group_query_attention": spec.num_query_groups < spec.num_attention_heads,
        "transformer_impl": "local", "ckpt_format": "torch", **TOKENIZER,
    }  # fmt: skip
    model = {
        "vocab_size": padded, "max_sequence_length": spec.max_position_embeddings, "rotary_base": rope.theta,
        "rotary_percent": rope.percent, "rope_scaling": rope.kind == "llama3", "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": spec.tied,
    }  # fmt: skip
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
    tp, pp = PIPELINE.get(name, (1, 1))
    layout: dict[str, Any] = {"tp": tp, "pp": pp, "make_vocab_size_divisible_by": 128, "transformer_impl": "local"}
    padded = wanted(spec, tp, pp, release).args["padded_vocab_size"]
    attributes = megatron_args.namespace(
        spec, **layout, **TOKENIZER, padded_vocab_size=padded, iteration=0, params_dtype=getattr(torch, spec.dtype)
    )
    load = save(folder / name, attributes, {})
    repeated = words(megatron_args.repeated(spec, **layout))
    flags = words(megatron_args.flags(spec, **layout, **TOKENIZER))
    bare = ["--ckpt-format", "torch", "--transformer-impl", "local"]
    bare += ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    ways = {"checkpoint": load + repeated, "bare": load + bare, "flags": flags}
    # From 0.15 on every flag has to exist; before, --window-size and --padded-vocab-size do not.
    return [
        {"name": f"{name}: {way}", "argv": argv + RUN, "lenient": release < (0, 15), "world": tp * pp}
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
        jobs = [job for name, spec in SPECS.items() for job in jobs_for(name, spec, folder, version(checkout))]
        return run(checkout, folder, jobs)


def result(checkout: str, name: str, way: str) -> dict[str, Any]:
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
    found, want = result(checkout, name, way), wanted(SPECS[name], *PIPELINE.get(name, (1, 1)), release)
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


@releases
def test_flags_to_repeat_are_not_restored(checkout: str) -> None:
    """Rows marked as not restored are lost without their flag; every other row survives (first test)."""
    release, lost = version(checkout), set()
    for name in SPECS:
        args, bare = result(checkout, name, "checkpoint")["args"], result(checkout, name, "bare")["args"]
        lost |= {
            row.fact
            for row in megatron_args.ROWS
            if [args.get(a) for a in row.attrs] != [bare.get(a) for a in row.attrs]
        }
    marked = {row.fact for row in megatron_args.ROWS if not row.restored} - {"quick_geglu"}
    marked -= {"sliding_window"} if release < (0, 15) else set()
    marked -= {"norm_offset"} if release < (0, 16) else set()
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
    argv = [*load, *words(megatron_args.repeated(spec, **layout)), *RUN]
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
