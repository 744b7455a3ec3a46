"""Every command of AWS's tutorial on checkpoint conversion: only the program's name and the plugins' are other ones.

Expected values: the sources themselves, as each direction is followed by the other; where rows go on ranks is tested
in test_nxdt.py. Models are tiny but have the tutorial's 32 layers and its 8 kv heads.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import nxdt_files
import pytest
import torch
from nxdt_models import build, full

from commands import same, weights_of
from inprocess import here

PROGRAM = "python3 checkpoint_converter.py"

TO_NXDT = (
    "python3 checkpoint_converter.py --model_style hf --hw_backend trn1 "
    "--input_dir /home/ubuntu/pretrained_llama_3_8B_hf/pytorch_model.bin "
    "--output_dir /home/ubuntu/converted_hf_style_hf_to_nxdt_tp8pp4/ --save_xser True "
    "--config /home/ubuntu/pretrained_llama_3_8B_hf/config.json --tp_size 8 --pp_size 4 --n_layers 32 "
    "--kv_size_multiplier 1 --qkv_linear True --convert_from_full_state"
)
FROM_NXDT = (
    "python3 checkpoint_converter.py --model_style hf --hw_backend trn1 --input_dir "
    "~/examples/nemo_experiments/hf_llama3_8B_SFT/2024-07-19_23-07-40/checkpoints/"
    "hf_llama3_8B--step=5-consumed_samples=160.0.ckpt/model "
    "--output_dir ~/converted_hf_style_nxdt_to_hf_tp8pp4/ --load_xser True --config ~/config.json "
    "--tp_size 8 --pp_size 4 --kv_size_multiplier 1 --qkv_linear True --convert_to_full_state"
)
TO_MEGATRON_STYLE = (
    "python3 checkpoint_converter.py --model_style megatron --hw_backend trn1 "
    "--input_dir ~/megatron-tp8pp4-nxdt-to-hf4/checkpoint.pt --output_dir ~/meg_nxdt_hf3_nxdt3 "
    "--config ~/llama_gqa/config.json --save_xser True --tp_size 8 --pp_size 4 --n_layers 32 "
    "--kv_size_multiplier 1 --qkv_linear True --convert_from_full_state"
)
FROM_MEGATRON_STYLE = (
    "python3 checkpoint_converter.py  --model_style megatron --hw_backend trn1 --input_dir "
    "~/examples/nemo_experiments/megatron_llama/2024-07-23_21-07-30/checkpoints/"
    "megatron_llama--step=5-consumed_samples=5120.0.ckpt/model "
    "--output_dir ~/megatron-tp8pp4-nxdt-to-hf4 --load_xser True --config ~/llama_gqa/config.json "
    "--tp_size 8 --pp_size 4 --kv_size_multiplier 1 --qkv_linear True --convert_to_full_state"
)
EXAMPLE = (
    "python3 checkpoint_converter.py --model_style hf --hw_backend trn1 --input_dir /hf/checkpoint/pytorch_model.bin "
    "--output_dir /nxdt/checkpoint --save_xser True --convert_from_full_state --config /path/to/config.json "
    "--tp_size 8 --pp_size 4 --n_layers 32 --kv_size_multiplier 1 --qkv_linear True --convert_from_full_state"
)
FROM_THE_HUB = (
    'python3 checkpoint_converter.py --model_style hf --hw_backend trn1 --hf_model_name "meta-llama/Llama-2-7b-hf" '
    "--output_dir /path/to/output --save_xser True --config /path/to/config.json --tp_size 8 --pp_size 4 "
    "--n_layers 32 --kv_size_multiplier 1 --qkv_linear False --convert_from_full_state"
)


def words(command: str, home: Path) -> list[str]:
    """The flags, with the paths of the tutorial's machine below `home`."""
    assert command.startswith(PROGRAM)
    found = shlex.split(command.removeprefix(PROGRAM))
    for place in ("/home/ubuntu", "~", "/hf/checkpoint", "/nxdt/checkpoint", "/path/to"):
        below = str(home / place.strip("/~"))
        found = [below + word.removeprefix(place) if word.startswith(place) else word for word in found]
    return found


def run(command: str, home: Path, loader: str, saver: str) -> None:
    done = here("--loader", loader, "--saver", saver, "--no-progress", *words(command, home))
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("llama3") / "source", hidden_size=32, num_attention_heads=16,
                 num_key_value_heads=8, intermediate_size=16, num_hidden_layers=32)  # fmt: skip


