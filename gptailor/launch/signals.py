"""Signals that ask for the end of long work, and signs of life meanwhile."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

HEARTBEAT_SECONDS = 5.0


ONE_PRESS = 1.0
"""Seconds within which signals count as one: Ctrl-C and `timeout` reach a process and the one that passes it on."""


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM asks the work to stop; a later one interrupts it where it is."""
    asked = threading.Event()
    first = 0.0

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal first
        if not asked.is_set():
            asked.set()
            first = time.monotonic()
            print("stopping after the work at hand; once more to stop at once", file=sys.stderr, flush=True)
        elif time.monotonic() - first > ONE_PRESS:
            raise KeyboardInterrupt

    kept = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextmanager
def heartbeat(beat: Callable[[], None]) -> Iterator[None]:
    """beat() every few seconds meanwhile."""
    over = threading.Event()

    def keep_on() -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            beat()

    thread = threading.Thread(target=keep_on, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
