"""Command lines of Megatron-LM's own loaders of Hugging Face and Meta models run with only the program's name changed.

The commands are those of Megatron-LM `docs/llama_mistral.md` at core_v0.12.0 (Llama 2 of Meta and of Hugging Face,
Llama 3, Mistral), with paths filled in; for Mixtral and for the loaders of earlier releases those of their flags.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import meta_reference
import pytest
import torch

import fixtures
from commands import convert, run, same, weights_of
from inprocess import main

META = """--model-type GPT --loader llama_mistral --load-dir {meta} --model-size llama2-7B --checkpoint-type meta
    --tokenizer-model {tokenizer} --saver core --save-dir {out} --target-tensor-parallel-size 2
    --target-pipeline-parallel-size 2 --bf16"""
HF = """--model-type GPT --loader llama_mistral --load-dir {hf} --model-size {size} --checkpoint-type hf
    --tokenizer-model {tokenizer} --saver {saver} --save-dir {out} --target-tensor-parallel-size 2
    --target-pipeline-parallel-size 1 --bf16"""
LLAMA3 = """--bf16 --model-type GPT --loader llama_mistral --saver core --target-tensor-parallel-size 2
    --checkpoint-type hf --load-dir {hf} --save-dir {out} --tokenizer-model {hf} --model-size {size}"""
MIXTRAL = """--model-type GPT --loader mixtral_hf --saver mcore --target-tensor-parallel-size 2
    --target-pipeline-parallel-size 1 --target-expert-parallel-size 2 --load-dir {hf} --save-dir {out}
    --tokenizer-model {tokenizer} --bf16 --megatron-path /nowhere"""
OLDEST = """--model-type GPT --loader llama2_hf --saver mcore --load-dir {hf} --save-dir {out}
    --tokenizer-model {tokenizer} --bf16 --megatron-path /nowhere --true-vocab-size 132"""


def ranks(folder: Path) -> dict[str, Any]:
    """File -> content of a Megatron checkpoint."""
    files = sorted(folder.rglob("model_optim_rng.pt"))
    return {str(file.relative_to(folder)): torch.load(file, weights_only=False) for file in files}


def check(command: str, source: Path, tmp_path: Path, kind: str, *flags: object, **values: object) -> None:
    """A command writes what today's loader does, and its args name the tokenizer that the flags do."""
    tokenizer = values.setdefault("tokenizer", tmp_path / "tokenizer.model")
    Path(str(tokenizer)).write_bytes(b"") if not Path(str(tokenizer)).exists() else None
    command = command.format(hf=source, meta=source, out=tmp_path / "old", **values)
    assert main([*shlex.split(command), "--no-progress"]) == 0
    new = ranks(convert(source, tmp_path / "new", "megatron_mcore", "--bf16", *flags))
    old = ranks(tmp_path / "old")
    assert list(old) == list(new)
    for file, content in new.items():
        same(old[file]["model"], content["model"])
        assert (old[file]["args"].tokenizer_type, str(old[file]["args"].tokenizer_model)) == (
            kind, str(source if kind == "HuggingFaceTokenizer" else tokenizer)
        )  # fmt: skip


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixtures.build("llama2", tmp_path_factory.mktemp("old") / "hf", vocab_size=132)


def test_llama2_of_meta(llama2: Path, tmp_path: Path) -> None:
    """Also where the size is a directory of the one named; the shards are counted, not taken from a table of sizes."""
    params = {"dim": 48, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1,
              "multiple_of": 8, "ffn_dim_multiplier": 0.6875}  # fmt: skip
    config = fixtures.config("llama2", vocab_size=132)
    where = tmp_path / "models" / "llama2-7B"
    meta_reference.build(where, weights_of(llama2), config, params, 2, rows=False)
    check(META, where, tmp_path, "Llama2Tokenizer", "--target-tp", 2, "--target-pp", 2)
    from_above = META.format(meta=where.parent, out=tmp_path / "above", tokenizer=tmp_path / "tokenizer.model")
    assert main([*shlex.split(from_above), "--no-progress"]) == 0
    assert ranks(tmp_path / "above").keys() == ranks(tmp_path / "old").keys()


@pytest.mark.parametrize(
    ("command", "size"), [(HF, "llama2-7Bf"), (HF, "yi-34B"), (HF.replace("llama_mistral", "llama2"), "7B")]
)
def test_llama_of_hugging_face(command: str, size: str, llama2: Path, tmp_path: Path) -> None:
    kind = "HuggingFaceTokenizer" if size == "yi-34B" else "Llama2Tokenizer"
    values = {"tokenizer": llama2} if size == "yi-34B" else {}
    check(command, llama2, tmp_path, kind, "--target-tp", 2, size=size, saver="core", **values)


@pytest.mark.parametrize(
    ("name", "overrides", "size"),
    [
        ("llama31", {}, "llama3"),
        ("mistral", {"sliding_window": None}, "mistral"),  # as from 7B v0.2 on: Megatron's layers have none
        ("qwen2", {}, "qwen2.5"),
    ],
)
def test_others_of_hugging_face(
    name: str, overrides: dict[str, Any], size: str, tmp_path: Path, hf: Callable[..., Path]
) -> None:
    source = hf(name, **overrides)
    check(LLAMA3, source, tmp_path, "HuggingFaceTokenizer", "--target-tp", 2, size=size, tokenizer=source)


def test_mixtral(tmp_path: Path, hf: Callable[..., Path]) -> None:
    check(MIXTRAL, hf("mixtral"), tmp_path, "Llama2Tokenizer", "--target-tp", 2, "--target-ep", 2)


def test_llama2_hf(llama2: Path, tmp_path: Path) -> None:
    check(OLDEST, llama2, tmp_path, "Llama2Tokenizer")


def test_flags_that_do_nothing_say_so(llama2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = ("--loader", "llama_mistral", "--model-size", "llama2-13B", "--checkpoint-type", "hf", "--megatron-path",
             "/x", "--loader-transformer-impl", "local", "--true-vocab-size", 100)  # fmt: skip
    with caplog.at_level("INFO", "ckptconv"):
        found = convert(llama2, tmp_path / "out", "hf", *flags)
    same(weights_of(found), weights_of(llama2))
    for words in ("--megatron-path is accepted and not used", "--loader-transformer-impl is accepted",
                  "size 100 is not used",
                  "weights stay float32", "llama2-13B has 40 layers of 5120, but the source has 4 of 48"):  # fmt: skip
        assert words in caplog.text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--loader", "llama_mistral", "--model-size", "mistral"), "that is a mistral model, but the source is llama"),
        (("--loader", "llama_mistral", "--model-size", "qwen2.5-7B"), "that is a qwen2 model"),
        (("--loader", "llama_mistral", "--model-size", "gpt-7B"), "--model-size gpt-7B: expected one of"),
        (("--loader", "llama_mistral", "--checkpoint-type", "meta"), "params.json: cannot be read"),
        (("--loader", "mixtral_hf"), "takes mixtral only"),
    ],
)
def test_another_model_than_said(
    flags: tuple[object, ...], words: str, llama2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(llama2, tmp_path / "out", "hf", *flags) in (2, 3)
    assert words in capsys.readouterr().err
