"""Directories of Megatron's `torch` format: tracker file, iterations, one directory per rank. Names and files only.

Source: Megatron-LM `megatron/training/checkpointing.py` (get_checkpoint_name, read_metadata) at core_v0.13.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptconv import dtypes
from ckptconv.containers import dcp, torchzip
from ckptconv.errors import SourceError, UsageError, refuse, some
from ckptconv.files import refuse_partial

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
#: What releases of 2022 called it beside their distributed optimizer, whose OPTIMIZER lay in directories of its own.
OLD_FILE, OPTIMIZER = "model_rng.pt", "optim.pt"
_ITERATION = re.compile(r"[0-9]{1,18}|release")


#: (tp rank, stage, ep rank)
Rank = tuple[int, int, int]


def directory_name(rank: Rank, pp: int, ep: int) -> str:
    """`mp_rank_01`, `mp_rank_01_003` with pipeline stages, and one number more with expert parallel ranks."""
    tp_rank, stage, ep_rank = rank
    return f"mp_rank_{tp_rank:02d}" + (f"_{stage:03d}" if pp > 1 else "") + (f"_{ep_rank:03d}" if ep > 1 else "")


def parse_name(name: str) -> tuple[int, ...] | None:
    """The numbers of a rank directory's name (tp, then pp or ep, then ep), or None for another name."""
    match = re.fullmatch(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?", name)
    return tuple(int(n) for n in match.groups() if n is not None) if match else None


def model_file(directory: Path) -> Path | None:
    """The file with the model in a rank's directory, there or not; None where the directory is an optimizer's."""
    names = {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()
    if FILE not in names and OLD_FILE in names:
        return directory / OLD_FILE
    return None if FILE not in names and OPTIMIZER in names else directory / FILE


def iteration_name(iteration: int | str) -> str:
    """`iter_0000001`, or `release`."""
    return iteration if isinstance(iteration, str) else f"iter_{iteration:07d}"


def iterations(top: Path) -> list[int]:
    """The iterations that lie in a directory, in order; none in a file."""
    found = [path.name for path in top.glob("iter_*") if re.fullmatch(r"iter_\d{7,18}", path.name) and path.is_dir()]
    return sorted(int(name[5:]) for name in found)


def iteration(text: str) -> int | str:
    """The value of an --iteration flag: a number, or `release`. Raises UsageError."""
    if not _ITERATION.fullmatch(text):
        raise UsageError(f"--iteration {text}: expected a number or 'release'.")
    return text if text == "release" else int(text)


def find_iteration(top: Path, wanted: int | str | None) -> tuple[Path, int]:
    """(directory with the ranks, iteration). Raises SourceError."""
    refuse_partial(top)
    if dcp.is_one(top) or any(parse_name(entry.name) for entry in top.iterdir()):
        match = re.fullmatch(r"iter_(\d+)", top.name)
        return top, int(match[1]) if match else 1
    tracked = wanted is None
    if wanted is None:
        try:
            said = (top / TRACKER).read_text(errors="replace").strip()
        except OSError as error:
            raise SourceError(
                f"{top}: has neither mp_rank directories nor a readable {TRACKER}. Give --iteration, or the directory "
                "that holds iter_*."
            ) from error
        if not _ITERATION.fullmatch(said):
            raise SourceError(f"{top / TRACKER}: says {said[:40]!r}, expected a number or 'release'. Give --iteration.")
        wanted = said
    wanted = iteration(str(wanted))  # text, too, where another plugin has declared the same flag
    directory = top / iteration_name(wanted)
    if not directory.is_dir():
        there = sorted(e.name for e in top.iterdir() if e.name.startswith("iter_") or e.name == "release")
        said_by = f" ({TRACKER} says so)" if tracked else ""
        raise SourceError(
            f"{directory}: does not exist{said_by}; there is {some(there) or 'no other'}. "
            "Give --iteration."
        )
    return directory, max(wanted, 1) if isinstance(wanted, int) else 1


def rank_files(directory: Path, needs_args: bool = True) -> tuple[dict[Rank, Path], dict[str, Any]]:
    """(rank -> file, args of rank 0). Raises SourceError when the ranks are not a full grid.

    Without `needs_args` the args are empty where a file has none.
    """
    numbers = {}
    for entry in directory.iterdir():
        parsed = parse_name(entry.name)
        if parsed is not None and (file := model_file(entry)) is not None:
            numbers[parsed] = file
    if not numbers:
        dist = "it is in the torch_dist format (--loader megatron_dist)"
        what = dist if dcp.is_one(directory) else "is the path right?"
        raise SourceError(f"{directory}: has no mp_rank_* directories; {what}.")
    lengths = {len(n) for n in numbers}
    if len(lengths) > 1:
        there = some(path.parent.name for path in numbers.values())
        raise SourceError(f"{directory}: mixes rank directories of several layouts ({there}). Keep those of one save.")
    missing = [path for path in numbers.values() if not path.is_file()]
    if missing:
        raise SourceError(
            f"{missing[0]}: missing. {len(missing)} of {len(numbers)} ranks have no {FILE}. Copy the missing files."
        )
    first = numbers[min(numbers)]
    arguments = _arguments(first, needs_args)
    # With two numbers the second is a stage or an expert rank: only the args tell.
    experts = arguments.get("expert_model_parallel_size")
    experts = experts if isinstance(experts, int) and not isinstance(experts, bool) and experts > 0 else 1
    stages = arguments.get("pipeline_model_parallel_size")
    lone = lengths == {2} and experts > 1
    if lone and isinstance(stages, int) and stages > 1:
        raise SourceError(
            f"{first}: its args say {stages} pipeline stages and expert parallel size {experts}, but its directory has "
            "one number for both. Was it renamed?"
        )
    ranks: dict[Rank, Path] = {}
    for n, path in numbers.items():
        n = (*n, 0, 0)[:3] if not lone else (n[0], 0, n[1])
        ranks[n[0], n[1], n[2]] = path
    tp, pp, ep = (1 + max(rank[axis] for rank in ranks) for axis in range(3))
    if isinstance(stages, int) and not pp <= stages <= 10**4:
        raise SourceError(f"{first}: its args say {stages} pipeline stages, but there are directories of {pp}.")
    pp = stages if isinstance(stages, int) else pp
    if not ep <= experts <= max(ep, 10**4 // pp):
        raise SourceError(
            f"{first}: its args say expert parallel size {experts}, but there are directories of {ep} such ranks."
        )
    ep = experts
    absent = [
        directory_name((t, p, e), pp, ep)
        for p in range(pp) for t in range(tp) for e in range(ep) if (t, p, e) not in ranks
    ]  # fmt: skip
    if absent:
        grid = f"{tp} x {pp}" + (f" x {ep}" if ep > 1 else "")
        refuse(
            SourceError(f"{directory}: lacks {some(absent)} of {grid} ranks. Copy the missing rank directories.")
        )
    return dict(sorted(ranks.items())), arguments


def _arguments(path: Path, needed: bool) -> dict[str, Any]:
    root = torchzip.read(str(path))
    if not needed and not (isinstance(root, dict) and root.get("args")):
        return {}
    return arguments(root, str(path))


def arguments(root: object, where: str) -> dict[str, Any]:
    """The trainer's args among what it saved. Raises SourceError, naming `where`, when there are none."""
    found = root.get("args") if isinstance(root, Mapping) else None
    if found is None or not hasattr(found, "__dict__"):
        raise SourceError(
            f"{where}: has no args, so the sizes of the model are unknown. Did Megatron-LM's save_checkpoint write it?"
        )
    return {
        name: dtypes.parse(value, where) if name == "params_dtype" else value for name, value in vars(found).items()
    }
