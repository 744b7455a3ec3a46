"""Many iterations of one training run: each is converted by one process, and is complete or absent in the target.

An iteration is collected in a folder of its own and moved to its place when it is whole, so what lies there need
not be done again. Processes of a job take the next one when they have done theirs; rank 0 writes Megatron's tracker at
the end.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ckptconv import companions
from ckptconv.containers import rankdir
from ckptconv.conversion import Report
from ckptconv.errors import SourceError, TargetError, UsageError, some, why
from ckptconv.files import PARTIAL
from ckptconv.team import Team

log = logging.getLogger("ckptconv")

#: Where unfinished iterations are collected, and what says with which flags.
WORK, FLAGS = ".ckptconv-iterations", "flags.json"
#: Directories of a training run whose iterations are directories: those of transformers' Trainer and of NxD Training.
_FOLDERS = (re.compile(r"checkpoint-(\d{1,18})"), re.compile(r"(?:.*[-_])?step[=_-](\d{1,18})(?:\D.*)?"))

#: Converts one: (source, iteration, folder to write into).
Convert = Callable[[str, int, str], Report]


def run(args: Namespace, words: Sequence[str], convert: Convert, team: Team | None) -> Report:
    """Convert what `args.iterations` names. Raises CkptconvError; damaged iterations are left out and told of last."""
    began, top = time.monotonic(), Path(args.save_dir)
    there = found(Path(args.load_dir))
    wanted = chosen(args.iterations, there, args.load_dir)
    if args.iterations == "all" and (late := [str(number) for number in wanted if number > _saved(args.load_dir)]):
        wanted = wanted[: -len(late)]
        log.warning("%s may still be written (the tracker does not name it): left out", ", ".join(late))
    if os.path.exists(top) and os.path.samefile(args.load_dir, top):
        raise UsageError(f"--save-dir {top} is the --load-dir: choose another directory.")
    if team is None or team.rank == 0:
        _prepare(top, _said(words), args.overwrite)
        if team:
            team.say("prepared")
    elif team:
        team.hear("prepared")
    reports, skipped, damaged = list[Report](), 0, dict[int, str]()
    for number in _turns(wanted, team):
        place = top / rankdir.iteration_name(number)
        if (place / companions.PROVENANCE).is_file() and not args.overwrite:
            skipped += 1
            continue
        work = top / WORK / place.name
        if work.is_dir() and not (work / PARTIAL).is_dir():
            shutil.rmtree(work)  # complete, but not moved
        try:
            reports.append(convert(str(there[number]), number, str(work)))
        except SourceError as error:
            damaged[number] = str(error)
            log.error("%s: %s", place.name, error)
            continue
        _move(work, top, place.name)
        log.info("%s is complete", place)
    if team:
        skipped, damaged = _together(team, skipped, damaged)
    if team is None or team.rank == 0:
        _track(top)
        log.info("%d iterations: %d converted, %d were there, %d cannot be read", len(wanted),
                 len(wanted) - skipped - len(damaged), skipped, len(damaged))  # fmt: skip
    if damaged:
        names = [f"{rankdir.iteration_name(number)}: {text}" for number, text in sorted(damaged.items())]
        raise SourceError("\n".join([f"{len(damaged)} of {len(wanted)} iterations are not converted:", *names]))
    peak = max((report.peak_memory for report in reports), default=0)
    return Report(time.monotonic() - began, sum(report.bytes for report in reports), peak, {"skipped": skipped})


def found(load_dir: Path) -> dict[int, Path]:
    """Iteration -> what --load-dir is for it. Raises SourceError when there are none."""
    if not load_dir.is_dir():
        raise UsageError(f"--load-dir {load_dir}: is no directory, expected one of a training run.")
    if numbers := rankdir.iterations(load_dir):
        return dict.fromkeys(numbers, load_dir)  # their loaders find them by number
    names = sorted(os.listdir(load_dir))
    folders: dict[int, Path] = {}
    for name in names:
        match = next((match for pattern in _FOLDERS if (match := pattern.fullmatch(name))), None)
        if match is None or not (load_dir / name).is_dir():
            continue
        if int(match[1]) in folders:
            raise SourceError(f"{load_dir}: {folders[int(match[1])].name} and {name} are both of iteration {match[1]}.")
        folders[int(match[1])] = load_dir / name
    if not folders:
        raise SourceError(
            f"{load_dir}: holds no iterations: expected directories iter_0001000 (Megatron), checkpoint-1000 (Hugging "
            f"Face) or *step=1000* (NxD Training), found {some(names) or 'nothing'}. Without --iterations one "
            "checkpoint is converted."
        )
    return dict(sorted(folders.items()))


def chosen(text: str, there: dict[int, Path], where: str) -> list[int]:
    """The iterations that --iterations names. Raises UsageError."""
    if text == "all":
        return list(there)
    try:
        wanted = sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise UsageError(f"--iterations {text}: expected all, or numbers such as 1000,2000.") from None
    missing = [str(number) for number in wanted if number not in there]
    if missing:
        raise UsageError(f"--iterations {text}: {where} has no {', '.join(missing)}; it has {_listed(there)}.")
    return wanted


def _saved(load_dir: str) -> float:
    """The last iteration that a trainer has said to be complete; behind it one may be on its way."""
    try:
        return int((Path(load_dir) / rankdir.TRACKER).read_text())
    except (OSError, ValueError):
        return math.inf


def _listed(there: dict[int, Path]) -> str:
    numbers = [str(number) for number in there]
    return ", ".join(numbers if len(numbers) < 9 else [*numbers[:4], "...", *numbers[-4:]])


def _turns(wanted: list[int], team: Team | None) -> Iterator[int]:
    """The iterations of this process, each as soon as it is ready for one."""
    counter = itertools.count()
    while (n := team.take("iterations") if team else next(counter)) < len(wanted):
        if team:
            team.check()
        yield wanted[n]


def _together(team: Team, skipped: int, damaged: dict[int, str]) -> tuple[int, dict[int, str]]:
    """What all processes have skipped and left out, when they are done."""
    team.say(f"done/{team.rank}", json.dumps([skipped, damaged]))
    said = [json.loads(team.hear(f"done/{rank}")) for rank in range(team.ranks)]
    return sum(n for n, _ in said), {int(number): text for _, found in said for number, text in found.items()}


#: Flags that make no other output.
_NEUTRAL = {"--resume": 0, "--overwrite": 0, "--verify": 0, "-v": 0, "--verbose": 0, "--no-progress": 0, "--threads": 1,
            "--max-memory": 1, "--max-queue-size": 1, "--iterations": 1}  # fmt: skip


def _said(words: Sequence[str]) -> list[str]:
    """The flags that say what each iteration becomes."""
    kept, waiting = [], iter(words)
    for word in waiting:
        name, equals, _ = word.replace("_", "-").partition("=")
        if name not in _NEUTRAL:
            kept.append(word)
        elif _NEUTRAL[name] and not equals:
            next(waiting, None)
    return kept


def _prepare(top: Path, flags: list[str], overwrite: bool) -> None:
    """Make the target, or see that it is of an earlier run of the same kind. Raises UsageError, TargetError."""
    mark = top / WORK / FLAGS
    try:
        there = sorted(os.listdir(top)) if top.exists() else []
        if there and not overwrite:
            if not mark.is_file():
                raise UsageError(
                    f"--save-dir {top}: exists and is not empty ({some(there, 4)}). Give another directory, or "
                    "--overwrite to replace iterations there."
                )
            before = json.loads(mark.read_text())
            if before != flags:
                raise UsageError(
                    f"--save-dir {top}: its iterations were converted with {' '.join(map(str, before))}, not with "
                    f"{' '.join(flags)}. Give another directory, or --overwrite to replace them."
                )
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(flags))
    except ValueError as error:
        raise UsageError(f"{mark}: is damaged. Give --overwrite to convert all iterations again.") from error
    except OSError as error:
        raise TargetError(f"{top}: cannot be made: {why(error)}") from error


def _move(work: Path, top: Path, name: str) -> None:
    """Put a complete iteration into its place, what goes with all of them first. Raises TargetError."""
    try:
        inner = work / name
        for entry in list(work.iterdir()) if inner.is_dir() else ():
            if entry.name == rankdir.TRACKER:
                os.replace(entry, top / WORK / entry.name)  # so this format has one
            elif entry.name != name and not (top / entry.name).exists():
                _rename(entry, top / entry.name)
        if (top / name).exists():
            shutil.rmtree(top / WORK / f"{name}-replaced", ignore_errors=True)
            _rename(top / name, top / WORK / f"{name}-replaced")
        _rename(inner if inner.is_dir() else work, top / name)
        for left in (work, top / WORK / f"{name}-replaced"):
            shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise TargetError(f"{top / name}: cannot be completed: {why(error)}") from error


def _rename(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError:
        if not (target.is_dir() and source.is_dir()) or target.name.startswith("iter_"):
            raise  # else another process was first with what goes with all iterations


def _track(top: Path) -> None:
    """Megatron's tracker: the last iteration that is there, where iterations are Megatron's."""
    mark = top / WORK / rankdir.TRACKER
    numbers = [int(p.name[5:]) for p in top.glob("iter_*") if (p / companions.PROVENANCE).is_file()]
    if mark.is_file() and numbers:
        temporary = mark.with_suffix(".new")
        temporary.write_text(str(max(numbers)))
        os.replace(temporary, top / rankdir.TRACKER)
