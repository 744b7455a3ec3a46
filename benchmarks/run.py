"""Run all benchmarks and write their tables into the README: python benchmarks/run.py [--size 8GB] [--runs 5]."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

import memory
import models
import overhead
import ranks
import scale
import speed

README = Path(__file__).parent.parent / "README.md"


def main() -> None:
    """Measure, then replace what is between the README's markers."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--size", choices=models.SIZES, default="8GB")
    given.add_argument("--runs", type=int, default=5)
    given.add_argument("--directory", type=Path, default=Path("/tmp/ckptconv-bench"))
    wanted = given.parse_args()
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = [
        f"`python benchmarks/run.py --size {wanted.size} --runs {wanted.runs}` on {os.cpu_count()} cores, "
        f"{gigabytes:.0f} GiB, {platform.system()}:",
        "",
        *speed.HEAD, *speed.measure(wanted.size, wanted.runs, wanted.directory),
        "",
        *memory.HEAD, *memory.measure(["0.5GB", "2GB", "8GB"], wanted.directory),
        "",
        *overhead.HEAD, *overhead.measure(wanted.directory),
        "",
        *scale.HEAD, *scale.measure(list(scale.LAYOUTS), 5, wanted.directory),
        "",
        *ranks.PLAN_HEAD, *ranks.plans(wanted.directory),
        "",
        *ranks.HEAD, *ranks.scaling(wanted.size, wanted.runs, wanted.directory),
    ]  # fmt: skip
    before, rest = README.read_text().split("<!-- measured -->")
    after = rest.split("<!-- end -->", 1)[1]
    table = "\n".join(lines)
    README.write_text(f"{before}<!-- measured -->\n{table}\n<!-- end -->{after}")


if __name__ == "__main__":
    main()
