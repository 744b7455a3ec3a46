"""Hugging Face directories: config.json and safetensors or .bin weights of any supported family.

`hf` takes the family from config.json; `hf_FAMILY` is the same loader pinned to one family and refuses others.
"""

from __future__ import annotations

import logging
from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ckptconv import companions, dtypes, families, lazy, ops, stream
from ckptconv.containers import hfdir
from ckptconv.errors import SourceError, near, some
from ckptconv.families.family import Row
from ckptconv.lazy import Cast, LazyTensor
from ckptconv.messages import Expected, expected
from ckptconv.metadata import Metadata, Origin
from ckptconv.spec import ModelSpec

log = logging.getLogger("ckptconv.loader")

PREFIX = "model."
HEAD = "lm_head.weight"


def recognises(load_dir: str) -> str | None:
    """Why a directory looks like ours, or None."""
    folder = Path(load_dir)
    if (folder / "latest_checkpointed_iteration.txt").exists():
        return None
    for name in ("config.json", hfdir.SINGLE, hfdir.INDEX, hfdir.BIN, hfdir.BIN_INDEX):
        if (folder / name).is_file():
            return f"it has {name}"
    return None


def add_arguments(parser: ArgumentParser) -> None:
    """No flags of its own: everything is read from the directory."""


def load_checkpoint(queue: Any, args: Namespace) -> None:
    """Send the model in args.load_dir. Raises SourceError."""
    _load(queue, args, None)


def pinned(family: str) -> Any:
    """The loader `hf_FAMILY`."""
    text = f"Hugging Face directories of the family {family} only."
    return SimpleNamespace(
        __name__=f"ckptconv.loaders.hf ({family})",
        __doc__=text,
        add_arguments=add_arguments,
        load_checkpoint=lambda queue, args: _load(queue, args, family),
    )


def _load(queue: Any, args: Namespace, only: str | None) -> None:
    stream.send(queue, _Source(args.load_dir, only, bool(getattr(args, "dtype_name", None))))


