"""Write the table of messages into docs/plugins.md: python docs/schema.py. A test checks that it is up to date."""

from __future__ import annotations

from pathlib import Path

from ckptconv.messages import schema

PAGE = Path(__file__).with_name("plugins.md")


def table() -> str:
    """The schema as a Markdown table."""
    lines = ["| message | key | shape | meaning |", "| --- | --- | --- | --- |"]
    for message, key in schema():
        lines.append(f"| `{message}` | `{key.name}` | [{', '.join(key.shape)}] | {key.meaning} |")
    return "\n".join(lines)


def page() -> str:
    """The page with the table in its place."""
    before, rest = PAGE.read_text().split("<!-- schema -->")
    after = rest.split("<!-- end -->", 1)[1]
    return f"{before}<!-- schema -->\n{table()}\n<!-- end -->{after}"


if __name__ == "__main__":
    PAGE.write_text(page())
