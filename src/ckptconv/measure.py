"""How much memory this process holds: anonymous and shared, without the page cache, sampled by a thread."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path


def resident() -> int:
    """Bytes of anonymous and shared memory of this process now; 0 where /proc does not say."""
    total = 0
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1]) << 10
    return total


def available() -> int:
    """Bytes of memory that can be had: of the machine, or of the control group where that leaves less."""
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, max(0, limit - used))
    return free


class Memory:
    """Samples `resident` until stopped or forgotten: who fails does not ask, and a process may convert many times."""

    def __init__(self, interval: float = 0.05) -> None:
        self._peak = [resident()]
        self._stop = threading.Event()
        # The thread does not hold `self`, or nobody could forget it.
        self._thread = threading.Thread(target=_sample, args=(self._peak, self._stop, interval), daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The peak, in bytes."""
        self._stop.set()
        self._thread.join()
        return max(*self._peak, resident())

    def __del__(self) -> None:
        self._stop.set()


def _sample(peak: list[int], stop: threading.Event, interval: float) -> None:
    while not stop.wait(interval):
        peak[0] = max(peak[0], resident())
