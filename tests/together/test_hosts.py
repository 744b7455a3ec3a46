"""Two hosts, each a network namespace, with a cable between them: over it goes what torchrun and the ranks say.

Files are shared, as they are on a cluster. One of the hosts dies, or the cable is pulled.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from launch import CASES, PATIENCE, PROMPT, SOON, Job, Tree, journals, same, stamp, stamps, torchrun, until

from inprocess import main

Sources = dict[str, Path]
Whole = Callable[[str], Tree]
ADDRESSES = ("10.213.7.1", "10.213.7.2")
MOMENT, FINISHED = 8, 6


@dataclass(frozen=True)
class Host:
    """A network namespace: its name, and that of its end of the cable."""

    name: str
    link: str

    @property
    def path(self) -> str:
        return f"/var/run/netns/{self.name}"

    def prefix(self) -> list[str]:
        return ["ip", "netns", "exec", self.name]

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", "-n", self.name, *words], check=True)

    def pids(self) -> list[int]:
        return [int(pid) for pid in subprocess.check_output(["ip", "netns", "pids", self.name]).split()]

    def kill(self) -> None:
        """Everything at once, as when the power fails."""
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two that reach one another at ADDRESSES. Skips where there can be none."""
    mark = uuid.uuid4().hex[:8]
    both = Host(f"ckptconv-{mark}-0", f"ck{mark}0"), Host(f"ckptconv-{mark}-1", f"ck{mark}1")
    try:
        for host in both:
            try:
                subprocess.run(["ip", "netns", "add", host.name], check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
        cable = ["ip", "link", "add", both[0].link, "netns", both[0].name, "type", "veth", "peer", "name", both[1].link,
                 "netns", both[1].name]  # fmt: skip
        done = subprocess.run(cable, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no veth pair here: {done.stderr.strip()}")
        for host, address in zip(both, ADDRESSES, strict=True):
            host.ip("addr", "add", f"{address}/24", "dev", host.link)
            host.ip("link", "set", host.link, "up")
            host.ip("link", "set", "lo", "up")
        yield both
    finally:
        for host in both:
            if os.path.exists(host.path):
                host.kill()
                subprocess.run(["ip", "netns", "del", host.name], check=True)


def words(sources: Sources, target: Path, *more: object) -> list[object]:
    return ["--load-dir", sources["hf"], "--save-dir", target, "--max-queue-size", 1, *CASES["megatron_mcore"], *more]


def c10d(number: int) -> list[object]:
    """Flags of torchrun on one of the hosts; the first has the rendezvous."""
    return [
        "--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29400", "--rdzv-id", "job",
        "--rdzv-conf", f"is_host={1 - number}", "--local-addr", ADDRESSES[number],
    ]  # fmt: skip


def static(number: int) -> list[object]:
    return ["--nnodes", 2, "--node-rank", number, "--master-addr", ADDRESSES[0], "--master-port", 29400]


def test_torchrun(hosts: tuple[Host, Host], sources: Sources, target: Path, whole: Whole) -> None:
    want = whole("megatron_mcore")
    agents = [
        torchrun(*words(sources, target, "--verify"), ranks=1, flags=c10d(n), prefix=host.prefix())
        for n, host in enumerate(hosts)
    ]
    said = [agent.communicate(timeout=PATIENCE)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert "".join(said).count("hf -> megatron_mcore:") == 1, said
    same(target, want)


def test_torchrun_on_a_host_that_dies(
    hosts: tuple[Host, Host], sources: Sources, target: Path, whole: Whole, tmp_path: Path
) -> None:
    """The first one, with the agent that has the rendezvous, and rank 0."""
    want, note = whole("megatron_mcore"), tmp_path / "note"
    agents = [
        torchrun(*words(sources, target), ranks=1, flags=static(n), prefix=host.prefix(), hold={1: (MOMENT, note)})
        for n, host in enumerate(hosts)
    ]
    until(lambda: note.exists() and len(journals(target)) >= FINISHED, "nothing was finished")
    hosts[0].kill()
    began = time.monotonic()
    said = [agent.communicate(timeout=PATIENCE)[0] for agent in agents][1]
    assert time.monotonic() - began < PROMPT
    until(lambda: not hosts[1].pids(), "there are still processes")
    assert agents[1].returncode != 0
    assert re.search("error: the store of torchrun's rendezvous.*--resume", said), said
    assert re.search("traceback : the store of torchrun's rendezvous", said), said  # in its report
    assert "TCPStore.cpp" not in said, said
    resumed((), sources, target, want)


def test_a_host_dies(
    hosts: tuple[Host, Host], sources: Sources, target: Path, whole: Whole, tmp_path: Path
) -> None:
    """The second one; torchrun, where it runs there, is gone with it."""
    want, note = whole("megatron_mcore"), tmp_path / "note"
    with job(hosts, words(sources, target), note) as running:
        until(lambda: note.exists() and len(journals(target)) >= FINISHED, running.said)
        began = time.monotonic()
        hosts[1].kill()
        check(running, 0, began)
    resumed((), sources, target, want)


def test_the_cable_is_pulled(
    hosts: tuple[Host, Host], sources: Sources, target: Path, whole: Whole, tmp_path: Path
) -> None:
    """Nobody is told: neither host hears of the other any more."""
    want, note = whole("megatron_mcore"), tmp_path / "note"
    with job(hosts, words(sources, target), note) as running:
        until(lambda: note.exists() and len(journals(target)) >= FINISHED, running.said)
        began = time.monotonic()
        hosts[1].ip("link", "set", hosts[1].link, "down")
        for rank in range(2):
            check(running, rank, began)
    hosts[1].ip("link", "set", hosts[1].link, "up")
    resumed(hosts, sources, target, want)


def job(hosts: tuple[Host, Host], flags: list[object], note: Path) -> Job:
    """A rank on each host, without agents."""
    return Job(
        2, flags, here=1, address=ADDRESSES[0], enter={rank: host.path for rank, host in enumerate(hosts)},
        hold={1: (MOMENT, note)}, constants=SOON, properly=True,
    )  # fmt: skip


def check(running: Job, rank: int, began: float) -> None:
    """The rank ended soon, and says why and how to go on."""
    ended = running.ends(rank)
    what = "store of torchrun's rendezvous does not answer any more" if rank else "rank 1 has not been heard of for"
    ended.failed(what, "finished files are kept", "--resume")
    assert ended.at - began < PROMPT


def resumed(hosts: tuple[Host, ...], sources: Sources, target: Path, want: Tree) -> None:
    """Go on with a rank on each of the hosts, or in this process."""
    assert os.listdir(target) == [".ckptconv-partial"]
    kept = stamps(target)
    assert len(kept) >= FINISHED
    flags = words(sources, target, "--resume")
    if hosts:
        enter = {rank: host.path for rank, host in enumerate(hosts)}
        with Job(2, flags, here=1, address=ADDRESSES[0], enter=enter) as running:
            running.succeeded()
    else:
        assert main(flags) == 0
    assert {name: stamp(target / name) for name in kept} == kept
    same(target, want)
