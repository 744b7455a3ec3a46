"""What MindSpore and MindSpore Transformers save: a file, a merged folder with its map, or a sharded Checkpoint 2.0.

Names and files only; what a name means is formats/mindspore.py. Source: MindSpore 2.10 `unified_safetensors` (the
merged folder), mindformers r1.8.0 `checkpoint/metadata.py`, `reshard.py` and `utils.py` (Checkpoint 2.0).
"""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any

from ckptconv.companions import read_json
from ckptconv.containers import hfdir, msckpt, safetensors
from ckptconv.errors import SourceError, some
from ckptconv.files import refuse_partial
from ckptconv.lazy import Assembly, LazyTensor, Piece, matrix

MAP = "param_name_map.json"
#: Of a merged folder: what is in a rank's file and in no strategy (step counters), never weights.
HYPER = "hyper_param.safetensors"
TRACKER, METADATA = "latest_checkpointed_iteration.txt", "metadata.json"
_ITERATION = re.compile(r"iteration_(\d{8,})")
_RANK = re.compile(r"rank_(\d+)")
_MERGE = (
    "It is one rank's part of a distributed model: merge the ranks with mindformers' "
    "toolkit/safetensors/unified_safetensors.py (mindspore.unified_safetensors), which needs the strategy files, and "
    "convert its output folder."
)


def recognises(place: str) -> str | None:
    """Why a file or folder looks like MindSpore's, or None. Cheap: reads one header at most."""
    path = Path(place)
    if path.is_dir():
        if (path / MAP).is_file():
            return f"it has {MAP}"
        if _iteration(path) is not None:
            return "it has iteration_* of a Checkpoint 2.0"
        ranks = (entry for entry in path.iterdir() if _RANK.fullmatch(entry.name))
        if any(any(entry.glob(kind)) for entry in ranks for kind in ("*.safetensors", "*.ckpt")):
            return "it has rank_* folders"
        first = next((p for kind in ("*.safetensors", "*.ckpt") for p in sorted(path.glob(kind))), None)
    else:
        first = path if path.suffix in (".safetensors", ".ckpt") else None
    if first is None or not first.is_file():
        return None
    try:
        if first.suffix == ".ckpt":
            return f"{first.name} holds MindSpore's messages" if msckpt.looks(first) else None
        tensors, metadata = safetensors.read(first)
    except SourceError:
        return None
    # Its tools write Hugging Face's names under their own format, too.
    own = metadata.get("format") == "ms" and not any(name.startswith("model.embed_tokens.") for name in tensors)
    return f"{first.name} is of the format ms" if own else None


def read(place: str) -> tuple[dict[str, LazyTensor], list[Path]]:
    """(tensors by name, files). Raises SourceError: rank files without what is needed to merge them, damage, gaps."""
    refuse_partial(place)
    path = Path(place)
    if path.is_file():
        return _read_all([path])
    iteration = _iteration(path)
    folder = iteration or path
    if (folder / METADATA).is_file():
        return _merged(folder)
    if (path / MAP).is_file():
        return _mapped(path)
    if iteration is None and (path / hfdir.INDEX).is_file():
        return hfdir.read(place)
    ranks = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and _RANK.fullmatch(entry.name))
    if ranks:
        raise SourceError(f"{folder}: holds {some(ranks)}, a checkpoint of several ranks. {_MERGE}")
    files = sorted(p for kind in ("*.safetensors", "*.ckpt") for p in folder.glob(kind) if p.name != HYPER)
    files = [p for p in files if not _is_optimizer(p.name)]
    if not files:
        raise SourceError(f"{folder}: has no {MAP}, *.safetensors or *.ckpt. Is the path right?")
    if len({p.suffix for p in files}) > 1:
        raise SourceError(f"{folder}: has .safetensors and .ckpt files ({some(p.name for p in files)}). Give one file.")
    return _read_all(files)


def _is_optimizer(name: str) -> bool:
    """`[PREFIX-]opt-0000000-0000008.safetensors` of a Checkpoint 2.0."""
    return re.fullmatch(r"(.+-)?opt-\d{7}-\d{7}\.safetensors", name) is not None


def _iteration(path: Path) -> Path | None:
    """The folder of one iteration of a Checkpoint 2.0: the one itself, that of the tracker, or the only one."""
    if _ITERATION.fullmatch(path.name):
        return path
    there = {int(m[1]): entry for entry in path.iterdir() if (m := _ITERATION.fullmatch(entry.name))}
    if not there:
        return None
    tracker = path / TRACKER
    said = tracker.read_text(errors="replace").strip() if tracker.is_file() else str(max(there))
    if not said.isdecimal() or int(said) not in there:
        raise SourceError(f"{tracker}: says {said[:40]!r}, but there are {some(p.name for p in there.values())}.")
    return there[int(said)]


def _read_file(path: Path) -> dict[str, LazyTensor]:
    if path.suffix == ".ckpt":
        return msckpt.read(path)
    return dict(safetensors.read(path)[0])


def _read_all(files: list[Path]) -> tuple[dict[str, LazyTensor], list[Path]]:
    """Files that hold whole tensors."""
    tensors: dict[str, LazyTensor] = {}
    where: dict[str, Path] = {}
    for path in files:
        if _RANK.search(path.stem) or _sharded(path):
            raise SourceError(f"{path}: {_MERGE} A file saved by a single device is whole: rename it.")
        for name, tensor in _read_file(path).items():
            if name in where:
                raise SourceError(f"{path}: {name} is also in {where[name].name}. Which of the two is the model's?")
            where[name], tensors[name] = path, tensor
    return tensors, files


