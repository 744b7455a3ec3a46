"""Every format to every other, and back to what Hugging Face had: bit for bit, found without being named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ckptconv import plugins
from inprocess import here

#: saver -> its flags; several ranks where the format has them.
FORMATS: dict[str, tuple[object, ...]] = {
    "hf": (),
    "megatron_mcore": ("--target-tp", 2, "--target-pp", 2, "--target-vpp", 2),
    "megatron_dist": (),
    "megatron_legacy": ("--target-tp", 2, "--target-pp", 2),
    "megatron_llm": ("--target-tp", 2, "--target-pp", 2),
    "megatron_gaudi": ("--target-tp", 2, "--target-pp", 2),
    "nxdt": ("--tp-size", 2, "--pp-size", 2, "--hw-backend", "trn1"),
    "mindspore": (),
    "meta": ("--target-tp", 2),
}

Written = Callable[..., Path]


def convert(source: Path, out: Path, saver: str) -> Path:
    done = here("--saver", saver, "--load-dir", source, "--save-dir", out, *FORMATS[saver])
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def written(hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Written:
    """`written(saver)`: a Llama of Hugging Face in that format."""
    root, made = tmp_path_factory.mktemp("any"), {}

    def get(saver: str) -> Path:
        if saver not in made:
            made[saver] = convert(hf("llama2", vocab_size=132), root / saver, saver)
        return made[saver]

    return get


def test_no_format_is_left_out() -> None:
    assert sorted(FORMATS) == plugins.builtin("saver")


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_any_to_any(hf: Callable[..., Path], written: Written, tmp_path: Path, source: str, target: str) -> None:
    there = convert(written(source), tmp_path / "there", target)
    back = load_file(convert(there, tmp_path / "back", "hf") / "model.safetensors")
    want = load_file(hf("llama2", vocab_size=132) / "model.safetensors")
    assert back.keys() == want.keys()
    for name, tensor in want.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
