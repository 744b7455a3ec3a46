"""Gaudi's Megatron-LM: dialects, types of models, args that are taken over, refusals. Expected values by hand."""

from __future__ import annotations

import base64
import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from commands import same, weights_of
from inprocess import here, main

Hf = Callable[..., Path]
FILE = "model_optim_rng.pt"


def run(*words: object) -> int:
    """The exit code of a command line."""
    return main(words)


def to_gaudi(source: Path, out: Path, *flags: object, tp: int = 1, pp: int = 1, ep: int = 1) -> Path:
    """A checkpoint of the fork's in iter_0000004."""
    layout = ("--target-tensor-parallel-size", tp, "--target-pipeline-parallel-size", pp,
              "--target-expert-parallel-size", ep, "--iteration", 4)  # fmt: skip
    assert run("--load-dir", source, "--save-dir", out, "--saver", "megatron_gaudi", *layout, *flags) == 0
    return out


def to_hf(source: Path, out: Path, *flags: object) -> Path:
    assert run("--loader", "megatron_gaudi", "--load-dir", source, "--save-dir", out, "--saver", "hf", *flags) == 0
    return out


def files(top: Path) -> list[Path]:
    return sorted(top.glob(f"iter_*/*/{FILE}"))


def edit(top: Path, change: Callable[[dict[str, Any], Path], None]) -> Path:
    """Rewrite every rank file, less what ckptconv notes and carries."""
    for path in files(top):
        root = torch.load(path, weights_only=False)
        change(root, path)
        torch.save(root, path)
        (path.parent.parent / "ckptconv.json").unlink(missing_ok=True)
    shutil.rmtree(top / "hf", ignore_errors=True)
    return top


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_experts_are_cut_as_the_model_reads_them(hf: Hf, tmp_path: Path) -> None:
    """fc1 on tensor rank t is [W_t; V_t], not rows of [W; V] as the fork's own saver has it."""
    source = hf("mixtral")
    top = to_gaudi(source, tmp_path / "mlm", tp=2, ep=2, pp=2)
    weights = weights_of(source)
    assert len(files(top)) == 8
    for path in files(top):
        tp, stage, ep = (int(n) for n in path.parent.name.split("_")[2:])
        model = torch.load(path, weights_only=False)["model"]
        for layer in (0, 1):
            at = f"decoder.layers.{layer}."
            assert at + "input_layernorm.weight" in model and at + "pre_mlp_layernorm.weight" in model
            for e in range(3):
                hub = f"model.layers.{2 * stage + layer}.block_sparse_moe.experts.{3 * ep + e}."
                gate, up, down = (weights[f"{hub}w{n}.weight"] for n in (1, 3, 2))
                mine = f"{at}mlp.experts.local_experts.{e}."
                rows = slice(20 * tp, 20 * tp + 20)
                assert torch.equal(model[mine + "linear_fc1.weight"], torch.cat([gate[rows], up[rows]]))
                assert torch.equal(model[mine + "linear_fc2.weight"], down[:, rows])
    same(weights_of(to_hf(top, tmp_path / "back")), weights)


