"""Runs of the command line that may be killed, starved or lied to, and checks of what is left of them.

A run is a session of its own with a mark in its environment, by which every process of it can be found afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
import zlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import inprocess
from ckptconv import files, plugins
from ckptconv.errors import CkptconvError
from ckptconv.files import PARTIAL
from ckptconv.spec import ModelSpec, Rope

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = Path(__file__).parent / "plugins"
MARK = "CKPTCONV_FAILURE_TEST"
#: Seconds a run may take in all, and its last process may outlive the first. Runs take about one.
LIMIT, LINGER = 25.0, 5.0
TRACKER = "latest_checkpointed_iteration.txt"
#: Relative path -> (bytes, crc).
Tree = dict[str, tuple[int, int]]


def spec(**changes: Any) -> ModelSpec:
    """A model of 17 MB and 8 layers: 12 messages, each of several blocks."""
    return ModelSpec(
        family="llama", num_layers=8, hidden_size=256, ffn_hidden_size=704, num_attention_heads=8, num_query_groups=8,
        kv_channels=32, vocab_size=4096, max_position_embeddings=4096, seq_length=4096, dtype="bfloat16", rope=Rope(),
    ).replace(**changes)  # fmt: skip


#: Flags of both savers in these tests: 8 rank files, 6 shards.
FLAGS: dict[str, tuple[object, ...]] = {
    "megatron_mcore": ("--target-tp", 2, "--target-pp", 4, "--threads", 2),
    "hf": ("--max-shard-size", "3MB", "--threads", 2),
}
#: The meddling saver takes the flags of both.
MEDDLING = (*FLAGS["megatron_mcore"], *FLAGS["hf"])

#: Messages of `spec()` from the metadata to the final word, and moments in it.
FIRST, MIDDLE, LAST = "1", "6", "last"


def bug(reason: str) -> pytest.MarkDecorator:
    """What the product does not do yet."""
    return pytest.mark.xfail(strict=True, reason=reason)


@dataclass(frozen=True)
class Ended:
    """A run that is over: its exit code, what it said, how long it took, and how long its last process stayed."""

    code: int
    out: str
    err: str
    seconds: float
    lingered: float

    @property
    def message(self) -> str:
        """The one error, with the lines that belong to it."""
        assert "Traceback" not in self.err, self.err
        found = re.findall(r"^ckptconv: error: .*", self.err, re.MULTILINE | re.DOTALL)
        assert len(found) == 1, self.err
        assert self.err.count("ckptconv: error:") == 1, self.err
        return str(found[0])

    def failed(self, *words: str, code: int | None = None) -> Ended:
        """Assert that it failed with one message that has all `words` (regular expressions)."""
        assert self.code != 0, self.err
        assert code is None or self.code == code, (self.code, self.err)
        for word in words:
            assert re.search(word, self.message), (word, self.message)
        return self

    def succeeded(self) -> Ended:
        assert self.code == 0, self.err
        assert "Traceback" not in self.err, self.err
        return self


class Run:
    """One running command line."""

    def __init__(
        self, words: Sequence[object], env: Mapping[str, str] | None = None, prefix: Sequence[str] = (),
        preexec: Callable[[], None] | None = None, path: Path | None = None,
    ) -> None:  # fmt: skip
        self.mark = uuid.uuid4().hex
        modules = os.pathsep.join(map(str, [ROOT / "src", PLUGINS, *([path] if path else [])]))
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "PYTEST_"))}
        environment |= {"PYTHONPATH": modules, MARK: self.mark, **(env or {})}
        self._log = Path(tempfile.gettempdir(), f"{MARK.lower()}-{self.mark}")
        self._shm = tempfile.mkdtemp(prefix="ckptconv-shm-")
        own = [*_own_shm(), self._shm] if _own_shm() and not prefix else []
        self._began = time.monotonic()
        with open(self._log, "wb") as err:
            self.process = subprocess.Popen(
                [*prefix, *own, sys.executable, "-m", "ckptconv", *map(str, words)],
                stdin=subprocess.DEVNULL, stdout=err, stderr=err, env=environment, start_new_session=True,
                preexec_fn=preexec,
            )  # fmt: skip

    def pids(self) -> list[int]:
        """Every live process with this run's mark in its environment."""
        return marked(self.mark)

    def signal(self, number: signal.Signals, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.process.pid, number)

    def wait(self, limit: float = LIMIT, linger: float = LINGER) -> Ended:
        """Wait for the first process, then for all others.

        Whatever is still there after the limits is a failure, and so is what is left in /dev/shm.
        """
        try:
            code = self.process.wait(limit)
            over = time.monotonic()
            while left := self.pids():
                assert time.monotonic() - over < linger, f"still there: {[describe(pid) for pid in left]}"
                time.sleep(0.02)
            done = time.monotonic()
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {limit} s: {[describe(pid) for pid in self.pids()]}\n{self._log.read_text()}"
            ) from None
        finally:
            self._end()
            self.process.wait()
            text = self._log.read_text(errors="replace")
            self._log.unlink()
            left = os.listdir(self._shm)
            shutil.rmtree(self._shm)
        assert not left, f"left in /dev/shm: {left}"
        return Ended(code, text, text, over - self._began, done - over)

    def _end(self) -> None:
        """Kill what is left, the process last that removes what the others leave in /dev/shm."""
        for patience in range(20, 0, -1):
            for pid in self.pids():
                tracker = "resource_tracker" in describe(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 0 if tracker and patience > 1 else signal.SIGKILL)
            if not self.pids():
                return
            time.sleep(0.1)