def _sharded(path: Path) -> bool:
    """Whether a file's name says that it is one of several of a Checkpoint 2.0."""
    match = re.search(r"model-\d{7}-(\d{7})\.safetensors$", path.name)
    return match is not None and int(match[1]) > 1


def _mapped(folder: Path) -> tuple[dict[str, LazyTensor], list[Path]]:
    """A merged folder: the map says which file holds which tensor; files it does not name are not the model's."""
    path = folder / MAP
    data = read_json(path)
    entries = data.get("weight_map", data)
    if not isinstance(entries, dict) or not entries:
        raise SourceError(f"{path}: has no weight_map. Copy it again.")
    for name, file in entries.items():
        if not isinstance(file, str) or "/" in file or file in ("", ".", ".."):
            raise SourceError(f"{path}: says that {name} is in {file!r}, expected a file name of this directory.")
    files = [folder / name for name in sorted(set(entries.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise SourceError(f"{path}: names {some(missing)}, which are not in the directory. Copy the missing files.")
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        own = _read_file(file)
        wanted = [name for name, place in entries.items() if place == file.name]
        absent = [name for name in wanted if name not in own]
        if absent:
            raise SourceError(
                f"{path}: says that {some(absent)} is in {file.name}, which does not hold it. "
                "Are both of one checkpoint?"
            )
        extra = [name for name in own if name not in entries]
        if extra:
            raise SourceError(
                f"{path}: does not name {some(extra)}, which {file.name} holds. Are both of one checkpoint?"
            )
        tensors |= {name: own[name] for name in wanted}
    return tensors, files


def _merged(folder: Path) -> tuple[dict[str, LazyTensor], list[Path]]:
    """Checkpoint 2.0: slices of tensors in the files of ranks, put together as metadata.json says."""
    path = folder / METADATA
    data = read_json(path)
    described, stored = data.get("state_dict_metadata"), data.get("storage_data")
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise SourceError(f"{path}: has no state_dict_metadata and storage_data of a Checkpoint 2.0. Copy it again.")
    opened: dict[str, dict[str, LazyTensor]] = {}

    def file_of(name: str, number: int) -> str:
        place = stored.get(str((name, (number,))))
        file = place[0].get("file_name") if isinstance(place, list) and place and isinstance(place[0], dict) else None
        if not isinstance(file, str) or "/" in file:
            raise SourceError(f"{path}: storage_data does not say where slice {number} of {name} is. Copy it again.")
        return file if file.endswith(".safetensors") else f"{file}.safetensors"

    def held(name: str, number: int) -> LazyTensor:
        file = file_of(name, number)
        if file not in opened:
            opened[file] = _read_file(folder / file)
        if name not in opened[file]:
            raise SourceError(
                f"{folder / file}: lacks {name}, whose slice {number} {METADATA} puts there. "
                "Are both of one save?"
            )
        return opened[file][name]

    tensors = {}
    for name, entry in described.items():
        try:
            if not _is_optimizer(file_of(name, int(entry["chunk"][0]["global_offset"][0]))):
                tensors[name] = _whole(name, entry, held)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise SourceError(
                f"{path}: cannot be understood at {name} ({type(error).__name__}: {error}). Copy it again."
            ) from error
    return tensors, [path, *(folder / file for file in sorted(opened))]


def _whole(name: str, entry: dict[str, Any], held: Any) -> LazyTensor:
    """A tensor of its slices. `global_offset` is a slice's number, counted over the fragments of all axes."""
    shape = tuple(int(n) for n in entry["global_shape"])
    cuts = tuple(int(n) for n in entry["axis_fragmentations"])
    layout = entry.get("layout")
    if len(cuts) != len(shape) or any(cut < 1 or size % cut for size, cut in zip(shape, cuts, strict=True)):
        raise ValueError(f"axis_fragmentations {list(cuts)} of the shape {list(shape)}")
    if any(cut > 1 for cut in cuts[1:-1]) or (isinstance(layout, dict) and layout.get("interleaved_parallel") is True):
        raise ValueError("slices of inner axes or in turn, which are not read: merge with mindformers' tools")
    local = tuple(size // cut for size, cut in zip(shape, cuts, strict=True))
    there = {int(chunk["global_offset"][0]): tuple(chunk["local_shape"]) for chunk in entry["chunk"]}
    if len(there) != prod(cuts) or sorted(there) != list(range(len(there))) or set(there.values()) != {local}:
        raise ValueError(f"chunks {some(map(str, there.items()))} where {prod(cuts)} of {list(local)} are needed")
    parts = [held(name, number) for number in range(prod(cuts))]
    for number, part in enumerate(parts):
        if part.shape != local:
            raise ValueError(f"slice {number} is {list(part.shape)}, expected {list(local)}")
    if len(parts) == 1:
        one: LazyTensor = parts[0]
        return one
    across = cuts[-1] if len(cuts) > 1 else 1
    rows, cols = matrix(local)
    pieces = [Piece(n // across * rows, n % across * cols, rows, cols, part, 0, 0) for n, part in enumerate(parts)]
    return Assembly(parts[0].dtype, shape, tuple(pieces))