def test_hf_style(llama3: Path, tmp_path: Path) -> None:
    shutil.copytree(llama3, tmp_path / "home/ubuntu/pretrained_llama_3_8B_hf")
    run(TO_NXDT, tmp_path, "hf", "nxdt")
    out = tmp_path / "home/ubuntu/converted_hf_style_hf_to_nxdt_tp8pp4"
    names = [f"dp_rank_00_tp_rank_{t:02d}_pp_rank_{p:02d}.pt" for t in range(8) for p in range(4)]
    assert sorted(nxdt_files.ranks(out / "model")) == sorted(names)
    # What a trainer leaves: its folder, without anything of ours.
    tag = tmp_path / (
        "examples/nemo_experiments/hf_llama3_8B_SFT/2024-07-19_23-07-40/checkpoints/"
        "hf_llama3_8B--step=5-consumed_samples=160.0.ckpt"
    )
    shutil.copytree(out / "model", tag / "model")
    for name in ("checkpoint", "done"):
        (tag / name).write_text("1")
    shutil.copy(llama3 / "config.json", tmp_path / "config.json")
    run(FROM_NXDT, tmp_path, "nxdt", "hf")
    same(weights_of(tmp_path / "converted_hf_style_nxdt_to_hf_tp8pp4"), full(llama3))


def test_megatron_style(llama3: Path, tmp_path: Path) -> None:
    """Both commands in the tutorial's own names: the one reads what the other writes."""
    for name in ("megatron-tp8pp4-nxdt-to-hf4", "llama_gqa"):
        (tmp_path / name).mkdir()
    shutil.copy(llama3 / "pytorch_model.bin", tmp_path / "megatron-tp8pp4-nxdt-to-hf4/checkpoint.pt")
    shutil.copy(llama3 / "config.json", tmp_path / "llama_gqa")
    run(TO_MEGATRON_STYLE, tmp_path, "hf", "nxdt")
    tag = (
        "examples/nemo_experiments/megatron_llama/2024-07-23_21-07-30/checkpoints/"
        "megatron_llama--step=5-consumed_samples=5120.0.ckpt"
    )
    (tmp_path / tag).mkdir(parents=True)
    (tmp_path / "meg_nxdt_hf3_nxdt3/model").rename(tmp_path / tag / "model")
    for used in ("megatron-tp8pp4-nxdt-to-hf4", "meg_nxdt_hf3_nxdt3"):
        shutil.rmtree(tmp_path / used)
    run(FROM_MEGATRON_STYLE, tmp_path, "nxdt", "hf")
    same(weights_of(tmp_path / "megatron-tp8pp4-nxdt-to-hf4"), full(llama3))
    # The first command names checkpoint.pt of this folder, which has safetensors now.
    run(TO_MEGATRON_STYLE, tmp_path, "hf", "nxdt")
    ours, theirs = (nxdt_files.ranks(tmp_path / name) for name in ("meg_nxdt_hf3_nxdt3/model", f"{tag}/model"))
    assert len(ours) == 32
    for name, tensors in theirs.items():
        same(ours[name], tensors)


def test_conversion_example(llama3: Path, tmp_path: Path) -> None:
    (tmp_path / "hf/checkpoint").mkdir(parents=True)
    (tmp_path / "path/to").mkdir(parents=True)
    shutil.copy(llama3 / "pytorch_model.bin", tmp_path / "hf/checkpoint")
    shutil.copy(llama3 / "config.json", tmp_path / "path/to")
    run(EXAMPLE, tmp_path, "hf", "nxdt")
    model = tmp_path / "nxdt/checkpoint/model"
    files = sorted(path.name for path in model.glob("*.pt") if not path.name.endswith(".info.pt"))
    assert files == sorted(f"dp_rank_00_tp_rank_{t:02d}_pp_rank_{p:02d}.pt" for t in range(8) for p in range(4))
    embedding = nxdt_files.read(model / files[0])["model.embed_tokens.weight"]
    assert torch.equal(embedding, full(llama3)["model.embed_tokens.weight"][:4])


def test_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """A cache of the hub as its own client leaves it, and no network: --qkv_linear False means False."""
    folder = tmp_path / "hub" / "models--meta-llama--Llama-2-7b-hf"
    source = build(folder / "snapshots" / ("0" * 40), hidden_size=32, num_attention_heads=8, num_key_value_heads=8,
                   intermediate_size=16, num_hidden_layers=32)  # fmt: skip
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    (tmp_path / "path/to").mkdir(parents=True)
    shutil.copy(source / "config.json", tmp_path / "path/to")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = cli("--loader", "hf", "--saver", "nxdt", *words(FROM_THE_HUB, tmp_path))
    assert done.returncode == 0, done.stderr
    out = tmp_path / "path/to/output"
    rank = nxdt_files.read(out / "model" / "dp_rank_00_tp_rank_07_pp_rank_03.pt")
    query = full(source)["model.layers.31.self_attn.q_proj.weight"]
    assert torch.equal(rank["model.layers.31.self_attn.q_proj.weight"], query[28:])
    assert json.loads((out / "hf" / "config.json").read_text())["num_hidden_layers"] == 32