@pytest.mark.parametrize("turned", [False, True])
def test_dynamic_experts(turned: bool, hf: Hf, tmp_path: Path) -> None:
    """moe_dynamic_hpu: global numbers and underscores; without permuted weights they are transposed."""
    source = hf("mixtral")
    top = to_gaudi(source, tmp_path / "mlm", "--moe-dynamic-hpu", tp=2, ep=2)
    weights = weights_of(source)
    for path in files(top):
        tp, ep = (int(n) for n in path.parent.name.split("_")[2:])
        root = torch.load(path, weights_only=False)
        assert root["args"].moe_dynamic_hpu is True
        for expert in range(3 * ep, 3 * ep + 3):
            found = root["model"][f"decoder.layers.1.mlp.experts.local_expert_{expert}_linear_fc2_weight"]
            down = weights[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"]
            assert torch.equal(found, down[:, 20 * tp : 20 * tp + 20])

    def turn(root: dict[str, Any], path: Path) -> None:
        root["args"].moe_permuted_weights = False
        for name in [name for name in root["model"] if "local_expert_" in name]:
            root["model"][name] = root["model"][name].T.contiguous()

    if turned:
        edit(top, turn)
    same(weights_of(to_hf(top, tmp_path / "back", "--verify")), weights)


def test_gate_and_up_apart_are_refused(hf: Hf, tmp_path: Path) -> None:
    top = to_gaudi(hf("mixtral"), tmp_path / "mlm", "--moe-dynamic-hpu")

    def apart(root: dict[str, Any], path: Path) -> None:
        for name in [name for name in root["model"] if name.endswith("_linear_fc1_weight")]:
            gate, up = root["model"].pop(name).chunk(2)
            root["model"] |= {name.replace("fc1", "fc11"): gate.clone(), name.replace("fc1", "fc12"): up.clone()}

    result = here("--load-dir", edit(top, apart), "--save-dir", tmp_path / "no", "--saver", "hf")
    assert result.returncode == 3 and "moe_fused_weights" in result.stderr


def test_extended_tensor_parallelism_is_refused(hf: Hf, tmp_path: Path) -> None:
    top = to_gaudi(hf("mixtral"), tmp_path / "mlm")

    def extended(root: dict[str, Any], path: Path) -> None:
        root["args"].moe_extended_tp = True

    result = here("--load-dir", edit(top, extended), "--save-dir", tmp_path / "no", "--saver", "hf")
    assert result.returncode == 3 and "moe_extended_tp" in result.stderr and "there is no checkpoint" in result.stderr


def test_norms_of_nvidias_transformer_engine(hf: Hf, tmp_path: Path) -> None:
    """The fork's converter loses them without a word."""
    source = hf("llama2")
    top = to_gaudi(source, tmp_path / "mlm", tp=2)

    def rename(root: dict[str, Any], path: Path) -> None:
        names = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
                 "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}  # fmt: skip
        for name in list(root["model"]):
            for old, new in names.items():
                if name.endswith(old):
                    root["model"][name.replace(old, new)] = root["model"].pop(name)

    same(weights_of(to_hf(edit(top, rename), tmp_path / "back")), weights_of(source))


def test_as_the_runtime_saves_it(hf: Hf, tmp_path: Path) -> None:
    """`iter_0000014` beside `iter_0000004`; few args, of which the vocabulary is smaller than the table."""
    source = hf("llama2")
    top = to_gaudi(source, tmp_path / "mlm", tp=2, pp=2)
    (top / "iter_0000014").mkdir()

    def few(root: dict[str, Any], path: Path) -> None:
        kept = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "group_query_attention",
                "ffn_hidden_size", "vocab_size", "padded_vocab_size", "norm_epsilon", "rotary_base",
                "max_position_embeddings", "tensor_model_parallel_size", "pipeline_model_parallel_size",
                "expert_model_parallel_size", "untie_embeddings_and_output_weights", "moe_dynamic_hpu")  # fmt: skip
        root["args"] = Namespace(**{name: getattr(root["args"], name) for name in kept})

    assert torch.load(files(top)[0], weights_only=False)["model"]["embedding.word_embeddings.weight"].shape[0] == 128
    out = to_hf(edit(top, few), tmp_path / "back")
    same(weights_of(out), weights_of(source))


# The documented command, and what types of models are


