"""MindSpore Transformers: every layout and naming, the documented command, refusals.

Expected files are put together by msfiles.py, which knows mindformers' rules and nothing of ckptconv.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msfiles
import pytest
import torch
from safetensors.torch import save_file

from commands import Weights, same, weights_of
from fixtures import build
from inprocess import here, main

Hf = Callable[..., Path]
INTERLEAVED = ("--ms-fc1-layout", "interleaved", "--ms-qkv-layout", "grouped")


def run(*words: object) -> int:
    """The exit code of a command line."""
    return main(words)


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def to_hf(source: Path, config: Path, out: Path, *flags: object) -> Weights:
    code = run("--loader", "core_mf", "--load-dir", source, "--save-dir", out, "--saver", "hf", "--ms-config", config,
               *flags)  # fmt: skip
    assert code == 0
    return weights_of(out)


#: Fixtures with every kind of tensor that mindformers has a name for.
MODELS = ("llama2", "llama_both_bias", "qwen2_tied", "qwen3", "qwen3_moe", "mixtral", "deepseek_v3", "moonlight",
          "deepseek_v3_mtp")  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_both_ways(name: str, hf: Hf, tmp_path: Path) -> None:
    source = hf(name, dtype="bfloat16")
    want = msfiles.fused(weights_of(source), config_of(source))
    assert run("--load-dir", source, "--save-dir", tmp_path / "ms", "--saver", "mindspore") == 0
    same(weights_of(tmp_path / "ms"), want)
    entries = json.loads((tmp_path / "ms" / "param_name_map.json").read_text())["weight_map"]
    assert sorted(entries) == sorted(want)
    made = msfiles.save(tmp_path / "made", want)
    same(to_hf(made, source, tmp_path / "back", *INTERLEAVED), weights_of(source))
    # What we wrote ourselves says how it is laid out.
    assert run("--load-dir", tmp_path / "ms", "--save-dir", tmp_path / "own", "--saver", "hf") == 0
    same(weights_of(tmp_path / "own"), weights_of(source))


@pytest.mark.parametrize("qkv", ["grouped", "contiguous"])
@pytest.mark.parametrize("name", ["llama_both_bias", "deepseek_v3"])
def test_contiguous_layouts(name: str, qkv: str, hf: Hf, tmp_path: Path) -> None:
    source = hf(name)
    want = msfiles.fused(weights_of(source), config_of(source), fc1="contiguous", qkv=qkv)
    flags = ("--ms-fc1-layout", "contiguous", "--ms-qkv-layout", qkv)
    assert run("--load-dir", source, "--save-dir", tmp_path / "ms", "--saver", "mindspore", *flags) == 0
    same(weights_of(tmp_path / "ms"), want)
    same(to_hf(msfiles.save(tmp_path / "made", want), source, tmp_path / "back", *flags), weights_of(source))


def test_from_one_layout_to_the_other(hf: Hf, tmp_path: Path) -> None:
    source = hf("llama2")
    first = msfiles.save(tmp_path / "a", msfiles.fused(weights_of(source), config_of(source)))
    flags = ("--target-ms-fc1-layout", "contiguous", "--target-ms-qkv-layout", "contiguous", "--ms-config", source)
    assert run("--load-dir", first, "--save-dir", tmp_path / "b", "--saver", "mindspore", *INTERLEAVED, *flags) == 0
    want = msfiles.fused(weights_of(source), config_of(source), fc1="contiguous", qkv="contiguous")
    same(weights_of(tmp_path / "b"), want)


@pytest.mark.parametrize("name", ["llama_both_bias", "deepseek_v3"])
def test_apart_as_for_inference(name: str, hf: Hf, tmp_path: Path) -> None:
    """linear_q, linear_k, linear_v, gating and hidden: nothing to ask."""
    source = hf(name)
    loose = {
        key: tensor for key, tensor in msfiles.split(weights_of(source), config_of(source)).items()
        if ".experts." not in key
    }  # fmt: skip
    whole = msfiles.fused(weights_of(source), config_of(source))
    loose |= {key: tensor for key, tensor in whole.items() if ".experts." in key}
    same(to_hf(msfiles.save(tmp_path / "ms", loose), source, tmp_path / "hf"), weights_of(source))


@pytest.mark.parametrize("name", ["deepseek_v3", "moonlight"])
def test_fused_latent_projections(name: str, hf: Hf, tmp_path: Path) -> None:
    source = hf(name)
    whole = msfiles.fused(weights_of(source), config_of(source), fc1="contiguous")
    if name == "moonlight":  # without a latent of queries
        stored: Weights = {}
        for key, tensor in whole.items():
            if ".linear_q." in key or ".linear_q_proj." in key:
                down = next(v for k, v in whole.items() if k.startswith(key.split("linear_q")[0] + "linear_kv_down"))
                stored[key.split("linear_q")[0] + "linear_qkv.weight"] = torch.cat([tensor, down])
            elif "linear_kv_down_proj" not in key:
                stored[key.replace("linear_kv_up_proj", "linear_kvb").replace("kv_layernorm", "k_layernorm")] = tensor
    else:
        stored = msfiles.fused_latent(whole)
    made = msfiles.save(tmp_path / "ms", stored)
    same(to_hf(made, source, tmp_path / "hf", "--ms-fc1-layout", "contiguous"), weights_of(source))


def test_experts_as_r1_6_declares_them(hf: Hf, tmp_path: Path) -> None:
    """[h, e * 2m] around the same elements; and each expert apart."""
    source = hf("qwen3_moe")
    whole = msfiles.fused(weights_of(source), config_of(source))
    first = {k: t.reshape(48, -1) if k.endswith("weight1") else t for k, t in whole.items()}
    same(to_hf(msfiles.save(tmp_path / "a", first), source, tmp_path / "x", *INTERLEAVED), weights_of(source))
    each: Weights = {}
    for key, tensor in whole.items():
        prefix, _, rest = key.rpartition(".experts.weight")
        for e, part in enumerate(tensor.chunk(6)) if prefix else ():
            each[f"{prefix}.experts.local_experts.{e}.linear_fc{rest}.weight"] = part.T
        each |= {} if prefix else {key: tensor}
    same(to_hf(msfiles.save(tmp_path / "b", each), source, tmp_path / "y", *INTERLEAVED), weights_of(source))


@pytest.mark.parametrize("concat", [False, True])
def test_older_llama_names(concat: bool, hf: Hf, tmp_path: Path) -> None:
    source = hf("llama2")
    stored = msfiles.older(weights_of(source))
    flags: tuple[object, ...] = ()
    if concat:
        flags = ("--ms-fc1-layout", "contiguous", "--ms-qkv-layout", "contiguous")
        for i in range(4):
            at = f"model.layers.{i}."
            q, k, v = (stored.pop(f"{at}attention.w{letter}.weight") for letter in "qkv")
            gate, up = (stored.pop(f"{at}feed_forward.w{n}.weight") for n in "13")
            stored[f"{at}attention.w_qkv.weight"] = torch.cat([q, k, v])
            stored[f"{at}feed_forward.w_gate_hidden.weight"] = torch.cat([gate, up])
    same(to_hf(msfiles.save(tmp_path / "ms", stored), source, tmp_path / "hf", *flags), weights_of(source))


def test_layer_norms_and_learned_positions(hf: Hf, tmp_path: Path) -> None:
    """GPT-2: LayerNorms have gamma and beta, the MLP no gate."""
    source = hf("gpt2")
    assert run("--load-dir", source, "--save-dir", tmp_path / "ms", "--saver", "mindspore") == 0
    stored = weights_of(tmp_path / "ms")
    assert "decoder.layers.0.input_layernorm.gamma" in stored and "decoder.final_layernorm.beta" in stored
    made = msfiles.save(tmp_path / "made", stored)
    same(to_hf(made, source, tmp_path / "hf", "--ms-qkv-layout", "grouped"), weights_of(source))
    # Under NVIDIA's names, and without a config.json.
    nvidia = {k.replace(".gamma", ".weight").replace(".beta", ".bias"): t for k, t in stored.items()}
    other = msfiles.save(tmp_path / "other", nvidia)
    flags = ("--num-attention-heads", 4, "--ms-qkv-layout", "grouped", "--saver", "mindspore")
    assert run("--load-dir", other, "--save-dir", tmp_path / "again", *flags) == 0
    same(weights_of(tmp_path / "again"), stored)


def test_entries_that_are_no_weights(hf: Hf, tmp_path: Path) -> None:
    source = hf("llama2")
    weights = msfiles.fused(weights_of(source), config_of(source))
    more = {f"adam_{kind}.{name}": torch.zeros_like(t) for kind in "mv" for name, t in weights.items()}
    counters = {name: torch.tensor(3) for name in ("global_step", "epoch_num", "step_num", "loss_scale")}
    counters["decoder.layers.0.self_attention.core_attention.dropout.keep_prob"] = torch.tensor(0.5)
    made = msfiles.save(tmp_path / "ms", {**weights, **more, **counters})
    same(to_hf(made, source, tmp_path / "hf", *INTERLEAVED), weights_of(source))
    notes = json.loads((tmp_path / "hf" / "ckptconv.json").read_text())["notes"]
    assert any("optimizer state is not converted" in note for note in notes)
    odd = msfiles.save(tmp_path / "odd", {**weights, "decoder.layers.0.mlp.extra.weight": torch.zeros(3)})
    flags = ("--load-dir", odd, "--save-dir", tmp_path / "no", "--saver", "hf", "--ms-config", source, *INTERLEAVED)
    result = here(*flags)
    assert result.returncode == 3 and "mlp.extra.weight, which no rule knows" in result.stderr


def test_map_index_and_hyper_parameters(hf: Hf, tmp_path: Path) -> None:
    """The older, flat map; a file it does not name; an index as Hugging Face's instead."""
    source = hf("llama2")
    weights = msfiles.fused(weights_of(source), config_of(source))
    half = dict(list(weights.items())[:9])
    rest = {name: tensor for name, tensor in weights.items() if name not in half}
    for folder in ("map", "index"):
        msfiles.save(tmp_path / folder, half, "part0.safetensors")
        msfiles.save(tmp_path / folder, rest, "part1.safetensors")
    msfiles.save(tmp_path / "map", {"whatever.it.is": torch.zeros(2)}, "hyper_param.safetensors")
    entries = {name: f"part{int(name in rest)}.safetensors" for name in weights}
    (tmp_path / "map" / "param_name_map.json").write_text(json.dumps(entries))
    (tmp_path / "index" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": entries}))
    for folder in ("map", "index"):
        same(to_hf(tmp_path / folder, source, tmp_path / f"hf_{folder}", *INTERLEAVED), weights_of(source))
    (tmp_path / "map" / "part1.safetensors").unlink()
    result = here("--loader", "core_mf", "--load-dir", tmp_path / "map", "--save-dir", tmp_path / "no", "--saver", "hf")
    assert result.returncode == 3 and "names part1.safetensors, which are not in the directory" in result.stderr


# Checkpoint 2.0: slices in the files of ranks


def sharded(folder: Path, weights: Weights, cuts: dict[str, tuple[int, ...]]) -> Path:
    """`iteration_00000012` of several ranks with the metadata.json that mindformers r1.8.0 writes."""
    top = folder / "iteration_00000012"
    top.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("12")
    count = max(_prod(cut) for cut in cuts.values())
    files: list[Weights] = [{} for _ in range(count)]
    described: dict[str, Any] = {}
    stored: dict[str, Any] = {}
    names = [f"llama-model-{n:07d}-{count:07d}" for n in range(count)]
    for name, tensor in weights.items():
        cut = cuts.get(name, (1,) * tensor.dim())
        parts = [tensor]
        for axis, pieces in enumerate(cut):
            parts = [small for part in parts for small in part.chunk(pieces, axis)]
        for n, part in enumerate(parts):
            files[n][name] = part
            stored[str((name, (n,)))] = [{"file_name": names[n], "storage_rank": n}]
        described[name] = {
            "properties": {"dtype": "Float32", "replica_id": 0, "allow_shape_mismatch": False, "allow_to_save": True},
            "global_shape": list(tensor.shape),
            "axis_fragmentations": list(cut),
            "layout": {"device_matrix": [count], "tensor_map": [0], "interleaved_parallel": False,
                       "alias_name": ["tp"], "rank_list": list(range(count))},
            "chunk": [{"global_offset": [n], "local_shape": list(part.shape)} for n, part in enumerate(parts)],
        }  # fmt: skip
    stored[str(("adam_m.x", (0,)))] = [{"file_name": f"llama-opt-0000000-{count:07d}", "storage_rank": 0}]
    described["adam_m.x"] = {"global_shape": [1], "axis_fragmentations": [1], "layout": None,
                             "chunk": [{"global_offset": [0], "local_shape": [1]}]}  # fmt: skip
    for name, tensors in zip(names, files, strict=True):
        msfiles.save(top, tensors, f"{name}.safetensors")
    (top / "metadata.json").write_text(json.dumps({"state_dict_metadata": described, "storage_data": stored}))
    return folder


def _prod(numbers: tuple[int, ...]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


def test_slices_are_merged(hf: Hf, tmp_path: Path) -> None:
    source = hf("llama2")
    weights = msfiles.fused(weights_of(source), config_of(source))
    cuts: dict[str, tuple[int, ...]] = {}
    for i in range(4):
        cuts[f"decoder.layers.{i}.mlp.linear_fc1.weight"] = (2, 2)
        cuts[f"decoder.layers.{i}.mlp.linear_fc2.weight"] = (1, 4)
        cuts[f"decoder.layers.{i}.self_attention.linear_qkv.weight"] = (4, 1)
    top = sharded(tmp_path / "ms", weights, cuts)
    flags = ("--ms-config", source, *INTERLEAVED)
    assert run("--load-dir", top, "--save-dir", tmp_path / "hf", "--saver", "hf", *flags) == 0
    same(weights_of(tmp_path / "hf"), weights_of(source))
    folder = top / "iteration_00000012"
    path = folder / "metadata.json"
    data = json.loads(path.read_text())
    del data["state_dict_metadata"]["decoder.layers.1.mlp.linear_fc1.weight"]["chunk"][2]
    path.write_text(json.dumps(data))
    told = ("--loader", "core_mf", "--saver", "hf", "--load-dir", folder, *flags)
    result = here(*told, "--save-dir", tmp_path / "no")
    assert result.returncode == 3 and "where 4 of [88, 24] are needed" in result.stderr
    path.unlink()
    result = here(*told, "--save-dir", tmp_path / "no")
    assert result.returncode == 3 and "unified_safetensors.py" in result.stderr


def test_rank_files_are_refused(hf: Hf, tmp_path: Path) -> None:
    weights = msfiles.fused(weights_of(hf("llama2")), config_of(hf("llama2")))
    msfiles.save(tmp_path / "a" / "rank_1", weights, "llama_rank_1-4_2.safetensors")
    top = tmp_path / "a"
    for place in (top, top / "rank_1", top / "rank_1" / "llama_rank_1-4_2.safetensors"):
        result = here("--load-dir", place, "--save-dir", tmp_path / "no", "--saver", "hf")
        assert result.returncode == 3, place
        assert "toolkit/safetensors/unified_safetensors.py" in result.stderr


# What flags say


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(Hugging Face, MindSpore): a GQA model with biases, sizes as in the documented command but a 64th of them."""
    top = tmp_path_factory.mktemp("biased")
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 32, "num_key_value_heads": 16,
             "vocab_size": 2000, "num_hidden_layers": 2, "max_position_embeddings": 2048}  # fmt: skip
    source = build("llama_both_bias", top / "hf", "bfloat16", **sizes)
    weights = msfiles.fused(weights_of(source), config_of(source), fc1="contiguous")
    return source, msfiles.save(top / "ms", weights, "model.safetensors")


def documented(source: object, out: object, *more: object) -> list[object]:
    """The command of MindSpore's guide (32 layers of 4096, 128000 tokens there), with our plugins' names."""
    return [
        "--megatron-path", "path_to_megatron",
        "--model-type", "GPT",
        "--loader", "core_mf",
        "--saver", "megatron_mcore",
        "--target-tensor-parallel-size", 2,
        "--target-pipeline-parallel-size", 2,
        "--load-dir", source,
        "--save-dir", out,
        "--loader-transformer-impl", "local",
        "--saver-transformer-impl", "local",
        "--position-embedding-type", "rope",
        "--true-vocab-size", 2000,
        "--padded-vocab-size", 2000,
        "--num-layers", 2,
        "--seq-length", 2048,
        "--hidden-size", 64,
        "--ffn-hidden-size", 256,
        "--num-attention-heads", 32,
        "--num-query-groups", 16,
        "--normalization", "RMSNorm",
        "--add-bias-linear",
        "--swiglu",
        *more,
    ]  # fmt: skip


def test_documented_command(biased: tuple[Path, Path], tmp_path: Path) -> None:
    """Upstream cannot run its own example (GQA); ours gives the ranks that the Hugging Face model gives."""
    hf, ms = biased
    result = here(*documented(ms, tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert "rows are taken as contiguous, as core_mf always did" in result.stderr
    layout = ("--target-tp", 2, "--target-pp", 2, "--saver-transformer-impl", "local")
    assert run("--load-dir", hf, "--save-dir", tmp_path / "want", "--saver", "megatron_mcore", *layout) == 0
    for path in sorted((tmp_path / "want").glob("iter_*/*/model_optim_rng.pt")):
        want = torch.load(path, weights_only=False)["model"]
        found = torch.load(tmp_path / "out" / path.relative_to(tmp_path / "want"), weights_only=False)["model"]
        same(found, want)
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "1"
    assert not (tmp_path / "ms2pt_checkpoint").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--num-layers", 3), "--num-layers 3, found 2"),
        (("--hidden-size", 128), "--hidden-size 128, found 64"),
        (("--ffn-hidden-size", 100), "--ffn-hidden-size 100, found 256"),
        (("--num-attention-heads", 16, "--num-query-groups", 16), "--num-query-groups 16, found 8"),
        (("--num-attention-heads", 24), "is not 24 heads of 2"),
        (("--padded-vocab-size", 2048), "--padded-vocab-size 2048, found 2000"),
        (("--true-vocab-size", 2048), "but the embedding has 2000 rows"),
        (("--normalization", "LayerNorm"), "--normalization LayerNorm, found RMSNorm"),
        (("--position-embedding-type", "learned_absolute"), "--position-embedding-type learned_absolute, found rope"),
    ],
)
def test_flags_that_disagree(
    flags: tuple[object, ...], says: str, biased: tuple[Path, Path], tmp_path: Path
) -> None:
    result = here(*documented(biased[1], tmp_path / "out", *flags))
    assert result.returncode == 3 and says in result.stderr
    assert not (tmp_path / "out").exists()


def test_biases_that_are_not_there(hf: Hf, tmp_path: Path) -> None:
    ms = msfiles.save(tmp_path / "ms", msfiles.fused(weights_of(hf("llama2")), config_of(hf("llama2"))))
    told = ("--loader", "core_mf", "--load-dir", ms, "--save-dir", tmp_path / "no", "--saver", "hf")
    result = here(*told, "--num-attention-heads", 4, "--add-bias-linear")
    assert result.returncode == 3 and "--add-bias-linear True, found False" in result.stderr
    result = here(*told)
    assert result.returncode == 2 and "Give --num-attention-heads" in result.stderr


def test_rope_and_epsilon_from_flags(biased: tuple[Path, Path], tmp_path: Path) -> None:
    told = ("--loader", "core_mf", "--load-dir", biased[1], "--save-dir", tmp_path / "out", "--saver", "hf")
    flags = ("--num-attention-heads", 32, "--rotary-base", 5e5, "--norm-epsilon", 1e-6, "--seq-length", 512)
    result = here(*told, *flags)
    assert result.returncode == 0 and "Megatron's defaults" not in result.stderr
    config = config_of(tmp_path / "out")
    assert (config["rope_theta"], config["rms_norm_eps"]) == (5e5, 1e-6)
    assert config["max_position_embeddings"] == 512 and config["num_key_value_heads"] == 16


def test_experts_need_a_config(hf: Hf, tmp_path: Path) -> None:
    source = hf("qwen3_moe")
    ms = msfiles.save(tmp_path / "ms", msfiles.fused(weights_of(source), config_of(source)))
    told = ("--loader", "core_mf", "--load-dir", ms, "--save-dir", tmp_path / "no", "--saver", "hf")
    result = here(*told, *INTERLEAVED)
    assert result.returncode == 2 and "--ms-config" in result.stderr


def test_its_other_name(hf: Hf, tmp_path: Path) -> None:
    """Under which layouts are always asked for."""
    ms = msfiles.save(tmp_path / "ms", msfiles.fused(weights_of(hf("llama2")), config_of(hf("llama2"))))
    told = ("--loader", "mindspore", "--load-dir", ms, "--saver", "hf", "--ms-config", hf("llama2"))
    result = here(*told, "--save-dir", tmp_path / "no")
    assert result.returncode == 2 and "--ms-fc1-layout is needed" in result.stderr
    assert run(*told, "--save-dir", tmp_path / "out", *INTERLEAVED) == 0
    same(weights_of(tmp_path / "out"), weights_of(hf("llama2")))


def test_true_vocabulary(hf: Hf, tmp_path: Path) -> None:
    source = hf("llama2")
    weights = msfiles.fused(weights_of(source), config_of(source))
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        weights[name] = torch.cat([weights[name], torch.ones(5, 48)])
    ms = msfiles.save(tmp_path / "ms", weights)
    flags = ("--true-vocab-size", 131, "--num-attention-heads", 4, "--kv-channels", 12, *INTERLEAVED)
    code = run("--loader", "core_mf", "--load-dir", ms, "--save-dir", tmp_path / "hf", "--saver", "hf", *flags)
    assert code == 0
    same(weights_of(tmp_path / "hf"), weights_of(source))


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "bert", "falcon_rw"])
def test_models_it_cannot_express(name: str, hf: Hf, tmp_path: Path) -> None:
    result = here("--load-dir", hf(name), "--save-dir", tmp_path / "no", "--saver", "mindspore")
    assert result.returncode == 7
    assert "MindSpore Transformers cannot express this model" in result.stderr
    assert not (tmp_path / "no").exists()


def test_a_file_of_its_format_beside_a_config_is_not_hugging_faces(hf: Hf, tmp_path: Path) -> None:
    source = hf("llama2")
    made = msfiles.save(tmp_path, msfiles.fused(weights_of(source), config_of(source)), "model.safetensors")
    (made / "config.json").write_bytes((source / "config.json").read_bytes())
    flags = ("--load-dir", made, "--save-dir", tmp_path / "out", "--saver", "hf", *INTERLEAVED)
    assert run(*flags) == 0
    same(weights_of(tmp_path / "out"), weights_of(source))


def test_its_tools_output_in_hugging_faces_names_is_hugging_faces(hf: Hf, tmp_path: Path) -> None:
    source = hf("llama2")
    save_file(weights_of(source), tmp_path / "model.safetensors", {"format": "ms"})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    assert run("--load-dir", tmp_path, "--save-dir", tmp_path / "out", "--saver", "hf") == 0
    same(weights_of(tmp_path / "out"), weights_of(source))
