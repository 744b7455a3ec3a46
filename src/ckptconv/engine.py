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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptconv import dtypes
from ckptconv.checksum import Runs, whole
from ckptconv.errors import TableError
from ckptconv.files import close_written, write_exactly
from ckptconv.lazy import LazyTensor, as_bytes, blocks, matrix

if TYPE_CHECKING:
    from ckptconv.containers.plan import PlannedFile

#: Bytes read and written at once: small enough to stay in a core's cache between the two.
BLOCK = 1 << 20
#: Bytes a thread takes on before it looks for the next piece of work.
UNIT = 32 << 20


@dataclass
class Output:
    """A planned file being filled. `path` is where its bytes are collected until it is published."""

    path: str
    plan: PlannedFile
    runs: dict[str, list[list[int]]] = field(default_factory=dict)  # slot -> written byte runs
    written: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    finished: bool = False

    @property
    def data_bytes(self) -> int:
        return sum(slot.nbytes for slot in self.plan.slots.values())

    def create(self) -> None:
        """Make the file with its final size (sparse until written)."""
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with open(self.path, "wb") as file:
            file.truncate(self.plan.size)

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
                raise TableError(f"{self.path}: {name} was not written exactly once")
            crcs[name] = crc
        self.plan.finish(lambda offset, data: write_exactly(self.path, offset, data), crcs)
        close_written(self.path)
        self.finished = True


