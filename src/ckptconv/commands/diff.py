"""Compare two checkpoints of any formats, message by message: equal, or what differs and how far.

Without --rtol and --atol, element types and bits have to be equal. Exit code 8 when something differs.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from ckptconv import commands, measure, numbers
from ckptconv.errors import UsageError, VerifyError, some
from ckptconv.plugins import Plugin
from ckptconv.spec import differences

if TYPE_CHECKING:
    from ckptconv.comparing import Difference, Map, Tolerance
    from ckptconv.incoming import Message, Stream
    from ckptconv.lazy import LazyTensor

log = logging.getLogger("ckptconv")

#: What of a model does not change what its tensors compute. Element types are those of the tensors.
_NO_MATTER = ("family", "dtype", "seq_length")


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this command."""
    add = parser.add_argument
    add("one", metavar="A", help="a checkpoint, of any format; or a model of the Hugging Face hub")
    add("other", metavar="B", help="another one")
    add("--loader", default="auto", metavar="NAME", help="what reads A (default: found from the directory)")
    add("--against-loader", default="auto", metavar="NAME", help="what reads B")
    add("--rtol", type=_tolerance, metavar="X", help="values are equal within X times the larger of both")
    add("--atol", type=_tolerance, metavar="Y", help="values are equal within Y; added to what --rtol allows")
    add("--tensors-only", action="store_true", help="sizes and settings that differ are named, and are no difference")
    add("--threads", type=numbers.positive, metavar="N", help="threads that compare (default: one per core, at most 8)")
    add("--json", action="store_true", help="print JSON")


def plugins(args: Namespace) -> list[Plugin]:
    """The loaders of what is named."""
    return [commands.source(args.one, args.loader)[1], commands.source(args.other, args.against_loader)[1]]


