"""The tree of errors, each with the exit code a shell sees.

    CkptconvError            1
    |-- UsageError           2   flags, plugin names, combinations that make no sense
    |-- SourceError          3   the checkpoint that is read: missing, truncated, contradictory
    |-- ProtocolError        4   messages between loader and saver: names, order, keys, shapes, counts
    |-- TableError           5   a family or format table that contradicts itself: a mistake in ckptconv
    |-- LayoutError          6   tp, pp, ... that do not divide the model
    |-- TargetError          7   what the target cannot express or the disk cannot take
    `-- VerifyError          8   what was written is not what was sent

A message says where, what was found, what was expected and what to do, in one to three lines, as sentences. Bugs are
not wrapped: they keep their traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from contextvars import ContextVar


class CkptconvError(Exception):
    """Base of every error a user can cause or mend."""

    exit_code = 1


class UsageError(CkptconvError):
    """A flag, a plugin name or a combination of them is wrong."""

    exit_code = 2


class SourceError(CkptconvError):
    """The checkpoint that is read is incomplete, damaged or not what it says."""

    exit_code = 3


class ProtocolError(CkptconvError):
    """A message has the wrong name, order, keys, shapes or count."""

    exit_code = 4


class TableError(CkptconvError):
    """A family or format table contradicts itself."""

    exit_code = 5


#: What is said below every TableError.
REPORT = "This is a mistake in ckptconv, not yours: please report it with the command and the model's config.json."


class LayoutError(CkptconvError):
    """Parallel sizes do not divide the model."""

    exit_code = 6


class TargetError(CkptconvError):
    """The target cannot express the model, exists already, or cannot be written."""

    exit_code = 7


class VerifyError(CkptconvError):
    """The written checkpoint differs from what was sent."""

    exit_code = 8


BY_EXIT_CODE = {
    kind.exit_code: kind
    for kind in (
        CkptconvError, UsageError, SourceError, ProtocolError, TableError, LayoutError, TargetError, VerifyError,
    )
}  # fmt: skip


def annotate(error: BaseException, lines: Iterable[str]) -> None:
    """Add lines that are shown below the message (`BaseException.add_note` is younger than the oldest Python here)."""
    error.__notes__ = [*notes(error), *lines]


def notes(error: BaseException) -> list[str]:
    """Lines that belong below the message."""
    said = list(getattr(error, "__notes__", []))
    if isinstance(error, TableError) and REPORT not in "\n".join([str(error), *said]):
        said.append(REPORT)
    return said


#: What one may do about what the system says.
_WAYS = {
    errno.ENOENT: "Is the path right?",
    errno.ENOTDIR: "Is the path right?",
    errno.EISDIR: "Give a file.",
    errno.ELOOP: "The link leads back to itself: replace it.",
    errno.EACCES: "Change its permissions, or run as another user.",
    errno.EPERM: "Change its permissions, or run as another user.",
    errno.EROFS: "Choose another place.",
    errno.ENOSPC: "Free space there.",
    errno.EDQUOT: "Free space there.",
    errno.EMFILE: "Raise the limit: ulimit -n 4096.",
    errno.EIO: "The disk, or the network it is on, may be failing.",
    errno.ESTALE: "The disk, or the network it is on, may be failing.",
}


def why(error: OSError) -> str:
    """What the system said, and what to do about it, as sentences."""
    return " ".join(filter(None, (f"{error.strerror or error}.", _WAYS.get(error.errno or 0))))


_tolerated: ContextVar[list[CkptconvError] | None] = ContextVar("tolerated", default=None)


@contextlib.contextmanager
def tolerating() -> Iterator[list[CkptconvError]]:
    """What checks refuse, in a list: a checkpoint is looked at that may be incomplete, and nothing is made of it."""
    found: list[CkptconvError] = []
    token = _tolerated.set(found)
    try:
        yield found
    finally:
        _tolerated.reset(token)


def looking() -> bool:
    """Whether a checkpoint is only looked at."""
    return _tolerated.get() is not None


def refuse(error: CkptconvError) -> None:
    """Raise an error of a check behind which one could still go on, or note it where a checkpoint is looked at."""
    found = _tolerated.get()
    if found is None:
        raise error
    found.append(error)


def collapse(names: Iterable[str]) -> list[str]:
    """Fold the numbers of a list of names: `a.0.x`, `a.1.x` become `a.{0..1}.x`; order of first sight is kept."""
    seen: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = re.match(r"(.*?)(\d+)(.*)$", name)
        numbers = seen.setdefault((match[1], match[3]) if match else (name, ""), [])
        if match:
            numbers.append(match[2])
    return [before + _span(sorted(set(numbers), key=int)) + after for (before, after), numbers in seen.items()]


#: A number that counts: between marks, or at the end of a name (`weight7`), but not that of `fc1.bias` or `4h`.
_COUNTER = re.compile(r"(?<![A-Za-z\d])\d+(?![A-Za-z\d])|(?<=[a-z])\d+$")


def folded(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that differ in counters only, under one name for each group: `layers.{0..3}.experts.{0..7}.w`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_COUNTER.sub("#", name), []).append(name)
    found: dict[str, list[str]] = {}
    for members in groups.values():
        columns = zip(*map(_COUNTER.findall, members), strict=True)
        spans = [_span(sorted(set(column), key=lambda n: (int(n), n))) for column in columns]
        parts = _COUNTER.split(members[0])
        found["".join(a + b for a, b in zip(parts, [*spans, ""], strict=True))] = members
    return found


def _span(numbers: list[str]) -> str:
    """Numbers as they were written, for a reader: nothing, `3`, `{00..31}`, or up to six of them in braces."""
    if len(numbers) < 2:
        return "".join(numbers)
    if len(numbers) == int(numbers[-1]) - int(numbers[0]) + 1:
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(numbers[:6]) + (",...}" if len(numbers) > 6 else "}")


def some(names: Iterable[str], limit: int = 6) -> str:
    """At most `limit` names for a message, then how many more there are."""
    listed = collapse(names)
    head = ", ".join(listed[:limit])
    return head if len(listed) <= limit else f"{head} and {len(listed) - limit} more"


def near(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest known name, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""
