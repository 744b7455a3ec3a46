"""The command line in the process of the tests: the saver runs in a thread, on the same checked endpoints.

A conversion costs some 30 ms so, and about a second in processes of its own. For tests of what is read and written.
Not for tests of the processes themselves (signals, kills, memory, plugins that are found on a path): they take the
fixture `cli`, which starts `python -m ckptconv`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from ckptconv import cli, conversion, errors, files
from ckptconv.errors import CkptconvError, ProtocolError
from ckptconv.loaders import megatron_gaudi
from ckptconv.plugins import Plugin
from ckptconv.staging import Stopped
from ckptconv.transport import Receiver


class _Queue(queue.Queue):  # type: ignore[type-arg]
    """Between threads; what crosses is pickled all the same, so that the ends share nothing."""

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put(pickle.dumps(item), block, timeout)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        data = super().get(block, timeout)
        if data is None:
            raise queue.Empty
        return pickle.loads(data)

    def end(self) -> None:
        """Forget what is in it and wake who waits: there is nothing to get."""
        with self.mutex:
            self.queue.clear()
            self.queue.append(None)
            self.not_empty.notify_all()
            self.not_full.notify_all()

    def cancel_join_thread(self) -> None:
        """Queues between processes have this."""


class _Saver:
    """What `conversion._Saver` is to the loader, with a thread in the place of the process."""

    def __init__(self, plugin: Plugin, args: Namespace) -> None:
        self.queue, self.returned = _Queue(max(1, args.max_queue_size)), _Queue()
        self.failure: CkptconvError | None = None
        self.trace = ""
        self.notes: list[str] = []
        self.result: dict[str, Any] | None = None
        self.ended = threading.Event()
        self._stop: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(plugin, pickle.loads(pickle.dumps(args))))

    def start(self) -> None:
        self._thread.start()

    def _run(self, plugin: Plugin, args: Namespace) -> None:
        try:
            receiver = Receiver(self.queue, self.returned, checking=args.checking, alive=self._loader_alive,
                                slices=plugin.slices, most=args.max_memory,
                                spoken=args.queue_dialect)  # fmt: skip
            result = plugin.run(receiver, args)
            try:
                receiver.rest()
            except ProtocolError as error:
                raise ProtocolError(f"saver {plugin.name}: {error}") from None
            self.result = dict(result) if isinstance(result, dict) else {}
        except conversion.Terminated as error:
            self.notes = errors.notes(error)
        except CkptconvError as error:
            self.trace = traceback.format_exc()
            self.failure = errors.BY_EXIT_CODE[error.exit_code]("\n".join([str(error), *errors.notes(error)]))
        except SystemExit as error:
            self.failure = CkptconvError(f"saver {plugin.name} called exit({error.code}); see what it printed above.")
        except OSError as error:
            self.trace = traceback.format_exc()
            self.failure = CkptconvError(f"{error.filename or 'system'}: {errors.why(error)}")
        except BaseException as error:
            traceback.print_exc()
            what = f"{type(error).__name__}: {error}"
            self.failure = CkptconvError(f"saver {plugin.name} failed with {what} (traceback above).")
        finally:
            self.ended.set()
            self.queue.end()

    def _loader_alive(self) -> None:
        if self._stop:
            raise self._stop

    def alive(self) -> None:
        if self.ended.is_set():
            raise Stopped("the saver ended.")

    def stop(self, wrong: bool) -> None:
        self._stop = ProtocolError("the loader failed.") if wrong else conversion.Terminated(signal.SIGTERM)
        self.queue.end()
        self._thread.join()

    def join(self, alive: object = None) -> None:
        self._thread.join()


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """Log to what is now sys.stderr, as the process of the command line does."""
    log, handler = logging.getLogger("ckptconv"), logging.StreamHandler(sys.stderr)
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def main(words: Sequence[object]) -> int:
    """What `ckptconv.cli.main` does; what is said goes to sys.stdout and sys.stderr."""
    files.reset()  # an earlier run may have had another file of the same path open
    try:
        with contextlib.ExitStack() as end, _logged():
            end.enter_context(mock.patch.object(conversion, "_Saver", _Saver))
            # Nobody pulls the plug. Two conversions of 2000 small files take 20 s instead of 12 on a busy disk.
            end.enter_context(mock.patch.object(os, "fsync"))
            # What is removed when a process ends is removed when this run does.
            end.enter_context(mock.patch.object(megatron_gaudi, "atexit", Namespace(register=end.callback)))
            return cli.main([str(word) for word in words])
    finally:
        files.reset()


def here(*words: object) -> subprocess.CompletedProcess[str]:
    """The same as a result of `subprocess.run`, for tests of the messages: in the place of the fixture `cli`."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(words)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
