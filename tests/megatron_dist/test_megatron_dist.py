"""torch_dist without Megatron: keys and shapes written out by hand, files read by torch, what is found and refused.

That real megatron-core reads and writes the same is shown in tests/oracle/test_dist_mcore.py.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint

import inprocess
from ckptconv import plugins
from ckptconv.containers import dcp, torchzip
from ckptconv.loaders import megatron_dist as loader
from ckptconv.savers import megatron_dist as saver
from commands import convert, same, weights_of

Hf = Callable[..., Path]
Weights = dict[str, torch.Tensor]
ITERATION = "iter_0000001"


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@pytest.fixture(scope="module")
def kept(hf: Hf, tmp_path_factory: pytest.TempPathFactory) -> Hf:
    """`kept(fixture, *flags)`: a torch_dist directory, made once. Do not change it."""
    made: dict[Any, Path] = {}

    def get(name: str, *flags: object) -> Path:
        if (name, flags) not in made:
            out = tmp_path_factory.mktemp("dist") / "out"
            made[name, flags] = convert(hf(name), out, "megatron_dist", "--make-vocab-size-divisible-by", 1, *flags)
        return made[name, flags]

    return get


def shapes(top: Path) -> dict[str, list[int]]:
    """Tensors by key, as torch's own reader sees them."""
    index = checkpoint.FileSystemReader(top / ITERATION).read_metadata()
    return {key: list(value.size) for key, value in index.state_dict_metadata.items() if hasattr(value, "size")}


def states(top: Path) -> set[str]:
    """Keys of stored objects, less the modules' numbers."""
    index = checkpoint.FileSystemReader(top / ITERATION).read_metadata()
    return {key for key, value in index.state_dict_metadata.items() if not hasattr(value, "size")}


def tensors(directory: Path) -> Weights:
    """Every tensor, read by torch."""
    index = checkpoint.FileSystemReader(directory).read_metadata()
    into = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in index.state_dict_metadata.items()
            if hasattr(v, "size")}  # fmt: skip
    checkpoint.load(into, storage_reader=checkpoint.FileSystemReader(directory), no_dist=True)
    return into


D = "decoder.layers."
#: h 48, f 88, 4 heads in 2 groups of 16, 131 tokens, 4 layers.
LLAMA = {
    "embedding.word_embeddings.weight": [131, 48],
    f"{D}self_attention.linear_qkv.layer_norm_weight": [4, 48],
    f"{D}self_attention.linear_qkv.weight": [4, 128, 48],
    f"{D}self_attention.linear_proj.weight": [4, 48, 64],
    f"{D}mlp.linear_fc1.layer_norm_weight": [4, 48],
    f"{D}mlp.linear_fc1.weight": [4, 176, 48],
    f"{D}mlp.linear_fc2.weight": [4, 48, 88],
    "decoder.final_layernorm.weight": [48],
}  # fmt: skip
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_dense_keys_are_the_same_for_both_implementations(kept: Hf, impl: str) -> None:
    top = kept("llama32", "--saver-transformer-impl", impl)
    assert shapes(top) == LLAMA
    want = {f"{D}{linear}._extra_state/shard_{i}_4" for linear in LINEARS for i in range(4)}
    if impl == "transformer_engine":
        want |= {f"{D}self_attention.core_attention._extra_state/shard_{i}_4" for i in range(4)}
        want |= {"decoder.final_layernorm._extra_state/shard_0_1"}
    assert states(top) == want


def test_layers_with_experts(kept: Hf) -> None:
    """Experts are stacked behind the layers; the norm before them is called after a linear only by the local spec."""
    local, engine = (shapes(kept("mixtral", "--saver-transformer-impl", impl))
                     for impl in ("local", "transformer_engine"))  # fmt: skip
    norm, alone = f"{D}mlp.linear_fc1.layer_norm_weight", f"{D}pre_mlp_layernorm.weight"
    assert {key: shape for key, shape in local.items() if key != norm} == {
        key: shape for key, shape in engine.items() if key != alone
    }
    assert norm in local and alone in engine
    layers, experts = engine[f"{D}mlp.router.weight"][:2]
    fc1, fc2 = (engine[f"{D}mlp.experts.experts.linear_{name}.weight"] for name in ("fc1", "fc2"))
    assert fc1 == [layers, experts, 2 * fc2[3], fc2[2]] and fc2[:2] == [layers, experts]
    objects = states(kept("mixtral", "--saver-transformer-impl", "local"))
    assert f"{D}mlp.experts.experts.linear_fc1._extra_state/shard_1.2_{layers}.{experts}" in objects
    assert not any(".mlp.linear_fc1._" in key or "router" in key for key in objects)


