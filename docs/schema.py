"""Write what the code knows into the documents: python docs/schema.py. A test checks that they are up to date.

docs/plugins.md has the table of messages, README.md that of families.
"""

from __future__ import annotations

from pathlib import Path

from ckptconv.families import FAMILIES
from ckptconv.messages import schema

TOP = Path(__file__).parent.parent


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


def pages() -> dict[Path, str]:
    """Every page that has a table, with the table in its place."""
    found = {}
    for name, mark, table in (("docs/plugins.md", "schema", messages()), ("README.md", "families", families())):
        before, rest = (TOP / name).read_text().split(f"<!-- {mark} -->")
        after = rest.split("<!-- end -->", 1)[1]
        found[TOP / name] = f"{before}<!-- {mark} -->\n{table}\n<!-- end -->{after}"
    return found


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
