"""What a format's table is made of, and which rows a model needs. No files, no ranks, no layers' placement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ckptconv.cuts import Cut
from ckptconv.errors import TableError
from ckptconv.messages import Expected
from ckptconv.spec import ModelSpec


def _always(spec: ModelSpec) -> bool:
    return True


@dataclass(frozen=True)
class Row:
    """The tensor `name` of a rank file holds `keys` of `message`, cut over tensor-parallel ranks by `cut`.

    `{i}` is the layer's number within its stage. `vocab`: rows are padded to the padded vocabulary. `last_stage`:
    the tensor lies on the last stage although its message belongs to the first.
    """

    message: str
    keys: tuple[str, ...]
    name: str
    cut: Cut
    vocab: bool = False
    last_stage: bool = False
    when: Callable[[ModelSpec], bool] = _always


@dataclass(frozen=True)
class Ignore:
    """Tensors of a rank file left out on purpose: all whose name ends in `suffix`, and why."""

    suffix: str
    reason: str


def rows_of(table: Sequence[Row], message: Expected, spec: ModelSpec) -> list[Row]:
    """The rows that hold the keys of one message. Raises TableError when a key has none."""
    rows = [
        row
        for row in table
        if row.message == message.template and all(key in message.shapes for key in row.keys) and row.when(spec)
    ]
    covered = {key for row in rows for key in row.keys}
    for key in message.shapes:
        if key not in covered:
            raise TableError(f"no row for {key!r} of {message.template!r}")
    return rows
