"""What a loader sends, taken in its own process: for whatever looks at a checkpoint instead of writing one.

The loader runs in a thread and puts into the same checked endpoints as in a conversion, so that loaders of others work,
too. Tensors are lazy: nothing is read before it is asked for.
"""

from __future__ import annotations

import queue as queues
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ckptconv import files
from ckptconv.errors import CkptconvError, ProtocolError
from ckptconv.lazy import LazyTensor, Literal, as_bytes, as_numpy, to_torch
from ckptconv.messages import Expected
from ckptconv.metadata import Metadata
from ckptconv.plugins import Plugin
from ckptconv.staging import Stopped
from ckptconv.transport import Budget, Receiver, Sender


@dataclass(frozen=True)
class Message:
    """One checked message. Its tensors can be read until the next one is asked for; for longer when `lasting`."""

    want: Expected
    tensors: dict[str, LazyTensor]
    lasting: bool

    def keep(self, key: str) -> LazyTensor:
        """A tensor that can be read as long as it is held: copied into memory where its sender takes its own back."""
        tensor = self.tensors[key]
        if self.lasting:
            return tensor
        return Literal(bytes(as_bytes(as_numpy(to_torch(tensor)))), tensor.dtype, tensor.shape)


class Stream:
    """A model as its loader sends it: use as a context manager, then iterate once.

    args: what a loader gets from the command line; `arguments` makes them. Raises CkptconvError of any kind, when
    entered or while messages are taken.
    """

    metadata: Metadata

    def __init__(self, loader: Plugin, args: Namespace) -> None:
        self._loader, self._args = loader, args
        self._queue: queues.Queue[Any] = queues.Queue(4)
        self._returned: queues.Queue[int] = queues.Queue()
        self._over = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._receiver = Receiver(self._queue, self._returned, checking=args.checking, alive=self._loader_alive)

    def __enter__(self) -> Stream:
        files.reset()  # what a path names may have changed since an earlier stream
        self._thread.start()
        try:
            self.metadata = self._receiver.metadata()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def __iter__(self) -> Iterator[Message]:
        for want, wire in self._receiver.messages():
            yield Message(want, wire.tensors, wire.buffer is None)
            self._receiver.release(wire)

    def _run(self) -> None:
        args = self._args
        sender = Sender(
            self._queue, self._returned, checking=args.checking, dtype=args.dtype_name, loader=self._loader.name,
            memory=Budget(), alive=self._reader_alive, model_type=args.model_type, spoken=args.queue_dialect,
            kv_channels=args.kv_channels,
        )  # fmt: skip
        try:
            self._loader.run(sender, args)
            if sender.gave_up:
                raise ProtocolError(f"loader {self._loader.name}: gave up (it sent 'exit'); see what it printed above.")
            if not sender.finished:
                sender.put("done")
        except Stopped:
            pass
        except SystemExit as error:
            said = f"loader {self._loader.name} called exit({error.code}); see what it printed above."
            self._failure = CkptconvError(said)
        except BaseException as error:  # handed to the thread that takes
            self._failure = error

    def _reader_alive(self) -> None:
        if self._over.is_set():
            raise Stopped("nobody takes messages any more.")

    def _loader_alive(self) -> None:
        """Called while there is nothing to take."""
        if not self._thread.is_alive() and self._queue.empty():
            raise self._failure or ProtocolError(f"loader {self._loader.name}: ended without a word.")

    def _stop(self) -> None:
        self._over.set()
        self._thread.join(timeout=5)


def arguments(loader: Plugin, load_dir: str, said: Namespace | None = None) -> Namespace:
    """What a loader gets from the command line: the defaults of every flag, less those that `said` has."""
    from ckptconv import cli

    own = ArgumentParser(add_help=False, conflict_handler="resolve")
    loader.add_arguments(own)
    defaults = {action.dest: action.default for action in own._actions}
    common = vars(cli.parser().parse_args([]))
    return Namespace(**{**common, **defaults, **vars(said or Namespace()), "load_dir": load_dir, "dtype_name": None})
