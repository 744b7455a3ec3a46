"""Whether this machine can convert: versions, memory, disk, limits, and plugins that cannot be used and why.

Exit code 1 when something is wrong.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ckptconv import measure
from ckptconv.commands import _shown

#: Packages: those that every conversion needs, then those that some do, and which.
NEEDED = ("numpy", "torch", "tqdm")
SOME = {
    "safetensors": "not needed to convert",
    "sentencepiece": "tokenizers made from tokenizer.model are checked with it",
    "tiktoken": "tokenizers made from tiktoken files are checked with it",
    "transformers": "not needed to convert",
    "huggingface_hub": "models of the Hugging Face hub",
}
#: Below this much, what may fail.
LEAST_FILES, LEAST_MEMORY, LEAST_DISK = 256, 512 << 20, 1 << 30


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of this command."""
    add = parser.add_argument
    add("directory", metavar="DIR", nargs="?", default=".", help="where checkpoints are written (default: here)")
    add("--json", action="store_true", help="print JSON")


@dataclass
class Found:
    """One thing that was looked at. wrong: what to do about it, empty where all is well."""

    about: str
    what: str
    wrong: str = ""


def run(args: Namespace) -> int:
    """Print what was found; 1 when something is wrong."""
    found = [*_versions(), *_machine(), *_disk(Path(args.directory)), *_plugins()]
    if args.json:
        print(json.dumps([asdict(one) for one in found], indent=1))
    else:
        rows = [(one.about, one.what + (f"\n  WRONG: {one.wrong}" if one.wrong else "")) for one in found]
        print("\n".join(_shown.table(rows)))
    return int(any(one.wrong for one in found))


def _versions() -> Iterator[Found]:
    from ckptconv.writing import version

    yield Found("ckptconv", f"{version()} in {Path(__file__).parent.parent}")
    old = "" if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed."
    yield Found("python", f"{platform.python_version()} ({sys.executable}), {platform.platform()}", old)
    for name in (*NEEDED, *SOME):
        try:
            yield Found("packages", f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            wrong = "It is needed: install it." if name in NEEDED else ""
            yield Found("packages", f"{name} is not installed" + (f" ({SOME[name]})" if name in SOME else ""), wrong)


def _machine() -> Iterator[Found]:
    yield Found("cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}")
    free = measure.available()
    few = f"Conversions take up to {_shown.size(LEAST_MEMORY)}; see --max-memory." if free < LEAST_MEMORY else ""
    yield Found("memory", f"{_shown.size(free)} free", few)
    try:
        shared = shutil.disk_usage("/dev/shm")
        text = f"{_shown.size(shared.total)}, {_shown.size(shared.free)} free; queues' semaphores use little of it"
        full = "Free some: not even semaphores fit." if shared.free < 1 << 20 else ""
        yield Found("/dev/shm", text, full)
    except OSError as error:
        yield Found("/dev/shm", f"{error.strerror}", "Mount it: processes cannot share semaphores without it.")
    try:
        os.close(os.memfd_create("ckptconv-doctor"))
    except OSError as error:
        yield Found("memfd", f"{error.strerror}", "Plugins of others need it; a sandbox may forbid memfd_create.")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = f"Raise it: ulimit -n {max(LEAST_FILES, 1024)}." if 0 <= soft < LEAST_FILES else ""
    yield Found("open files", f"at most {soft} (ulimit -n), {hard} allowed", low)


def _disk(directory: Path) -> Iterator[Found]:
    above = directory.absolute()
    try:
        while not above.exists():
            above = above.parent
        free = shutil.disk_usage(above).free
    except OSError as error:
        yield Found("disk", f"{above}: {error.strerror}", "Choose another directory for --save-dir.")
        return
    wrong = "" if os.access(above, os.W_OK) else "It cannot be written to: choose another directory for --save-dir."
    if not above.is_dir():
        wrong = "It is a file: choose a directory for --save-dir."
    if free < LEAST_DISK and not wrong:
        wrong = "Free space there, or choose another directory for --save-dir."
    yield Found("disk", f"{_shown.size(free)} free at {above}", wrong)


def _plugins() -> Iterator[Found]:
    from ckptconv import plugins

    counts = dict.fromkeys(plugins.FUNCTIONS, 0)
    for kind, name, origin, why in [*plugins.listing(), *plugins.on_path()]:
        if origin == "broken":
            yield Found("plugins", f"{kind} {name}", f"{why}")
        else:
            counts[kind] += 1
            if origin != "built in":
                yield Found("plugins", f"{kind} {name}: {origin}")
    yield Found("plugins", ", ".join(_shown.count(number, kind) for kind, number in counts.items()) + " can be used")
