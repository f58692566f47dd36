"""Who the workers are and what they do: heard from them, asked of the scheduler, written for the dashboard to read.

`workers.json` in the run's folder is a glance, not a record: it is there while the engine is, and is written anew every
few seconds. Which worker scored a trial is stored with the trial.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gptailor.store.folder import RunFolder, write_atomically

if TYPE_CHECKING:
    from distributed import Client

    from gptailor.scoring.cluster.worker import Answer

LOOK_EVERY = 2.0
"""Seconds."""


@dataclass
class Member:
    """A worker. since: when it began what it does; joined: when it was first seen; times are seconds since 1970.

    state: idle, opening (its family) or scoring. memory: bytes of its process. seconds: at work on trials.
    """

    name: str
    host: str
    joined: float
    device: str = ""
    state: str = "idle"
    trial_id: int | None = None
    since: float = 0.0
    done: int = 0
    seconds: float = 0.0
    memory: int = 0


class WorkerStatuses:
    """The workers of a run by their address. Heard from in one thread, looked at in another."""

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.workers
        self._members: dict[str, Member] = {}
        self._gate = threading.Lock()
        self._looked = -LOOK_EVERY

    @property
    def n_workers(self) -> int:
        return len(self._members)

    def heard(self, event: tuple[float, dict[str, Any]]) -> None:
        """A worker says what it does now."""
        at, said = event
        with self._gate:
            member = self._members.get(said["worker"])
            if member is not None:
                member.trial_id, member.since = said["trial_id"], at
                is_at_work = said["trial_id"] is not None or said["is_opening"]
                member.state = "opening" if said["is_opening"] else "scoring" if is_at_work else "idle"

    def did(self, answer: Answer) -> None:
        """A worker has ended a trial, or its part of one."""
        with self._gate:
            for member in self._members.values():
                if member.name == answer.worker:
                    member.done += 1
                    member.seconds += answer.stitch_seconds + answer.evaluate_seconds
                    member.device = answer.device or member.device

    def look(self, client: Client | None, now: bool = False) -> None:
        """Ask the scheduler who is there, not more often than is useful, and write it down."""
        if client is None or (not now and time.monotonic() - self._looked < LOOK_EVERY):
            return
        self._looked = time.monotonic()
        try:
            there = client.scheduler_info(n_workers=-1)["workers"]
        except Exception:  # the connection is being lost; whoever waits for a trial finds out
            return
        with self._gate:
            for address in self._members.keys() - there.keys():
                del self._members[address]
            for address, facts in there.items():
                fresh = Member(str(facts["name"]), str(facts["host"]), time.time())
                self._members.setdefault(address, fresh).memory = int(facts["metrics"].get("memory", 0))
            text = json.dumps({"at": time.time(), "workers": [asdict(m) for m in self._members.values()]})
        with suppress(OSError):  # a full disk; it is for looking at only
            write_atomically(self._path, text, durable=False)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
