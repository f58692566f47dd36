"""A trial's time: what takes too long is told to stop, and what does not stop then is given up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

LATE_SECONDS = 30.0
"""Seconds beyond its time after which a trial is taken to hang: a pack, or a batch that is generated, may end first."""


class TookTooLong(Exception):
    """A trial's time is up."""


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
