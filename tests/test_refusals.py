"""docs/errors.md has what users are told: messages that are really said are found on it."""

from __future__ import annotations

import argparse
import ast
import errno
import importlib
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

from ckptconv import cli, commands, errors, oldcommands, plugins
from ckptconv.errors import BY_EXIT_CODE, CkptconvError, SourceError, TableError
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


def test_exit_codes_are_those_of_the_errors() -> None:
    """In the table of the page, and in `ckptconv --help`, whose words begin as the errors' names do."""
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", PAGE.read_text(), flags=re.MULTILINE)
    assert [int(code) for code, _ in rows] == [0, *sorted(BY_EXIT_CODE), 130]
    listed = " ".join(cli.parser().format_help().split()).split("Exit codes: ")[1]
    said = {int(code): word for code, word in re.findall(r"(\d+) (\w+)", listed.split(";")[0])}
    assert list(said) == [0, *sorted(BY_EXIT_CODE), 130]
    for code, kind in BY_EXIT_CODE.items():
        assert kind is CkptconvError or kind.__name__.lower().startswith(said[code][:5]), (code, said[code])


#: Flags that messages name and no command of ours has: those of Megatron-LM's trainer.
TRAINERS = {"--ckpt-format", "--spec"}


def faults(text: str, flags: set[str]) -> list[str]:
    """What of a message is not as STYLE.md 22 to 25 want it, as far as a program sees it."""
    plain = re.sub(r"\\([<>*_])", r"\1", text)
    wrong = []
    # [ ... ] is a part that may be missing; a message may end with another one, or with a list in lines below it.
    if not plain.rstrip("]").endswith((".", "?", ":")) and not re.search(r"<(error|text|self)>$", plain):
        wrong.append("no full stop")
    if re.match(r"\W*(error|failed|invalid|cannot)\b", plain, flags=re.IGNORECASE) or plain[:1].isspace():
        wrong.append("begins with no place or thing")
    if re.search(r"  |!|[.?;:,] ?[.;:,](?!\.)|\?\.", re.sub(r"\.\.\.|\.(?=\w|\*)", "", plain)):
        wrong.append("odd marks")
    if len(re.sub(r"<[^<>]*>", "", plain)) > 420:
        wrong.append("long")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+(?![\w*<-])", plain))
    wrong += sorted(named - flags - TRAINERS)
    return wrong


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Every flag of every command."""
    made = cli.parser()
    for kind in plugins.FUNCTIONS:
        for name in plugins.builtin(kind):
            plugins.find(kind, name).add_arguments(made)
    for name in commands.names():
        importlib.import_module(f"ckptconv.commands.{name}").add_arguments(made)
    for arguments, _ in oldcommands.COMMANDS.values():
        older = argparse.ArgumentParser()
        arguments(older)
        made._option_string_actions |= older._option_string_actions
    return {*made._option_string_actions, "--kind"}  # of python -m ckptconv.testing


def test_messages_are_as_the_style_wants_them(refusals: ModuleType, flags: set[str]) -> None:
    found = {refusal.text: (refusal.module, faults(refusal.text, flags)) for refusal in refusals.found()}
    assert len(found) > 500
    assert {text: wrong for text, wrong in found.items() if wrong[1]} == {}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("<path>: is truncated. Copy it again.", []),
        ("unknown flag <which>. [Did you mean '<near name>'?]", []),
        ("<where>: its args: <error>", []),
        ("<path>: is truncated", ["no full stop"]),
        ("Error: <path> is truncated.", ["begins with no place or thing"]),
        ("<path>: is truncated..", ["odd marks"]),
        ("<path>: is truncated!  Copy it.", ["odd marks"]),
        ("<path>: Is it right?.", ["odd marks"]),
        ("give --target-tpp.", ["--target-tpp"]),
        ("<path>: " + "far too many words " * 30 + "are said.", ["long"]),
    ],
)
def test_faults_are_seen(flags: set[str], text: str, wrong: list[str]) -> None:
    assert faults(text, flags) == wrong


def test_a_mistake_of_ours_asks_to_be_reported() -> None:
    said = errors.notes(TableError("no row for 'x'."))
    assert said == [errors.REPORT]
    # What a saver's process reports has it in its text; it is not said twice.
    assert errors.notes(TableError("\n".join(["no row for 'x'.", *said]))) == []
    assert errors.notes(SourceError("x")) == []


@pytest.mark.parametrize("verbose", [False, True])
def test_tracebacks_of_the_savers_process_are_for_those_who_ask(
    hf: Hf, tmp_path: Path, cli: Callable[..., Any], verbose: bool
) -> None:
    words = ("--load-dir", hf("llama2"), "--save-dir", tmp_path / "out", "--saver", "megatron_mcore", "--target-tp", 3)
    done = cli(*words, *(["-v"] if verbose else []))
    assert done.returncode == 6 and "tp 3 does not divide" in done.stderr
    assert ("Traceback" in done.stderr) is verbose
    assert ("cuts.py" in done.stderr) is verbose  # where it was raised, in the other process


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("side", ["loader", "saver"])
def test_what_the_system_refuses_is_an_error_and_no_traceback(
    hf: Hf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str, verbose: bool
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/some/file")

    module = {"loader": "ckptconv.loaders.hf._Source", "saver": "ckptconv.savers.hf._config"}[side]
    monkeypatch.setattr(module, refused)
    words = ("--load-dir", hf("llama2"), "--save-dir", tmp_path / "out", "--saver", "hf")
    done = here(*words, *(["-v"] if verbose else []))
    assert done.returncode == 1
    assert "ckptconv: error: /some/file: Permission denied. Change its permissions" in done.stderr
    assert verbose or "Traceback" not in done.stderr


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
