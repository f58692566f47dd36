"""A run's journal: every event of a run, one fsynced line each, before it reaches the database.

It is what a damaged, locked or lost database is recreated from, so it is only ever appended to, its torn last line is
tolerated, and every line carries a checksum, so that a flipped byte is noticed and costs one event.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptailor.store.connection import StoreFull, StoreMissing, StoreNewer, StoreUnwritable

FORMAT = 2
"""Version of a line, raised when the meaning of its events changes. 2: `forgotten` takes rows out again."""

Event = dict[str, Any]
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CHECKSUM = re.compile(rb',"crc":"([0-9a-f]{8})"\}$')


@dataclass
class JournalContents:
    """events in order; damaged: line numbers (from 1) that were passed over; end: bytes up to the last whole line."""

    events: list[Event] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    end: int = 0

    @property
    def last(self) -> int:
        """Number of the last event, 0 in an empty journal."""
        return int(self.events[-1]["n"]) if self.events else 0


def write_journal(path: Path, events: Iterable[Event], replace: bool = False) -> None:
    """A whole journal at once, there with all its events or not at all. A replaced one is kept as `*.damaged`.

    Raises StoreFull, StoreUnwritable; FileExistsError where there is one and it is not to be replaced.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.write_bytes(b"")
        append(fresh, events)
        if replace:
            if path.exists():
                os.replace(path, path.with_name(f"{path.name}.damaged"))
            os.replace(fresh, path)
        else:
            os.link(fresh, path)
        _sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)


def append(path: Path, events: Iterable[Event]) -> None:
    """Write events with one fsync: all of them, or none. Raises StoreFull, StoreUnwritable."""
    data = b"".join(map(_encode, events))
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        start = os.fstat(handle).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(handle, data[written:])
            os.fsync(handle)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, start)  # half a batch must not be followed by the next one
            raise _unwritable(path, error) from error
    finally:
        os.close(handle)


def read_journal(path: Path) -> JournalContents:
    """Every event that can be read; a torn last line is left out. Raises StoreMissing, StoreNewer."""
    contents = JournalContents()
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                contents.end += len(line)
                event = _decode(line[:-1])
                if event is None:
                    contents.damaged.append(number)
                else:
                    contents.events.append(event)
    except FileNotFoundError as error:
        raise StoreMissing(f"there is no journal at {path}") from error
    return contents


def cut_torn_line(path: Path, contents: JournalContents) -> None:
    """Remove what a killed writer left behind the last whole line."""
    if path.exists() and path.stat().st_size > contents.end:
        os.truncate(path, contents.end)


def _encode(event: Event) -> bytes:
    # Lone surrogates (undecodable bytes in a message) have no UTF-8 form: they become question marks.
    body = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body)


def _decode(line: bytes) -> Event | None:
    found = _CHECKSUM.search(line)
    if not found or int(found[1], 16) != zlib.crc32(line[: found.start()] + b"}"):
        return None
    event = json.loads(line)
    if event["v"] > FORMAT:
        raise StoreNewer(f"the journal was written by a newer gptailor (format {event['v']}, this one knows {FORMAT})")
    return event


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(path: Path, error: OSError) -> StoreUnwritable:
    if error.errno in _FULL:
        return StoreFull(f"the disk is full: {path} cannot be written ({error.strerror}); free some space")
    return StoreUnwritable(f"{path} cannot be written: {error.strerror}")