def test_layers_of_two_kinds_have_keys_of_their_own(kept: Hf) -> None:
    found = shapes(kept("deepseek_v3_mtp"))
    assert not any(key.startswith(D) and not key.removeprefix(D)[0].isdigit() for key in found)
    first, last = (min((k for k in found if k.startswith(f"{D}{n}.mlp.")), default="") for n in (0, 3))
    assert first == f"{D}0.mlp.linear_fc1.layer_norm_weight" and last.startswith(f"{D}3.mlp.experts.experts.")
    assert len(found[last]) == 3
    assert "mtp.layers.0.transformer_layer.self_attention.linear_proj.weight" in found
    objects = states(kept("deepseek_v3_mtp"))
    assert f"{D}0.mlp.linear_fc1._extra_state/shard_0_1" in objects
    assert f"{D}3.mlp.experts.experts.linear_fc2._extra_state/shard_1_{found[last][0]}" in objects
    assert {"mtp.layers.0.eh_proj._extra_state/shard_0_1", "mtp.layers.0.enorm._extra_state/shard_0_1"} <= objects


def test_key_style_and_extra_states_as_told(kept: Hf, hf: Hf, tmp_path: Path) -> None:
    top = kept("llama32", "--layer-keys", "apart", "--extra-state", "mlp.act", "--extra-state", "embedding.extra")
    stacked = {key: shape[1:] for key, shape in LLAMA.items() if key.startswith(D)}
    assert {k: v for k, v in shapes(top).items() if k.startswith(D)} == {
        f"{D}{i}.{key.removeprefix(D)}": shape for key, shape in stacked.items() for i in range(4)
    }
    assert {f"{D}3.mlp.act._extra_state/shard_0_1", "embedding.extra._extra_state/shard_0_1"} <= states(top)
    same(weights_of(convert(top, tmp_path / "back")), weights_of(hf("llama32")))
    done = inprocess.here("--load-dir", hf("deepseek_v3"), "--save-dir", tmp_path / "no", "--saver", "megatron_dist",
                          "--layer-keys", "stacked")  # fmt: skip
    assert done.returncode == 2 and "with and without experts" in done.stderr
    assert not (tmp_path / "no").exists()


