"""Every script of examples/ runs as its first lines say, and all that it makes of a model is the same model.

The folders of examples/ are run elsewhere: the plugins in tests/plugins, the layers in tests/oracle.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from commands import convert, same, weights_of

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


class Example(NamedTuple):
    """How a script is called, and what it leaves.

    words: its arguments, {hf} is a Hugging Face directory and {work} one to make; hub: Hugging Face directories below
    {work}; other: directories of other formats there; says: a part of what it prints; hf: config of the model of {hf}.
    """

    words: str
    hub: tuple[str, ...]
    other: tuple[str, ...]
    says: str = ""
    hf: dict[str, Any] = {}  # noqa: RUF012


BF16 = {"dtype": "bfloat16"}
TABLE = {
    "gaudi.sh": Example("{hf} llama2 {work}", ("hf",), ("megatron", "again"), hf=BF16),
    "megatron_dist.sh": Example("{work}", ("hf", "back"), ("dist", "ranks"), "the same after two conversions"),
    "megatron_legacy.sh": Example("{work}", ("hf", "again"), ("legacy", "core"), "the same after three conversions"),
    "megatron_llm.sh": Example("{work}", ("llama", "back"), ("release", "tp2pp2"), "the same after three conversions"),
    "megatron_mcore.sh": Example("{hf} {work}", ("hf",), ("start", "virtual", "dist"), "--num-layers 4\n"),
    "meta.sh": Example("{work}", ("hf",), ("meta", "meta4", "meta2", "megatron"), "the same after three conversions"),
    "mindspore.sh": Example("{hf} {work}", ("hf",), ("ms", "ms_contiguous", "megatron"), hf=BF16),
    "nxdt.sh": Example("{hf} {work}", ("../work-hf",), (),
                       hf={"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 136}),
    "quickstart.py": Example("{work}", ("llama", "back"), ("mcore",), "logits for 'the quick brown fox' equal: True\n"),
}  # fmt: skip


def test_each_is_run() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == set(TABLE)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH on which `python` is this one and `ckptconv` this checkout."""
    folder = tmp_path_factory.mktemp("bin")
    for name, words in (("python", ""), ("ckptconv", " -m ckptconv")):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable}{words} "$@"\n')
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("name", TABLE)
def test_example(name: str, path: str, hf: Callable[..., Path], tmp_path: Path) -> None:
    example, work = TABLE[name], tmp_path / "work"
    source = hf("llama2", **example.hf) if "{hf}" in example.words else work / example.hub[0]
    command = [sys.executable] * name.endswith(".py") + [str(EXAMPLES / name)]
    command += example.words.format(hf=source, work=work).split()
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert example.says in done.stdout
    want = weights_of(source)
    for folder in example.hub:
        same(weights_of(work / folder), want)
    for folder in example.other:
        same(weights_of(convert(work / folder, tmp_path / "read" / folder)), want)
