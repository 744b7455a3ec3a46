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
    """Samples `resident` until stopped."""

    def __init__(self, interval: float = 0.05) -> None:
        self._peak = resident()
        self._stop = threading.Event()
        self._interval = interval
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._peak = max(self._peak, resident())

    def stop(self) -> int:
        """The peak, in bytes."""
        self._stop.set()
        self._thread.join()
        return max(self._peak, resident())