class _Source:
    """One directory: its config, its tensors by name, and which of them have been used."""

    def __init__(self, directory: str, only: str | None, casting: bool) -> None:
        self.directory = directory
        self._casting = casting
        self._companions = companions.find(directory)
        config = companions.read_config(self._companions)
        where = str(Path(directory) / companions.CONFIG)
        if config is None:
            raise SourceError(f"{where}: missing. The sizes of the model are read from it; fetch it with the weights.")
        self.family = families.of_config(config, where)
        if only and self.family.name != only:
            raise SourceError(
                f"{where}: model_type is {config.get('model_type')!r}, but --loader hf_{only} takes {only} only. "
                f"Use --loader hf_{self.family.name}, or --loader hf for any family."
            )
        quantised = config.get("quantization_config")
        if quantised:
            kind = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
            raise SourceError(
                f"{where}: the weights are quantised ({kind}), which is not supported: converting them would not be "
                "bit-exact. Use the unquantised checkpoint of this model."
            )
        self._where = where
        self._names, self.files = hfdir.read(directory)
        self._bare = f"{PREFIX}embed_tokens.weight" not in self._names and "embed_tokens.weight" in self._names
        self.spec = self._settle_head(self._settle_dtype(self.family.spec(config, where)))
        self._rows = self._tabled()
        self._check_names()

    # The model as stored

    def _settle_dtype(self, spec: ModelSpec) -> ModelSpec:
        """What is stored counts, not what config.json says: it may ask for a conversion at load time."""
        sizes: Counter[str] = Counter()
        for tensor in self._names.values():
            if dtypes.BY_NAME[tensor.dtype].floating:
                sizes[tensor.dtype] += tensor.nbytes
        if not sizes:
            raise SourceError(f"{self.directory}: its weight files hold no floating point tensors.")
        stored = sizes.most_common(1)[0][0]
        if dtypes.size_of(stored) < 2:
            raise SourceError(f"{self.directory}: most weights are {stored}, which is a quantised form. Not supported.")
        return spec.replace(dtype=stored)

    def _settle_head(self, spec: ModelSpec) -> ModelSpec:
        """Tied as transformers 5 sees it: config.json says so and no other head is stored."""
        head, embedding = self._names.get(HEAD), self._names.get(self._disk("model.embed_tokens.weight"))
        if spec.tied and head is not None and embedding is not None and not lazy.equal(head, embedding):
            log.warning(
                "loader: config.json says tie_word_embeddings, but %s differs from the embedding: taken as untied", HEAD
            )
            return spec.replace(tied=False)
        return spec

    def _tabled(self) -> dict[tuple[str, str], Row]:
        return {(row.message, row.key): row for row in self.family.rows}

    def _disk(self, name: str) -> str:
        """The name on disk: files of a bare model lack the `model.` prefix."""
        return name.removeprefix(PREFIX) if self._bare else name

    # Names: every tensor is used or ignored by a rule

    def _check_names(self) -> None:
        if self.spec.num_layers > len(self._names):
            raise SourceError(
                f"{self._where}: says {self.spec.num_layers} layers, but the weight files hold {len(self._names)} "
                "tensors in all. Is this config from the same checkpoint?"
            )
        wanted: dict[str, Expected] = {}
        for message in expected(self.spec):
            for key in message.shapes:
                for name in self._rows[message.template, key].names:
                    wanted[self._disk(name.format(i=message.layer))] = message
        missing = [name for name in wanted if name not in self._names]
        if missing:
            left = [name for name in self._names if name not in wanted]
            hint = near(missing[0], left)
            if missing == [HEAD]:
                hint = " config.json says the head is not tied (tie_word_embeddings)."
            raise SourceError(
                f"{self.directory}: lacks {some(missing)}, which a {self.family.name} model of "
                f"{self.spec.num_layers} layers has.{hint} Is config.json from the same checkpoint?"
            )
        ignored = self._ignored()
        left = [name for name in self._names if name not in wanted and name not in ignored]
        if left:
            raise SourceError(
                f"{self.directory}: holds {some(left)}, which a {self.family.name} model as in config.json "
                f"({self.spec.num_layers} layers) does not have.{near(left[0], wanted)} They would be lost."
            )
        for name, reason in sorted(ignored.items()):
            log.debug("loader: ignored %s: %s", name, reason)

    def _ignored(self) -> dict[str, str]:
        """Names left out on purpose, with the reason."""
        rules = {
            self._disk(rule.name.format(i=layer)): rule.reason
            for rule in self.family.ignore
            for layer in range(self.spec.num_layers)
        }
        if self.spec.tied:
            rules[HEAD] = "equal to the embedding it is tied to"
        return {name: rules[name] for name in self._names if name in rules}

    # The stream

    def metadata(self) -> Metadata:
        """The first message."""
        tokenizer = self._companions.get("tokenizer.model")
        return Metadata(
            spec=self.spec,
            origin=Origin("hf", self.directory, stream.stamps(self.files), self._companions, self._notes()),
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(Path(tokenizer).parent) if tokenizer else None,
        )

    def _notes(self) -> list[str]:
        return [f"ignored {some([name])}: {reason}" for name, reason in sorted(self._ignored().items())]

    def tensors(self, message: Expected) -> dict[str, LazyTensor]:
        """The tensors of one message, not read. Raises SourceError on wrong shapes."""
        return {key: self._tensor(message, key, shape) for key, shape in message.shapes.items()}

    def _tensor(self, message: Expected, key: str, shape: lazy.Shape) -> LazyTensor:
        row = self._rows[message.template, key]
        names = [self._disk(name.format(i=message.layer)) for name in row.names]
        parts = [self._names[name] for name in names]
        for name, part, want in zip(names, parts, row.op.part_shapes(shape, self.spec), strict=True):
            if part.shape != want:
                raise SourceError(self._misfit(name, part, want))
        if len({part.dtype for part in parts}) > 1:
            if not self._casting:
                listed = ", ".join(f"{name} is {part.dtype}" for name, part in zip(names, parts, strict=True))
                raise SourceError(
                    f"{self.directory}: {listed}, but they become one tensor. Give --dtype to convert all weights."
                )
            parts = [part if part.dtype == self.spec.dtype else Cast(part, self.spec.dtype) for part in parts]
        return ops.fuse(row.op, parts, shape, self.spec)

    def _misfit(self, name: str, part: LazyTensor, want: lazy.Shape) -> str:
        file = part.path if isinstance(part, lazy.FileTensor) else self.directory
        sizes = {
            field.key: getattr(self.spec, field.spec)
            for field in self.family.fields
            if field.key and getattr(self.spec, field.spec) in want and field.spec != "num_layers"
        }
        said = ", ".join(f"{key} is {value}" for key, value in sizes.items())
        return (
            f"{file}: {name} is {list(part.shape)}, expected {list(want)}"
            + (f" ({said} in config.json)" if said else "")
            + ". Is this config from the same checkpoint?"
        )
