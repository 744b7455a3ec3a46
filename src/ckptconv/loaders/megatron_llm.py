"""EPFL's Megatron-LLM checkpoints (release and trained, any tensor and pipeline parallel size), without its code."""

from __future__ import annotations

import functools
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from ckptconv import stream
from ckptconv.containers import rankdir
from ckptconv.errors import SourceError
from ckptconv.formats import megatron_llm, megatron_llm_args
from ckptconv.formats.megatron_llm import TOKENIZER
from ckptconv.lazy import LazyTensor
from ckptconv.loaders import _megatron, _rankfiles
from ckptconv.loaders._megatron import Found
from ckptconv.sharding import slot_name


def recognises(load_dir: str) -> str | None:
    """Why a directory looks like ours, or None."""
    return _megatron.recognised(load_dir, "megatron_llm")


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this loader."""
    _megatron.add_arguments(parser, "megatron_llm")


def load_checkpoint(queue: Any, args: Namespace) -> None:
    """Send the model in args.load_dir. Raises SourceError."""
    top = Path(args.load_dir)
    directory, iteration = rankdir.find_iteration(top, args.iteration)
    paths, said = rankdir.rank_files(directory)
    found = _rankfiles.read(directory, paths, said, _tensors)
    if getattr(args, "model_type", None) == "gemma":
        said = {"model_name": "gemma", **said}
    found.fields = functools.partial(megatron_llm_args.fields, said)
    found.target, found.called = megatron_llm.target_spec, megatron_llm.called
    found.table = lambda spec: megatron_llm.table(megatron_llm.target_spec(spec))
    found.carried = {name: value for name, value in said.items() if _plain(value)}
    stream.send(queue, _Source(args, "megatron_llm", top, directory, iteration, found))


class _Source(_megatron.Source):
    """One iteration; the tokenizer that hf_to_megatron.py leaves beside it is carried along."""

    def _find_companions(self) -> dict[str, str]:
        found, beside = super()._find_companions(), self.top / TOKENIZER
        return {TOKENIZER: str(beside), **found} if beside.is_file() else found


def _tensors(path: Path, model: dict[Any, Any], found: Found, chunk: int | None) -> dict[str, LazyTensor]:
    """The tensors of a virtual stage by slot, in the names of the encoder dialect."""
    tensors: dict[str, LazyTensor] = {}
    for name, value in megatron_llm.flat(model):
        foreign = next((what for mark, what in megatron_llm.FOREIGN.items() if mark in name), None)
        if foreign:
            raise SourceError(f"{path}: holds {name}: {foreign}, which this loader does not read.")
        if not isinstance(value, LazyTensor):
            raise SourceError(f"{path}: {name} is a {type(value).__name__}, expected a tensor.")
        if slot_name(chunk, name) in tensors:
            raise SourceError(f"{path}: holds {name} twice, in the spelling of both dialects.")
        tensors[slot_name(chunk, name)] = value
    return tensors


def _plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
