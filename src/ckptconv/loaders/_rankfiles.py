"""Rank files of Megatron's `torch` format: what is in all of them, for every loader of such files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckptconv.containers import rankdir, torchzip
from ckptconv.errors import SourceError, some
from ckptconv.formats import mcore
from ckptconv.lazy import LazyTensor
from ckptconv.loaders._megatron import NOT_WEIGHTS, Found
from ckptconv.sharding import slot_name

#: (file, its `model` dict, what was found so far, virtual stage) -> tensors by slot
Tensors = Callable[[Path, dict[Any, Any], Found, int | None], dict[str, LazyTensor]]


def read(
    directory: Path, paths: dict[rankdir.Rank, Path], arguments: dict[str, Any], tensors: Tensors | None = None
) -> Found:
    """The tensors of all rank files, not read. Raises SourceError: foreign or unknown keys, sizes that contradict.

    tensors: what makes them of one `model` dict, where that is not megatron-core's.
    """
    found, tensors = Found(paths, arguments, {}), tensors or core_tensors
    _check_sizes(directory, found)
    roots = {rank: _root(path) for rank, path in paths.items()}
    found.vpp = max(_virtual_stages(root) for root in roots.values())
    for rank, path in paths.items():
        root = roots[rank]
        models = _models(path, root, found.vpp)
        unknown = [str(key) for key in root if key not in models.values() and key not in NOT_WEIGHTS]
        if unknown:
            raise SourceError(f"{path}: has {some(unknown)} beside the model, which no rule knows. They would be lost.")
        found.ignored |= {key: NOT_WEIGHTS[key] for key in root if key in NOT_WEIGHTS}
        others = {entry.name for entry in path.parent.glob("*optim*.pt")} - {path.name}
        found.ignored |= dict.fromkeys(others, NOT_WEIGHTS["optimizer"])
        found.tensors[rank] = {}
        for chunk, key in models.items():
            found.tensors[rank] |= tensors(path, root[key], found, chunk)
    return found


def _root(path: Path) -> Any:
    """What a file holds, less what is not used of it: of an optimizer not even the names are kept."""
    root = torchzip.read(str(path))
    return {key: None if key in NOT_WEIGHTS else root[key] for key in root} if isinstance(root, dict) else root


def _virtual_stages(root: Any) -> int:
    """How many there are as far as one file tells: a stage without layers may lack its key."""
    keys = map(str, root) if isinstance(root, dict) else ()
    return 1 + max((int(key[5:]) for key in keys if re.fullmatch(r"model\d{1,4}", key)), default=0)


def _models(path: Path, root: Any, vpp: int) -> dict[int | None, str]:
    """Virtual stage (None where there are none) -> key of its tensors."""
    if not isinstance(root, dict):
        raise SourceError(f"{path}: holds a {type(root).__name__}, expected a dict with a 'model'.")
    models: dict[int | None, str] = {None: "model"}
    if vpp > 1:
        models = {number: f"model{number}" for number in range(vpp) if f"model{number}" in root}
    for key in models.values():
        if not isinstance(root.get(key), dict):
            raise SourceError(f"{path}: has no {key!r}; it has {some(str(key) for key in root)}.")
    return models


def core_tensors(path: Path, model: dict[Any, Any], found: Found, chunk: int | None) -> dict[str, LazyTensor]:
    """The tensors of a virtual stage by slot."""
    names = [str(name) for name in model]
    for mark, what in mcore.FOREIGN.items():
        foreign = next((name for name in names if mark in name), None)
        if foreign:
            raise SourceError(f"{path}: holds {foreign}: {what}, which this loader does not read.")
    tensors: dict[str, LazyTensor] = {}
    for name, value in zip(names, model.values(), strict=True):
        name = name.removeprefix("module.")
        rule = next((rule for rule in mcore.IGNORE if name.endswith(rule.suffix)), None)
        if rule:
            found.ignored["*" + rule.suffix] = rule.reason
        elif isinstance(value, LazyTensor):
            parts = mcore.unpacked(name, value, _local_experts(found), str(path))
            tensors |= {slot_name(chunk, part): tensor for part, tensor in parts.items()}
        else:
            raise SourceError(f"{path}: {name} is a {type(value).__name__}, expected a tensor. Is it a model's file?")
    return tensors


def _local_experts(found: Found) -> int:
    """Experts of one rank; 0 where the args do not say."""
    experts, ep = found.arguments.get("num_experts"), found.sizes[2]
    return experts // ep if isinstance(experts, int) and experts % ep == 0 else 0


def _check_sizes(directory: Path, found: Found) -> None:
    """Raise SourceError when the directories are not those the args speak of."""
    tp, pp, ep = found.sizes
    for name, said in (("tensor_model_parallel_size", tp), ("pipeline_model_parallel_size", pp),
                       ("expert_model_parallel_size", ep)):  # fmt: skip
        value = found.arguments.get(name)
        if isinstance(value, int) and value != said:
            raise SourceError(
                f"{directory}: the args say {name} {value}, but there are {said} such ranks "
                f"({some(str(p.parent.name) for p in found.paths.values())}). Are rank directories missing?"
            )
    etp = found.arguments.get("expert_tensor_parallel_size")
    if found.arguments.get("num_experts") and etp not in (None, tp):
        raise SourceError(
            f"{directory}: the args say expert_tensor_parallel_size {etp} and tensor_model_parallel_size "
            f"{tp}: in the torch format ranks of the one overwrite files of the other, so experts are lost. Save "
            "again in the torch_dist format."
        )