def documented(kind: str, source: Path, out: Path, *more: object) -> list[object]:
    """The command of the README's first half, with ours for the program's name."""
    return [
        "--loader", "megatron_gaudi", "--saver", "hf",
        "--ckpt-dir-name", "iter_0000004",
        "--target-params-dtype", "bf16",
        "--source-model-type", kind,
        "--load-path", source,
        "--save-path", out,
        *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def plain_rope(hf: Hf, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(Hugging Face, Gaudi) of a Llama 3 in size; its args say nothing of a scaled rope, as the fork trains them."""
    source = hf("llama3")
    top = to_gaudi(source, tmp_path_factory.mktemp("gaudi") / "mlm", tp=2, pp=2)
    return source, edit(top, lambda root, path: None)


@pytest.mark.parametrize(
    ("kind", "instruct", "positions", "scaling", "eos"),
    [
        ("llama3.1", False, 131072, True, 128001),
        ("llama3.1", True, 131072, True, [128001, 128008, 128009]),
        ("llama3", False, 8192, False, 128001),
        ("llama3", True, 8192, False, [128001, 128008, 128009]),
        ("llama2", False, 16384, False, 2),  # a longer rope: Code Llama
    ],
)
def test_documented_command(
    kind: str, instruct: bool, positions: int, scaling: bool, eos: Any, plain_rope: tuple[Path, Path], tmp_path: Path
) -> None:
    source, top = plain_rope
    result = here(*documented(kind, top, tmp_path, *(["--instruct"] if instruct else ["--no-instruct"])))
    assert result.returncode == 0, result.stderr
    same(weights_of(tmp_path), {name: t.bfloat16() for name, t in weights_of(source).items()})
    config = config_of(tmp_path)
    assert config["max_position_embeddings"] == positions and config["rope_theta"] == 500000.0
    assert config["vocab_size"] == 131 and config["torch_dtype"] == "bfloat16"
    want = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    found = {k: v for k, v in (config.get("rope_scaling") or {}).items() if k != "type"}
    assert found == (want if scaling else {})
    assert (config["bos_token_id"], config["eos_token_id"]) == (1 if kind == "llama2" else 128000, eos)
    if instruct:
        generation = json.loads((tmp_path / "generation_config.json").read_text())
        assert generation["do_sample"] and (generation["temperature"], generation["top_p"]) == (0.6, 0.9)
        assert generation["eos_token_id"] == eos
    assert json.loads((tmp_path / "source_megatron_args.json").read_text())["params_dtype"] == "torch.float32"


@pytest.mark.parametrize(
    ("kind", "instruct", "has", "lacks"),
    [
        ("llama3", False, "<|reserved_special_token_250|>", "<|eom_id|>"),
        ("llama3.1", True, "<|finetune_right_pad_id|>", "<|reserved_special_token_250|>"),
    ],
)
def test_tiktoken_from_the_args(
    kind: str, instruct: bool, has: str, lacks: str, hf: Hf, tmp_path: Path
) -> None:
    """256 ranks, one a byte, and Llama 3's 256 special tokens."""
    ranks = tmp_path / "tokenizer.model"
    ranks.write_bytes(b"".join(base64.b64encode(bytes([n])) + b" %d\n" % n for n in range(256)))
    top = to_gaudi(hf("llama3", vocab_size=512, tokenizer=False), tmp_path / "mlm", "--tokenizer-model", ranks)
    top = edit(top, lambda root, path: None)
    args = torch.load(files(top)[0], weights_only=False)["args"]
    assert args.tokenizer_model == str(ranks)
    result = here(*documented(kind, top, tmp_path / "out", *(["--instruct"] if instruct else [])))
    assert result.returncode == 0, result.stderr
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.token_to_id(has) is not None and tokenizer.token_to_id(lacks) is None
    config = config_of(tmp_path / "out")
    assert config["bos_token_id"] == tokenizer.token_to_id("<|begin_of_text|>") == 256
    ends = [tokenizer.token_to_id(f"<|{name}|>") for name in ("end_of_text", "eom_id", "eot_id")]
    found = config["eos_token_id"]
    assert sorted(found) == ends if instruct else found == ends[0]


def test_without_a_type_only_the_args_count(plain_rope: tuple[Path, Path], tmp_path: Path) -> None:
    _, top = plain_rope
    config = config_of(to_hf(top, tmp_path))
    assert config["max_position_embeddings"] == 8192 and config.get("rope_scaling") is None


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (("--source-model-type", "mixtral"), 3, "--source-model-type mixtral, but the model has no experts"),
        (("--instruct",), 2, "--source-model-type is needed"),
        (("--ckpt-dir-name", "iter_0000005"), 2, "iter_0000005 is no directory"),
    ],
)
def test_flags_that_contradict(
    flags: tuple[object, ...], code: int, says: str, plain_rope: tuple[Path, Path], tmp_path: Path
) -> None:
    result = here("--load-dir", plain_rope[1], "--save-dir", tmp_path / "no", "--saver", "hf", *flags)
    assert result.returncode == code and says in result.stderr
    assert not (tmp_path / "no").exists()


