"""Run a loader here and a saver in a process of its own, and make both end well or both end at once.

The saver's process reports on a pipe: `ready`, `error`, `done`. Whatever goes wrong on either side stops the other
and leaves one error: that of the side that failed first.
"""

from __future__ import annotations

import _thread
import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
import traceback
import types
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from typing import Any

from ckptconv import errors, measure, plugins, together, transport
from ckptconv.errors import CkptconvError, ProtocolError, UsageError
from ckptconv.plugins import Plugin
from ckptconv.signals import deaf
from ckptconv.staging import Staging, Stopped, is_wrong
from ckptconv.team import Team

log = logging.getLogger("ckptconv")

#: Seconds a saver is given to clean up after its loader has failed.
GRACE = 10.0


@dataclass
class Report:
    """What a conversion did. Bytes are those written; memory is anonymous + shared, of all processes together."""

    seconds: float = 0.0
    bytes: int = 0
    peak_memory: int = 0
    saver: dict[str, Any] = field(default_factory=dict)


class _Saver:
    """The saver's process as the parent sees it."""

    def __init__(self, plugin: Plugin, args: Namespace, team: Team | None = None) -> None:
        context = transport.context()
        resource_tracker.ensure_running()  # before the first semaphore, which it would remove if we were killed
        try:
            self.queue = context.Queue(maxsize=max(1, args.max_queue_size))
            self.returned = context.Queue()
        except OSError as error:
            text = f"/dev/shm: no semaphore can be made: {errors.why(error)} `ckptconv doctor` says more."
            raise CkptconvError(text) from error
        self._pipe, child = context.Pipe(duplex=False)
        line = None
        if team is not None:
            asked, pipe = context.Pipe()
            threading.Thread(target=together.serve, args=(asked, team), daemon=True).start()
            line = together.Line(pipe, team.rank, team.ranks)
        self.failure: CkptconvError | None = None
        self.trace = ""
        self.notes: list[str] = []
        self.result: dict[str, Any] | None = None
        self.ended = threading.Event()
        self._noticed = threading.Event()
        self._process = context.Process(
            target=_child, args=(plugin.name, args, self.queue, self.returned, child, os.getpid(), line), name="saver"
        )
        self._name = plugin.name
        self._theirs = [child, *([pipe] if line else [])]

    def start(self) -> None:
        """Start the process. Signals wait until it can be stopped."""
        with _held():
            # The child must not get a Ctrl-C before it can ignore it.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                with _without_main():
                    self._process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            for end in self._theirs:
                end.close()
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Read the pipe until the process is gone; then wake the loader if it went badly."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                kind, value = self._pipe.recv()
                if kind == "done":
                    self.result = value
                elif kind == "note":
                    self.notes = value
                elif kind == "error":
                    code, message, self.trace = value
                    self.failure = errors.BY_EXIT_CODE.get(code, CkptconvError)(message)
        self._process.join()
        code = self._process.exitcode
        if self.failure is None and (self.result is None or code):
            how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
            self.failure = CkptconvError(
                f"the saver process ({self._name}) {how} before it had finished. Nothing it wrote is taken for "
                "complete. After SIGKILL, see whether the machine ran out of memory. --resume goes on where it stopped."
            )
        self.ended.set()
        # A loader that sends or waits notices by itself; one that is busy elsewhere is woken.
        if self.failure and not self._noticed.wait(1.0):
            _thread.interrupt_main()

    def alive(self) -> None:
        """Raise Stopped when the saver is gone."""
        if self.ended.is_set():
            self._noticed.set()
            raise Stopped("the saver ended.")

    def stop(self, wrong: bool) -> None:
        """End the saver because the loader failed: ask, wait, then insist. `wrong`: there is nothing to continue."""
        self._noticed.set()
        self.queue.cancel_join_thread()
        self.returned.cancel_join_thread()
        if self._process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGUSR1 if wrong else signal.SIGTERM)
            if not self.ended.wait(GRACE):
                self._process.kill()
                self.ended.wait(GRACE)

    def join(self, alive: Callable[[], None] | None = None) -> None:
        """Wait for a saver that has everything; `alive` raises when it waits in vain."""
        while not self.ended.wait(0.1):
            if alive:
                alive()
        self._noticed.set()


