"""Sub-commands, one module each: `ckptconv NAME ...` is NAME's `add_arguments(parser)` and `run(args)`, an exit code.

A module that reads checkpoints has `plugins(args)` as well: the loaders of what is named, whose flags are its flags.
Nothing heavy is imported before `run`.
"""

from __future__ import annotations

import os
import pkgutil
from typing import TYPE_CHECKING

from ckptconv import files, hub
from ckptconv.errors import UsageError

if TYPE_CHECKING:
    from ckptconv.plugins import Plugin


def names() -> list[str]:
    """The sub-commands there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def source(place: str, loader: str = "auto") -> tuple[str, Plugin]:
    """(directory or file, its loader): a path, or a model of the Hugging Face hub. Raises UsageError, SourceError."""
    from ckptconv import plugins as finding

    files.refuse_remote(place)
    if hub.is_name(place):
        place = hub.fetch(place)
    if not os.path.exists(place):
        raise UsageError(f"{place}: does not exist. Is the path right? The directory comes before the flags.")
    unnamed = loader in ("auto", finding.ANY_MEGATRON)
    plugin = finding.find("loader", finding.detect(place) if unnamed else loader)
    if not os.path.isdir(place) and not plugin.files:
        raise UsageError(f"{place}: is a file, expected a directory.")
    return place, plugin
