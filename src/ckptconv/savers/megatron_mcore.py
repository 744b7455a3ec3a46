"""Megatron-Core checkpoints in the `torch` format: one model_optim_rng.pt per tensor and pipeline rank."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from ckptconv.savers import _megatron

#: The loader that reads what this writes (for --verify).
LOADER = "megatron_mcore"


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this saver."""
    _megatron.add_arguments(parser, "megatron_mcore")


def save_checkpoint(queue: Any, args: Namespace) -> dict[str, Any]:
    """Write args.save_dir. Returns bytes and digests. Raises CkptconvError of any kind."""
    return _megatron.save(queue, args, _megatron.Target, "megatron_mcore")