def run(loader: Plugin, saver: Plugin, args: Namespace, team: Team | None = None) -> Report:
    """Convert, with the other processes of a team if there is one.

    Raises CkptconvError (of either side, or of another process) or KeyboardInterrupt; the saver is gone afterwards.
    """
    with _interrupted_once():
        return _run(loader, saver, args, team)


def _run(loader: Plugin, saver: Plugin, args: Namespace, team: Team | None) -> Report:
    started = time.monotonic()
    _check_memory(args, loader, saver)
    process = _Saver(saver, args, team) if team else _Saver(saver, args)

    def alive() -> None:
        if team:
            team.check()
        process.alive()

    memory = measure.Memory()
    sender = transport.Sender(
        process.queue, process.returned, checking=args.checking, dtype=args.dtype_name,
        loader=loader.name, memory=_budget(args, saver), alive=alive, model_type=args.model_type,
        spoken=args.queue_dialect, kv_channels=args.kv_channels,
    )  # fmt: skip
    try:
        process.start()
        loader.run(sender, args)
        if sender.gave_up:
            raise ProtocolError(f"loader {loader.name}: gave up (it sent 'exit'); see what it printed above.")
        if not sender.finished:
            sender.put("done")
        process.join(alive=team.check if team else None)
        if process.failure:
            raise process.failure
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        saver_failed = process.failure is not None
        with deaf() if team else contextlib.nullcontext():
            if team:
                team.fail(process.failure or error, is_wrong(process.failure or error))
            elsewhere = team.failure if team else None
            process.stop(wrong=elsewhere.wrong if elsewhere else isinstance(error, CkptconvError))
            if team:
                team.ended()
        if elsewhere:
            errors.annotate(elsewhere, process.notes)
            raise elsewhere from None
        if saver_failed and process.failure:
            if process.trace:
                log.debug("saver:\n%s", process.trace)
            raise process.failure from None
        if isinstance(error, SystemExit):
            error = CkptconvError(f"loader {loader.name} called exit({error.code}); see what it printed above.")
        errors.annotate(error, process.notes)
        raise error from error.__cause__
    finally:
        sender.close()
    result = process.result or {}
    peak = memory.stop() + sender.shared_bytes + int(result.get("peak_memory", 0))
    return Report(time.monotonic() - started, int(result.get("bytes", 0)), peak, result)


#: What a saver's process holds for itself: one of ours, and one of others that has imported torch.
OURS, WITH_TORCH = 96 << 20, 384 << 20


def room(args: Namespace, saver: Plugin) -> int:
    """Bytes that a saver's process holds for itself."""
    return OURS if saver.ours and not args.dtype_name else WITH_TORCH


def _check_memory(args: Namespace, loader: Plugin, saver: Plugin) -> None:
    """Raise UsageError for a --max-memory that two processes without any tensor do not keep."""
    needed = measure.resident() + room(args, saver)
    if loader.ours and saver.ours and args.max_memory is not None and args.max_memory < needed:
        raise UsageError(
            f"--max-memory: {args.max_memory / 1e6:.0f} MB, but the processes hold up to {needed / 1e6:.0f} MB "
            "themselves. Give at least as much."
        )


def _budget(args: Namespace, saver: Plugin) -> transport.Budget:
    return transport.Budget(args.max_memory, room(args, saver), copied=not saver.ours)


@contextlib.contextmanager
def _interrupted_once() -> Iterator[None]:
    """SIGTERM ends us as Ctrl-C does: through the code that cleans up, which further signals do not disturb."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    came = []

    def handler(number: int, frame: object) -> None:
        if _waiting is not None:
            _waiting.append(number)
            return
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        came.append(number)
        raise Terminated(number) if number == signal.SIGTERM else KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers if main}
    try:
        yield
    finally:
        for number, old in before.items() if not came else ():
            signal.signal(number, old)


#: Signals that came while they are held.
_waiting: list[int] | None = None


@contextlib.contextmanager
def _held() -> Iterator[None]:
    """Signals that came meanwhile come behind it. (A mask holds them from one thread only.)"""
    global _waiting
    _waiting = []
    try:
        yield
    finally:
        came, _waiting = _waiting or [], None
        for number in came[:1]:
            signal.raise_signal(number)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """A new process would run the program that called us again; a saver needs nothing of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")


