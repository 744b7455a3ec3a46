"""What does not depend on bytes: start-up, a tiny conversion, the cost of a message, planning a big source.

    python benchmarks/overhead.py [--directory /tmp/ckptconv-bench]
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from statistics import median

import models
import timing

from ckptconv.spec import ModelSpec

HEAD = ["| what | figure |", "| --- | --- |"]


def tiny(layers: int) -> ModelSpec:
    """A model whose bytes do not matter."""
    return models.spec("0.5GB").replace(
        hidden_size=16, ffn_hidden_size=32, num_attention_heads=2, num_query_groups=1, kv_channels=8, vocab_size=64,
        num_layers=layers,
    )  # fmt: skip


def seconds(command: list[str], output: Path | None = None, runs: int = 5) -> float:
    """Median wall time, a sync included."""
    kept = []
    for _ in range(runs):
        kept.append(timing.timed(command).seconds)
        if output:
            shutil.rmtree(output, ignore_errors=True)
    return median(kept)


def measure(directory: Path) -> list[str]:
    """Rows of a Markdown table."""
    shutil.rmtree(directory, ignore_errors=True)
    out = directory / "out"
    few, many = directory / "few", directory / "many"
    models.write(tiny(4), few)
    models.write(tiny(1004), many)
    python = seconds([sys.executable, "-c", "pass"])
    rows = [f"| `ckptconv --help` | {seconds([sys.executable, '-m', 'ckptconv', '--help']) - python:.2f} s + Python |"]
    times = [seconds(timing.convert(folder, out, "megatron_mcore"), out) for folder in (few, many)]
    rows.append(f"| a tiny model, HF -> mcore | {times[0]:.2f} s |")
    rows.append(f"| a message (a layer: 7 tensors into 7 slots) | {(times[1] - times[0]):.2f} ms |")
    shutil.rmtree(directory)
    return rows


if __name__ == "__main__":
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--directory", type=Path, default=Path("/tmp/ckptconv-bench"))
    print("\n".join([*HEAD, *measure(given.parse_args().directory)]))
