"""Where a process's seconds go: each counts once, for the part of the work that is going on just then."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from enum import StrEnum


class Part(StrEnum):
    """What a run's process does, in the order of its life."""

    START = "start"  # from the command on: imports, the run file, the preflight
    WAITING = "waiting"  # for its device, the end of a pause, room on a disk
    LOADING = "loading"  # digests, models, benchmarks
    REFERENCES = "references"  # what the trials are measured against, and the order of the examples
    SUGGEST = "suggest"  # the next plans: SMAC asked and told, a baseline's cut made
    STITCH = "stitch"
    SCORE = "score"  # with workers all their time, stitching included
    STORE = "store"  # journal, database, summary
    SELECTION = "selection"
    HELD_OUT = "held-out"
    OTHER = "other"


class Stopwatch:
    """Seconds by part of the thread that made it; what other threads do meanwhile is not counted twice."""

    def __init__(self, began: datetime | None = None, part: Part = Part.OTHER) -> None:
        """began: when the process did, if that was before now; until now it was at `part`."""
        self.began_at = began or datetime.now(UTC)
        self._owner = threading.get_ident()
        self._part = part
        self._since = time.monotonic() - max((datetime.now(UTC) - self.began_at) / timedelta(seconds=1), 0.0)
        self._spent: dict[Part, float] = {}

    @contextmanager
    def of(self, part: Part) -> Iterator[None]:
        """Count what happens inside for this part, except for what is counted for another one within."""
        if threading.get_ident() != self._owner:
            yield
            return
        outer = self._part
        self.turn_to(part)
        try:
            yield
        finally:
            self.turn_to(outer)

    def turn_to(self, part: Part) -> None:
        """Count for this part from now on."""
        self._lap()
        self._part = part

    def move(self, seconds: float, source: Part, target: Part) -> None:
        """Count seconds that went to one part for another: who took them said so afterwards."""
        seconds = min(seconds, self._spent.get(source, 0.0))
        for part, change in ((source, -seconds), (target, seconds)):
            self._spent[part] = self._spent.get(part, 0.0) + change

    def seconds(self) -> dict[Part, float]:
        """Up to now, in the order of Part, of parts that took any."""
        if threading.get_ident() == self._owner:
            self._lap()
        return {part: self._spent[part] for part in Part if self._spent.get(part)}

    def _lap(self) -> None:
        at = time.monotonic()
        self._spent[self._part] = self._spent.get(self._part, 0.0) + at - self._since
        self._since = at
