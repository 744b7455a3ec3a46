"""One conversion on several ranks of torchrun: how it scales here, and what 8 x 8 ranks would do to DeepSeek-V3.

    python benchmarks/ranks.py [--size 8GB] [--runs 5] [--directory /tmp/ckptconv-bench]

The plan is made from files of holes with real headers: bytes that each rank would read and write, beside headers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import models
import timing

HEAD = ["| 2 threads in all | wall | against one process, median (min to max) | CPU |", "| --- | --- | --- | --- |"]
PLAN_HEAD = ["| DeepSeek-V3 on 64 ranks | planned | files | written per rank | read per rank | read in all |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
TARGETS = {
    "HF -> mcore TP8 PP16 EP8": ("megatron_mcore", "--target-tp", "8", "--target-pp", "16", "--target-ep", "8",
                                 "--decoder-first-pipeline-num-layers", "3",
                                 "--decoder-last-pipeline-num-layers", "2"),
    "HF -> torch_dist": ("megatron_dist", "--target-tp", "8"),
    "HF -> HF": ("hf",),
}


def on_ranks(ranks: int, command: list[str]) -> list[str]:
    """A conversion's command line on ranks of torchrun."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*run, *command[1:]]


def scaling(size: str, runs: int, directory: Path) -> list[str]:
    """Rows of a Markdown table: one process, then ranks, of as many threads together."""
    source, out = directory / "hf", directory / "out"
    shutil.rmtree(directory, ignore_errors=True)
    models.write(models.spec(size), source, shard=200 * 10**6)
    command = timing.convert(source, out, "megatron_mcore", "--target-tp", "2", "--target-pp", "4")
    alone, one, two = timing.in_turn(runs, [
        (lambda: [*command, "--threads", "2"], out),
        (lambda: on_ranks(1, [*command, "--threads", "2"]), out),
        (lambda: on_ranks(2, [*command, "--threads", "1"]), out),
    ])  # fmt: skip
    rows = []
    for name, kept in (("one process", alone), ("torchrun, 1 rank", one), ("torchrun, 2 ranks", two)):
        seconds, cpu = (median(getattr(run, what) for run in kept) for what in ("seconds", "cpu"))
        against = timing.ratios(kept, alone)
        rows.append(f"| {size} HF -> mcore TP2 PP4, {name} | {seconds:.1f} s | {against} | {cpu:.1f} s |")
        print(rows[-1], flush=True)
    shutil.rmtree(directory)
    return rows


def plans(directory: Path) -> list[str]:
    """Rows of a Markdown table: what 64 ranks would write and read."""
    source, out = directory / "hf", directory / "out"
    shutil.rmtree(directory, ignore_errors=True)
    models.write(models.spec("DeepSeek-V3"), source, sparse=True)
    rows = []
    for name, (saver, *flags) in TARGETS.items():
        command = [sys.executable, "-m", "ckptconv", "plan", *timing.convert(source, out, saver, *flags)[3:]]
        began = time.perf_counter()
        ran = subprocess.run([*command, "--ranks", "64", "--json"], capture_output=True, text=True)
        seconds = time.perf_counter() - began
        plan = json.loads(ran.stdout)  # printed, even if the disk here is too small for it
        files, written, read = ([rank[what] for rank in plan["ranks"]] for what in ("files", "written", "read"))
        between = [f"{min(values) / 1e9:.1f} to {max(values) / 1e9:.1f} GB" for values in (written, read)]
        rows.append(
            f"| {name}, {plan['source']['bytes'] / 1e12:.2f} TB | {seconds:.0f} s | {min(files)} to {max(files)} of "
            f"{sum(files)} | {between[0]} | {between[1]} | {sum(read) / 1e12:.2f} TB |"
        )
        print(rows[-1], flush=True)
    shutil.rmtree(directory)
    return rows


if __name__ == "__main__":
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--size", choices=models.SIZES, default="8GB")
    given.add_argument("--runs", type=int, default=5)
    given.add_argument("--directory", type=Path, default=Path("/tmp/ckptconv-bench"))
    wanted = given.parse_args()
    print("\n".join(PLAN_HEAD))
    plans(wanted.directory)
    print("\n".join(HEAD))
    scaling(wanted.size, wanted.runs, wanted.directory)
