"""What a format's table is made of, and which rows a model needs. No files, no ranks, no layers' placement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ckptconv.cuts import Cut
from ckptconv.errors import TableError
from ckptconv.messages import Expected
from ckptconv.ops import PLAIN, View
from ckptconv.spec import ModelSpec


def _always(spec: ModelSpec, layer: int | None) -> bool:
    return True


@dataclass(frozen=True)
class Row:
    """The tensor `name` of a rank file holds `keys` of `message`, cut over tensor-parallel ranks by `cut`.

    `{i}` is the layer's number within its stage, `{n}` in the model, `{e}` the expert's within its expert-parallel
    rank, `{g}` in the model: then the tensor holds one expert's slices of the keys. `stacked`: it holds those of all
    experts of its expert-parallel rank. `view`: how the file's tensor is seen by the cut. `vocab`: rows are padded to
    the padded vocabulary. `last_stage`: the tensor lies on the last stage, too, although its message belongs to the
    first: a copy, where there are several stages; `mtp_stage`: the same for the stage of the MTP layers. `double`: the
    tensor repeats what another row holds, as its reader wants both. `vector`: keys [e, n] of which a tensor holds one
    row, as a vector.
    """

    message: str
    keys: tuple[str, ...]
    name: str
    cut: Cut
    vocab: bool = False
    last_stage: bool = False
    mtp_stage: bool = False
    double: bool = False
    vector: bool = False
    view: View = PLAIN
    stacked: bool = False
    when: Callable[[ModelSpec, int | None], bool] = _always

    @property
    def expert(self) -> bool:
        """Whether the tensor is one expert's."""
        return "{e}" in self.name or "{g}" in self.name

    @property
    def copy(self) -> bool:
        """Whether another row holds the same."""
        return self.last_stage or self.mtp_stage or self.double


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
        if row.message == message.template and all(key in message.shapes for key in row.keys)
        and row.when(spec, message.layer)
    ]
    covered = {key for row in rows for key in row.keys}
    for key in message.shapes:
        if key not in covered:
            raise TableError(f"no row for {key!r} of {message.template!r}.")
    return rows
