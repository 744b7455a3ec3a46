"""Megatron-LM's loader of this name at core_v0.4.0: Llama 2 from Hugging Face's files; `hf` does the work."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from ckptconv.loaders import hf, llama_mistral

#: --load-dir may be a model of the Hugging Face hub.
from_hub = True


def recognises(load_dir: str) -> None:
    """Nothing: the directories are those of `hf`."""


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this loader."""
    llama_mistral.older_arguments(parser.add_argument_group("loader llama2_hf"))


def load_checkpoint(queue: Any, args: Namespace) -> None:
    """Send the model in args.load_dir. Raises SourceError."""
    llama_mistral.send(queue, args, hf.opened(args.load_dir, "llama", args.dtype_name), "Llama2Tokenizer")
