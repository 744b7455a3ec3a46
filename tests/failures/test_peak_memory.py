"""Peak memory of all processes together, measured from outside while a model larger than the limit passes through."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import LINGER, Run, describe, spec

from ckptconv.messages import expected

MODEL = spec(num_layers=10, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16, num_query_groups=16,
             kv_channels=64, vocab_size=16000)  # fmt: skip
LARGEST = max(sum(2 * shape[0] * (shape[1:] or (1,))[0] for shape in m.shapes.values()) for m in expected(MODEL))
#: Most that may be held, without torch and with it in the loader; each is less than the model that passes through.
LIMIT, WITH_TORCH = (128 << 20) + 4 * LARGEST, (512 << 20) + 4 * LARGEST
LAYERS = WITH_TORCH // LARGEST + 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.4 GB of holes."""
    import models

    top = tmp_path_factory.mktemp("gigabyte") / "hf"
    assert models.write(MODEL, top, shard=150_000_000, sparse=True) > LIMIT
    return top


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """Where a model may lie for the length of a test."""
    yield tmp_path / "out"
    shutil.rmtree(tmp_path)


def children(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                found += children(int(child))
    return found


def savers(pid: int) -> list[int]:
    """The process of the saver, if it has been started."""
    return [child for child in children(pid) if "spawn_main" in describe(child)]


def held(pids: list[int]) -> int:
    """Bytes of anonymous and mapped shared memory, and of shared memory that is only open (memfd)."""
    total = shared(pids)
    for pid in pids:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            total += sum(int(n) << 10 for n in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+)", status, re.MULTILINE))
    return total


def shared(pids: list[int]) -> int:
    """Bytes of shared memory that is only open."""
    sizes = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                if os.readlink(entry.path).startswith(("/memfd:", "/dev/shm/")):
                    known = os.stat(entry.path)
                    sizes[known.st_ino] = known.st_blocks * 512
    return sum(sizes.values())


class Peak:
    """Samples a run from a thread. `stall`: the saver stands still until nothing more has piled up for a second."""

    def __init__(self, running: Run, stall: bool) -> None:
        self.bytes = 0
        self._pid, self._over = running.process.pid, threading.Event()
        self._thread = threading.Thread(target=self._stalled if stall else self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while not self._over.wait(0.02):
            self._once()

    def _once(self) -> None:
        self.bytes = max(self.bytes, held(children(self._pid)))

    def _stalled(self) -> None:
        while not (found := savers(self._pid)) and not self._over.wait(0.01):
            pass
        with contextlib.suppress(ProcessLookupError):
            for pid in found:
                os.kill(pid, signal.SIGSTOP)
            grew, before = time.monotonic(), -1
            while not self._over.wait(0.02) and (time.monotonic() - grew < 1 or before < LARGEST):
                self._once()
                if (now := shared([self._pid])) > before:
                    grew, before = time.monotonic(), now
            for pid in found:
                os.kill(pid, signal.SIGCONT)
        self._sample()

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self.bytes


def measured(*words: object, stall: bool = False) -> tuple[int, int]:
    """(peak as measured, peak as reported), bytes."""
    running = Run(words)
    peak = Peak(running, stall)
    try:
        ended = running.wait(90, LINGER)
    finally:
        found = peak.stop()
    ended.succeeded()
    said = re.search(r"peak memory (\d+) MiB", ended.err)
    assert said, ended.err
    print(f"{found >> 20} MiB measured, {said[1]} reported: {words}")
    return found, int(said[1]) << 20


def test_there_and_back(source: Path, target: Path) -> None:
    to, back = target / "mcore", target / "hf"
    began = time.monotonic()
    flags = ("--target-tp", 2, "--target-pp", 2)
    for words in (
        ("--saver", "megatron_mcore", *flags, "--load-dir", source, "--save-dir", to),
        ("--saver", "hf", "--load-dir", to, "--save-dir", back),
    ):
        peak, said = measured(*words)
        assert peak < LIMIT, f"{peak >> 20} MiB, at most {LIMIT >> 20} allowed"
        assert 0.6 * peak < said < 1.6 * peak, (peak >> 20, said >> 20)
    assert time.monotonic() - began < 120


def torch_flags(target: Path, layers: int, *more: object) -> tuple[object, ...]:
    sizes = ("--layers", layers, "--hidden", 1024, "--ffn", 4096, "--vocabulary", 16000)
    where = ("--load-dir", target.parent, "--save-dir", target)
    return ("--loader", "torch", *sizes, "--saver", "megatron_mcore", *where, *more)


def test_a_loader_of_others(target: Path) -> None:
    peak, said = measured(*torch_flags(target, LAYERS))
    assert peak < WITH_TORCH, f"{peak >> 20} MiB, at most {WITH_TORCH >> 20} allowed"
    assert 0.6 * peak < said < 1.6 * peak, (peak >> 20, said >> 20)


def test_max_memory_is_kept(target: Path) -> None:
    """A loader of others and a saver of ours that stands still: what piles up is what the processes leave of the limit.

    The limit is what the refusal of a hopeless one says is needed, and two messages; without one, more piles up.
    """
    ended = Run(torch_flags(target, 9, "--max-memory", "150MB")).wait(90, LINGER)
    assert ended.code == 2, ended.err
    more = re.search(r"--max-memory: message 'embeddings' takes \d+ MB, but .* Give at least (\d+) MB more", ended.err)
    assert more, ended.err
    assert not target.exists() or not any(target.rglob("*.pt"))
    limit = (150 + int(more[1])) * 10**6 + 2 * LARGEST
    peak, _ = measured(*torch_flags(target, 9, "--max-memory", limit), stall=True)
    assert peak < limit, f"{peak >> 20} MiB of {limit >> 20}"
    shutil.rmtree(target)
    unbounded, _ = measured(*torch_flags(target, 9), stall=True)
    assert unbounded > limit, f"{unbounded >> 20} MiB are no more than {limit >> 20}: a limit would not be noticed"
