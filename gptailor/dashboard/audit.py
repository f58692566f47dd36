"""Who changed what: a line for every action that was asked of the dashboard, also for those that were refused.

The file lies beside the runs, is only ever added to, and is readable by the server's own user alone. Values are cut and
escaped, so that no name can forge a second line.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from pathlib import Path

from gptailor.trial import now

NAME = "audit.jsonl"
MAX_BYTES = 5 * 1024**2
KEPT_FILES = 10
LONGEST = 300


def record(root: Path, who: str, action: str, run_id: str, outcome: str) -> None:
    """Add a line to `root`/audit.jsonl.

    Where it cannot be written, the line goes to the server's own output: a full disk must not keep anybody from
    stopping a run.
    """
    entry = {"time": now().isoformat(timespec="milliseconds"), "who": who, "action": action}
    entry |= {"run": run_id, "outcome": outcome}
    line = json.dumps({name: value[:LONGEST] for name, value in entry.items()}) + "\n"  # ASCII: all else is escaped
    try:
        root.mkdir(parents=True, exist_ok=True)
        _append(root / NAME, line.encode())
    except OSError as error:
        logging.getLogger(__name__).error("the audit log cannot be written (%s): %s", error.strerror, line.strip())


def _append(path: Path, line: bytes) -> None:
    while True:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            here = os.fstat(handle)
            if not path.exists() or not os.path.samestat(here, path.stat()):
                continue  # somebody else has just moved it away
            if here.st_size and here.st_size + len(line) > MAX_BYTES:
                _move_on(path)
                continue
            os.write(handle, line)
            os.fsync(handle)
            return
        finally:
            os.close(handle)


def _move_on(path: Path) -> None:
    """audit.jsonl becomes audit.jsonl.1, that .2, and so on; the oldest is gone."""
    for number in range(KEPT_FILES - 1, 0, -1):
        older = path.with_name(f"{path.name}.{number}")
        if older.exists():
            os.replace(older, path.with_name(f"{path.name}.{number + 1}"))
    os.replace(path, path.with_name(f"{path.name}.1"))