def test_a_scaled_rope_is_not_llama3s(hf: Hf, tmp_path: Path) -> None:
    top = edit(to_gaudi(hf("llama31"), tmp_path / "mlm"), lambda root, path: None)
    result = here(*documented("llama3", top, tmp_path / "no"))
    assert result.returncode == 3 and "but the args say a llama3 scaled rope" in result.stderr
    same(weights_of(to_hf(top, tmp_path / "yes", "--source-model-type", "llama3.1")), weights_of(hf("llama31")))


# Args of the source


def margs(folder: Path, **values: object) -> Path:
    path = folder / "source_megatron_args.json"
    path.write_text(json.dumps(values))
    return path


def test_args_are_taken_over(hf: Hf, tmp_path: Path) -> None:
    """But not the padded vocabulary, whose padding is gone, nor layout and run; text of objects is none."""
    told = margs(
        tmp_path, num_layers=4, hidden_size=48, rotary_base=10000, padded_vocab_size=512, lr=0.0003, train_iters=1000,
        tensor_model_parallel_size=8, iteration=77, attention_dropout=0.1, attention_backend="AttnBackend.auto",
        hidden_dropout=None, some_dtype="torch.bfloat16", max_position_embeddings=2048, tokenizer_model="/gone",
        tokenizer_type="GPTSentencePieceTokenizer", make_vocab_size_divisible_by=7, vocab_size=512,
    )  # fmt: skip
    top = to_gaudi(hf("llama2"), tmp_path / "mlm", "--source-margs-file", told, tp=2)
    args = torch.load(files(top)[0], weights_only=False)["args"]
    assert (args.lr, args.train_iters, args.attention_dropout) == (0.0003, 1000, 0.1)
    assert (args.padded_vocab_size, args.tensor_model_parallel_size, args.iteration) == (256, 2, 4)
    assert args.some_dtype is torch.bfloat16 and args.max_position_embeddings == 2048
    assert not hasattr(args, "attention_backend") and args.hidden_dropout == 0.0
    assert args.tokenizer_model != "/gone" and args.tokenizer_type == "HuggingFaceTokenizer"
    assert (args.vocab_size, args.make_vocab_size_divisible_by) == (131, 128)
    same(weights_of(to_hf(top, tmp_path / "back")), weights_of(hf("llama2")))


@pytest.mark.parametrize("values", [{"num_layers": 5}, {"rotary_base": 500000}, {"ffn_hidden_size": 96}])
def test_args_of_another_model(values: dict[str, object], hf: Hf, tmp_path: Path) -> None:
    told = margs(tmp_path, **values)
    result = here("--load-dir", hf("llama2"), "--save-dir", tmp_path / "no", "--saver", "megatron_gaudi",
                  "--source-margs-file", told)  # fmt: skip
    assert result.returncode == 3 and "says another model" in result.stderr
    assert not (tmp_path / "no").exists()


def test_tied_models_and_verification(hf: Hf, tmp_path: Path) -> None:
    """Upstream cannot export a tied model."""
    source = hf("qwen2_tied")
    top = to_gaudi(source, tmp_path / "mlm", "--verify", tp=2, pp=2)
    same(weights_of(to_hf(top, tmp_path / "back", "--verify")), weights_of(source))
    ours = json.loads((top / "iter_0000004" / "ckptconv.json").read_text())
    assert ours["target"]["format"] == "megatron_gaudi"
    # NVIDIA's loader hands it on.
    code = run("--loader", "megatron_mcore", "--load-dir", top, "--save-dir", tmp_path / "other", "--saver", "hf")
    assert code == 0
    same(weights_of(tmp_path / "other"), weights_of(source))
