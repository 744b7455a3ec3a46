"""Read a written checkpoint back through its own loader and compare digests with those of the stream it was made of."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ckptconv import files, metadata, plugins
from ckptconv.checksum import whole
from ckptconv.engine import Engine, Job, default_threads
from ckptconv.errors import VerifyError, some
from ckptconv.lazy import LazyTensor
from ckptconv.messages import check, expected

if TYPE_CHECKING:
    from ckptconv.team import Team


class _Digests:
    """A queue that digests what is put into it: the receiving end of a verification."""

    def __init__(self, engine: Engine, skipped: Callable[[int], bool]) -> None:
        self.found: dict[str, dict[str, str]] = {}
        self._engine, self._skipped, self._count = engine, skipped, 0
        self._wanted: Any = None

    def put(self, item: Any) -> None:
        """Take metadata, a message or `done`."""
        if self._wanted is None:
            known = metadata.read(item)
            assert known is not None  # our own loaders always send it
            self._wanted = expected(known.spec)
        elif isinstance(item, dict):
            want = next(self._wanted)
            self._count += 1
            if self._skipped(self._count - 1):
                return
            found = self.found.setdefault(want.name, {})
            for key, tensor in check(item, want).items():
                self._engine.submit([self._job(found, key, tensor)])

    @staticmethod
    def _job(found: dict[str, str], key: str, tensor: LazyTensor) -> Job:
        def done(runs: list[list[int]]) -> None:
            found[key] = f"crc32:{whole(runs, tensor.nbytes):08x}"

        return Job(tensor, [], [(0, tensor.rows)], done)


def verify(
    directory: str, loader: str, digests: dict[str, dict[str, str]], threads: int | None, team: Team | None = None
) -> int:
    """Compare a directory with `digests`; returns how many tensors are equal. Raises VerifyError.

    The processes of a team take messages in turns.
    """
    rank, ranks = (team.rank, team.ranks) if team else (0, 1)
    plugin = plugins.find("loader", loader)
    parser = ArgumentParser()
    plugin.add_arguments(parser)
    args = Namespace(load_dir=directory, dtype_name=None, **vars(parser.parse_args([])))
    files.reset()
    with Engine(threads or default_threads(), lambda output: None, lambda count: None) as engine:
        queue = _Digests(engine, lambda number: number % ranks != rank)
        plugin.run(queue, args)
        engine.drain()
    own = {message: keys for n, (message, keys) in enumerate(digests.items()) if n % ranks == rank}
    different = [
        f"{message}/{key}"
        for message in {**own, **queue.found}
        for key in {**own.get(message, {}), **queue.found.get(message, {})}
        if own.get(message, {}).get(key) != queue.found.get(message, {}).get(key)
    ]
    if different:
        raise VerifyError(
            f"{directory}: read back, {len(different)} tensors differ from what was sent: {some(different)}. "
            "The disk or memory may be faulty: do not use this checkpoint."
        )
    if team:
        team.say(f"verified/{rank}")
        for other in range(ranks):
            team.hear(f"verified/{other}")
    return sum(len(keys) for keys in digests.values())