def test_contents_as_torch_reads_them(kept: Hf, hf: Hf) -> None:
    """Rows where the formulas of grouped queries and of [gate; up] put them."""
    source, found = load_file(hf("llama2") / "model.safetensors"), tensors(kept("llama2") / ITERATION)
    layer = "model.layers.2."
    gate, up = (source[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(found[f"{D}mlp.linear_fc1.weight"][2], torch.cat([gate, up]))
    q, k, v = (source[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv")
    rows, d = found[f"{D}self_attention.linear_qkv.weight"][2], 12
    for group in range(2):
        top = group * 4 * d
        assert torch.equal(rows[top : top + 2 * d], q[group * 2 * d : (group + 1) * 2 * d])
        assert torch.equal(rows[top + 2 * d : top + 3 * d], k[group * d : (group + 1) * d])
        assert torch.equal(rows[top + 3 * d : top + 4 * d], v[group * d : (group + 1) * d])
    assert torch.equal(found["output_layer.weight"], source["lm_head.weight"])


def test_what_a_trainer_reads_beside_the_tensors(kept: Hf) -> None:
    top = kept("llama2", "--target-tp", 2, "--target-pp", 2)
    assert (top / "latest_checkpointed_iteration.txt").read_text() == "1"
    said = json.loads((top / ITERATION / "metadata.json").read_text())
    assert said == {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
                    "common_backend_version": 1}  # fmt: skip
    common = torch.load(top / ITERATION / "common.pt", weights_only=False)
    args = common.pop("args")
    assert common == {
        "checkpoint_version": 3.0,
        "iteration": 1,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    assert (args.ckpt_format, args.use_dist_ckpt, args.no_save_optim) == ("torch_dist", True, True)
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.num_layers) == (2, 2, 4)
    flags = (top / "megatron_args.txt").read_text()
    assert "\n--ckpt-format torch_dist\n" in flags and "--ckpt-format torch\n" not in flags


def test_experts_may_be_cut_otherwise_than_the_rest(hf: Hf, tmp_path: Path) -> None:
    top = convert(hf("mixtral"), tmp_path / "out", "megatron_dist", "--target-tp", 2, "--target-etp", 1)
    args = torch.load(top / ITERATION / "common.pt", weights_only=False)["args"]
    assert (args.tensor_model_parallel_size, args.expert_tensor_parallel_size) == (2, 1)
    assert "\n--expert-tensor-parallel-size 1\n" in (top / "megatron_args.txt").read_text()
    done = inprocess.here("--load-dir", hf("mixtral"), "--save-dir", tmp_path / "no", "--saver", "megatron_dist",
                          "--target-tp", 3)  # fmt: skip
    assert done.returncode == 6


def test_several_data_files(hf: Hf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "FILE_BYTES", 200_000)
    top = convert(hf("mixtral"), tmp_path / "out", "megatron_dist", "--verify")
    files = sorted((top / ITERATION).glob("*.distcp"))
    assert len(files) > 3 and all(path.stat().st_size < 500_000 for path in files)
    one = tmp_path / "one"
    monkeypatch.undo()
    convert(hf("mixtral"), one, "megatron_dist")
    there, whole = tensors(top / ITERATION), tensors(one / ITERATION)
    same(there, whole)


@pytest.mark.parametrize("name", ["llama32", "qwen2_moe_step", "deepseek_v3_mtp", "megatron_bert"])
def test_rank_files_come_out_the_same_by_either_way(name: str, kept: Hf, hf: Hf, tmp_path: Path) -> None:
    flags = ("--target-tp", 2, "--target-pp", 2, "--make-vocab-size-divisible-by", 1)
    straight = convert(hf(name), tmp_path / "a", "megatron_mcore", *flags)
    around = convert(kept(name), tmp_path / "b", "megatron_mcore", *flags)
    ranks = sorted(path.relative_to(straight) for path in straight.glob("iter_*/*/model_optim_rng.pt"))
    assert len(ranks) == 4
    for rank in ranks:
        one, other = (torch.load(top / rank, weights_only=False)["model"] for top in (straight, around))
        same(other, one)


def test_one_loader_knows_it_from_the_directory(kept: Hf, hf: Hf, tmp_path: Path) -> None:
    top = kept("llama2")
    assert plugins.detect(str(top)) == plugins.detect(str(top / ITERATION)) == "megatron_dist"
    for number, flags in enumerate(((), ("--loader", "megatron_mcore"), ("--loader", "core"), ("--iteration", 1))):
        same(weights_of(convert(top, tmp_path / str(number), "hf", *flags)), weights_of(hf("llama2")))
    back = convert(top / ITERATION, tmp_path / "alone", "hf", "--true-vocab-size", 131)
    same(weights_of(back), weights_of(hf("llama2")))


def test_planning_opens_no_chunk(kept: Hf, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, read = [], torchzip.read

    def noticed(path: Any, *rest: Any) -> object:
        opened.append(path)
        return read(path, *rest)

    monkeypatch.setattr(torchzip, "read", noticed)
    found = loader.read(kept("mixtral") / ITERATION)
    assert len(found.tensors[0, 0, 0]) > 60
    assert [Path(path).name for path in opened] == ["common.pt"]


# Plain distributed checkpoints, written by torch

#: What a trainer with Transformer Engine calls a Llama's tensors, and Hugging Face's parts of them.
NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}  # fmt: skip


def state_of(source: Weights, halves: bool) -> Weights:
    """Names and tensors of megatron-core's model, by hand."""
    state = {
        "embedding.word_embeddings.weight": source["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": source["model.norm.weight"],
        "output_layer.weight": source["lm_head.weight"],
    }
    for i in range(4):
        hf, ours = f"model.layers.{i}.", f"{D}{i}."
        state |= {ours + name: source[hf + part] for name, part in NAMES.items()}
        q, k, v = (source[f"{hf}self_attn.{name}_proj.weight"].unflatten(0, (2, -1)) for name in "qkv")
        state[f"{ours}self_attention.linear_qkv.weight"] = torch.cat([q, k, v], 1).flatten(0, 1)
        gate, up = (source[f"{hf}mlp.{name}_proj.weight"] for name in ("gate", "up"))
        fc1 = f"{ours}mlp.linear_fc1.weight"
        state |= {f"{fc1}_w": gate, f"{fc1}_v": up} if halves else {fc1: torch.cat([gate, up])}
    return state


def plain(directory: Path, prefix: str, state: dict[str, Any], **others: Any) -> Path:
    """A directory without metadata.json, written by torch."""
    data = {**{prefix + key: value for key, value in state.items()}, **others}
    writer = checkpoint.FileSystemWriter(directory, thread_count=2)
    checkpoint.save(data, storage_writer=writer, no_dist=True)
    return directory


@pytest.fixture(scope="module")
def arguments(kept: Hf) -> Callable[..., Namespace]:
    def get(**changes: Any) -> Namespace:
        args = torch.load(kept("llama2") / ITERATION / "common.pt", weights_only=False)["args"]
        return Namespace(**{**vars(args), "vocab_size": 131, "ckpt_format": "fsdp_dtensor", **changes})

    return get


def test_fsdp_dtensor_and_torch_dcp(hf: Hf, arguments: Callable[..., Namespace], tmp_path: Path) -> None:
    source = weights_of(hf("llama2"))
    moments = {f"optimizer.state.exp_avg.{key}": value for key, value in state_of(source, True).items()}
    rest = {"iteration": 5, "checkpoint_version": 3.0, "opt_param_scheduler.max_lr": 1.0, "rng_state": [1], **moments}
    args = arguments(tensor_model_parallel_size=2)
    fsdp = plain(tmp_path / "iter_0000005", "model.module.module.", state_of(source, True), args=args, **rest)
    same(weights_of(convert(fsdp, tmp_path / "a")), source)
    plain_dcp = plain(tmp_path / "dcp", "model.", state_of(source, False), args=arguments(), **rest)
    same(weights_of(convert(plain_dcp, tmp_path / "b")), source)
    cut = plain(tmp_path / "cut", "model.", state_of(source, False), args=args, **rest)
    assert "of tensor parallel size 2" in refused(cut, tmp_path)


def test_grouped_experts_of_fsdp(kept: Hf, hf: Hf, tmp_path: Path) -> None:
    """Keys of Transformer Engine's grouped linears: one number for the expert, then the half."""
    state: dict[str, Any] = {}
    for key, tensor in tensors(kept("mixtral") / ITERATION).items():
        if not key.startswith(D):
            state[key] = tensor
            continue
        for i, layer in enumerate(tensor):
            name = f"{D}{i}.{key.removeprefix(D)}"
            if ".experts." not in key:
                state[name] = layer
                continue
            for e, expert in enumerate(layer):
                one = f"{name.replace('.experts.experts.', '.experts.')}{e}"
                halves = expert.chunk(2) if "fc1" in key else ()
                state |= dict(zip((f"{one}_w", f"{one}_v"), halves, strict=True)) if halves else {one: expert}
    args = torch.load(kept("mixtral") / ITERATION / "common.pt", weights_only=False)["args"]
    there = plain(tmp_path / "there", "model.module.", state, args=args)
    same(weights_of(convert(there, tmp_path / "back", "hf", "--true-vocab-size", 131)), weights_of(hf("mixtral")))
    half = next(key for key in state if key.endswith("_v"))
    del state[half]
    assert "one is missing" in refused(plain(tmp_path / "half", "model.module.", state, args=args), tmp_path)


def test_torchtitan(hf: Hf, tmp_path: Path) -> None:
    """Its Llama has Meta's names and rotary rows (state_dict_adapter.py permutes them for Hugging Face's)."""
    top = convert(hf("llama2"), tmp_path / "meta", "meta")
    state = torch.load(top / "consolidated.00.pth", weights_only=True)
    rest = {f"optimizer.state.{key}.exp_avg": value for key, value in state.items()}
    there = plain(tmp_path / "step-10", "", state, **rest, train_state=[10], lr_scheduler={"last_epoch": 10})
    assert "put" not in (error := refused(there, tmp_path)) and "--loader meta" in error
    for name in ("params.json", "hf"):
        shutil.move(top / name, there / name)
    assert plugins.detect(str(there)) == "meta"
    back = convert(there, tmp_path / "back", "hf", "--llama-version", "2")
    same(weights_of(back), weights_of(hf("llama2")))
    assert any("ignored optimizer*" in note for note in noted(back))


# What is refused


def refused(directory: Path, tmp_path: Path, code: int = 3) -> str:
    """The error of a conversion to Hugging Face, which writes nothing."""
    out = tmp_path / "refused"
    done = inprocess.here("--load-dir", directory, "--save-dir", out, "--saver", "hf")
    assert done.returncode == code, done.stderr
    assert not out.exists()
    return done.stderr


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("model.decoder.final_norm.weight", "HybridModel"),
        ("model.decoder.layers.0.mixer.in_proj.weight", "hybrid"),
        ("model.decoder.layers.0.self_attention.strange.weight", "which no rule knows"),
        ("surprise.weight", "which no rule knows"),
        ("model.decoder.layers.0.mlp.linear_fc1.weight_w", "under two keys"),
        ("model.decoder.layers.mlp.linear_fc2.weight", "expected an axis"),
    ],
)  # fmt: skip
def test_foreign_tensors_are_named(
    key: str, says: str, hf: Hf, arguments: Callable[..., Namespace], tmp_path: Path
) -> None:
    state = state_of(weights_of(hf("llama2")), False)
    there = plain(tmp_path / "it", "model.", state, args=arguments(), **{key: torch.zeros(4)})
    error = refused(there, tmp_path)
    assert says in error and key.removeprefix("model.").split(".")[-1].removesuffix("_w") in error


def test_other_kinds_of_checkpoints_are_named(hf: Hf, tmp_path: Path) -> None:
    source = weights_of(hf("llama2"))
    titan = {"tok_embeddings.weight": source["model.embed_tokens.weight"], "norm.weight": source["model.norm.weight"]}
    optimizer = {"optimizer.state.norm.weight.exp_avg": torch.zeros(4), "train_state": io.BytesIO(b"x")}
    assert "torchtitan" in refused(plain(tmp_path / "titan", "", titan, **optimizer), tmp_path)
    assert "Hugging Face" in refused(plain(tmp_path / "hf", "", source), tmp_path)
    state = state_of(source, False)
    assert "has no args" in refused(plain(tmp_path / "nemo", "module.", state), tmp_path)
    other = plain(tmp_path / "else", "", {"a.weight": torch.zeros(3)})
    assert "Is this a GPT or BERT model" in refused(other, tmp_path)


def test_incomplete_directories_are_named(kept: Hf, tmp_path: Path) -> None:
    def copy(name: str) -> tuple[Path, Path]:
        top = tmp_path / name
        shutil.copytree(kept("llama2"), top)
        return top, top / ITERATION

    top, inside = copy("unfinished")
    (inside / "metadata.json").unlink()
    assert "was not completed" in refused(top, tmp_path)
    top, inside = copy("zarr")
    (inside / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    assert "zarr" in (error := refused(top, tmp_path)) and "--ckpt-format torch_dist" in error
    top, inside = copy("index")
    (inside / ".metadata").unlink()
    assert ".metadata: cannot be read" in refused(top, tmp_path)
    top, inside = copy("data")
    data = next(inside.glob("*.distcp"))
    size = data.stat().st_size
    data.write_bytes(b"\0" * size)
    assert data.name in refused_while_reading(top, tmp_path)
    data.unlink()
    assert f"lacks {data.name}" in refused(top, tmp_path)


def refused_while_reading(directory: Path, tmp_path: Path) -> str:
    done = inprocess.here("--load-dir", directory, "--save-dir", tmp_path / "refused", "--saver", "hf")
    assert done.returncode == 3, done.stderr
    assert not list((tmp_path / "refused").glob("*.safetensors"))
    return done.stderr


def test_unknown_tensors_beside_the_model(kept: Hf, tmp_path: Path) -> None:
    top = tmp_path / "top"
    shutil.copytree(kept("llama2"), top)
    common = torch.load(top / ITERATION / "common.pt", weights_only=False)
    torch.save({**common, "note": {"text": [1, "x"]}}, top / ITERATION / "common.pt")
    convert(top, tmp_path / "fine")
    assert any("ignored note: trainer state" in note for note in noted(tmp_path / "fine"))
    torch.save({**common, "ema": {"deep": [torch.zeros(3)]}}, top / ITERATION / "common.pt")
    assert "holds tensors in ema" in refused(top, tmp_path)


def noted(out: Path) -> list[str]:
    return list(json.loads((out / "ckptconv.json").read_text())["notes"])


def test_objects_that_no_rule_knows(kept: Hf, tmp_path: Path) -> None:
    top = tmp_path / "top"
    shutil.copytree(kept("llama2"), top)
    index = pickle.loads((top / ITERATION / ".metadata").read_bytes())
    key = next(key for key in index.state_dict_metadata if "_extra_state" in key)
    index.state_dict_metadata["adapter/shard_0_1"] = index.state_dict_metadata[key]
    place = next(place for at, place in index.storage_data.items() if at.fqn == key)
    index.storage_data[type(next(iter(index.storage_data)))("adapter/shard_0_1")] = place
    (top / ITERATION / ".metadata").write_bytes(pickle.dumps(index))
    assert "holds adapter/shard_0_1, which no rule knows" in refused(top, tmp_path)


def test_an_object_is_read_where_it_lies(kept: Hf) -> None:
    stored = dcp.read(kept("llama2") / ITERATION)
    assert {str(stored.object(key)) for key in stored.objects} == {"[None]"}
