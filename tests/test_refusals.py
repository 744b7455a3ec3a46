"""docs/errors.md has what users are told: messages that are really said are found on it."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ckptconv.errors import BY_EXIT_CODE
from inprocess import here

Hf = Callable[..., Path]
TOP = Path(__file__).resolve().parents[1]
PAGE = TOP / "docs" / "errors.md"


@pytest.fixture(scope="module")
def refusals() -> ModuleType:
    spec = importlib.util.spec_from_file_location("refusals", TOP / "docs" / "refusals.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["refusals"] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


def sections() -> dict[int, list[str]]:
    """Exit code -> messages of the page, unescaped."""
    found: dict[int, list[str]] = {}
    for line in PAGE.read_text().splitlines():
        if match := re.match(r"## (\d+): ", line):
            messages = found.setdefault(int(match[1]), [])
        elif line.startswith("## "):
            break
        elif line.startswith("- "):
            messages.append(re.sub(r"\\([<>*_])", r"\1", line[2:]))
    return found


def pattern(message: str) -> str:
    """What a message of the page looks like when it is said."""
    words = re.split(r"'?<[^<>]*>'?|\[[^\[\]]*\|[^\[\]]*\]| ?\[Did you mean[^\]]*\]|\[[^\[\]]*\]", message)
    return ".*".join(map(re.escape, words))


def on_the_page(code: int, said: str) -> list[str]:
    text = " ".join(said.split())
    return [message for message in sections()[code] if re.fullmatch(pattern(message), text)]


def edit(source: Path, out: Path, **config: Any) -> Path:
    shutil.copytree(source, out)
    changed = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(changed))
    return out


def cases(hf: Hf, tmp_path: Path) -> dict[str, tuple[int, tuple[object, ...]]]:
    base = ("--load-dir", hf("llama2"), "--save-dir", tmp_path / "out")
    broken = edit(hf("llama2"), tmp_path / "broken")
    with open(broken / "model.safetensors", "r+b") as file:
        file.truncate(9000)
    other = edit(hf("llama2"), tmp_path / "other", rms_norm_eps=1e-4)
    return {
        "no such saver": (2, (*base, "--saver", "hff")),
        "no such flag": (2, (*base, "--saver", "hf", "--target-tp", 2)),
        "truncated": (3, ("--load-dir", broken, "--save-dir", tmp_path / "out", "--saver", "hf")),
        "tp": (6, (*base, "--saver", "megatron_mcore", "--target-tp", 3)),
        "stages": (6, (*base, "--saver", "megatron_mcore", "--target-pp", 3)),
        "there already": (2, ("--load-dir", hf("llama2"), "--save-dir", other, "--saver", "hf")),
        "shards": (7, (*base, "--saver", "hf", "--num-output-shards", 1000)),
        "diff": (8, ("diff", hf("llama2"), other)),
    }


def test_what_is_said_is_on_the_page(hf: Hf, tmp_path: Path) -> None:
    for name, (code, words) in cases(hf, tmp_path).items():
        done = here(*words)
        assert done.returncode == code, (name, done.stderr)
        said = done.stderr.split("ckptconv: error: ", 1)[1]
        assert on_the_page(code, said), (name, said)


def test_a_message_that_is_not_there_is_not_found() -> None:
    assert not on_the_page(2, "the moon is full.")
    assert on_the_page(2, "`ckptconv plugins` takes no flags, found --x.")


def test_every_kind_of_error_has_messages_and_advice(refusals: ModuleType) -> None:
    assert sorted(sections()) == sorted(BY_EXIT_CODE) == sorted(refusals.ADVICE)
    assert all(sections().values())


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("f'{self._path}: {name!r} is [{a} x {b}].'", "<path>: '<name>' is [<a> x <b>]."),
        ("f'lacks {some(missing)}.{near(missing[0], known)}'", "lacks <missing>. [Did you mean '<near name>'?]"),
        ("f'{len(found)} of {total}: ' + ('none' if x else 'some')", "<number> of <total>: [none | some]"),
        ("f'{self.top / TRACKER}: not there'", "latest.txt: not there"),
        ("f'{name}: {hint}'", "<name>: Copy it again."),
        ("f'{wanted.replace(a, b)}, {comma.join(map(str, files))}'", "<wanted>, <files>"),
        ("f'{start + count} bytes'", "<number> bytes"),
    ],
)
def test_placeholders(refusals: ModuleType, source: str, shown: str) -> None:
    names = {"TRACKER": [ast.Constant("latest.txt")], "hint": [ast.Constant("Copy it again.")]}
    assert refusals._text(ast.parse(source, mode="eval").body, names) == shown