def _child(
    name: str, args: Namespace, queue: Any, returned: Any, pipe: Any, parent: int, line: together.Line | None
) -> None:
    """The saver's process: run the plugin, report how it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it too, and tells us

    def terminated(number: int, frame: object) -> None:
        raise Terminated(number)

    def refused(number: int, frame: object) -> None:
        raise ProtocolError("the loader failed.")

    signal.signal(signal.SIGTERM, terminated)
    signal.signal(signal.SIGUSR1, refused)
    logging.basicConfig(level=args.log_level, format="%(message)s", stream=sys.stderr)
    memory = measure.Memory()

    def alive() -> None:
        if os.getppid() != parent:
            raise Stopped("the loader's process is gone: it was killed, perhaps for lack of memory.")

    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    receiver = None
    try:
        saver = plugins.find("saver", name)
        if saver.ours:
            gc.disable()  # nothing here makes reference cycles worth the search
        receiver = transport.Receiver(queue, returned, checking=args.checking, alive=alive,
                                      slices=saver.slices, most=args.max_memory,
                                      spoken=args.queue_dialect)  # fmt: skip
        if line:
            args.output = together.output(args, line)
        result = saver.run(receiver, args)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # it is done: only the report is left
        try:
            receiver.rest()
        except ProtocolError as error:
            raise ProtocolError(f"saver {name}: {error}") from None
        result = dict(result) if isinstance(result, dict) else {}
        pipe.send(("done", {**result, "peak_memory": memory.stop()}))
    except Terminated as error:
        _report(pipe, "note", errors.notes(error))
        _quit(queue, returned, 1)
    except together.Elsewhere as error:
        _report(pipe, "note", errors.notes(error))
        _quit(queue, returned, 1)
    except CkptconvError as error:
        text = "\n".join([str(error), *errors.notes(error)])
        if isinstance(error, Stopped) or not _report(pipe, "error", (error.exit_code, text, traceback.format_exc())):
            print(f"ckptconv: error: {text}", file=sys.stderr)  # nobody else is left to say it
        _quit(queue, returned, error.exit_code)
    except SystemExit as error:
        _report(pipe, "error", (1, f"saver {name} called exit({error.code}); see what it printed above.", ""))
        _quit(queue, returned, 1)
    except OSError as error:
        text = f"{error.filename or 'system'}: {errors.why(error)}"
        _report(pipe, "error", (CkptconvError.exit_code, text, traceback.format_exc()))
        _quit(queue, returned, CkptconvError.exit_code)
    except BaseException as error:
        # A bug, ours or a plugin's: it keeps its traceback.
        traceback.print_exc()
        _report(pipe, "error", (1, f"saver {name} failed with {type(error).__name__}: {error} (traceback above).", ""))
        _quit(queue, returned, 1)


def _report(pipe: Any, kind: str, value: Any) -> bool:
    """Tell the parent; False when there is none."""
    try:
        pipe.send((kind, value))
    except OSError:
        return False
    return True


def _quit(queue: Any, returned: Any, code: int) -> None:
    """Leave without waiting for what nobody will read."""
    queue.cancel_join_thread()
    returned.cancel_join_thread()
    sys.stderr.flush()
    os._exit(code)


def _leave_with(parent: int) -> None:
    """When the parent is gone, give the main thread time to notice and clean up, then leave."""
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(GRACE)
    os._exit(1)


def check_target(args: Namespace) -> None:
    """What can be said about --save-dir before anything is fetched. Raises UsageError, TargetError."""
    Staging(args.save_dir, overwrite=args.overwrite, resume=args.resume)


def check_usage(args: Namespace, loader: Plugin) -> None:
    """What can be said about the flags before anything is read. Raises UsageError."""
    if not os.path.isdir(args.load_dir) and not (loader.files and os.path.isfile(args.load_dir)):
        what = "is a file, expected a directory" if os.path.exists(args.load_dir) else "does not exist"
        raise UsageError(f"--load-dir {args.load_dir}: {what}.")
    if os.path.exists(args.save_dir) and os.path.samefile(args.load_dir, args.save_dir):
        raise UsageError(f"--save-dir {args.save_dir} is the --load-dir: choose another directory.")
