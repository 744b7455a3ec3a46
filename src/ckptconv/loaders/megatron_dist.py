"""Megatron-Core checkpoints in the `torch_dist` format (and `fsdp_dtensor`, `torch_dcp`), saved at any layout.

Tensors are the whole model's, so there are no ranks to join: translated to the names of a rank file they are read like
the one file of an unsharded checkpoint. Optimizer state, extra states and the trainer's own objects are left behind.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptconv import companions, stream
from ckptconv.containers import dcp, rankdir, torchzip
from ckptconv.errors import SourceError, some
from ckptconv.formats import mcore, mcore_dist
from ckptconv.formats.table import Row
from ckptconv.lazy import Assembly, LazyTensor, Piece
from ckptconv.loaders import _megatron
from ckptconv.loaders._megatron import NOT_WEIGHTS, Found
from ckptconv.spec import ModelSpec

COMMON, COMMON_KEY = "common.pt", "common_state/shard_0_1"
#: Objects of a plain distributed checkpoint that tell what `common.pt` tells.
_TOLD = ("args", "iteration", "checkpoint_version")


def recognises(load_dir: str) -> str | None:
    """Why a directory looks like ours, or None."""
    return _megatron.recognised(load_dir, "megatron_dist")


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this loader."""
    _megatron.add_arguments(parser, "megatron_dist")


def load_checkpoint(queue: Any, args: Namespace) -> None:
    """Send the model in args.load_dir. Raises SourceError."""
    top = Path(args.load_dir)
    directory, iteration = rankdir.find_iteration(top, args.iteration)
    if not dcp.is_one(directory):
        kind = _megatron.kind(top, args.iteration)
        raise SourceError(
            f"{directory}: is no distributed checkpoint: it has neither {dcp.METADATA} nor {dcp.FINISHED}. "
            + (f"Give --loader {kind}." if kind else "Is the path right?")
        )
    stream.send(queue, _megatron.Source(args, "megatron_dist", top, directory, iteration, read(directory)))


def read(directory: Path) -> Found:
    """The tensors of a directory by the names of a rank file, not read. Raises SourceError for all that is unknown."""
    backend = _backend(directory)
    stored = dcp.read(directory)
    if backend is None and COMMON_KEY in stored.objects:
        raise _unfinished(directory)
    ignored: dict[str, str] = {}
    unknown = [key for key in stored.objects if not _ignored(key, ignored)]
    keys = [key for key in stored.tensors if not _ignored(key, ignored)]
    prefix = mcore_dist.prefix_of(keys, str(directory))
    unknown += [key for key in keys if not key.startswith(prefix)]
    if unknown:
        raise SourceError(f"{directory}: holds {some(unknown)}, which no rule knows. They would be lost.")
    arguments = rankdir.arguments(_common(directory, stored, ignored), str(directory))
    names = {key: key.removeprefix(prefix) for key in keys}
    for mark, what in mcore.FOREIGN.items():
        foreign = next((key for key in keys if mark in names[key]), None)
        if foreign:
            raise SourceError(f"{directory}: holds {foreign}: {what}, which this loader does not read.")
    if backend is None:
        _check_unsharded(directory, arguments, names.values())
    tensors = _tensors(directory, {name: stored.tensors[key] for key, name in names.items()})
    rank = (0, 0, 0)
    found = Found({rank: directory / dcp.METADATA}, arguments, {rank: tensors}, ignored)
    found.files = [path for path in (directory / COMMON, *stored.files) if path.is_file()]
    found.table = lambda spec: _table(list(tensors), spec)
    return found


def _table(names: Sequence[str], spec: ModelSpec) -> Sequence[Row]:
    """The rows: with norms behind the sums only the local spec has the names of linears for them."""
    found = mcore.dialect(list(names))
    if spec.norms == "post" and found.implementation != "local":
        return mcore_dist.table("local", spec)
    return found.table


def _backend(directory: Path) -> str | None:
    """What `metadata.json` says; None for the formats that have none. Raises SourceError."""
    path = directory / dcp.FINISHED
    if not path.is_file():
        if (directory / COMMON).is_file():
            raise _unfinished(directory)
        return None
    said = companions.read_json(path).get("sharded_backend")
    if said == "torch_dist":
        return str(said)
    hint = " Megatron-LM before 0.16 reads it and can save it again with --ckpt-format torch_dist."
    raise SourceError(f"{path}: says sharded_backend {said!r}, expected torch_dist.{hint if said == 'zarr' else ''}")


