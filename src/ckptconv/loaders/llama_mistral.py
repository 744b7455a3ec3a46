"""Megatron-LM's loader of this name: Llama, Mistral, Yi and Qwen2.5 from Hugging Face's or Meta's files.

Its command lines run as they are; `hf` and `meta` do the work. Source of the flags: Megatron-LM
`tools/checkpoint/loader_llama_mistral.py` at core_v0.9.0 to core_v0.16.1, `loader_llama2.py` before, and Gaudi
Megatron-LM 1.24.
"""

from __future__ import annotations

import logging
import re
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptconv import numbers, stream
from ckptconv.errors import UsageError, some
from ckptconv.formats.meta import PARAMS, VERSIONS
from ckptconv.loaders import hf, meta
from ckptconv.metadata import Metadata
from ckptconv.spec import ModelSpec

log = logging.getLogger("ckptconv.loader")

#: --load-dir may be a model of the Hugging Face hub.
from_hub = True

#: First part of a --model-size -> our family; without one (`7B`) it is Llama 2.
FAMILIES = {"llama2": "llama", "llama3": "llama", "mistral": "mistral", "yi": "llama", "qwen2.5": "qwen2", "": "llama"}
#: --model-size, less the `f` of fine-tuned models -> layers, hidden size.
SIZES = {
    "llama2-7B": (32, 4096), "llama2-13B": (40, 5120), "llama2-70B": (80, 8192), "llama3-8B": (32, 4096),
    "llama3-70B": (80, 8192), "mistral-7B": (32, 4096), "yi-34B": (60, 7168), "qwen2.5-7B": (28, 3584),
    "qwen2.5-72B": (80, 8192),
}  # fmt: skip
_SIZE = re.compile(r"(?P<model>llama2|llama3(?:\.[1-3])?|mistral|yi|qwen2\.5|)-?(?P<size>\d+B|)f?")


def recognises(load_dir: str) -> None:
    """Nothing: the directories are those of `hf` and `meta`."""


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this loader."""
    group = parser.add_argument_group("loader llama_mistral")
    group.add_argument("--model-size", metavar="NAME", type=_model_size,
                       help="llama2-7B, llama3-8B, mistral-7B, yi-34B, qwen2.5, ...; checked against what is found"
                       )  # fmt: skip
    group.add_argument("--checkpoint-type", choices=("hf", "meta"), help="whose files (default: as found)")
    group.add_argument("--llama-version", choices=tuple(VERSIONS),
                       help="of Meta's files: as for --loader meta")  # fmt: skip
    group.add_argument("--make-vocab-size-divisible-by", type=numbers.positive, metavar="N",
                       help="what the target pads the vocabulary to, with its tp")  # fmt: skip
    older_arguments(group)


def older_arguments(group: Any) -> None:
    """Flags of all of Megatron-LM's loaders of Hugging Face models."""
    group.add_argument("--tokenizer-model", metavar="PATH", help="the tokenizer to go with the model")
    group.add_argument("--true-vocab-size", type=numbers.positive, metavar="N", help="only compared with what is found")
    group.add_argument("--vocab-file", metavar="PATH", help="not used: the vocabulary is as large as the embedding")


def load_checkpoint(queue: Any, args: Namespace) -> None:
    """Send the model in args.load_dir. Raises SourceError, UsageError."""
    folder = Path(args.load_dir)
    if args.model_size and not (folder / PARAMS).is_file() and (folder / args.model_size / PARAMS).is_file():
        folder = folder / args.model_size  # where an older release of that loader looked
    of_meta = args.checkpoint_type == "meta" if args.checkpoint_type else bool(meta.recognises(str(folder)))
    place = str(folder)
    source = meta.opened(place, args.llama_version) if of_meta else hf.opened(place, None, args.dtype_name)
    _check_size(args.model_size, source.spec)
    llama2 = args.model_size and _parts(args.model_size)[0] in ("llama2", "")
    send(queue, args, source, "Llama2Tokenizer" if llama2 else None)


def send(queue: Any, args: Namespace, source: stream.Source, tokenizer_type: str | None) -> None:
    """Send a source with what the flags say; say which of them do nothing."""
    if args.vocab_file:
        log.info("loader: --vocab-file is not needed and not used")
    rows = source.spec.vocab_size
    if args.true_vocab_size not in (None, rows):
        log.warning(
            "loader: --true-vocab-size %d is not used, as it never was by this loader: all %d rows of the embedding "
            "are kept", args.true_vocab_size, rows,
        )  # fmt: skip
    if not args.dtype_name:
        log.info("loader: weights stay %s; without --bf16 and --fp16 Megatron-LM's loader makes them float32 "
                 "(--dtype fp32)", source.spec.dtype)  # fmt: skip
    told: dict[str, Any] = {}
    if args.tokenizer_model:
        told["tokenizer_model"] = args.tokenizer_model
        whole = Path(args.tokenizer_model).is_dir()
        told["tokenizer_type"] = "HuggingFaceTokenizer" if whole or not tokenizer_type else tokenizer_type
    if divisor := getattr(args, "make_vocab_size_divisible_by", None):
        told["make_vocab_size_divisible_by"] = divisor
    stream.send(queue, _Told(source, told))


class _Told:
    """A source whose first message says what flags say."""

    def __init__(self, source: stream.Source, told: dict[str, Any]) -> None:
        self.spec = source.spec
        self.tensors, self.holdings = source.tensors, source.holdings
        self._source, self._told = source, told

    def metadata(self) -> Metadata:
        """The first message."""
        return replace(self._source.metadata(), **self._told)


def _model_size(text: str) -> str:
    if not text or not _SIZE.fullmatch(text):
        raise UsageError(f"--model-size {text}: expected one of {some([*SIZES, 'llama3', 'mistral', 'qwen2.5'], 12)}.")
    return text


def _parts(model_size: str) -> tuple[str, str]:
    """(model, size) of a --model-size, either may be empty."""
    match = _SIZE.fullmatch(model_size)
    return (match["model"], match["size"]) if match else ("", "")


def _check_size(model_size: str | None, spec: ModelSpec) -> None:
    """Raise UsageError for another family than is found, and say it when the size is another: it is the files' then."""
    if not model_size:
        return
    model, size = _parts(model_size)
    family = FAMILIES[model.partition(".")[0] if model.startswith("llama3") else model]
    found = spec.family or "llama"
    if family != found:
        raise UsageError(f"--model-size {model_size}: that is a {family} model, but the source is {found}.")
    wanted = SIZES.get(f"{model or 'llama2'}-{size}")
    there = (spec.num_layers, spec.hidden_size)
    if wanted and wanted != there:
        log.warning(
            "loader: --model-size %s has %d layers of %d, but the source has %d of %d, which counts",
            model_size, *wanted, *there,
        )  # fmt: skip
