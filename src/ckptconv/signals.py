"""Signals that have to wait."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

#: What ends a process from outside, and how a loader ends its saver.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Ignore what would end the process while it puts things in order: by then it is quicker to finish."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING if main}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