@dataclass(frozen=True)
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
    """One tensor with its targets. `digest_rows`: leading rows that count for the digest (padding does not)."""

    tensor: LazyTensor
    targets: Sequence[Target]
    digest_rows: int
    on_digest: Callable[[int], None]
    runs: Runs = field(default_factory=Runs)
    pending: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Engine:
    """A few threads that work off jobs. Use as a context manager; `submit` blocks while enough work is waiting."""

    def __init__(self, threads: int, on_output: Callable[[Output], None], on_bytes: Callable[[int], None]) -> None:
        self._work: queue.Queue[Callable[[_Buffers], None] | None] = queue.Queue(maxsize=4 * threads)
        self._on_output, self._on_bytes = on_output, on_bytes
        self._failure: BaseException | None = None
        self._idle = threading.Condition()
        self._waiting = 0
        self._flusher: queue.Queue[Output | None] = queue.Queue()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        self._threads.append(threading.Thread(target=self._flush, daemon=True))

    def __enter__(self) -> Engine:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind and not self._failure:
            self._failure = RuntimeError("stopped")  # threads drop what is still waiting
        for _ in self._threads[:-1]:
            self._work.put(None)
        self._flusher.put(None)
        for thread in self._threads:
            thread.join()

    def submit(self, jobs: Sequence[Job], done: Callable[[], None] = lambda: None) -> None:
        """Queue the blocks of `jobs`; `done` is called when all of them are written."""
        units = []
        for job in jobs:
            own = list(self._units(job))
            job.pending = len(own)
            units += [(job, unit) for unit in own]
            if not own:
                job.on_digest(0)
        left = [len(units), threading.Lock()]
        if not units:
            done()
        for job, unit in units:
            self._put(lambda buffers, job=job, unit=unit: self._copy(job, unit, buffers, left, done))  # type: ignore[misc]

    def drain(self) -> None:
        """Wait until everything submitted so far is written and flushed. Raises what a thread failed with."""
        with self._idle:
            while self._waiting and not self._failure:
                self._idle.wait(0.2)
        self.check()

    def check(self) -> None:
        """Raise the first failure of a thread."""
        if self._failure:
            raise self._failure

    def _put(self, work: Callable[[_Buffers], None]) -> None:
        with self._idle:
            self._waiting += 1
        while True:
            self.check()
            try:
                return self._work.put(work, timeout=0.2)
            except queue.Full:
                continue

    def _settle(self) -> None:
        with self._idle:
            self._waiting -= 1
            self._idle.notify_all()

    def _run(self) -> None:
        buffers = _Buffers()
        while (work := self._work.get()) is not None:
            try:
                if not self._failure:
                    work(buffers)
            except BaseException as error:  # handed to the thread that submits or drains
                self._failure = self._failure or error
            self._settle()

    def _flush(self) -> None:
        while (output := self._flusher.get()) is not None:
            try:
                if not self._failure:
                    output.finish()
                    self._on_output(output)
            except BaseException as error:
                self._failure = self._failure or error
            self._settle()

    def _units(self, job: Job) -> list[list[tuple[int, int]]]:
        """Runs of consecutive blocks, each run at most UNIT bytes. Blocks end where a target begins or ends."""
        edges = [job.digest_rows]
        for target in job.targets:
            edges += [target.row, target.row + target.rows]
        units: list[list[tuple[int, int]]] = []
        size = UNIT
        per_row = job.tensor.cols * dtypes.size_of(job.tensor.dtype)
        for row, count in blocks(job.tensor, BLOCK, edges):
            if size >= UNIT:
                units.append([])
                size = 0
            units[-1].append((row, count))
            size += count * per_row
        return units

    def _copy(
        self, job: Job, unit: list[tuple[int, int]], buffers: _Buffers, left: list[Any], done: Callable[[], None]
    ) -> None:
        """Read the blocks of a unit, write them to their targets, then settle accounts."""
        tensor = job.tensor
        width, cols = dtypes.size_of(tensor.dtype), tensor.cols
        first, last = unit[0][0], unit[-1][0] + unit[-1][1]
        targets = [t for t in job.targets if t.row < last and first < t.row + t.rows]
        digest = Runs()
        written: dict[tuple[int, str], tuple[Output, str, Runs]] = {}
        for row, count in unit:
            if self._failure:
                return
            block = buffers.get(0, count, cols, tensor.dtype)
            tensor.read(block, row, 0)
            if row < job.digest_rows:
                digest.add(row * cols * width, as_bytes(block))
            moved = 0
            for t in targets:
                if t.row <= row < t.row + t.rows:
                    runs = written.setdefault((id(t.output), t.slot), (t.output, t.slot, Runs()))[2]
                    moved += self._write(t, row, count, block, runs, buffers, tensor.dtype)
            self._on_bytes(moved)
        for output, slot, runs in written.values():
            if output.account(slot, runs.runs):
                with self._idle:
                    self._waiting += 1
                self._flusher.put(output)
        with job.lock:
            for run in digest.runs:
                job.runs.extend(*run)
            job.pending -= 1
            complete = not job.pending
        if complete:
            crc = whole(job.runs.runs, job.digest_rows * cols * width)
            if crc is None:
                raise TableError("a tensor was not read exactly once")
            job.on_digest(crc)
        with left[1]:
            left[0] -= 1
            last_unit = not left[0]
        if last_unit:
            done()

    @staticmethod
    def _write(t: Target, row: int, count: int, block: Any, runs: Runs, buffers: _Buffers, dtype: str) -> int:
        """Write the part of a block that belongs to `t`; returns bytes."""
        slot = t.output.plan.slots[t.slot]
        slot_cols, width = matrix(slot.shape)[1], dtypes.size_of(dtype)
        slot_row = t.slot_row + row - t.row
        if t.cols == block.shape[1]:
            data = block
        else:
            data = buffers.get(1, count, t.cols, dtype)
            data[...] = block[:, t.col : t.col + t.cols]
        base = t.output.plan.offsets[t.slot]
        view = as_bytes(data)
        if t.cols == slot_cols:
            start = slot_row * slot_cols * width
            write_exactly(t.output.path, base + start, view)
            runs.add(start, view)
        else:
            # Rows of the slot that come from several tensors: no format here has one, so it need not be fast.
            for i in range(count):
                start = ((slot_row + i) * slot_cols + t.slot_col) * width
                line = view[i * t.cols * width : (i + 1) * t.cols * width]
                write_exactly(t.output.path, base + start, line)
                runs.add(start, line)
        return len(view)


class _Buffers:
    """A thread's reused memory: one block to read into, one to gather columns in."""

    def __init__(self) -> None:
        self._memory: list[Any] = [None, None]

    def get(self, which: int, rows: int, cols: int, dtype: str) -> Any:
        """A [rows, cols] matrix of opaque elements; valid until the next call for the same `which`."""
        import numpy as np

        kind = dtypes.opaque(dtype)
        nbytes = rows * cols * kind.itemsize
        if self._memory[which] is None or len(self._memory[which]) < nbytes:
            self._memory[which] = np.empty(max(nbytes, BLOCK), np.uint8)
        return self._memory[which][:nbytes].view(kind).reshape(rows, cols)


def default_threads() -> int:
    """Threads that copy: as many as cores, at most 8; one core still overlaps reading with flushing."""
    return max(1, min(8, len(os.sched_getaffinity(0))))
