"""One run at a time on a device (or on the workers of one scheduler), in order of arrival.

Each run that wants a device draws a numbered ticket, a file that it keeps locked while it waits and while it runs: the
lowest ticket that is held has the device. A killed run's ticket is held by nobody and is passed over.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from gptailor.launch.devices import card
from gptailor.launch.engine import asked
from gptailor.launch.process import is_held
from gptailor.store.folder import RunFolder

POLL_SECONDS = 0.2


class StopAsked(Exception):
    """The run was asked to stop while it waited for its device."""


class DeviceQueue:
    """`with DeviceQueue(folder, "cuda:0"):` waits until the device is this run's. Raises StopAsked, OSError.

    A GPU has one queue, by whatever number each run sees it. say: told, for people, which run is waited for.
    should_stop: whether a signal asked for the end of the wait; a stop that was left in the run's folder counts anyway.
    """

    def __init__(
        self,
        folder: RunFolder,
        device: str,
        say: Callable[[str], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.folder = folder
        self._device, self._say, self._should_stop = device, say, should_stop
        self._place = _place(folder.root, card(device))
        self._ticket: Path | None = None
        self._handle = -1

    def __enter__(self) -> DeviceQueue:
        self._place.mkdir(parents=True, exist_ok=True)
        with _counter(self._place):
            # Only under the counter, so that a ticket just drawn is never taken for a dead one.
            for ticket in _tickets(self._place):
                if not is_held(ticket):
                    ticket.unlink()
            last = max((int(ticket.name.partition("-")[0]) for ticket in _tickets(self._place)), default=0)
            self._ticket = self._place / f"{last + 1:08d}-{self.folder.run_id}"
            self._handle = os.open(self._ticket, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._handle, fcntl.LOCK_EX)
        told = ""
        try:
            while ahead := _ahead(self._ticket):
                if (first := _owner(ahead[0])) != told:
                    told = first
                    others = f", and {len(ahead) - 1} more before this one" if len(ahead) > 1 else ""
                    self._say(f"waiting for {self._device}: run {first} has it{others}")
                if self._should_stop() or asked(self.folder, "stop"):
                    raise StopAsked(f"run {self.folder.run_id} was stopped while it waited for its device")
                time.sleep(POLL_SECONDS)
        except BaseException:  # also Ctrl-C: who does not get in must not leave a ticket
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._ticket is not None:
            self._ticket.unlink(missing_ok=True)
            os.close(self._handle)
            self._ticket = None


def waiting_behind(root: str | Path, run_id: str) -> list[str]:
    """Runs that this one waits for, the one that has the device first; none where it does not wait."""
    for place in (Path(root) / ".devices").glob("*/"):
        for ticket in _tickets(place):
            if _owner(ticket) == run_id and is_held(ticket) and (ahead := _ahead(ticket)):
                return [_owner(other) for other in ahead]
    return []


def _ahead(ticket: Path) -> list[Path]:
    return [other for other in _tickets(ticket.parent) if other.name < ticket.name and is_held(other)]


def _owner(ticket: Path) -> str:
    return ticket.name.partition("-")[2]


def _place(root: Path, device: str) -> Path:
    return root / ".devices" / re.sub(r"[^A-Za-z0-9.]+", "-", device)


def _tickets(place: Path) -> list[Path]:
    return sorted(place.glob("[0-9]*-*"))


@contextmanager
def _counter(place: Path) -> Iterator[None]:
    handle = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
