"""Moves tensors from where they lie to where they belong, block by block, on a few threads.

A job is one lazy tensor and the rectangles of it that go into slots of planned files. Each block of rows is read once
into a reused buffer, added to the tensor's digest, and written to every slot that wants some of it: no tensor is ever
in memory, and a byte is copied once into the buffer and once into the page cache. Reading, checksumming and writing
all happen outside the interpreter lock, so threads help.

Not here: what goes where (sharding.py, savers), file layouts (containers/), publishing (staging.py).
"""

from __future__ import annotations

import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ckptconv import dtypes
from ckptconv.checksum import Runs, crc32, merged, whole
from ckptconv.errors import TableError, TargetError, why
from ckptconv.files import close_written, start_flushing, write_exactly
from ckptconv.lazy import LazyTensor, as_bytes, blocks, matrix

if TYPE_CHECKING:
    import numpy as np

    from ckptconv.containers.plan import PlannedFile
    from ckptconv.lazy import Matrix

#: Bytes read and written at once: small enough to stay in a core's cache between the two.
BLOCK = 1 << 20
#: Bytes a thread takes on before it looks for the next piece of work.
UNIT = 32 << 20
#: Written runs from this size on are handed to the disk at once; small ones are left for it to collect.
FLUSHED = 4 << 20


@dataclass
class Output:
    """A planned file being filled. `path` is where its bytes are collected until it is published."""

    path: str
    plan: PlannedFile
    runs: dict[str, list[list[int]]] = field(default_factory=dict)  # slot -> written byte runs
    written: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    #: one writer at a time: the kernel lets no more into a file, and waiting there burns a core
    writing: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def data_bytes(self) -> int:
        return sum(slot.nbytes for slot in self.plan.slots.values())

    def create(self) -> None:
        """Make the file with its final size (sparse until written). Raises TargetError."""
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with open(self.path, "wb") as file:
                file.truncate(self.plan.size)
        except OSError as error:
            raise TargetError(f"{self.path}: cannot be made ({self.plan.size} bytes): {why(error)}") from error

    def account(self, slot: str, runs: list[list[int]]) -> bool:
        """Note what was written; True when that completes the file."""
        with self.lock:
            self.runs.setdefault(slot, []).extend(runs)
            self.written += sum(end - start for start, end, _ in runs)
            return self.written >= self.data_bytes

    def finish(self) -> None:
        """Write headers and directory, flush, close. Raises TableError unless every slot was written exactly once."""
        crcs = {}
        for name, slot in self.plan.slots.items():
            crc = whole(self.runs.get(name, []), slot.nbytes)
            if crc is None:
                raise TableError(f"{self.path}: {name} was not written exactly once.")
            crcs[name] = crc
        self.plan.finish(lambda offset, data: write_exactly(self.path, offset, data), crcs)
        close_written(self.path)


@dataclass(frozen=True, slots=True)
class Target:
    """The rectangle [rows, cols] at (row, col) of a job's tensor goes to (slot_row, slot_col) of a slot."""

    output: Output
    slot: str
    row: int
    col: int
    slot_row: int
    slot_col: int
    rows: int
    cols: int


@dataclass
class Job:
    """One tensor with its targets. What neither goes to a target nor counts for the digest is not read.

    counted: spans of rows (first, end) that count for the digest, in order and apart (padding never counts);
    on_digest: is given their byte runs, [start, end, crc] each, when all is done.
    """

    tensor: LazyTensor
    targets: Sequence[Target]
    counted: Sequence[tuple[int, int]]
    on_digest: Callable[[list[list[int]]], None]
    runs: list[list[int]] = field(default_factory=list)
    pending: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class _Unit:
    """Consecutive blocks of a job, (first row, rows, targets) each, that write to the same files."""

    job: Job
    message: _Message
    outputs: frozenset[int]
    blocks: list[tuple[int, int, list[Target]]] = field(default_factory=list)
    nbytes: int = 0


@dataclass
class _Message:
    """Jobs submitted together: `done` is called when the last of their units is written."""

    done: Callable[[], None]
    units: int = 0


