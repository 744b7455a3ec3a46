"""Jobs of several ranks in processes of their own: started, stopped, and what is left of them.

`torchrun` starts them as a user does. `Job` does it with torchrun's environment but without its agent, which stops all
ranks of a machine when one is gone: so a test sees that they end by themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptconv.files import PARTIAL

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: Seconds in which something has to happen on a machine that is busy.
PATIENCE = 120.0
#: Seconds in which all ranks have to be gone after one is; some 2 where nothing else runs.
PROMPT = 60.0
#: A rank that says nothing is taken for dead sooner than elsewhere.
SOON = {"team.SILENT": 6.0, "team.HEARD": 1.0}
Tree = dict[str, bytes]
#: Saver and flags. hf has a small and a default shard size.
CASES: dict[str, tuple[object, ...]] = {
    "megatron_mcore": ("--saver", "megatron_mcore", "--target-tp", 2, "--target-pp", 4, "--threads", 2),
    "megatron_dist": ("--saver", "megatron_dist", "--threads", 2),
    "hf": ("--saver", "hf", "--max-shard-size", "1600KB", "--threads", 2),
    "hf whole": ("--saver", "hf", "--threads", 2),
}


@dataclass(frozen=True)
class Ended:
    """A rank that is over: its exit code, what it said, and when it ended (monotonic seconds)."""

    code: int
    said: str
    at: float

    @property
    def message(self) -> str:
        """The one error, with the lines that belong to it."""
        assert "Traceback" not in self.said, self.said
        assert self.said.count("ckptconv: error:") == 1, self.said
        return self.said[self.said.index("ckptconv: error:") :]

    def failed(self, *words: str, code: int | None = None) -> Ended:
        """Assert that it failed with one message that has all `words` (regular expressions)."""
        assert self.code != 0, self.said
        assert code is None or self.code == code, (self.code, self.said)
        for word in words:
            assert re.search(word, self.message), (word, self.message)
        return self


class Zygote:
    """A process that has torch imported and forks ranks (zygote.py)."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, **what: Any) -> Any:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, HERE / "zygote.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=environment() | {"TORCH_CPP_LOG_LEVEL": "ERROR"},
            )  # fmt: skip
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        if self._process:
            self._process.communicate()


zygote = Zygote()


def environment(constants: Mapping[str, float] | None = None, hold: Mapping[int, Any] | None = None) -> dict[str, str]:
    """What a rank has in its environment; meddling/sitecustomize.py says what it does with it."""
    asked = {"constants": constants or {}, "hold": {str(k): [n, str(p)] for k, (n, p) in (hold or {}).items()}}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "PYTEST_"))}
    paths = os.pathsep.join(filter(None, map(str, (ROOT / "src", HERE / "meddling", os.environ.get("MEDDLING", "")))))
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CKPTCONV_TEST": json.dumps(asked)}
    return kept | own


