"""File names of NxDT checkpoints: three generations of them, and the folders around. Names and files only.

Source: neuronx-distributed 0.18 `parallel_layers/checkpointing.py` (v1), `trainer/checkpoint.py` (v2, and v3 with
expert parallel ranks).
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice
from pathlib import Path

from ckptconv.containers.rankdir import Rank
from ckptconv.errors import SourceError, some
from ckptconv.files import refuse_partial

MODEL = "model"
#: Empty-looking files of the trainer: this folder is a checkpoint; it was completely written.
MARKER, DONE = "checkpoint", "done"

_NAMES = {
    "v1": re.compile(r"tp_rank_(?P<tp>\d{2,})_pp_rank_(?P<pp>\d{2,})(?:_dp_rank_(?P<dp>\d{2,}))?"),
    "v2": re.compile(r"dp_rank_(?P<dp>\d{2,})_tp_rank_(?P<tp>\d{2,})_pp_rank_(?P<pp>\d{2,})\.pt"),
    "v3": re.compile(
        r"dp_rank_(?P<dp>\d{2,})_ep_rank_(?P<ep>\d{2,})_tp_rank_(?P<tp>\d{2,})_pp_rank_(?P<pp>\d{2,})\.pt"
    ),
}  # fmt: skip
_INNER = "checkpoint.pt"


def name(rank: Rank, ep: int) -> str:
    """The file of a rank as the trainer names it today."""
    t, p, e = rank
    return "dp_rank_00_" + (f"ep_rank_{e:02d}_" if ep > 1 else "") + f"tp_rank_{t:02d}_pp_rank_{p:02d}.pt"


def _there(folder: Path) -> dict[str, dict[tuple[Rank, int], Path]]:
    """Generation -> (rank, data parallel rank) -> file."""
    found: dict[str, dict[tuple[Rank, int], Path]] = {}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        for kind, pattern in _NAMES.items():
            match = pattern.fullmatch(entry.name)
            path = entry / _INNER if match and kind == "v1" and entry.is_dir() else entry
            if match and path.is_file():
                numbers = {axis: int(value or 0) for axis, value in match.groupdict().items()}
                rank = numbers["tp"], numbers["pp"], numbers.get("ep", 0)
                found.setdefault(kind, {})[rank, numbers.get("dp", 0)] = path
    return found


def recognise(load_dir: str) -> str | None:
    """A file that only an NxDT checkpoint has, or None."""
    for folder in (Path(load_dir), Path(load_dir) / MODEL):
        for files in _there(folder).values():
            return str(next(iter(files.values())).relative_to(load_dir))
    return None


def find(load_dir: str) -> tuple[Path, dict[Rank, Path], list[str]]:
    """(the folder of the checkpoint, rank -> file, notes). `load_dir` is that folder or its `model`. Raises SourceError
    when there are none, some lack, or several generations lie side by side.
    """
    refuse_partial(load_dir)
    top = Path(load_dir)
    folder = next((f for f in (top, top / MODEL) if _there(f)), None)
    if folder is None:
        inside = [e.name for e in sorted(top.iterdir()) if e.is_dir()]
        raise SourceError(
            f"{top}: no dp_rank_*_tp_rank_*_pp_rank_*.pt or tp_rank_*_pp_rank_* there or in {MODEL}; it has "
            f"{some(inside) or 'no folders'}. Give the checkpoint's own folder."
        )
    top = folder.parent if folder.name == MODEL else folder
    if (top / MARKER).is_file() and not (top / DONE).exists():
        raise SourceError(f"{top}: has no file {DONE!r}: the trainer was interrupted while it saved. Use another step.")
    kinds = _there(folder)
    if len(kinds) > 1:
        raise SourceError(f"{folder}: holds files of {' and '.join(kinds)} names side by side. Keep those of one save.")
    (files,) = kinds.values()
    ranks = {rank: path for (rank, dp), path in files.items() if dp == 0}
    others = Counter(dp for _, dp in files)
    del others[0]
    tp, pp, ep = (1 + max(rank[axis] for rank, _ in files) for axis in range(3))
    if len(ranks) != tp * pp * ep:
        all_of_it = ((t, p, e) for p in range(pp) for t in range(tp) for e in range(ep))
        missing = islice((name(rank, ep) for rank in all_of_it if rank not in ranks), 7)
        grid = f"tp {tp} x pp {pp}" + (f" x ep {ep}" if ep > 1 else "")
        raise SourceError(f"{folder}: lacks {some(missing)} of {grid} ranks. Copy the missing files.")
    notes = [f"ignored files of data parallel ranks {some(map(str, others))}: copies of rank 0"] if others else []
    return top, dict(sorted(ranks.items(), key=lambda item: (item[0][1], item[0][0], item[0][2]))), notes