def _unfinished(directory: Path) -> SourceError:
    return SourceError(
        f"{directory}: has no {dcp.FINISHED}, which Megatron writes last: this save was not completed. "
        "Take an earlier iteration."
    )


def _common(directory: Path, stored: dcp.Checkpoint, ignored: dict[str, str]) -> Mapping[str, Any]:
    """What is not a tensor of all ranks: the trainer's args among it.

    It is in common.pt, from core_v0.19 on in an object of the checkpoint, and in plain checkpoints in several.
    """
    if (directory / COMMON).is_file():
        path, root = str(directory / COMMON), torchzip.read(directory / COMMON)
    elif COMMON_KEY in stored.objects:
        path, root = f"{directory}: {COMMON_KEY}", stored.object(COMMON_KEY)
        root = root[0] if isinstance(root, list) and len(root) == 1 else root
    else:
        return {key: stored.object(key) for key in _TOLD if key in stored.objects}
    if not isinstance(root, dict):
        raise SourceError(f"{path}: holds a {type(root).__name__}, expected a dict with args.")
    unknown = []
    for key, value in root.items():
        reason = mcore_dist.ignored(str(key), NOT_WEIGHTS)
        if reason is None and _holds_tensor(value):
            unknown.append(str(key))
        else:
            ignored[str(key)] = reason or "trainer state without tensors"
    if unknown:
        raise SourceError(f"{path}: holds tensors in {some(unknown)}, which no rule knows. They would be lost.")
    return root


def _holds_tensor(value: object) -> bool:
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, LazyTensor):
            return True
        if id(one) not in seen:
            seen.add(id(one))
            waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list | tuple) else ()
    return False


def _ignored(key: str, ignored: dict[str, str]) -> bool:
    """Whether a rule leaves a key behind; which one is noted."""
    module = key.partition("/shard_")[0]
    rule = next((rule for rule in mcore.IGNORE if module.endswith(rule.suffix)), None)
    if rule:
        ignored["*" + rule.suffix] = rule.reason
        return True
    reason = "read" if key == COMMON_KEY else mcore_dist.ignored(key, NOT_WEIGHTS)
    if reason:
        ignored[mcore_dist.head(key) + "*" * (mcore_dist.head(key) != key)] = reason
    return reason is not None


def _check_unsharded(directory: Path, arguments: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise SourceError where tensor ranks may have overwritten each other, as torch_dcp knows none of them."""
    tp = arguments.get("tensor_model_parallel_size")
    if isinstance(tp, int) and tp > 1 and not any(name.endswith("linear_fc1.weight_w") for name in names):
        raise SourceError(
            f"{directory}: a plain distributed checkpoint of tensor parallel size {tp}: whether its tensors are whole "
            "cannot be told. Save it again with --ckpt-format torch_dist."
        )


def _tensors(directory: Path, stored: Mapping[str, dcp.Tensor]) -> dict[str, LazyTensor]:
    """The tensors of a rank file. Raises SourceError for a name with two tensors or half of one."""
    found: dict[str, dict[int | None, LazyTensor]] = {}
    for key, tensor in stored.items():
        for part in mcore_dist.parts(key, tensor.shape, str(directory)):
            there = found.setdefault(part.name, {})
            if part.half in there or (there and (part.half is None or None in there)):
                raise SourceError(f"{directory}: holds {part.name} under two keys. Which one counts cannot be told.")
            there[part.half] = tensor.at(part.index)
    renamed = mcore_dist.unfused(found)
    return {renamed.get(name, name): _whole(directory, name, there) for name, there in found.items()}


def _whole(directory: Path, name: str, there: Mapping[int | None, LazyTensor]) -> LazyTensor:
    """A tensor, or [gate; up] of both."""
    if None in there:
        return there[None]
    gate, up = there.get(0), there.get(1)
    if gate is None or up is None or (gate.dtype, gate.shape) != (up.dtype, up.shape):
        raise SourceError(f"{directory}: of {name}_w and {name}_v one is missing or unlike the other.")
    pieces = (Piece(0, 0, gate.rows, gate.cols, gate, 0, 0), Piece(gate.rows, 0, up.rows, up.cols, up, 0, 0))
    return Assembly(gate.dtype, (2 * gate.shape[0], *gate.shape[1:]), pieces)
