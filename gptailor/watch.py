"""What goes on beside the search's loop: signals that ask for its end, signs of life, a trial that takes too long."""

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
LATE_SECONDS = 30.0
"""Seconds beyond its time after which a trial is taken to hang: a pack, or a batch that is generated, may end first."""


class TookTooLong(Exception):
    """A trial's time is up."""


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM asks the search to stop; a later one interrupts it where it is."""
    asked = threading.Event()
    first = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not asked.is_set():
            asked.set()
            first = time.monotonic()
            print("stopping after the examples at hand; once more to stop at once", file=sys.stderr, flush=True)
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


class TimeLimit:
    """`with TimeLimit(seconds, hung) as limit:` lets `limit.check()` raise TookTooLong once the time is up.

    Work that does not even come back to check() hangs: LATE_SECONDS later hung() is called, in a thread of its own, and
    must end the process, for what hangs cannot be interrupted. seconds None: no limit.
    """

    def __init__(self, seconds: float | None, hung: Callable[[], None]) -> None:
        self._seconds, self._hung = seconds, hung
        self._until = float("inf")
        self._gate = threading.Lock()
        self._is_over = False

    def __enter__(self) -> TimeLimit:
        if self._seconds is not None:
            self._until = time.monotonic() + self._seconds
            self._timer = threading.Timer(self._seconds + LATE_SECONDS, self._ring)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._gate:  # who comes back while hung() is at it waits here for the end
            self._is_over = True
        if self._seconds is not None:
            self._timer.cancel()

    def check(self) -> None:
        if time.monotonic() > self._until:
            raise TookTooLong(f"longer than the {self._seconds:g} s that a trial may take")

    def _ring(self) -> None:
        with self._gate:
            if not self._is_over:
                self._hung()