class Engine:
    """A few threads that work off jobs. Use as a context manager; `submit` blocks while enough work is waiting.

    A thread prefers work on files that no other thread is writing: two writers of one file wait for its inode's lock.
    """

    def __init__(self, threads: int, on_output: Callable[[Output], None], on_bytes: Callable[[int], None]) -> None:
        self._on_output, self._on_bytes = on_output, on_bytes
        self._failure: BaseException | None = None
        self._state = threading.Condition(threading.RLock())
        self._pending: list[_Unit] = []
        self._limit = 32 * threads
        self._busy: Counter[int] = Counter()
        self._left = 0  # units and outputs that are not settled
        self._closed = False
        self._flusher: queue.Queue[Output | None] = queue.Queue()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        self._threads.append(threading.Thread(target=self._flush, daemon=True))

    def __enter__(self) -> Engine:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._state:
            if kind:
                self._fail(RuntimeError("stopped"))  # threads drop what is still waiting
            self._closed = True
            self._state.notify_all()
        self._flusher.put(None)
        for thread in self._threads:
            thread.join()

    def submit(self, jobs: Sequence[Job], done: Callable[[], None] = lambda: None) -> None:
        """Queue the blocks of `jobs`; `done` is called when all of them are written."""
        message = _Message(done)
        units = []
        for job in jobs:
            own = list(_units(job, message))
            job.pending = len(own)
            units += own
            if not own:
                job.on_digest([[0, 0, 0]] if job.counted else [])
        message.units = len(units)
        if not units:
            done()
        for unit in units:
            with self._state:
                while len(self._pending) >= self._limit and not self._failure:
                    self._state.wait()
                self.check()
                self._pending.append(unit)
                self._left += 1
                self._state.notify_all()

    def drain(self) -> None:
        """Wait until everything submitted so far is written and flushed. Raises what a thread failed with."""
        with self._state:
            while self._left and not self._failure:
                self._state.wait()
        self.check()

    def check(self) -> None:
        """Raise the first failure of a thread."""
        if self._failure:
            raise self._failure

    def _fail(self, error: BaseException) -> None:
        with self._state:
            self._failure = self._failure or error
            self._state.notify_all()

    def _take(self) -> _Unit | None:
        """The next unit, on files of its own if there is one; None at the end."""
        with self._state:
            while not self._pending:
                if self._closed or self._failure:
                    return None
                self._state.wait()
            free = (n for n, unit in enumerate(self._pending) if not any(self._busy[o] for o in unit.outputs))
            unit = self._pending.pop(next(free, 0))
            self._busy.update(unit.outputs)
            self._state.notify_all()
            return unit

    def _settle(self, outputs: frozenset[int] = frozenset()) -> None:
        with self._state:
            self._busy.subtract(outputs)
            self._left -= 1
            self._state.notify_all()

    def _run(self) -> None:
        buffers = _Buffers()
        while (unit := self._take()) is not None:
            try:
                self._copy(unit, buffers)
            except BaseException as error:  # handed to the thread that submits or drains
                self._fail(error)
            self._settle(unit.outputs)

    def _flush(self) -> None:
        while (output := self._flusher.get()) is not None:
            try:
                if not self._failure:
                    output.finish()
                    self._on_output(output)
            except BaseException as error:
                self._fail(error)
            self._settle()

    def _copy(self, unit: _Unit, buffers: _Buffers) -> None:
        """Read the blocks of a unit, write them to their targets, then settle accounts."""
        job, tensor = unit.job, unit.job.tensor
        row_bytes = tensor.cols * dtypes.size_of(tensor.dtype)
        digest = Runs()
        written: dict[tuple[int, str], tuple[Output, str, Runs]] = {}
        for row, count, targets in unit.blocks:
            if self._failure:
                return
            counts = any(start <= row < end for start, end in job.counted)
            left = 0 if counts else min(t.col for t in targets)
            right = tensor.cols if counts else max(t.col + t.cols for t in targets)
            block = buffers.get(0, count, right - left, tensor.dtype)
            tensor.read(block, row, left)
            crc = crc32(as_bytes(block))
            if counts:
                digest.add(row * row_bytes, count * row_bytes, crc)
            for t in targets:
                runs = written.setdefault((id(t.output), t.slot), (t.output, t.slot, Runs()))[2]
                _write(t, row, left, block, crc, runs, buffers)
            self._on_bytes(sum(count * t.cols for t in targets) * dtypes.size_of(tensor.dtype))
        for output, slot, runs in written.values():
            for start, end, _ in runs.runs:
                if end - start >= FLUSHED:
                    start_flushing(output.path, output.plan.offsets[slot] + start, end - start)
            if output.account(slot, runs.runs):
                with self._state:
                    self._left += 1
                self._flusher.put(output)
        with job.lock:
            job.runs += digest.runs
            job.pending -= 1
            complete = not job.pending
        if complete:
            found = merged(job.runs)
            if [run[:2] for run in found] != [[start * row_bytes, end * row_bytes] for start, end in job.counted]:
                raise TableError("a tensor was not read exactly once.")
            job.on_digest(found)
        with self._state:
            unit.message.units -= 1
            last = not unit.message.units
        if last:
            unit.message.done()


