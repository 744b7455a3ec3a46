"""The documents say what the code does."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from ckptconv import cli, commands, plugins

TOP = Path(__file__).parent.parent


def test_tables_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("schema", TOP / "docs" / "schema.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for page, text in module.pages().items():
        assert page.read_text() == text, f"run python docs/schema.py: {page} is out of date"


def known_flags() -> set[str]:
    made = cli.parser()
    for kind in plugins.FUNCTIONS:
        for name in plugins.builtin(kind):
            plugins.find(kind, name).add_arguments(made)
    for name in commands.names():
        importlib.import_module(f"ckptconv.commands.{name}").add_arguments(made)
    return set(made._option_string_actions)


@pytest.mark.parametrize("page", ["README.md", "docs/plugins.md"])
def test_flags_that_are_named_exist(page: str) -> None:
    text = re.sub(r"<!--.*?-->", "", (TOP / page).read_text())
    others = ("pip install", "checkpoint-args", "benchmarks/", "torchrun")
    text = "\n".join(line for line in text.splitlines() if not any(other in line for other in others))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", text)) - {"--finetune", "--load_dir", "--spec"}
    assert named <= known_flags()


def test_every_flag_is_in_the_list_and_explained() -> None:
    lines = (TOP / "docs" / "flags.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| `-")]
    listed = {name for row in rows for name in re.findall(r"`(--[a-z0-9-]+)`", row.split(" | ")[0])}
    assert known_flags() - {"-h", "-v", "--help"} <= listed
    assert not [row for row in rows if len(row.split(" | ", 1)[1].strip(" |")) < 5]


def test_the_readme_has_its_two_commands() -> None:
    text = (TOP / "README.md").read_text()
    for mark, wanted in (("run", "examples/quickstart.py"), ("test", "-m pytest")):
        block = text.split(f"<!-- {mark} -->", 1)[1].split("<!-- end -->", 1)[0]
        commands = [line for line in block.splitlines() if line.startswith("    ")]
        assert len(commands) == 1
        assert wanted in commands[0]
