"""Peak memory by model size: anonymous + shared memory of the whole process tree, sampled every 20 ms.

    python benchmarks/memory.py [--sizes 0.5GB 2GB 8GB] [--directory /tmp/ckptconv-bench]

Beside ours: what a plain script does, which reads with the safetensors library and writes with torch.save.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import models
import timing

PLAIN = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
state = {}
for path in Path(sys.argv[1]).glob("*.safetensors"):
    state.update(load_file(path))
Path(sys.argv[2]).mkdir()
torch.save({"model": {k: v.clone() for k, v in state.items()}}, sys.argv[2] + "/model.pt")
"""
HEAD = ["| source | HF -> mcore TP2 PP2 | mcore -> HF | `load_file` + `torch.save` |", "| --- | --- | --- | --- |"]


def measure(sizes: list[str], directory: Path) -> list[str]:
    """Rows of a Markdown table: peak MiB by conversion."""
    rows = []
    for size in sizes:
        shutil.rmtree(directory, ignore_errors=True)
        source, middle, out = (directory / name for name in ("hf", "mcore", "out"))
        models.write(models.spec(size), source)
        flags = ("--target-tp", "2", "--target-pp", "2")
        there = timing.timed(timing.convert(source, middle, "megatron_mcore", *flags), watch=True)
        back = timing.timed(timing.convert(middle, out, "hf"), watch=True)
        shutil.rmtree(out)
        shutil.rmtree(middle)
        plain = timing.timed([sys.executable, "-c", PLAIN, str(source), str(out)], watch=True)
        peaks = [f"{run.memory / 2**20:.0f} MiB" for run in (there, back, plain)]
        rows.append(f"| {size} | {' | '.join(peaks)} |")
        print(rows[-1], flush=True)
    shutil.rmtree(directory)
    return rows


if __name__ == "__main__":
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--sizes", nargs="+", choices=models.SIZES, default=["0.5GB", "2GB", "8GB"])
    given.add_argument("--directory", type=Path, default=Path("/tmp/ckptconv-bench"))
    wanted = given.parse_args()
    print("\n".join(HEAD))
    measure(wanted.sizes, wanted.directory)
