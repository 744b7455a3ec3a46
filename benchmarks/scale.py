"""Sources as big as they come, as files of holes with real headers: planned whole, and their first layers streamed.

    python benchmarks/scale.py [--models 70B DeepSeek-V3] [--layers 4] [--directory /tmp/ckptconv-bench]

Planned: the source is opened and checked, and every file and slice of a Megatron checkpoint is laid out. Streamed: a
saver that is a third party's gets real tensors of the first layers, big ones in slices of experts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import models
import timing

#: What a target of this size is cut into.
LAYOUTS = {"70B": ("8", "4", "1"), "DeepSeek-V3": ("8", "1", "32")}
HEAD = ["| source | planned | peak | first layers streamed | peak |", "| --- | --- | --- | --- | --- |"]
PLAN = """
import sys
from argparse import ArgumentParser
from ckptconv.loaders.hf import opened
from ckptconv.messages import expected
from ckptconv.savers import _megatron, megatron_mcore
source = opened(sys.argv[1])
for message in expected(source.spec):
    source.tensors(message)
parser = ArgumentParser()
megatron_mcore.add_arguments(parser)
tp, pp, ep = sys.argv[2:]
args = parser.parse_args(["--target-tp", tp, "--target-pp", pp, "--target-ep", ep])
args.save_dir, args.dtype_name = "planned", None
target = _megatron.Target(source.metadata(), args)
print(len(target.plans), sum(plan.size for plan in target.plans.values()))
"""


def measure(names: list[str], layers: int, directory: Path) -> list[str]:
    """Rows of a Markdown table."""
    rows = []
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    for name in names:
        shutil.rmtree(directory, ignore_errors=True)
        source, out = directory / "hf", directory / "out"
        size = models.write(models.spec(name), source, sparse=True)
        layout = LAYOUTS[name]
        planned = timing.timed([sys.executable, "-c", PLAN, str(source), *layout], watch=True)
        counting = timing.convert(source, out, "counting", "--count-layers", str(layers))
        streamed = timing.timed(counting, watch=True, may_fail=True)
        counted = json.loads((out / "counted.json").read_text())
        tp, pp, ep = layout
        rows.append(
            f"| {name}, {size / 1e12:.2f} TB | {planned.seconds:.1f} s (TP{tp} PP{pp} EP{ep}) "
            f"| {planned.memory / 2**20:.0f} MiB | {layers} layers, {counted['bytes'] / 1e9:.1f} GB in "
            f"{counted['messages']} messages, {counted['seconds']:.1f} s | {streamed.memory / 2**20:.0f} MiB |"
        )
        print(rows[-1], flush=True)
    shutil.rmtree(directory)
    return rows


if __name__ == "__main__":
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--models", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    given.add_argument("--layers", type=int, default=5)
    given.add_argument("--directory", type=Path, default=Path("/tmp/ckptconv-bench"))
    wanted = given.parse_args()
    print("\n".join(HEAD))
    measure(wanted.models, wanted.layers, wanted.directory)