def run(*words: object, limit: float = LIMIT, linger: float = LINGER, **options: Any) -> Ended:
    """Run the command line to its end."""
    return Run(words, **options).wait(limit, linger)


def inside(*words: object) -> Ended:
    """The same in this process, for refusals and for runs that only follow the one that was meddled with."""
    began = time.monotonic()
    if str(PLUGINS) not in sys.path:
        sys.path.append(str(PLUGINS))
    done = inprocess.here(*words)
    text = done.stdout + done.stderr
    return Ended(done.returncode, text, text, time.monotonic() - began, 0.0)


def marked(mark: str) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdecimal() and f"{MARK}={mark}".encode() in Path(f"/proc/{entry}/environ").read_bytes():
                found.append(int(entry))
    return found


def describe(pid: int) -> str:
    with contextlib.suppress(OSError):
        return f"{pid}: {Path(f'/proc/{pid}/cmdline').read_bytes().replace(bytes(1), b' ').decode()}"
    return f"{pid}: gone"


@functools.cache
def _own_shm() -> list[str]:
    """A prefix that gives a command a /dev/shm of its own, the directory named next; empty where that is forbidden."""
    for flags in ("-m", "-rm"):
        prefix = ["unshare", flags, "bash", "-c", 'mount --bind "$0" /dev/shm && exec "$@"']
        with contextlib.suppress(FileNotFoundError), tempfile.TemporaryDirectory() as directory:
            code = "import multiprocessing as m; m.get_context('spawn').Lock()"
            if not subprocess.run([*prefix, directory, sys.executable, "-c", code], capture_output=True).returncode:
                return prefix
    return []


def tree(directory: Path, without: Sequence[str] = (PARTIAL,)) -> Tree:
    """Relative path -> (bytes, crc) of every file. The order of keys in a provenance file is left out of account."""
    return {
        str(path.relative_to(directory)): (path.stat().st_size, zlib.crc32(_content(path)))
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.relative_to(directory).parts[0] not in without
    }


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    return json.dumps(json.loads(data), sort_keys=True).encode() if path.name == "ckptconv.json" else data


def untouched(directory: Path) -> dict[str, tuple[int, int, int]]:
    """What must not change in a source: size, time and content of every file."""
    return {name: (*known, (directory / name).stat().st_mtime_ns) for name, known in tree(directory, ()).items()}


class _Drain:
    """Takes what a loader sends and reads every byte of it."""

    def __init__(self) -> None:
        self.done = False

    def put(self, item: Any) -> None:
        from ckptconv import lazy

        self.done = item == "done"
        if isinstance(item, dict):
            for key, tensor in item.items():
                if key != "name":
                    lazy.equal(tensor, lazy.Zeros(tensor.dtype, tensor.shape))


def load(directory: Path, loader: str) -> None:
    """Read a checkpoint through a built-in loader, in this process. Raises CkptconvError."""
    plugin = plugins.find("loader", loader)
    parser = ArgumentParser()
    plugin.add_arguments(parser)
    files.reset()
    queue = _Drain()
    try:
        plugin.run(queue, Namespace(load_dir=str(directory), dtype_name=None, **vars(parser.parse_args([]))))
    finally:
        files.reset()
    assert queue.done


def loads(directory: Path, loader: str) -> bool:
    try:
        load(directory, loader)
    except (CkptconvError, FileNotFoundError):
        return False
    return True


def words(saver: str, source: Path, target: Path, *more: object, loader: str = "meddling") -> list[object]:
    """A conversion in lockstep: the queue holds one message, so the saver is where the loader is."""
    through = ["--through", other(saver)] if loader == "meddling" else []
    return [
        "--loader", loader, *through, "--saver", saver, *FLAGS.get(saver, MEDDLING),
        "--load-dir", source, "--save-dir", target, "--max-queue-size", 1, *more,
    ]  # fmt: skip


def other(saver: str) -> str:
    """The loader of the format that a saver does not write."""
    return "hf" if saver == "megatron_mcore" else "megatron_mcore"


def check_incomplete(target: Path, collected: bool = False) -> None:
    """Nothing here may be taken for a complete checkpoint: by our loaders, by transformers, Megatron or torch.

    `collected`: everything was written and flushed, and is just being renamed into place.
    """
    if not target.exists():
        return
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", TRACKER):
        assert not (target / name).exists(), f"{target / name} is there"
    partial = target / PARTIAL
    inside = () if collected else (*target.glob("iter_*"), partial, *partial.glob("iter_*"))
    for directory in (target, *inside):
        for loader in ("hf", "megatron_mcore"):
            if directory.is_dir() and loads(directory, loader):
                # A rank directory of the staging area, when all were written and are about to be published.
                assert directory.parent == partial, f"{directory} is complete for loader {loader}"
                assert set(finished(target)) == {str(p.relative_to(partial)) for p in directory.rglob("*.pt")}
    if not collected:
        assert not [path for path in target.rglob("*.pt") if PARTIAL not in path.parts]
        for path in partial.rglob("*.pt"):
            # One rank may be complete, but then it is to the last byte.
            assert not loadable(path) or zipfile.ZipFile(path).testzip() is None, f"{path} is damaged and can be loaded"


def loadable(path: Path) -> bool:
    """Whether torch.load reads a file."""
    import torch

    with contextlib.suppress(Exception):
        torch.load(path, map_location="cpu", weights_only=False)
        return True
    return False


def finished(target: Path) -> dict[str, int]:
    """Files that an interrupted run has finished, by its own account."""
    journal = target / PARTIAL / "journal.json"
    known: dict[str, int] = json.loads(journal.read_text())["finished"] if journal.exists() else {}
    return known
