"""Run commands in turn, each as a whole process that ends in a sync, with the memory of its whole process tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median


@dataclass
class Run:
    """One timed command: seconds with the sync, CPU seconds of its tree, peak anonymous + shared bytes of its tree."""

    seconds: float
    cpu: float
    memory: int


def tree(root: int) -> list[int]:
    """A process and all that it has started."""
    found, children = [root], {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    children.setdefault(int(file.read().rsplit(")", 1)[1].split()[1]), []).append(int(entry))
            except OSError:
                continue
    for pid in found:
        found += children.get(pid, [])
    return found


def held(pids: Sequence[int]) -> int:
    """Anonymous and shared bytes, each shared page once per process that maps it; unmapped shared files are added."""
    total, seen = 0, set()
    for pid in pids:
        try:
            with open(f"/proc/{pid}/status") as file:
                for line in file:
                    if line.startswith(("RssAnon:", "RssShmem:")):
                        total += int(line.split()[1]) << 10
            for fd in os.listdir(f"/proc/{pid}/fd"):
                path = f"/proc/{pid}/fd/{fd}"
                if os.readlink(path).startswith("/memfd:"):
                    stat = os.stat(path)
                    if stat.st_ino not in seen:
                        seen.add(stat.st_ino)
                        total += stat.st_blocks * 512
        except OSError:
            continue
    return total


def timed(command: Sequence[str], watch: bool = False, may_fail: bool = False) -> Run:
    """Run a command, then sync. `watch` samples the memory of its tree, which costs a little time."""
    os.sync()
    before = os.times()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], held(tree(process.pid)))

    watcher = threading.Thread(target=sample)
    if watch:
        watcher.start()
    _, errors = process.communicate()
    os.sync()
    seconds = time.perf_counter() - started
    stop.set()
    if watch:
        watcher.join()
    if process.returncode and not may_fail:
        sys.exit(f"{' '.join(command)} failed: {errors}")
    after = os.times()
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return Run(seconds, cpu, peak[0])


def convert(source: Path, target: Path, saver: str, *flags: str) -> list[str]:
    """The command line of one conversion."""
    command = [sys.executable, "-m", "ckptconv", "--saver", saver, "--no-progress"]
    return [*command, "--load-dir", str(source), "--save-dir", str(target), *flags]


def in_turn(runs: int, pairs: Sequence[tuple[Callable[[], list[str]], Path]]) -> list[list[Run]]:
    """Every command once per round; its output is removed after each. The first round only warms caches."""
    results: list[list[Run]] = [[] for _ in pairs]
    for number in range(runs + 1):
        for (command, output), kept in zip(pairs, results, strict=True):
            shutil.rmtree(output, ignore_errors=True)
            run = timed(command())
            shutil.rmtree(output, ignore_errors=True)
            if number:
                kept.append(run)
    return results


def ratios(ours: Sequence[Run], theirs: Sequence[Run]) -> str:
    """Median (min to max) of the wall time ratios, pair by pair."""
    values = sorted(a.seconds / b.seconds for a, b in zip(ours, theirs, strict=True))
    return f"{median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"
