"""The weight files of a Hugging Face directory: safetensors or torch .bin, single or sharded, with or without index.

The order of preference is that of transformers: model.safetensors, its index, pytorch_model.bin, its index; then any
*.safetensors whose headers can be scanned. Names and files only; what a name means is families/.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from fnmatch import fnmatch
from pathlib import Path

from ckptconv.companions import read_json
from ckptconv.containers import safetensors, torchzip
from ckptconv.errors import SourceError, refuse, some
from ckptconv.files import refuse_partial
from ckptconv.lazy import LazyTensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
#: A whole model in one torch file, as converters of other systems call it.
FULL = "checkpoint.pt"

#: Weights in other formats that lie beside a model's own in some repositories, and adapters.
_NOT_THE_MODEL = ("consolidated", "adapter_", "training_args", "optimizer", "scheduler", "rng_state")


def weight_files(directory: str) -> list[Path]:
    """Files that hold the weights, in order; `directory` may be one of them. Raises SourceError when there are none or
    some are missing.
    """
    folder = Path(directory)
    if folder.is_file():
        return [folder]
    names = {path.name for path in folder.glob("*") if path.is_file()}
    found, index = wanted(names, folder.joinpath)
    if index:
        _check_indexed(folder / index, found, names)
    elif len(found) > 1 or (found and found[0] not in (SINGLE, BIN)):
        _check_shard_count([folder / name for name in found])
    if found:
        return [folder / name for name in found if name in names]
    if (folder / "adapter_model.safetensors").is_file():
        raise SourceError(f"{folder}: holds only an adapter (LoRA). Merge it into its base model first.")
    raise SourceError(
        f"{folder}: no weights found: neither {SINGLE}, {INDEX}, {BIN}, {BIN_INDEX} nor other *.safetensors."
        f"{_instead(folder)} Fetch or copy them."
    )


def _instead(folder: Path) -> str:
    """What has the name of a file with weights and is none."""
    for path in sorted(folder.glob("*")):
        if path.suffix in (".safetensors", ".bin") and not path.is_file():
            return f" {path.name} is {'a link to nowhere' if path.is_symlink() else 'no regular file'}."
    return ""


def wanted(names: Collection[str], at: Callable[[str], Path]) -> tuple[list[str], str]:
    """(names of the weight files, of their index if it counts) among `names`. at: the path of an index, to be read."""
    for single, index in ((SINGLE, INDEX), (BIN, BIN_INDEX)):
        if single in names:
            return [single], ""
        if index in names:
            return sorted(set(_weight_map(at(index)).values())), index
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        found = sorted(n for n in names if fnmatch(n, pattern) and not n.startswith(_NOT_THE_MODEL))
        if found:
            return found, ""
    return [name for name in (FULL,) if name in names], ""


def _weight_map(index: Path) -> dict[str, str]:
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise SourceError(f"{index}: has no weight_map. Fetch or copy it again.")
    for name, file in entries.items():
        if not isinstance(file, str) or "/" in file or file in ("", ".", ".."):
            raise SourceError(f"{index}: says that {name} is in {file!r}, expected a file name of this directory.")
    return entries


def _check_indexed(index: Path, files: list[str], names: Collection[str]) -> None:
    missing = [name for name in files if name not in names]
    if missing:
        refuse(SourceError(
            f"{index}: names {some(missing)}, which {'is' if len(missing) == 1 else 'are'} not in the directory "
            f"({len(files) - len(missing)} of {len(files)} shards are there). Fetch the missing shards."
        ))  # fmt: skip


def _check_shard_count(found: list[Path]) -> None:
    """Without an index, names like model-00002-of-00004 still tell what is missing."""
    numbered = [re.search(r"-(\d+)-of-(\d+)\.\w+$", path.name) for path in found]
    totals = {int(m[2]) for m in numbered if m}
    for total in totals:
        there = {int(m[1]) for m in numbered if m and int(m[2]) == total}
        missing = [str(n) for n in range(1, total + 1) if n not in there]
        if missing:
            refuse(SourceError(
                f"{found[0].parent}: shard {', '.join(missing[:6])} of {total} is missing (there is no index file, "
                "the names of the others say so). Fetch it."
            ))  # fmt: skip


def read(directory: str) -> tuple[dict[str, LazyTensor], list[Path]]:
    """(tensors by name, weight files). Raises SourceError: missing or damaged files, index and headers that disagree,
    a name in two shards."""
    refuse_partial(directory)
    files = weight_files(directory)
    where: dict[str, Path] = {}
    tensors: dict[str, LazyTensor] = {}
    for path in files:
        held = safetensors.read(str(path))[0] if path.suffix == ".safetensors" else _read_bin(path)
        for name, tensor in held.items():
            if name in where:
                raise SourceError(f"{path}: {name} is also in {where[name].name}. Which of the two is the model's?")
            where[name], tensors[name] = path, tensor
    for index in (INDEX, BIN_INDEX):
        path = Path(directory) / index
        if len(files) > 1 and path.is_file() and files[0].suffix == Path(index.removesuffix(".index.json")).suffix:
            _check_index(path, where)
    return tensors, files


def _check_index(index: Path, where: dict[str, Path]) -> None:
    entries = _weight_map(index)
    absent = [name for name in entries if name not in where]
    if absent:
        refuse(SourceError(
            f"{index}: names {some(absent)}, which no shard holds (the file it gives for the first is "
            f"{entries[absent[0]]}). Shards and index are not from the same checkpoint."
        ))  # fmt: skip
    moved = [name for name, file in entries.items() if name in where and where[name].name != file]
    if moved:
        raise SourceError(
            f"{index}: says that {moved[0]} is in {entries[moved[0]]}, but it is in {where[moved[0]].name}. "
            "Shards and index are not from the same checkpoint."
        )
    extra = [name for name in where if name not in entries]
    if extra:
        raise SourceError(
            f"{index}: does not name {some(extra)}, which {where[extra[0]].name} holds. Shards and index are not from "
            "the same checkpoint."
        )


def _read_bin(path: Path) -> dict[str, LazyTensor]:
    """A state dict saved by torch.save, possibly inside {'state_dict': ...}, 'module' or 'model'."""
    data = torchzip.read(str(path))
    for key in ("state_dict", "module", "model"):
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
    if not isinstance(data, dict):
        raise SourceError(f"{path}: holds a {type(data).__name__}, expected a dict of tensors. Save the state_dict().")
    other = [str(name) for name, value in data.items() if not isinstance(value, LazyTensor)]
    if other:
        raise SourceError(f"{path}: {some(other)} is not a tensor, expected a dict of tensors only. Save those alone.")
    return {str(name): value for name, value in data.items()}
