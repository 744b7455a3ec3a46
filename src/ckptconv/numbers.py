"""Numbers as people write them in flags."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def natural(text: str) -> int:
    """A whole number, or 0."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB` or a plain number, as huggingface_hub counts them."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)", text.strip(), re.IGNORECASE)
    unit = _UNITS.get((match[2] + ("B" if match[2] and match[2][-1] not in "bB" else "")).upper()) if match else None
    if not match or unit is None or float(match[1]) * unit < 1:
        raise ArgumentTypeError(f"{text!r} is not a size such as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * unit)
