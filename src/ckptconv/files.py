"""Open files, kept few: positional reads and writes that never leave more than a bounded number of descriptors.

Reads are plain `pread`s, not mappings: a file that shrinks under us gives a short read and an error that names it,
where a mapping would end the process with SIGBUS.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator

from ckptconv.errors import SourceError, TargetError, UsageError, why

#: The folder of a target in which an unfinished conversion is collected.
PARTIAL = ".ckptconv-partial"


def refuse_partial(directory: str | os.PathLike[str]) -> None:
    """Raise SourceError when a source is what an interrupted conversion has left."""
    if PARTIAL in os.path.abspath(directory).split(os.sep):
        raise SourceError(f"{directory}: is part of an interrupted conversion. Complete it first with --resume.")


def refuse_remote(place: str | None, flag: str = "") -> None:
    """Raise UsageError for the address of an object store: weights are read and written at any offset of a file."""
    if place is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place):
        raise UsageError(
            f"{flag} {place}: is an address, expected a directory. Mount it as a file system, or copy it to a disk: "
            "docs/torchrun.md says why.".lstrip()
        )


def _kept() -> int:
    """Descriptors kept open at most, for reading and for writing each: a share of what the process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(4, min(48, (soft - 32) // 3)) if soft > 0 else 48


KEPT = _kept()


class _Descriptors:
    """A least-recently-used set of open descriptors; one that is in use is never closed."""

    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._lock = threading.Lock()
        self._open: OrderedDict[str, tuple[int, list[int]]] = OrderedDict()

    @contextlib.contextmanager
    def use(self, path: str) -> Iterator[int]:
        with self._lock:
            if path not in self._open:
                self._evict(KEPT - 1)
                self._open[path] = (os.open(path, self._flags | os.O_CLOEXEC), [0])
            self._open.move_to_end(path)
            descriptor, users = self._open[path]
            users[0] += 1
        try:
            yield descriptor
        finally:
            with self._lock:
                users[0] -= 1
                if not users[0] and self._open.get(path, (None,))[0] != descriptor:
                    os.close(descriptor)  # forgotten meanwhile

    def _evict(self, limit: int) -> None:
        for path in [p for p, (_, users) in self._open.items() if not users[0]]:
            if len(self._open) <= limit:
                return
            os.close(self._open.pop(path)[0])

    def forget(self, path: str) -> None:
        """Close `path` if it is open (before it is renamed or removed), in use as soon as it is not."""
        with self._lock:
            descriptor, users = self._open.pop(path, (None, [0]))
            if descriptor is not None and not users[0]:
                os.close(descriptor)

    def clear(self) -> None:
        """Close everything that is not in use."""
        with self._lock:
            self._evict(0)


_reading = _Descriptors(os.O_RDONLY)
_writing = _Descriptors(os.O_WRONLY)


def read_exactly(path: str, offset: int, out: memoryview) -> None:
    """Fill `out` from `offset` of the file. Raises SourceError when the file ends before or cannot be read."""
    wanted, start = len(out), offset
    try:
        with _reading.use(path) as descriptor:
            while out:
                count = os.preadv(descriptor, [out], offset)
                if count == 0:
                    raise SourceError(
                        f"{path}: ends at byte {offset}, but a tensor needs bytes {start} to {start + wanted}. "
                        "The file is truncated or changed while it was read: fetch or copy it again."
                    )
                out, offset = out[count:], offset + count
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {why(error)}") from error


def read_bytes(path: str, offset: int, count: int) -> bytes:
    """`count` bytes from `offset`; errors as in `read_exactly`."""
    buffer = bytearray(count)
    read_exactly(path, offset, memoryview(buffer))
    return bytes(buffer)


def write_exactly(path: str, offset: int, data: memoryview | bytes) -> None:
    """Write all of `data` at `offset` of an existing file. Raises TargetError (full disk, quota, i/o)."""
    view = memoryview(data)
    try:
        with _writing.use(path) as descriptor:
            while view:
                count = os.pwrite(descriptor, view, offset)
                view, offset = view[count:], offset + count
    except OSError as error:
        raise TargetError(
            f"{path}: cannot be written: {error.strerror}. Free space on that disk or choose another --save-dir; "
            "nothing there has been made to look complete."
        ) from error


def start_flushing(path: str, offset: int, count: int) -> None:
    """Let the disk begin with what was just written, instead of when much of it has piled up. Best effort."""
    with contextlib.suppress(OSError), _writing.use(path) as descriptor:
        os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)


def close_written(path: str, durable: bool = True) -> None:
    """Flush a written file to the disk and close it. Raises TargetError."""
    try:
        if durable:
            with _writing.use(path) as descriptor:
                os.fsync(descriptor)
        _writing.forget(path)
    except OSError as error:
        raise TargetError(
            f"{path}: cannot be flushed: {error.strerror}. "
            "Is the disk full or failing? Nothing there has been made to look complete."
        ) from error


def forget(path: str) -> None:
    """Close whatever is open on `path`."""
    _reading.forget(path)
    _writing.forget(path)


def reset() -> None:
    """Close all descriptors: what a path names may have changed since it was opened."""
    _reading.clear()
    _writing.clear()
