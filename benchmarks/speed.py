"""Conversions against `cp -r` of the same bytes, both ending in a sync, in turn in one run, start-up included.

    python benchmarks/speed.py [--size 8GB] [--runs 5] [--directory /tmp/ckptconv-bench]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path
from statistics import median

import models
import timing


def measure(size: str, runs: int, directory: Path) -> list[str]:
    """Rows of a Markdown table: conversion, seconds, seconds of cp, ratio, CPU seconds of both."""
    source, middle, out, copy = (directory / name for name in ("hf", "mcore", "out", "copy"))
    shutil.rmtree(directory, ignore_errors=True)
    models.write(models.spec(size), source)
    there = ("--target-tp", "2", "--target-pp", "2")
    subprocess.run(timing.convert(source, middle, "megatron_mcore", *there), check=True, capture_output=True)
    cases = {
        f"{size} HF -> mcore TP2 PP2": (source, "megatron_mcore", there),
        f"{size} mcore TP2 PP2 -> HF": (middle, "hf", ()),
        f"{size} mcore TP2 PP2 -> TP4 PP1": (middle, "megatron_mcore", ("--target-tp", "4", "--target-pp", "1")),
    }
    rows = []
    for name, (folder, saver, flags) in cases.items():
        ours, theirs = timing.in_turn(
            runs,
            [
                (lambda f=folder, s=saver, g=flags: timing.convert(f, out, s, *g), out),
                (lambda f=folder: ["cp", "-r", str(f), str(copy)], copy),
            ],
        )
        seconds = [median(run.seconds for run in kept) for kept in (ours, theirs)]
        cpu = [median(run.cpu for run in kept) for kept in (ours, theirs)]
        rows.append(
            f"| {name} | {seconds[0]:.1f} s | {seconds[1]:.1f} s | {timing.ratios(ours, theirs)} "
            f"| {cpu[0]:.1f} s / {cpu[1]:.1f} s |"
        )
        print(rows[-1], flush=True)
    shutil.rmtree(directory)
    return rows


HEAD = ["| conversion | wall | `cp -r` + `sync` | ratio, median (min to max) | CPU, ours / cp |",
        "| --- | --- | --- | --- | --- |"]  # fmt: skip

if __name__ == "__main__":
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--size", choices=models.SIZES, default="8GB")
    given.add_argument("--runs", type=int, default=5)
    given.add_argument("--directory", type=Path, default=Path("/tmp/ckptconv-bench"))
    wanted = given.parse_args()
    print("\n".join(HEAD))
    measure(wanted.size, wanted.runs, wanted.directory)
