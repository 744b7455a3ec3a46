"""The Megatron-Core loader: what it finds by itself, what it checks, what it refuses.

Checkpoints are written by our saver (which test_roundtrip.py and the golden files check) and then changed with torch.
"""

from __future__ import annotations

import dataclasses
import enum
import io
import json
import shutil
import subprocess
import sys
import types
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fixtures import config
from inprocess import main

Hf = Callable[..., Path]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
Made = Callable[..., Path]
Edit = Callable[[dict[str, Any]], None]

ITERATION, TRACKER, FILE = "iter_0000001", "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
PROVENANCE = "ckptconv.json"
EMBEDDING = "embedding.word_embeddings.weight"


def convert(source: Path, out: Path, *flags: object, saver: str = "hf") -> int:
    return main(["--saver", saver, "--load-dir", str(source), "--save-dir", str(out), *map(str, flags)])


@pytest.fixture(scope="module")
def kept(hf: Hf, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`kept(name, tp, pp)`: a checkpoint, made once. Do not change it."""
    made: dict[Any, Path] = {}

    def get(name: str = "llama2", tp: int = 1, pp: int = 1, impl: str = "local") -> Path:
        key = (name, tp, pp, impl)
        if key not in made:
            out = tmp_path_factory.mktemp("mcore") / "out"
            flags = ("--target-tp", tp, "--target-pp", pp, "--saver-transformer-impl", impl)
            assert convert(hf(name), out, *flags, saver="megatron_mcore") == 0
            made[key] = out
        return made[key]

    return get


@pytest.fixture
def made(kept: Made, tmp_path: Path) -> Made:
    """`made(name, tp, pp)`: a copy of a checkpoint to change, as a trainer would have written it: without our notes."""

    def get(*args: Any, notes: bool = False, **kwargs: Any) -> Path:
        shutil.copytree(kept(*args, **kwargs), tmp_path / "in")
        if not notes:
            (tmp_path / "in" / ITERATION / PROVENANCE).unlink()
        return tmp_path / "in"

    return get


def ranks(folder: Path) -> list[Path]:
    return sorted(folder.rglob(FILE))


def edit(path: Path, change: Edit, **how: Any) -> None:
    root = torch.load(path, weights_only=False)
    change(root)
    torch.save(root, path, **how)


def arguments(**changes: Any) -> Edit:
    return lambda root: vars(root["args"]).update(changes)


def same_weights(out: Path, source: Path) -> None:
    found, expected = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    assert sorted(found) == sorted(expected)
    assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# What it finds by itself


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_sizes_are_found(kept: Made, hf: Hf, tmp_path: Path, tp: int, pp: int, impl: str) -> None:
    source = kept("llama2", tp, pp, impl)
    names = {(1, 1): ["mp_rank_00"], (2, 1): ["mp_rank_00", "mp_rank_01"], (1, 2): ["mp_rank_00_000", "mp_rank_00_001"],
             (2, 4): [f"mp_rank_{t:02d}_{p:03d}" for t in range(2) for p in range(4)]}  # fmt: skip
    assert [path.parent.name for path in ranks(source)] == names[tp, pp]
    assert convert(source, tmp_path / "out") == 0
    same_weights(tmp_path / "out", hf("llama2"))


def test_the_target_has_the_sizes_of_the_source_by_default(kept: Made, tmp_path: Path) -> None:
    assert convert(kept("llama2", 2, 2), tmp_path / "out", saver="megatron_mcore") == 0
    assert [p.parent.name for p in ranks(tmp_path / "out")] == [p.parent.name for p in ranks(kept("llama2", 2, 2))]


def test_two_numbers_are_a_stage_or_an_expert_rank_as_the_args_say(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read as expert ranks, the second stage of this dense model makes no sense: that is seen, not guessed around."""
    source = made("llama2", 1, 2)
    assert convert(source, tmp_path / "stages") == 0
    for path in ranks(source):
        edit(path, arguments(pipeline_model_parallel_size=1, expert_model_parallel_size=2))
    assert convert(source, tmp_path / "experts") == 3
    assert "its args say 4 layers, but the stages hold 2" in capsys.readouterr().err
    for path in ranks(source):
        edit(path, arguments(pipeline_model_parallel_size=2, expert_model_parallel_size=2))
    assert convert(source, tmp_path / "both") == 3
    said = capsys.readouterr().err
    assert "say 2 pipeline stages and expert parallel size 2, but its directory has one number for both" in said
    assert not (tmp_path / "experts").exists()


def add_what_a_trainer_adds(root: dict[str, Any]) -> None:
    model = root["model"]
    model["output_layer._extra_state"] = None
    model["decoder.layers.0.self_attention.linear_qkv._extra_state"] = io.BytesIO(b"fp8")
    model["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(7, dtype=torch.uint8)
    root["optimizer"] = {"state": {0: torch.ones(3)}, "param_groups": [{"lr": 1e-4}]}
    root["opt_param_scheduler"] = {"max_lr": 1e-4}
    root["rng_state"] = [{"random_rng_state": (3, (1, 2), None), "torch_rng_state": torch.zeros(9, dtype=torch.uint8)}]
    root["num_floating_point_operations_so_far"] = 1e20
    root["rerun_state_machine"] = {"mode": "disabled"}


def test_what_a_trainer_adds_is_left_behind(made: Made, hf: Hf, tmp_path: Path) -> None:
    source = made("llama2", 2, 1)
    for path in ranks(source):
        edit(path, add_what_a_trainer_adds)
        torch.save({}, path.with_name("distrib_optim.pt"))
    assert convert(source, tmp_path / "out") == 0
    same_weights(tmp_path / "out", hf("llama2"))
    notes = json.loads((tmp_path / "out" / PROVENANCE).read_text())["notes"]
    assert any("_extra_state" in note for note in notes)
    assert any("optimizer" in note for note in notes)


def prefixed(root: dict[str, Any]) -> None:
    root["model"] = {f"module.{name}": tensor for name, tensor in root["model"].items()}


@pytest.mark.parametrize(
    ("change", "how"), [(prefixed, {}), (lambda root: None, {"_use_new_zipfile_serialization": False})]
)
def test_other_ways_to_save_the_same(made: Made, hf: Hf, tmp_path: Path, change: Edit, how: dict[str, Any]) -> None:
    source = made("llama2", 2, 1)
    for path in ranks(source):
        edit(path, change, **how)
    assert convert(source, tmp_path / "out") == 0
    same_weights(tmp_path / "out", hf("llama2"))


def test_args_with_classes_of_megatron(
    made: Made, hf: Hf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pickle names classes of modules that are not installed."""
    names = ("megatron", "megatron.core", "megatron.core.enums", "megatron.core.transformer.enums")
    modules = {name: types.ModuleType(name) for name in names}
    modules["megatron.core.enums"].ModelType = enum.Enum(  # type: ignore[attr-defined]
        "ModelType", {"encoder_or_decoder": 1}, module="megatron.core.enums"
    )
    backend = enum.Enum("AttnBackend", {"auto": 5}, module="megatron.core.transformer.enums")
    modules["megatron.core.transformer.enums"].AttnBackend = backend  # type: ignore[attr-defined]
    settings = dataclasses.make_dataclass("Settings", [("depth", int)])
    settings.__module__ = "megatron.core.enums"
    modules["megatron.core.enums"].Settings = settings  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    source = made("llama2", 1, 2)
    enums: Any = modules["megatron.core.enums"]
    for path in ranks(source):
        edit(
            path,
            arguments(
                model_type=enums.ModelType.encoder_or_decoder, attention_backend=next(iter(backend)),
                settings=settings(3), pipeline_dtype=torch.float32,
                rampup=types.SimpleNamespace(start=1), yaml_cfg=None, where=Path("/data"), masks={1, 2},
            ),
        )  # fmt: skip
    monkeypatch.undo()
    assert convert(source, tmp_path / "out") == 0
    same_weights(tmp_path / "out", hf("llama2"))


def touch(path: str) -> None:
    Path(path).write_text("ran")


class Evil:
    """Would run a function of the one who unpickles it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return touch, (self.path,)


def test_nothing_that_a_file_says_is_run(made: Made, tmp_path: Path) -> None:
    source = made()
    edit(ranks(source)[0], arguments(hook=Evil(str(tmp_path / "ran"))))
    assert convert(source, tmp_path / "out") in (0, 3)
    assert not (tmp_path / "ran").exists()


def test_without_the_small_files_the_config_is_rebuilt_and_this_is_said(
    made: Made, hf: Hf, cli: Cli, tmp_path: Path
) -> None:
    source = made("llama31", 2, 2)
    shutil.rmtree(source / "hf")
    run = cli("--saver", "hf", "--load-dir", source, "--save-dir", tmp_path / "out")
    assert run.returncode == 0
    assert "config.json was rebuilt from the source's own arguments as a llama model" in run.stderr
    same_weights(tmp_path / "out", hf("llama31"))
    written, original = json.loads((tmp_path / "out" / "config.json").read_text()), config("llama31")
    known = set(original) & set(written)
    assert {"vocab_size", "rope_theta", "rope_scaling", "num_key_value_heads", "torch_dtype", "rms_norm_eps"} <= known
    # Of the three tokens that end a text, a tokenizer (the source's args still name it) tells one.
    assert written["eos_token_id"] in original["eos_token_id"]
    known -= {"eos_token_id"}
    assert {key: written[key] for key in known} == {key: original[key] for key in known}


# Iterations


def renamed(folder: Path, name: str, tracker: str) -> Path:
    (folder / ITERATION).rename(folder / name)
    (folder / TRACKER).write_text(tracker)
    return folder


@pytest.mark.parametrize(
    ("name", "tracker", "flags"),
    [
        ("iter_0000001", "1", ()),
        ("iter_0000001", " 1\n", ()),
        ("iter_0001234", "1234", ()),
        ("iter_12345678", "12345678", ()),
        ("release", "release\n", ()),
        ("iter_0000005", "7", ("--iteration", 5)),
        ("release", "7", ("--iteration", "release")),
        ("iter_0000005", "nonsense", ("--iteration", "5")),
    ],
)
def test_which_iteration(
    made: Made, hf: Hf, tmp_path: Path, name: str, tracker: str, flags: tuple[object, ...]
) -> None:
    source = renamed(made("llama2", 1, 2), name, tracker)
    assert convert(source, tmp_path / "out", *flags) == 0
    same_weights(tmp_path / "out", hf("llama2"))


def test_of_several_iterations_the_one_asked_for_is_read(made: Made, hf: Hf, tmp_path: Path) -> None:
    source = made()
    shutil.copytree(source / ITERATION, source / "iter_0000002")
    edit(ranks(source / "iter_0000002")[0], lambda root: root["model"]["decoder.final_layernorm.weight"].fill_(7))
    for flags, changed in (((), False), (("--iteration", 2), True)):
        assert convert(source, tmp_path / f"out{changed}", *flags) == 0
        norm = load_file(tmp_path / f"out{changed}" / "model.safetensors")["model.norm.weight"]
        assert bool((norm == 7).all()) is changed


@pytest.mark.parametrize("tracker", [True, False])
def test_the_directory_of_an_iteration(made: Made, hf: Hf, tmp_path: Path, tracker: bool) -> None:
    source = made("llama2", 2, 1)
    if not tracker:
        (source / TRACKER).unlink()
    assert convert(source / ITERATION, tmp_path / "out") == 0
    same_weights(tmp_path / "out", hf("llama2"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 1
    assert (tmp_path / "out" / "tokenizer.model").is_file()


def test_the_iteration_is_kept(made: Made, tmp_path: Path) -> None:
    source = renamed(made(), "iter_0000042", "42")
    assert convert(source, tmp_path / "out", saver="megatron_mcore") == 0
    assert (tmp_path / "out" / "iter_0000042" / "mp_rank_00" / FILE).is_file()
    assert (tmp_path / "out" / TRACKER).read_text() == "42"
    assert torch.load(ranks(tmp_path / "out")[0], weights_only=False)["iteration"] == 42


@pytest.mark.parametrize(
    ("name", "tracker", "flags", "messages"),
    [
        (ITERATION, "", (), (TRACKER, "says ''", "a number or 'release'")),
        (ITERATION, "soon", (), (TRACKER, "says 'soon'", "a number or 'release'")),
        (ITERATION, "7", (), ("iter_0000007: does not exist", "iter_0000001")),
        (ITERATION, "1", ("--iteration", "9"), ("iter_0000009: does not exist", "iter_0000001")),
        (ITERATION, "release", (), ("release: does not exist", "iter_0000001")),
    ],
)
def test_iterations_that_are_not_there(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, tracker: str, flags: tuple[str, ...],
    messages: tuple[str, ...],
) -> None:  # fmt: skip
    assert convert(renamed(made(), name, tracker), tmp_path / "out", *flags) == 3
    said = capsys.readouterr().err
    assert all(message in said for message in messages), said


def test_an_iteration_that_is_none(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(made(), tmp_path / "out", "--iteration", "last") == 2
    said = capsys.readouterr().err
    assert "--iteration" in said
    assert TRACKER not in said


def test_no_tracker_and_no_ranks(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made()
    (source / TRACKER).unlink()
    assert convert(source, tmp_path / "out", "--loader", "megatron_mcore") == 3
    assert "--iteration" in capsys.readouterr().err
    assert convert(source, tmp_path / "out", "--loader", "megatron_mcore", "--iteration", 1) == 0


# Vocabulary


def rows(out: Path) -> int:
    return len(load_file(out / "model.safetensors")["model.embed_tokens.weight"])


def unsaid(source: Path) -> Path:
    """Nothing says how many rows are tokens."""
    shutil.rmtree(source / "hf")
    for path in ranks(source):
        edit(path, arguments(vocab_size=None))
    return source


def test_all_rows_are_kept_when_nothing_says_more(made: Made, cli: Cli, tmp_path: Path) -> None:
    run = cli("--saver", "hf", "--load-dir", unsaid(made("llama2", 2, 1)), "--save-dir", tmp_path / "out")
    assert run.returncode == 0
    assert "256 embedding rows" in run.stderr
    assert "--true-vocab-size" in run.stderr
    assert rows(tmp_path / "out") == 256


@pytest.mark.parametrize("kind", ["size", "file"])
def test_the_true_vocabulary_can_be_told(made: Made, hf: Hf, tmp_path: Path, kind: str) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({str(n): n for n in range(131)}))
    flags = ("--true-vocab-size", 131) if kind == "size" else ("--vocab-file", tmp_path / "vocab.json")
    source = unsaid(made("llama2", 2, 1))
    assert convert(source, tmp_path / "out", *flags) == 0
    same_weights(tmp_path / "out", hf("llama2"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 131


def test_a_flag_wins_over_what_was_noted(made: Made, tmp_path: Path) -> None:
    assert convert(made(notes=True), tmp_path / "out", "--true-vocab-size", 256) == 0
    assert rows(tmp_path / "out") == 256
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 256


def test_the_args_know_the_true_vocabulary(made: Made, hf: Hf, tmp_path: Path) -> None:
    source = made("llama2", 2, 1)
    shutil.rmtree(source / "hf")
    assert convert(source, tmp_path / "out") == 0
    same_weights(tmp_path / "out", hf("llama2"))


@pytest.mark.parametrize("size", [257, 0, -1])
def test_a_vocabulary_that_cannot_be(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    assert convert(made(), tmp_path / "out", "--true-vocab-size", size) in (2, 3)
    assert str(size) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Damage


def model(change: Callable[[dict[str, Any]], Any]) -> Edit:
    def inside(root: dict[str, Any]) -> None:
        change(root["model"])

    return inside


def set_tensor(name: str, index: Any, value: float) -> Edit:
    def change(root: dict[str, Any]) -> None:
        root["model"][name][index] = value

    return change


def rename(old: str, new: str) -> Edit:
    return model(lambda m: m.update({new: m.pop(old)}))


def replace(name: str, value: Callable[[torch.Tensor], Any]) -> Edit:
    return model(lambda m: m.update({name: value(m[name])}))


QKV, FC2 = "decoder.layers.1.self_attention.linear_qkv.weight", "decoder.layers.0.mlp.linear_fc2.weight"
NORM = "decoder.layers.1.input_layernorm.weight"

#: What happens to the last rank's file of a tp 2 pp 2 checkpoint, and what is said.
DAMAGED: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "replica differs": (
        set_tensor(NORM, 5, 9.0),
        (f"mp_rank_01_001/{FILE}: {NORM} differs from that in mp_rank_00_001", "both ranks must hold the same"),
    ),
    "replicas of the final norm differ": (
        set_tensor("decoder.final_layernorm.weight", 0, 9.0), ("decoder.final_layernorm.weight differs from that in",)
    ),
    "unknown tensor": (
        model(lambda m: m.update({"decoder.layers.1.mlp.extra.weight": torch.ones(2)})),
        ("mp_rank_01_001", "holds decoder.layers.1.mlp.extra.weight", "They would be lost"),
    ),
    "missing tensor": (model(lambda m: m.pop(QKV)), ("mp_rank_01_001", f"lacks {QKV}")),
    "misspelt tensor": (rename(QKV, QKV + "s"), (f"lacks {QKV}", f"Did you mean '{QKV}s'?")),
    "wrong shape": (
        replace(FC2, lambda t: t[:, :40].clone()), ("mp_rank_01_001", f"{FC2} is [48, 40], expected [48, 44]")
    ),
    "wrong type": (replace(FC2, lambda t: t.bfloat16()), ("mp_rank_01_001", f"{FC2} is bfloat16", "float32")),
    "no tensor": (replace(FC2, lambda t: "a string"), (f"{FC2} is a str, expected a tensor",)),
    "unknown part": (lambda root: root.update(ema={"x": torch.ones(2)}), ("has ema beside the model", "lost")),
    "no model": (lambda root: root.pop("model"), ("has no 'model'",)),
    "virtual stages": (lambda root: root.update(model0=root.pop("model")), ("has no 'model'", "model0")),
    "experts": (
        rename(FC2, "decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight"),
        (f"lacks {FC2}", "Did you mean 'decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight'?"),
    ),
    "hybrid": (rename("decoder.final_layernorm.weight", "decoder.final_norm.weight"), ("HybridModel",)),
    "mamba": (rename(QKV, "decoder.layers.1.mixer.in_proj.weight"), ("Mamba",)),
    "legacy": (
        lambda root: root.update(model={"language_model": {"embedding": root["model"]}}), ("legacy", "megatron-core")
    ),
    "mla": (rename(QKV, "decoder.layers.1.self_attention.linear_kv_up_proj.weight"), (f"lacks {QKV}",)),
    "t5": (rename(QKV, "decoder.layers.1.cross_attention.linear_kv.weight"), ("a T5 checkpoint",)),
    "mtp": (
        model(lambda m: m.update({"mtp.layers.0.enorm.weight": torch.ones(48)})),
        ("holds mtp.layers.0.enorm.weight", "They would be lost"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    change, messages = DAMAGED[case]
    source = made("llama2", 2, 2)
    edit(ranks(source)[-1], change)
    assert convert(source, tmp_path / "out") == 3
    said = capsys.readouterr().err
    assert all(message in said for message in messages), said
    assert len(said.strip().split("\n")) <= 3
    assert not (tmp_path / "out").exists()


def test_a_tied_copy_that_differs(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made("qwen2_tied", 2, 2)
    edit(ranks(source)[-1], set_tensor("output_layer.weight", (3, 4), 9.0))
    assert convert(source, tmp_path / "out") == 3
    said = capsys.readouterr().err
    assert "mp_rank_01_001" in said
    assert "output_layer.weight differs from embedding.word_embeddings.weight on stage 0" in said


def test_a_sharded_tensor_may_differ_over_ranks(made: Made, tmp_path: Path) -> None:
    """The check of replicas must not fire on what is cut: and the change is seen in the right row."""
    source = made("llama2", 2, 1)
    edit(ranks(source)[1], set_tensor(EMBEDDING, (2, 3), 9.0))
    assert convert(source, tmp_path / "out") == 0
    embedding = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert embedding[128 + 2, 3] == 9.0


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda root: root.pop("args"), ("mp_rank_00_000", "has no args", "sizes of the model are unknown")),
        (arguments(num_experts=8), ("lacks decoder.layers.{0..1}.mlp.router.weight",)),
        (arguments(multi_latent_attention=True, qk_layernorm=True),
         ("lacks decoder.layers.{0..1}.self_attention.linear_q_proj.weight",)),
        (arguments(multi_latent_attention=True), ("qk_layernorm=False: multi-latent attention without norms",)),
        (arguments(qk_layernorm=True), ("lacks decoder.layers.{0..1}.self_attention.q_layernorm.weight",)),
        (arguments(mtp_num_layers=1), ("mp_rank_00_001", "lacks embedding.word_embeddings.weight, mtp.layers.0.enorm")),
        (arguments(expert_model_parallel_size=2), ("one number for both",)),
        (arguments(swiglu=False), ("mlp.linear_fc1.weight is [88, 48], expected [44, 48] from the args",)),
        (arguments(position_embedding_type="learned_absolute", use_rotary_position_embeddings=False),
         ("lacks embedding.position_embeddings.weight",)),
        (arguments(hidden_size="48"), ("args.hidden_size is '48', expected a whole number",)),
        (lambda root: vars(root["args"]).pop("num_attention_heads"), ("args has no num_attention_heads",)),
        (arguments(tensor_model_parallel_size=4), ("tensor_model_parallel_size 4", "there are 2 such ranks")),
        (arguments(pipeline_model_parallel_size=4), ("_002", "of 2 x 4 ranks")),
        (arguments(num_layers=6, encoder_num_layers=6), ("args say 6 layers", "the stages hold 2 + 2")),
        (arguments(ffn_hidden_size=96), ("is [88, 48], expected [96, 48]",)),
        (arguments(untie_embeddings_and_output_weights=False),
         ("output_layer.weight differs from embedding.word_embeddings.weight on stage 0", "untie_embeddings")),
    ],
)
def test_args_that_do_not_fit(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Edit, messages: tuple[str, ...]
) -> None:
    source = made("llama2", 2, 2)
    edit(ranks(source)[0], change)
    assert convert(source, tmp_path / "out") == 3
    said = capsys.readouterr().err
    assert all(message in said for message in messages), said


def remove_rank(folder: Path) -> None:
    shutil.rmtree(folder / ITERATION / "mp_rank_01_000")


def remove_last_stage(folder: Path) -> None:
    for rank in range(2):
        shutil.rmtree(folder / ITERATION / f"mp_rank_{rank:02d}_001")


def remove_file(folder: Path) -> None:
    ranks(folder)[2].unlink()


def add_other_layout(folder: Path) -> None:
    shutil.copytree(folder / ITERATION / "mp_rank_00_000", folder / ITERATION / "mp_rank_00")


def truncate(folder: Path) -> None:
    data = ranks(folder)[3].read_bytes()
    ranks(folder)[3].write_bytes(data[: len(data) // 2])


def empty(folder: Path) -> None:
    for path in (folder / ITERATION).iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def become_torch_dist(folder: Path) -> None:
    empty(folder)
    (folder / ITERATION / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')


def become_a_list(folder: Path) -> None:
    torch.save([1, 2], ranks(folder)[1])


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (remove_rank, ("lacks mp_rank_01_000 of 2 x 2 ranks",)),
        (remove_last_stage, ("_001", "of 2 x 2 ranks")),
        (remove_file, (f"mp_rank_01_000/{FILE}: missing", "1 of 4")),
        (add_other_layout, ("mixes rank directories of several layouts",)),
        (truncate, (f"mp_rank_01_001/{FILE}",)),
        (empty, ("has no mp_rank_* directories",)),
        (become_torch_dist, (".metadata: cannot be read",)),
        (become_a_list, (f"mp_rank_00_001/{FILE}: holds a list",)),
    ],
)
def test_files_that_are_missing_or_broken(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None],
    messages: tuple[str, ...],
) -> None:  # fmt: skip
    source = made("llama2", 2, 2)
    damage(source)
    assert convert(source, tmp_path / "out") == 3
    said = capsys.readouterr().err
    assert all(message in said for message in messages), said
    assert not (tmp_path / "out").exists()


def test_a_namespace_of_the_old_days(made: Made, hf: Hf, tmp_path: Path) -> None:
    """disable_bias_linear instead of add_bias_linear, norm_epsilon instead of layernorm_epsilon, few attributes."""
    needed = (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "group_query_attention",
        "num_query_groups", "kv_channels", "max_position_embeddings", "position_embedding_type", "normalization",
        "norm_epsilon", "swiglu", "untie_embeddings_and_output_weights", "padded_vocab_size", "vocab_size",
        "tensor_model_parallel_size", "pipeline_model_parallel_size",
    )  # fmt: skip

    def old(root: dict[str, Any]) -> None:
        root["args"] = Namespace(**{name: getattr(root["args"], name) for name in needed}, disable_bias_linear=True)

    source = made("llama2", 1, 2)
    shutil.rmtree(source / "hf")
    for path in ranks(source):
        edit(path, old)
    assert convert(source, tmp_path / "out") == 0
    same_weights(tmp_path / "out", hf("llama2"))


@pytest.mark.parametrize(("flag", "folder", "number"), [("5", "iter_0000005", 5), ("release", "release", 0)])
def test_the_iteration_to_write(hf: Hf, tmp_path: Path, flag: str, folder: str, number: int) -> None:
    assert convert(hf("llama2"), tmp_path / "mcore", "--iteration", flag, saver="megatron_mcore") == 0
    root = torch.load(tmp_path / "mcore" / folder / "mp_rank_00" / FILE, weights_only=False)
    assert (root["iteration"], root["args"].iteration) == (number, number)
    assert (tmp_path / "mcore" / TRACKER).read_text() == flag
    assert convert(tmp_path / "mcore", tmp_path / "back") == 0
    same_weights(tmp_path / "back", hf("llama2"))


def test_there_is_no_iteration_0(hf: Hf, tmp_path: Path) -> None:
    assert convert(hf("llama2"), tmp_path / "mcore", "--iteration", 0, saver="megatron_mcore") == 2
    assert not (tmp_path / "mcore").exists()
