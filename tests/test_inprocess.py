"""The stand-in that most tests convert with does what the command line's own processes do."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from inprocess import here

Hf = Callable[..., Path]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("case", "code"), [("fine", 0), ("a saver that refuses", 6), ("a loader that refuses", 3)])
def test_the_same_code_words_and_files(hf: Hf, cli: Cli, tmp_path: Path, case: str, code: int) -> None:
    flags: tuple[object, ...] = ("--saver", "megatron_mcore", "--no-progress")
    flags += ("--target-tp", 3) if case == "a saver that refuses" else ("--target-tp", 2)
    source = hf("llama2")
    if case == "a loader that refuses":
        source = hf("llama2", num_hidden_layers=5)
        (source / "config.json").write_bytes((hf("llama2") / "config.json").read_bytes())
    found = []
    for name, run in (("one", cli), ("two", here)):
        out = tmp_path / name / "out"
        done = run("--load-dir", source, "--save-dir", out, *flags)
        said = re.sub(r"[\d.]+ (GB in|s,|MiB|MB/s)", "", done.stderr).replace(str(out), "OUT")
        found.append((done.returncode, done.stdout, said, files(tmp_path / name)))
    assert found[0][:3] == found[1][:3]
    assert found[0][0] == code
    assert found[0][3].keys() == found[1][3].keys()
    assert bool(found[0][3]) == (code == 0)
    assert all(found[1][3][name] == data or str(tmp_path).encode() in data for name, data in found[0][3].items())