@dataclass
class Found:
    """What was found. tensors: `message/key` -> how values differ, or both shapes; notes are no differences."""

    compared: int = 0
    bytes: int = 0
    model: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # messages and keys that only A has
    extra: list[str] = field(default_factory=list)  # that only B has
    tensors: dict[str, Difference | str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def run(args: Namespace) -> int:
    """Print what was found. Raises VerifyError when something differs."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads take a block each: those of torch would only spin
    began, memory = time.monotonic(), measure.Memory()
    found = compared(args)
    wrong = len(found.missing) + len(found.extra) + len(found.tensors) + (0 if args.tensors_only else len(found.model))
    print(json.dumps({"equal": not wrong, **asdict(found)}, indent=2) if args.json else "\n".join(_lines(found, wrong)))
    seconds = time.monotonic() - began
    log.info("diff: %.1f s, peak memory %d MiB", seconds, memory.stop() >> 20)
    if wrong:
        parts = (("settings", found.model), ("only in A", found.missing), ("only in B", found.extra),
                 ("tensors", found.tensors))  # fmt: skip
        what = ", ".join(f"{len(items)} {name}" for name, items in parts if items)
        where = f" The first tensor is {next(iter(found.tensors))}." if found.tensors else ""
        raise VerifyError(f"{args.one} and {args.other} differ: {what}.{where}")
    return 0


def compared(args: Namespace) -> Found:
    """Compare what `args` names. Raises CkptconvError for what cannot be read."""
    from tqdm import tqdm

    from ckptconv.comparing import Tolerance
    from ckptconv.engine import default_threads
    from ckptconv.incoming import Stream, arguments
    from ckptconv.messages import expected

    one, other = (commands.source(*named) for named in ((args.one, args.loader), (args.other, args.against_loader)))
    if not (one[1].ours or other[1].ours):
        raise UsageError(
            f"diff: loaders {one[1].name} and {other[1].name} are both of others, and one of two has to be built in: "
            "its tensors can be asked for in any order. Convert one of the checkpoints first (--saver hf)."
        )
    exact = args.rtol is None and args.atol is None
    tolerance, found = Tolerance(args.rtol or 0.0, args.atol or 0.0, exact), Found()
    with ExitStack() as stack:
        left, right = (
            stack.enter_context(Stream(plugin, arguments(plugin, place, args))) for place, plugin in (one, other)
        )
        pool = stack.enter_context(ThreadPoolExecutor(args.threads or default_threads()))
        padded = _model(left, right, found)
        bar = stack.enter_context(tqdm(total=sum(1 for _ in expected(left.metadata.spec)), unit="msg", disable=None))
        # A loader of others sends real tensors, once and in its order; those of ours say where bytes lie.
        for name, pair in _pairs(left, right, other[1].ours):
            bar.update()
            _message(name, pair, padded, tolerance, pool.map, found)
    return found


def _model(left: Stream, right: Stream, found: Found) -> int | None:
    """Compare the models; how many rows of the vocabularies can be, where nothing tells which rows are padding."""
    one, other = left.metadata, right.metadata
    sizes = sorted(((one.spec.vocab_size, one.vocab_as_is, "A"), (other.spec.vocab_size, other.vocab_as_is, "B")))
    (few, _, _), (many, as_is, side) = sizes
    padded = few if few < many and as_is else None
    found.model += differences(one.spec, other.spec, (*_NO_MATTER, *(("vocab_size",) if padded else ())))
    if padded:
        found.notes.append(
            f"{side} has {many} rows in its vocabulary, and nothing in it tells which are padding: the first {few} are "
            "compared"
        )
    return padded


def _pairs(left: Stream, right: Stream, right_is_ours: bool) -> Iterator[tuple[str, list[Message | None]]]:
    """(name, messages of A and of B) as the side sends them that cannot be asked in any order, then what is left."""
    first, second = (left, right) if right_is_ours else (right, left)
    known = {message.want.name: message for message in second}
    used = set()
    for message in first:
        whole = known.get(message.want.part_of)
        used.add(message.want.part_of)
        pair = [message, whole and _part(whole, message)]
        yield message.want.name, pair if right_is_ours else pair[::-1]
    for name, message in known.items():
        if name not in used:
            yield name, [None, message] if right_is_ours else [message, None]


def _part(whole: Message, like: Message) -> Message:
    """What a message holds of a layer that comes in several, one for some experts each."""
    from ckptconv.incoming import Message

    experts, want = like.want.experts, whole.want
    if experts is None or not want.sliced:
        return whole
    if not experts:
        want = want.without_experts()
        return Message(want, {key: whole.tensors[key] for key in want.shapes}, whole.lasting)
    want = want.slice_of(range(min(experts.start, want.num_experts), min(experts.stop, want.num_experts)))
    tensors = {key: whole.tensors[key].narrow_rows(experts.start, shape[0]) for key, shape in want.shapes.items()}
    return Message(want, tensors, whole.lasting)


def _message(
    name: str, pair: list[Message | None], padded: int | None, tolerance: Tolerance, run: Map, found: Found
) -> None:  # fmt: skip
    """Compare one message of both."""
    from ckptconv.comparing import compare

    left, right = pair
    if left is None or right is None:
        (found.extra if left is None else found.missing).append(name)
        return
    found.missing += [f"{name}/{key}" for key in left.tensors if key not in right.tensors]
    found.extra += [f"{name}/{key}" for key in right.tensors if key not in left.tensors]
    for key, one in left.tensors.items():
        if key not in right.tensors:
            continue
        one, other = _common(one, right.tensors[key], padded)
        found.compared += 1
        found.bytes += one.nbytes
        if one.shape != other.shape:
            found.tensors[f"{name}/{key}"] = f"{list(one.shape)} != {list(other.shape)}"
        elif difference := compare(one, other, tolerance, run):
            found.tensors[f"{name}/{key}"] = difference


def _common(one: LazyTensor, other: LazyTensor, padded: int | None) -> tuple[LazyTensor, LazyTensor]:
    """Both without the rows of the vocabulary that only one has, where they may be padding."""
    if padded is None or one.shape[1:] != other.shape[1:] or padded != min(one.shape[0], other.shape[0]):
        return one, other
    return one.narrow_rows(0, padded), other.narrow_rows(0, padded)


def _lines(found: Found, wrong: int) -> list[str]:
    """The same for people."""
    lines = [f"note: {note}" for note in found.notes]
    lines += [f"model: {line}" for line in found.model]
    lines += [f"only in {side}: {some(names)}" for side, names in (("A", found.missing), ("B", found.extra)) if names]
    lines += [f"{name}: {difference}" for name, difference in found.tensors.items()]
    total = f"{found.compared} tensors, {found.bytes / 1e6:.1f} MB"
    return [*lines, f"{len(found.tensors)} of {total} differ" if wrong else f"equal: {total}"]


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise ArgumentTypeError(f"{text!r} is no number from 0 on")
    return value
