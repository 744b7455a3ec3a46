"""Peak memory of all processes together, measured from outside while a model of 1 GB passes through."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import LINGER, Run, spec

from ckptconv.messages import expected

MODEL = spec(num_layers=30, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16, num_query_groups=16,
             kv_channels=64, vocab_size=16000)  # fmt: skip
LARGEST = max(sum(2 * shape[0] * (shape[1:] or (1,))[0] for shape in m.shapes.values()) for m in expected(MODEL))
LIMIT = (512 << 20) + 4 * LARGEST


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gigabyte of holes."""
    import models

    top = tmp_path_factory.mktemp("gigabyte") / "hf"
    assert models.write(MODEL, top, shard=400_000_000, sparse=True) > 10**9
    return top


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """Where a gigabyte may lie for the length of a test."""
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


def held(pids: list[int]) -> int:
    """Bytes of anonymous and mapped shared memory, and of shared memory that is only open (memfd)."""
    total, seen = 0, set()
    for pid in pids:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            total += sum(int(n) << 10 for n in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+)", status, re.MULTILINE))
            for entry in os.scandir(f"/proc/{pid}/fd"):
                if os.readlink(entry.path).startswith(("/memfd:", "/dev/shm/")):
                    known = os.stat(entry.path)
                    if known.st_ino not in seen:
                        seen.add(known.st_ino)
                        total += known.st_blocks * 512
    return total


class Peak:
    """Samples a run from a thread."""

    def __init__(self, running: Run) -> None:
        self.bytes = 0
        self._pid, self._over = running.process.pid, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while not self._over.wait(0.01):
            self.bytes = max(self.bytes, held(children(self._pid)))

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self.bytes


def measured(*words: object) -> tuple[int, int]:
    """(peak as measured, peak as reported), bytes."""
    running = Run(words)
    peak = Peak(running)
    try:
        ended = running.wait(90, LINGER)
    finally:
        found = peak.stop()
    ended.succeeded()
    said = re.search(r"peak memory (\d+) MiB", ended.err)
    assert said, ended.err
    print(f"{found >> 20} MiB measured, {said[1]} reported, {LIMIT >> 20} allowed: {words}")
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
    peak, said = measured(*torch_flags(target, 30))
    assert peak < LIMIT, f"{peak >> 20} MiB, at most {LIMIT >> 20} allowed"
    assert 0.6 * peak < said < 1.6 * peak, (peak >> 20, said >> 20)


def test_max_memory_is_kept(target: Path) -> None:
    """A loader of others and a saver of ours: what is in flight is what the processes leave of the limit."""
    unbounded, _ = measured(*torch_flags(target, 30))
    shutil.rmtree(target)
    limit = int(0.7 * unbounded)
    peak, _ = measured(*torch_flags(target, 30, "--max-memory", f"{limit}"))
    assert peak < limit, f"{peak >> 20} MiB of {limit >> 20}"


def test_a_limit_that_cannot_be_kept_is_refused(target: Path) -> None:
    words = torch_flags(target, 8, "--max-memory", "150MB")
    ended = Run(words).wait(90, LINGER)
    assert ended.code == 2, ended.err
    assert re.search(r"--max-memory: message 'embeddings' takes \d+ MB, but .* Give at least \d+ MB more", ended.err)
    assert not target.exists() or not any(target.rglob("*.pt"))
