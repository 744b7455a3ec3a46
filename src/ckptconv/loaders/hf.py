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
from ckptconv.containers import hfdir, msdir
from ckptconv.errors import SourceError, near, refuse, some
from ckptconv.families import quantised
from ckptconv.families.family import Row
from ckptconv.lazy import Cast, LazyTensor
from ckptconv.messages import Expected, expected
from ckptconv.metadata import Metadata, Origin
from ckptconv.spec import ModelSpec

log = logging.getLogger("ckptconv.loader")

#: --load-dir may be a model of the Hugging Face hub.
from_hub = True

#: --load-dir may be a weight file.
takes_files = True


def recognises(load_dir: str) -> str | None:
    """Why a directory looks like ours, or None."""
    folder = Path(load_dir)
    if (folder / "latest_checkpointed_iteration.txt").exists() or msdir.recognises(load_dir):
        return None
    if folder.is_file() and (folder.name == hfdir.SINGLE or folder.suffix in (".bin", ".pt", ".pth")):
        return f"it is a file {folder.suffix}"
    for name in ("config.json", hfdir.SINGLE, hfdir.INDEX, hfdir.BIN, hfdir.BIN_INDEX):
        if (folder / name).is_file():
            return f"it has {name}"
    return None


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this loader."""
    group = parser.add_argument_group("loader hf")
    group.add_argument("--config", metavar="PATH", help="config.json, where it does not lie beside the weights")


def load_checkpoint(queue: Any, args: Namespace) -> None:
    """Send the model in args.load_dir. Raises SourceError."""
    _load(queue, args, None)


def pinned(family: str) -> Any:
    """The loader `hf_FAMILY`."""
    text = f"Hugging Face directories of the family {family} only."
    return SimpleNamespace(
        __name__=f"ckptconv.loaders.hf ({family})",
        __doc__=text,
        from_hub=True,
        add_arguments=add_arguments,
        takes_files=takes_files,
        load_checkpoint=lambda queue, args: _load(queue, args, family),
    )


def _load(queue: Any, args: Namespace, only: str | None) -> None:
    told = getattr(args, "config", None)
    stream.send(queue, opened(args.load_dir, only, getattr(args, "dtype_name", None), told))


def opened(
    directory: str, only: str | None = None, dtype: str | None = None, config: str | None = None
) -> stream.Source:
    """The model in a directory (or one weight file), checked. only: its family; dtype: what it will be cast to;
    config: the path of its config.json, where it is elsewhere. Raises SourceError.
    """
    return _Source(directory, only, dtype, config)


class _Source:
    """One directory: its config, its tensors by name, and which of them have been used."""

    def __init__(
        self, directory: str, only: str | None, dtype: str | None, told: str | None = None
    ) -> None:
        self.directory = directory
        self._casting = bool(dtype)
        folder = Path(directory).parent if Path(directory).is_file() else Path(directory)
        self._companions = companions.find(folder)
        if told:
            self._companions = {**companions.find(Path(told).parent), **self._companions, companions.CONFIG: told}
        config = companions.read_config(self._companions)
        where = told or str(folder / companions.CONFIG)
        if config is None:
            beside = f"{directory}: " if folder != Path(directory) else ""
            raise SourceError(
                f"{beside}{where}: missing. The sizes of the model are read from it; fetch it with the weights."
            )
        self.family = families.of_config(config, where)
        if only and self.family.name != only:
            raise SourceError(
                f"{where}: model_type is {config.get('model_type')!r}, but --loader hf_{only} takes {only} only. "
                f"Use --loader hf_{self.family.name}, or --loader hf for any family."
            )
        quantised.method_of(config, where)
        self._where = where
        self._stored, self.files = hfdir.read(directory)
        self._names, self._changes = quantised.plain(self._stored, config, dtype, where)
        for change in self._changes:
            log.info("loader: %s", change)
        prefix = self.family.prefix
        self._bare = bool(prefix) and not any(name.startswith(prefix) for name in self._names)
        self._check_counts(config)
        plain = self._settle_dtype(self.family.spec(config, where))
        if self._changes:
            plain = plain.replace(dtype=quantised.target(config, dtype, where))
        spec = self._settle_parts(self._settle_mtp(plain))
        self.spec = self._settle_head(spec)
        self._check_names()
        self._check_duplicates()

    def _check_counts(self, config: dict[str, Any]) -> None:
        """Raise SourceError for more layers than tensors or more experts than rows, before they are counted out."""
        tensors, rows = len(self._names), sum(tensor.rows for tensor in self._names.values())
        most = {"num_layers": (tensors, "layers", "tensors"), "encoder_layers": (tensors, "layers", "tensors"),
                "mtp_layers": (tensors, "layers", "tensors"), "moe.num_experts": (rows, "experts", "rows")}  # fmt: skip
        for field in self.family.fields:
            value = config.get(field.key) if field.key else None
            limit, what, held = most.get(field.spec, (None, "", ""))
            if limit is not None and isinstance(value, int | float) and value > limit:
                raise SourceError(
                    f"{self._where}: says {value} {what} ({field.key}), but the weight files hold {limit} {held} in "
                    "all. Is this config from the same checkpoint?"
                )

    # The model as stored

    def _settle_dtype(self, spec: ModelSpec) -> ModelSpec:
        """What is stored counts, not what config.json says: it may ask for a conversion at load time."""
        sizes: Counter[str] = Counter()
        for tensor in self._names.values():
            if dtypes.BY_NAME[tensor.dtype].floating:
                sizes[tensor.dtype] += tensor.nbytes
        if not sizes:
            raise SourceError(f"{self.directory}: its weight files hold no floating point tensors. Are they a model's?")
        stored = sizes.most_common(1)[0][0]
        if dtypes.size_of(stored) < 2:
            raise SourceError(
                f"{self.directory}: most weights are {stored}, a quantised form that is not read. Use the unquantised "
                "checkpoint of this model."
            )
        return spec.replace(dtype=stored)

    def _settle_mtp(self, spec: ModelSpec) -> ModelSpec:
        """MTP layers as stored: transformers drops them when it saves a model, and keeps their number in the config."""
        message = next((m for m in expected(spec) if m.template.startswith("mtp")), None)
        if message is None:
            return spec
        own = [name for row in self.family.rows_of(message, spec) for name in row.stored(message.layer, spec)]
        if any(self._has(name) for name in own):
            return spec
        log.warning("loader: config.json says %d MTP layers, but the files hold none: left out", spec.mtp_layers)
        return spec.replace(mtp_layers=0)

    def _settle_parts(self, spec: ModelSpec) -> ModelSpec:
        """Parts as stored: a model is often saved with heads that the class in its config does not have, or without."""
        for name in self.family.optional:
            whole = spec.replace(**{name: True})
            message = next(m for m in expected(whole) if m.template == name.replace("_", " "))
            rows = self.family.rows_of(message, whole, self._has)
            found = any(self._has(stored) for row in rows for stored in row.stored(message.layer, whole))
            spec = spec.replace(**{name: found})
        return spec

    def _settle_head(self, spec: ModelSpec) -> ModelSpec:
        """Tied as transformers 5 sees it: config.json says so and no other head is stored."""
        if not spec.tied:
            return spec
        self._head = self._one_name("output layer", "weight", spec.replace(tied=False))
        embedding = self._one_name("embeddings", "word embeddings", spec)
        head, tied_to = self._names.get(self._head), self._names.get(embedding)
        if head is not None and tied_to is not None and not lazy.equal(head, tied_to):
            log.warning(
                "loader: config.json says tie_word_embeddings, but %s differs from the embedding: taken as untied",
                self._head,
            )
            return spec.replace(tied=False)
        return spec

    def _one_name(self, message: str, key: str, spec: ModelSpec) -> str:
        """The name on disk of a key that is one stored tensor."""
        want = next((m for m in expected(spec) if m.template == message), None)
        if want is None:
            return ""
        row = next(row for row in self.family.rows_of(want, spec, self._has) if key in row.keys)
        return self._disk(row.stored(None, spec)[0])

    def _has(self, name: str) -> bool:
        return self._disk(name) in self._names

    def _disk(self, name: str) -> str:
        """The name on disk: files of a bare model lack the `model.` prefix."""
        return name.removeprefix(self.family.prefix) if self._bare else name

    # Names: every tensor is used or ignored by a rule

    def _check_names(self) -> None:
        wanted: dict[str, Expected] = {}
        for message in expected(self.spec):
            for row in self._rows(message):
                wanted |= dict.fromkeys(map(self._disk, row.stored(message.layer, self.spec)), message)
        missing = [name for name in wanted if name not in self._names]
        if missing:
            left = [name for name in self._names if name not in wanted]
            hint = near(missing[0], left)
            if wanted[missing[0]].name == "output layer":
                hint = " config.json says the head is not tied (tie_word_embeddings)."
            refuse(SourceError(
                f"{self.directory}: lacks {some(missing)}, which a {self.family.name} model of "
                f"{self.spec.num_layers} layers has.{hint} Is config.json from the same checkpoint?"
            ))  # fmt: skip
        ignored = self._ignored()
        left = [name for name in self._names if name not in wanted and name not in ignored]
        if left:
            refuse(SourceError(
                f"{self.directory}: holds {some(left)}, which a {self.family.name} model as in config.json "
                f"({self.spec.num_layers} layers) does not have.{near(left[0], wanted)} They would be lost."
            ))  # fmt: skip
        for name, reason in sorted(ignored.items()):
            log.debug("loader: ignored %s: %s", name, reason)

    def _rows(self, message: Expected) -> list[Row]:
        return self.family.rows_of(message, self.spec, self._has)

    def _ignored(self) -> dict[str, str]:
        """Names left out on purpose, with the reason."""
        rules = {
            self._disk(rule.name.format(i=layer)): rule.reason
            for rule in self.family.ignore
            for layer in range(self.spec.num_layers + self.spec.mtp_layers)
        }
        if self.spec.tied:
            rules[self._head] = "equal to the embedding it is tied to"
        for duplicate in self.family.duplicates:
            rules |= dict.fromkeys(
                map(self._disk, duplicate.stored(self.spec)), f"equal to {duplicate.key!r} of {duplicate.message!r}"
            )
        return {name: rules[name] for name in self._names if name in rules}

    def _check_duplicates(self) -> None:
        """Raise SourceError when a tensor that is stored twice differs: one of the two would be lost."""
        messages = {message.template: message for message in expected(self.spec) if message.layer is None}
        for duplicate in self.family.duplicates:
            message = messages.get(duplicate.message)
            for name in map(self._disk, duplicate.stored(self.spec)):
                if message is None or name not in self._names:
                    continue
                tensor = next(self._made(message, row) for row in self._rows(message) if duplicate.key in row.keys)
                if not lazy.equal(self._names[name], tensor[duplicate.key]):
                    refuse(SourceError(
                        f"{self.directory}: {name} differs from {duplicate.key!r} of {duplicate.message!r}, of which "
                        "it has to be a copy. Converting would lose one of the two."
                    ))  # fmt: skip

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
        ignored = [f"ignored {some([name])}: {reason}" for name, reason in sorted(self._ignored().items())]
        return [*self._changes, *ignored]

    def tensors(self, message: Expected) -> dict[str, LazyTensor]:
        """The tensors of one message, not read. Raises SourceError on wrong shapes."""
        made: dict[str, LazyTensor] = {}
        for row in self._rows(message):
            made |= self._made(message, row)
        return {key: made[key] for key in message.shapes}

    def holdings(self) -> stream.Holdings:
        """What lies in which file."""
        files: dict[str, dict[str, LazyTensor]] = {}
        for name, tensor in self._stored.items():
            path = next((place[0] for place in lazy.places(tensor)), self.directory)
            files.setdefault(Path(path).name, {})[name] = tensor
        return stream.Holdings(files)

    def _made(self, message: Expected, row: Row) -> dict[str, LazyTensor]:
        """The message tensors of one row."""
        keys = row.shapes(message)
        names = [self._disk(name) for name in row.stored(message.layer, self.spec)]
        parts = [self._names[name] for name in names]
        for name, part, want in zip(names, parts, row.op.part_shapes(keys, self.spec), strict=True):
            if part.shape != (stored := row.view.shape(want)):
                raise SourceError(self._misfit(name, part, stored))
        if len({part.dtype for part in parts}) > 1:
            if not self._casting:
                listed = some(f"{name} is {part.dtype}" for name, part in zip(names, parts, strict=True))
                raise SourceError(
                    f"{self.directory}: {listed}, but they become one tensor. Give --dtype to convert all weights."
                )
            parts = [part if part.dtype == self.spec.dtype else Cast(part, self.spec.dtype) for part in parts]
        return dict(zip(row.keys, ops.fuse(row.op, list(map(row.view.seen, parts)), keys, self.spec), strict=True))

    def _misfit(self, name: str, part: LazyTensor, want: lazy.Shape) -> str:
        file = part.path if isinstance(part, lazy.FileTensor) else self.directory
        sizes = {
            field.key: field.of(self.spec)
            for field in self.family.fields
            if field.key and field.of(self.spec) in want and field.spec != "num_layers"
        }
        said = ", ".join(f"{key} is {value}" for key, value in sizes.items())
        return (
            f"{file}: {name} is {list(part.shape)}, expected {list(want)}"
            + (f" ({said} in config.json)" if said else "")
            + ". Is this config from the same checkpoint?"
        )