def _units(job: Job, message: _Message) -> Iterator[_Unit]:
    """A job's blocks in units of at most UNIT bytes; blocks end where a target begins or ends."""
    begins: dict[int, list[Target]] = {}
    for target in job.targets:
        begins.setdefault(target.row, []).append(target)
    edges = {row for span in job.counted for row in span} | {*begins, *(t.row + t.rows for t in job.targets)}
    row_bytes = job.tensor.cols * dtypes.size_of(job.tensor.dtype)
    active: list[Target] = []
    counts = False
    unit: _Unit | None = None
    for row, count in blocks(job.tensor, BLOCK, sorted(edges)):
        if row in edges or row == 0:
            active = [t for t in active if row < t.row + t.rows] + begins.get(row, [])
            counts = any(start <= row < end for start, end in job.counted)
        if not active and not counts:
            continue
        outputs = frozenset(id(t.output) for t in active)
        if unit is None or unit.outputs != outputs or unit.nbytes >= UNIT:
            if unit:
                yield unit
            unit = _Unit(job, message, outputs)
        unit.blocks.append((row, count, active))
        unit.nbytes += count * row_bytes
    if unit:
        yield unit


def _write(t: Target, row: int, left: int, block: Matrix, crc: int, runs: Runs, buffers: _Buffers) -> None:
    """Write the part of a block at (row, left) that belongs to `t`. `crc` is that of the whole block."""
    count, cols = block.shape
    slot = t.output.plan.slots[t.slot]
    slot_cols, width = matrix(slot.seen or slot.shape)[1], block.itemsize
    slot_row = t.slot_row + row - t.row
    data = block
    if t.cols != cols:
        data = buffers.get(1, count, t.cols, block.dtype)
        data[...] = block[:, t.col - left : t.col - left + t.cols]
    base, view = t.output.plan.offsets[t.slot], as_bytes(data)
    if t.cols == slot_cols:
        start = slot_row * slot_cols * width
        if t.cols != cols:
            crc = crc32(view) if t.output.plan.needs_crc else 0
        with t.output.writing:
            write_exactly(t.output.path, base + start, view)
        runs.add(start, len(view), crc)
        return
    # Rows of the slot that come from several tensors: no format here has one, so it need not be fast.
    for i in range(count):
        start = ((slot_row + i) * slot_cols + t.slot_col) * width
        line = view[i * t.cols * width : (i + 1) * t.cols * width]
        write_exactly(t.output.path, base + start, line)
        runs.add(start, len(line), crc32(line))


class _Buffers:
    """A thread's reused memory: one block to read into, one to gather columns in."""

    def __init__(self) -> None:
        self._memory: list[Any] = [None, None]

    def get(self, which: int, rows: int, cols: int, dtype: str | np.dtype[Any]) -> Matrix:
        """A [rows, cols] matrix of opaque elements; valid until the next call for the same `which`."""
        import numpy as np

        kind = dtypes.opaque(dtype) if isinstance(dtype, str) else dtype
        nbytes = rows * cols * kind.itemsize
        if self._memory[which] is None or len(self._memory[which]) < nbytes:
            self._memory[which] = np.empty(max(nbytes, BLOCK), np.uint8)
        matrix: Matrix = self._memory[which][:nbytes].view(kind).reshape(rows, cols)
        return matrix


def default_threads() -> int:
    """Threads that copy: as many as cores, at most 8; one core still overlaps reading with flushing."""
    return max(1, min(8, len(os.sched_getaffinity(0))))
