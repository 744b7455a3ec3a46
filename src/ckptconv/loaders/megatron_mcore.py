"""Megatron-Core checkpoints in the `torch` format, of any tensor, pipeline (virtual, uneven) and expert parallel size.

Sizes are found from the directory names and the pickled args, which are read without Megatron and without running
anything. Tensors are joined over ranks; those every rank has must be equal.
"""

from __future__ import annotations

import importlib
import logging
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from ckptconv import stream
from ckptconv.containers import rankdir
from ckptconv.loaders import _megatron, _rankfiles

log = logging.getLogger("ckptconv.loader")


def recognises(load_dir: str) -> str | None:
    """Why a directory looks like ours, or None."""
    return _megatron.recognised(load_dir, "megatron_mcore")


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this loader."""
    _megatron.add_arguments(parser, "megatron_mcore")


def load_checkpoint(queue: Any, args: Namespace) -> None:
    """Send the model in args.load_dir, also one for a sister of this loader. Raises SourceError."""
    top = Path(args.load_dir)
    kind = _megatron.kind(top, args.iteration) or "megatron_mcore"
    if kind != "megatron_mcore":
        log.info("loader: this is a checkpoint for --loader %s", kind)
        importlib.import_module(f"ckptconv.loaders.{kind}").load_checkpoint(queue, args)
        return
    directory, iteration = rankdir.find_iteration(top, args.iteration)
    paths, arguments = rankdir.rank_files(directory)
    found = _rankfiles.read(directory, paths, arguments)
    stream.send(queue, _megatron.Source(args, "megatron_mcore", top, directory, iteration, found))
