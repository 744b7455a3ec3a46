"""Read a written checkpoint back through its own loader and compare digests with those of the stream it was made of."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from ckptconv import files, metadata, plugins
from ckptconv.engine import Engine, Job, default_threads
from ckptconv.errors import VerifyError, some
from ckptconv.lazy import LazyTensor
from ckptconv.messages import check, expected


class _Digests:
    """A queue that digests what is put into it: the receiving end of a verification."""

    def __init__(self, engine: Engine) -> None:
        self.found: dict[str, dict[str, str]] = {}
        self._engine = engine
        self._wanted: Any = None

    def put(self, item: Any) -> None:
        """Take metadata, a message or `done`."""
        if self._wanted is None:
            known = metadata.read(item)
            assert known is not None  # our own loaders always send it
            self._wanted = expected(known.spec)
        elif isinstance(item, dict):
            want = next(self._wanted)
            found = self.found.setdefault(want.name, {})
            for key, tensor in check(item, want).items():
                self._engine.submit([self._job(found, key, tensor)])

    @staticmethod
    def _job(found: dict[str, str], key: str, tensor: LazyTensor) -> Job:
        return Job(tensor, [], tensor.rows, lambda crc: found.__setitem__(key, f"crc32:{crc:08x}"))


def verify(directory: str, loader: str, digests: dict[str, dict[str, str]], threads: int | None) -> int:
    """Compare a directory with `digests`; returns how many tensors are equal. Raises VerifyError."""
    plugin = plugins.find("loader", loader)
    parser = ArgumentParser()
    plugin.add_arguments(parser)
    args = Namespace(load_dir=directory, dtype_name=None, **vars(parser.parse_args([])))
    files.reset()
    with Engine(threads or default_threads(), lambda output: None, lambda count: None) as engine:
        queue = _Digests(engine)
        plugin.run(queue, args)
        engine.drain()
    different = [
        f"{message}/{key}"
        for message in {**digests, **queue.found}
        for key in {**digests.get(message, {}), **queue.found.get(message, {})}
        if digests.get(message, {}).get(key) != queue.found.get(message, {}).get(key)
    ]
    if different:
        raise VerifyError(
            f"{directory}: read back, {len(different)} tensors differ from what was sent: {some(different)}. "
            "The disk or memory may be faulty: do not use this checkpoint."
        )
    return sum(len(keys) for keys in digests.values())
