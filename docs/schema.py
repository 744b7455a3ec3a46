"""Write what the code knows into the documents: python docs/schema.py. A test checks that they are up to date.

docs/plugins.md has the table of messages, docs/flags.md those of flags, README.md that of families; docs/errors.md is
made by refusals.py.
"""

from __future__ import annotations

import importlib
import sys
from argparse import ArgumentParser
from pathlib import Path

from ckptconv import cli, commands, plugins
from ckptconv.families import FAMILIES
from ckptconv.messages import schema

TOP = Path(__file__).parent.parent
sys.path.insert(0, str(TOP / "docs"))
import refusals  # noqa: E402


def messages() -> str:
    """The message schema as a Markdown table."""
    lines = ["| message | key | shape | | meaning |", "| --- | --- | --- | --- | --- |"]
    for message, key in schema():
        mark = "+" if key.extension else ""
        lines.append(f"| `{message}` | `{key.name}` | [{', '.join(key.shape)}] | {mark} | {key.meaning} |")
    return "\n".join(lines)


def families() -> str:
    """The families as a Markdown table."""
    lines = ["| family | models | proven by |", "| --- | --- | --- |"]
    lines += [f"| {family.name} | {family.models} | {family.verified} |" for family in FAMILIES.values()]
    return "\n".join(lines)


def _rows(made: ArgumentParser) -> list[str]:
    lines = ["", "| flag | meaning |", "| --- | --- |"]
    for action in made._actions:
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        values = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "")
        value = f" `{values}`" if values and action.nargs != 0 else ""
        text = " ".join((action.help or "").replace("%%", "%").split()).replace("|", "\\|")
        if action.dest != "help":
            lines.append(f"| {names}{value.replace('|', chr(92) + '|')} | {text} |")
    return lines


def flags() -> str:
    """All flags, of the program and of every plugin, as Markdown tables."""
    lines = ["## Of every conversion", *_rows(cli.parser())]
    for kind in plugins.FUNCTIONS:
        for name in plugins.builtin(kind):
            if name.startswith("hf_"):
                continue  # those of `hf`
            made = ArgumentParser(conflict_handler="resolve", add_help=False)
            plugin = plugins.find(kind, name)
            plugin.add_arguments(made)
            lines += ["", f"## {kind.capitalize()} `{name}`", "", plugin.summary]
            lines += _rows(made) if made._actions else []
    for name in commands.names():
        made = ArgumentParser(conflict_handler="resolve", add_help=False)
        module = importlib.import_module(f"ckptconv.commands.{name}")
        module.add_arguments(made)
        lines += ["", f"## `ckptconv {name}`", "", (module.__doc__ or "").split("\n")[0], *_rows(made)]
    return "\n".join(lines)


def pages() -> dict[Path, str]:
    """Every page that has a table, with the table in its place."""
    found = {TOP / "docs/errors.md": refusals.page()}
    tables = (("docs/plugins.md", "schema", messages()), ("docs/flags.md", "flags", flags()),
              ("README.md", "families", families()))  # fmt: skip
    for name, mark, table in tables:
        before, rest = (TOP / name).read_text().split(f"<!-- {mark} -->")
        after = rest.split("<!-- end -->", 1)[1]
        found[TOP / name] = f"{before}<!-- {mark} -->\n{table}\n<!-- end -->{after}"
    return found


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