class Job:
    """Ranks that have been started, each in a session of its own.

    more: rank -> flags that only that one has; mounts: rank -> (source, target) directories that it sees bound;
    enter: rank -> path of its network namespace; properly: the interpreters end as they do, which takes time.
    """

    def __init__(
        self, ranks: int, words: Sequence[object], *, here: int | None = None, address: str = "127.0.0.1",
        constants: Mapping[str, float] | None = None, hold: Mapping[int, Any] | None = None,
        more: Mapping[int, Sequence[object]] | None = None,
        mounts: Mapping[int, Sequence[tuple[Path, Path]]] | None = None, enter: Mapping[int, str] | None = None,
        properly: bool = False,
    ) -> None:  # fmt: skip
        self._top = Path(tempfile.mkdtemp(prefix="ckptconv-job-"))
        self.pids: list[int] = []
        self._codes: dict[int, tuple[int, float]] = {}
        port = free_port() if address == "127.0.0.1" else 29400
        common = environment(constants, hold) | {
            "TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(here or ranks),
            "MASTER_ADDR": address, "MASTER_PORT": str(port),
        }  # fmt: skip
        for rank in range(ranks):
            self.pids.append(zygote.ask(
                cwd=str(self._top), log=str(self._top / str(rank)),
                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank % (here or ranks))},
                words=[str(word) for word in (*words, *(more or {}).get(rank, ()))],
                mounts=[[str(path) for path in pair] for pair in (mounts or {}).get(rank, ())],
                enter=(enter or {}).get(rank, ""), properly=properly,
                meddling=str(HERE / "meddling" / "sitecustomize.py"),
            ))  # fmt: skip

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *rest: object) -> None:
        for pid in self.pids:
            for each in session(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
        until(self._over, "no end after SIGKILL")
        shutil.rmtree(self._top)

    def saver(self, rank: int) -> int:
        """The process of a rank's saver."""
        (found,) = [pid for pid in session(self.pids[rank]) if "spawn_main" in command(pid)]
        return found

    def signal(self, rank: int, number: signal.Signals, who: str = "loader") -> None:
        """Send a signal to a rank's `loader`, its `saver`, or `both`."""
        loader, saver = self.pids[rank], self.saver(rank)
        for pid in {"loader": [loader], "saver": [saver], "both": [loader, saver]}[who]:
            os.kill(pid, number)

    def _poll(self, rank: int) -> bool:
        if rank not in self._codes:
            code = zygote.ask(poll=self.pids[rank])
            if code is not None:
                self._codes[rank] = code, time.monotonic()
        return rank in self._codes

    def _over(self) -> bool:
        return len([rank for rank in range(len(self.pids)) if self._poll(rank)]) == len(self.pids)

    def said(self) -> str:
        return "\n".join(f"rank {path.name}: {path.read_text()}" for path in sorted(self._top.iterdir()))

    def wait(self) -> list[Ended]:
        """Wait for all ranks and for every process of theirs."""
        until(self._over, self.said)
        return [self.ends(rank) for rank in range(len(self.pids))]

    def ends(self, rank: int) -> Ended:
        """Wait for one rank, and the processes that it has started."""
        until(lambda: self._poll(rank) and not session(self.pids[rank]), self.said)
        return Ended(self._codes[rank][0], (self._top / str(rank)).read_text(), self._codes[rank][1])

    def succeeded(self) -> list[Ended]:
        """Wait; assert that all did well and that only rank 0 has something to say."""
        ended = self.wait()
        assert [one.code for one in ended] == [0] * len(ended), self.said()
        assert [bool(one.said) for one in ended] == [True] + [False] * (len(ended) - 1), self.said()
        return ended


def until(there: Callable[[], Any], said: Any, limit: float = PATIENCE) -> None:
    """Wait for something."""
    end = time.monotonic() + limit
    while not there():
        assert time.monotonic() < end, said() if callable(said) else said
        time.sleep(0.1)


def session(leader: int) -> list[int]:
    """Live processes of a session."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ProcessLookupError):
            if entry.isdecimal():
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader and fields[0] != "Z":
                    found.append(int(entry))
    return found


def command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(bytes(1), b" ").decode()
    return ""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def torchrun(
    *words: object, ranks: int, flags: Sequence[object] = ("--standalone",), prefix: Sequence[str] = (),
    constants: Mapping[str, float] | None = None, hold: Mapping[int, Any] | None = None,
) -> subprocess.Popen[str]:  # fmt: skip
    """Start torchrun; its processes are a session."""
    agent = [sys.executable, "-m", "torch.distributed.run", *flags, "--nproc-per-node", ranks]
    return subprocess.Popen(
        [*prefix, *map(str, agent), "-m", "ckptconv", *map(str, words)], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(constants, hold),
        start_new_session=True,
    )  # fmt: skip


def tree(top: Path) -> Tree:
    """Every file below a directory."""
    return {str(path.relative_to(top)): path.read_bytes() for path in sorted(top.rglob("*")) if path.is_file()}


def same(found: Path, want: Tree) -> None:
    """Assert that a directory is `want`, byte for byte."""
    there = tree(found)
    assert sorted(there) == sorted(want)
    assert not [name for name in want if there[name] != want[name]]


def journals(target: Path) -> dict[str, int]:
    """Files that an unfinished target has finished, of all ranks."""
    found: dict[str, int] = {}
    for path in (target / PARTIAL).glob("journal*.json"):
        found |= json.loads(path.read_bytes())["finished"]
    return found


def stamps(target: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each finished file."""
    return {name: stamp(target / PARTIAL / name) for name in journals(target)}


def stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns
