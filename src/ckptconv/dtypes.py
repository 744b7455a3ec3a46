"""Element types: one row per type, with its name in every system we meet.

Sources: safetensors format description (dtype names), torch 2.13 `torch/storage.py` (legacy typed storage names,
which is what `torch.save` pickles), numpy for the plain types. Sizes are in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptconv.errors import SourceError, some

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class DType:
    """One element type. `name` is torch's attribute name, `storage` the class `torch.save` names (None: untyped)."""

    name: str
    size: int
    safetensors: str
    storage: str | None
    floating: bool


_ROWS = (
    DType("float64",         8, "F64",     "DoubleStorage",   True),
    DType("float32",         4, "F32",     "FloatStorage",    True),
    DType("float16",         2, "F16",     "HalfStorage",     True),
    DType("bfloat16",        2, "BF16",    "BFloat16Storage", True),
    DType("float8_e4m3fn",   1, "F8_E4M3", None,              True),
    DType("float8_e5m2",     1, "F8_E5M2", None,              True),
    DType("int64",           8, "I64",     "LongStorage",     False),
    DType("int32",           4, "I32",     "IntStorage",      False),
    DType("int16",           2, "I16",     "ShortStorage",    False),
    DType("int8",            1, "I8",      "CharStorage",     False),
    DType("uint8",           1, "U8",      "ByteStorage",     False),
    DType("uint16",          2, "U16",     None,              False),
    DType("uint32",          4, "U32",     None,              False),
    DType("uint64",          8, "U64",     None,              False),
    DType("bool",            1, "BOOL",    "BoolStorage",     False),
)  # fmt: skip

BY_NAME = {row.name: row for row in _ROWS}
BY_SAFETENSORS = {row.safetensors: row for row in _ROWS}
BY_STORAGE = {row.storage: row for row in _ROWS if row.storage}

#: What `--dtype` and `--bf16`/`--fp16` accept beside `keep`.
SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def size_of(name: str) -> int:
    """Bytes of one element of the type called `name` (torch's name)."""
    return BY_NAME[name].size


def parse(value: object, where: str) -> str:
    """The name of a type written as `bfloat16`, `torch.bfloat16`, `bf16` or a torch.dtype.

    Raises SourceError naming `where` for anything else.
    """
    text = str(value).removeprefix("torch.")
    text = {"half": "float16", "float": "float32", **SHORT}.get(text, text)
    if text not in BY_NAME:
        raise SourceError(f"{where}: unknown element type {value!r}, expected one of {some(BY_NAME)}.")
    return text


def opaque(name: str) -> np.dtype[Any]:
    """An unsigned numpy type of the same width: how elements are moved without being looked at."""
    import numpy as np

    return np.dtype(f"u{size_of(name)}")


def of_torch(name: str) -> torch.dtype:
    """The torch.dtype called `name`. Imports torch."""
    import torch

    return getattr(torch, name)  # type: ignore[no-any-return]
