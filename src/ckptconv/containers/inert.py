"""What stands in an unpickled checkpoint for things that are not rebuilt: it remembers, and never runs anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class DTypeName:
    """A torch dtype by name: `str()` is what `str()` of the dtype is, for example `torch.bfloat16`."""

    name: str

    def __str__(self) -> str:
        return f"torch.{self.name}"


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by name, as a pickle refers to it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Inert:
    """What a pickle built from an unknown class or function: the recipe instead of the result.

    `args` and `kwargs` are those of the call (the value of an enum member is `args[0]`), `state` is what the object
    would have been given as its state, `elements` and `entries` what a list or dict would hold.
    """

    __slots__ = ("args", "elements", "entries", "kwargs", "module", "name", "state")

    def __init__(
        self, module: str, name: str, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> None:
        self.module = module
        self.name = name
        self.args = args
        self.kwargs = dict(kwargs or {})
        self.state: object = None
        self.elements: list[object] = []
        self.entries: dict[object, object] = {}

    @property
    def fields(self) -> dict[str, object]:
        """The attributes in `state`, also where it is a pair of the dict and the slots; empty for other states."""
        parts = self.state if isinstance(self.state, tuple) and len(self.state) == 2 else (self.state,)
        dicts = [part for part in parts if isinstance(part, dict)]
        if len(dicts) + parts.count(None) != len(parts):
            return {}
        return {key: value for part in dicts for key, value in part.items() if isinstance(key, str)}

    def append(self, item: object) -> None:
        self.elements.append(item)

    def extend(self, items: Iterable[object]) -> None:
        self.elements.extend(items)

    def __setitem__(self, key: object, value: object) -> None:
        self.entries[key] = value

    def __str__(self) -> str:
        parts = [short(arg) for arg in self.args[:4]]
        parts += [f"{key}={short(value)}" for key, value in list(self.kwargs.items())[:4]]
        return f"{self.module}.{self.name}({', '.join(parts)})"

    def __repr__(self) -> str:
        return f"<{self}>"


def short(value: object) -> str:
    """`value` for a message: at most 60 characters, one level deep, and never an error of its own."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"<int of {value.bit_length()} bits>"
    if isinstance(value, (Global, DTypeName)):
        return str(value)[:60]
    if isinstance(value, Inert):
        return f"{value.module}.{value.name}"[:60]
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        return f"<{type(value).__name__} of {len(value)}>"
    text = repr(value[:60] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
