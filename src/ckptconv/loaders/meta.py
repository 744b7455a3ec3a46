"""Meta's own Llama checkpoints: `consolidated.NN.pth` in any number of shards, and params.json.

Sizes come from params.json and the tensors, which have to agree; how the embedding is cut is seen from its shape.
"""

from __future__ import annotations

import logging
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from ckptconv import companions, lazy, stream
from ckptconv.containers import dcp, torchzip
from ckptconv.containers.rankdir import Rank
from ckptconv.errors import SourceError, some
from ckptconv.files import refuse_partial
from ckptconv.formats import mcore_dist, meta
from ckptconv.formats.meta import PARAMS, TOKENIZER
from ckptconv.joining import Shards
from ckptconv.layout import Layout
from ckptconv.lazy import LazyTensor
from ckptconv.messages import Expected
from ckptconv.metadata import Metadata, Origin
from ckptconv.spec import ModelSpec, differences

log = logging.getLogger("ckptconv.loader")

_FILE = re.compile(r"consolidated\.(\d+)\.pth")


def recognises(load_dir: str) -> str | None:
    """Why a directory looks like ours, or None."""
    folder = Path(load_dir)
    if (folder / PARAMS).is_file() and any(_FILE.fullmatch(entry.name) for entry in folder.iterdir()):
        return f"it has {PARAMS} and consolidated.*.pth"
    return f"it has {PARAMS} and {dcp.METADATA}" if dcp.is_one(folder) and (folder / PARAMS).is_file() else None


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this loader."""
    group = parser.add_argument_group("loader meta")
    group.add_argument("--llama-version", choices=tuple(meta.VERSIONS),
                       help="the release, which tells what params.json does not: the factor of a scaled rope, the "
                       "longest input (default: as params.json and the tensors suggest)")  # fmt: skip


def load_checkpoint(queue: Any, args: Namespace) -> None:
    """Send the model in args.load_dir. Raises SourceError."""
    stream.send(queue, opened(args.load_dir, args.llama_version))


def opened(directory: str, version: str | None = None) -> stream.Source:
    """The checkpoint in a directory, checked. Raises SourceError."""
    return _Source(Path(directory), version)


class _Source:
    """One directory: its params, its shards, and the model they hold."""

    def __init__(self, folder: Path, version: str | None) -> None:
        refuse_partial(folder)
        self.folder = folder
        self._where = str(folder / PARAMS)
        self._params = meta.checked(companions.read_json(self._where), self._where)
        self._paths = _shard_files(folder)
        self._data: list[Path] = []  # files beside them
        self._tensors, self.ignored = self._read()
        self._check_shard_count()
        rows, vocab = self._embedding()
        stored = self._stored(vocab)
        table, layout = meta.table(stored, rows), Layout(stored.num_layers, len(self._paths))
        self._shards = Shards(self._tensors, self._paths, table, stored, layout, vocab)
        self._shards.check()
        self._check_dtypes()
        self.spec = self._settled(stored, version)
        self._companions = self._find_companions()

    # Files

    def _read(self) -> tuple[dict[Rank, dict[str, LazyTensor]], dict[str, str]]:
        tensors: dict[Rank, dict[str, LazyTensor]] = {}
        ignored: dict[str, str] = {}
        for rank, path in self._paths.items():
            root = self._distributed(ignored) if path.name == dcp.METADATA else torchzip.read(str(path))
            if not isinstance(root, dict):
                raise SourceError(f"{path}: holds a {type(root).__name__}, expected a dict of tensors.")
            tensors[rank] = {}
            for name, value in root.items():
                rule = next((rule for rule in meta.IGNORE if str(name).endswith(rule.suffix)), None)
                if rule:
                    ignored[str(name)] = rule.reason
                elif isinstance(value, LazyTensor):
                    tensors[rank][str(name)] = value
                else:
                    raise SourceError(f"{path}: {name} is a {type(value).__name__}, expected a tensor.")
        return tensors, ignored

    def _distributed(self, ignored: dict[str, str]) -> dict[str, LazyTensor]:
        """The tensors of torchtitan's distributed checkpoint, whose Llama has Meta's names and rotary rows."""
        stored = dcp.read(self.folder)
        self._data = list(stored.files)
        for key in (*stored.objects, *stored.tensors):
            if (reason := mcore_dist.ignored(key, {"optimizer": "optimizer state is not converted"})) is not None:
                ignored[mcore_dist.head(key) + "*"] = reason
            elif key in stored.objects:
                raise SourceError(f"{self.folder}: holds {key}, which no rule knows. It would be lost.")
        keys = [key for key in stored.tensors if mcore_dist.head(key) + "*" not in ignored]
        return {key.removeprefix("model."): stored.tensors[key].at() for key in keys}

    def _first(self, name: str) -> LazyTensor:
        """A tensor of the first shard that sizes are taken from."""
        path, there = self._paths[0, 0, 0], self._tensors[0, 0, 0]
        if name not in there or len(there[name].shape) != 2:
            raise SourceError(f"{path}: has no matrix {name}; it has {some(there)}. Is this a Llama model of Meta's?")
        return there[name]

    def _check_shard_count(self) -> None:
        """Shards whose last ones are missing look complete by their names; the queries tell."""
        rows = self._first("layers.0.attention.wq.weight").shape[0]
        whole, count = self._params["n_heads"] * meta.head_dim(self._params), len(self._paths)
        if rows * count != whole:
            wanted = f"{whole // rows} shards" if rows and whole % rows == 0 else "another model"
            raise SourceError(
                f"{self.folder}: {count} shards of {rows} query rows each, but {PARAMS} says {whole} rows in all: that "
                f"is {wanted}. Are consolidated.*.pth files missing?"
            )

    # The model

    def _embedding(self) -> tuple[bool, int]:
        """(whether the embedding is cut on dim 0, rows of the vocabulary)."""
        dim, count = self._params["dim"], len(self._paths)
        rows, cols = self._first("tok_embeddings.weight").shape
        if dim not in (cols, cols * count):
            raise SourceError(
                f"{self._paths[0, 0, 0]}: tok_embeddings.weight is [{rows}, {cols}], which is no cut of an embedding "
                f"of dim {dim} ({PARAMS}) in {count} shards."
            )
        vocab = rows * count if cols == dim else rows
        said = self._params.get("vocab_size", -1)
        if said > 0 and said != vocab:
            raise SourceError(f"{self._where}: vocab_size is {said}, but the embedding has {vocab} rows in all.")
        return cols == dim, vocab

    def _stored(self, vocab: int) -> ModelSpec:
        """The model as stored: with a head, whether tied or not."""
        params = self._params
        layers = {name.split(".")[1] for name in self._tensors[0, 0, 0] if name.startswith("layers.")}
        if len(layers) != params["n_layers"]:
            raise SourceError(f"{self._where}: n_layers is {params['n_layers']}, but the shards hold {len(layers)}.")
        ffn = self._first("layers.0.feed_forward.w1.weight").shape[0] * len(self._paths)
        said = params.get("hidden_dim") or meta.ffn_size(
            params["dim"], params.get("multiple_of", 256), params.get("ffn_dim_multiplier")
        )
        if said != ffn:
            log.warning("loader: %s makes feed_forward %d wide; the tensors are %d, which counts", PARAMS, said, ffn)
        version, dtype = meta.guess(params, False, vocab), self._first("tok_embeddings.weight").dtype
        return meta.read(params, version, self._where, ffn=ffn, vocab=vocab, tied=False, dtype=dtype)

    def _check_dtypes(self) -> None:
        for i in range(self._params["n_layers"]):
            names = [f"layers.{i}.attention.{part}.weight" for part in ("wq", "wk", "wv")]
            kinds = {name: self._tensors[0, 0, 0][name].dtype for name in names}
            if len(set(kinds.values())) > 1:
                listed = some(f"{name} is {kind}" for name, kind in kinds.items())
                raise SourceError(
                    f"{self._paths[0, 0, 0]}: {listed}, but they become one tensor. "
                    "Save them as one type."
                )

    def _settled(self, stored: ModelSpec, told: str | None) -> ModelSpec:
        """The model with what the release or our own note says."""
        embeddings, output = (self._shards.messages[name] for name in ("embeddings", "output layer"))
        one, other = (self._shards.joined(embeddings, "word embeddings"), self._shards.joined(output, "weight"))
        tied = lazy.equal(one, other)
        if tied:
            self.ignored["output.weight"] = "equal to the embedding it is tied to"
        noted = self._noted()
        version = told or (noted or {}).get("target", {}).get("llama_version")
        self._version = version or meta.guess(self._params, tied, stored.vocab_size)
        spec = meta.read(
            self._params, self._version, self._where,
            ffn=stored.ffn_hidden_size, vocab=stored.vocab_size, tied=tied, dtype=stored.dtype,
        )  # fmt: skip
        if noted and not told:
            known = ModelSpec.from_json(noted["spec"], str(self.folder / companions.PROVENANCE))
            unlike = differences(known, spec, (*meta.UNSAID, "tied"))
            if not unlike:
                return known.replace(dtype=spec.dtype)
            log.warning("loader: %s was changed since we wrote it: %s", PARAMS, some(unlike, 3))
        if version is None:
            scaling = f", rope factor {spec.rope.scaling['factor']:g}" if spec.rope and spec.rope.scaling else ""
            log.warning(
                "loader: taken as Llama %s: at most %d positions%s, which %s does not say. --llama-version says "
                "otherwise.", self._version, spec.max_position_embeddings, scaling, PARAMS,
            )  # fmt: skip
        return spec

    def _noted(self) -> dict[str, Any] | None:
        """What we noted when this checkpoint was written by us; None for one of Meta's."""
        path = self.folder / companions.PROVENANCE
        if not path.is_file():
            return None
        noted = companions.read_json(path)
        if not isinstance(noted.get("spec"), dict) or not isinstance(noted.get("target"), dict):
            raise SourceError(f"{path}: is not a provenance file of ckptconv. Remove it to go on without it.")
        version = noted["target"].get("llama_version")
        if version not in meta.VERSIONS:
            raise SourceError(f"{path}: was written for another checkpoint than this. Remove it to go on without it.")
        return noted

    def _find_companions(self) -> dict[str, str]:
        """The files of a Hugging Face model kept with it, else its tokenizer, which lay above Llama 1 and 2."""
        found = companions.find(self.folder / companions.FOLDER) or companions.find(self.folder)
        above = self.folder.absolute().parent / TOKENIZER
        if not any(map(companions.is_tokenizer, found)) and above.is_file():
            log.info("loader: the tokenizer is %s", above)
            found[TOKENIZER] = str(above)
        return found

    # The stream

    def metadata(self) -> Metadata:
        """The first message."""
        sentencepiece = TOKENIZER in self._companions and not meta.VERSIONS[self._version].rows
        notes = [f"ignored {name}: {reason}" for name, reason in sorted(self.ignored.items())]
        return Metadata(
            spec=self.spec,
            origin=Origin(
                "meta", str(self.folder), stream.stamps([Path(self._where), *self._paths.values(), *self._data]),
                self._companions,
                [f"taken as Llama {self._version}", *notes],
            ),
            tp=len(self._paths),
            tokenizer_type="Llama2Tokenizer" if sentencepiece else None,
            tokenizer_model=self._companions.get(TOKENIZER),
        )  # fmt: skip

    def tensors(self, message: Expected) -> dict[str, LazyTensor]:
        """The full tensors of one message, not read."""
        return {key: self._shards.joined(message, key) for key in message.shapes}

    def holdings(self) -> stream.Holdings:
        """What lies on which rank."""
        return self._shards.holdings()


def _shard_files(folder: Path) -> dict[Rank, Path]:
    """Shard -> file. Raises SourceError when there are none or some are missing."""
    if dcp.is_one(folder):
        return {(0, 0, 0): folder / dcp.METADATA}
    found = sorted((int(match[1]), entry) for entry in folder.iterdir() if (match := _FILE.fullmatch(entry.name)))
    files = dict(found)
    if not files:
        raise SourceError(f"{folder}: has no consolidated.*.pth. Is the path right?")
    if len(files) < len(found):
        raise SourceError(f"{folder}: two of {some(path.name for _, path in found)} have the same number. Keep one.")
    missing = [f"consolidated.{n:02d}.pth" for n in range(max(files) + 1) if n not in files]
    if missing:
        raise SourceError(f"{folder}: lacks {some(missing)} of {max(files) + 1} shards. Fetch the missing ones.")
    return {(n, 0, 0): path for n, path in found}
