"""Model work beside a search (export, evaluate, generate) as processes that outlive the page.

A job is a folder: what was asked, the output, the lock that says it lives, and, once it ended, its exit code. The shell
writes the code, so that it is there whatever became of the Python process.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from gptailor.errors import UserError
from gptailor.launch.events import Event, read_events
from gptailor.launch.process import is_held, python, signal_holder, spawn, wait_until
from gptailor.store.folder import RUN_ID, RunFolder, write_atomically
from gptailor.trial import now

# $0: the file for the exit code; the command follows. Written whole: beside, then moved.
_WRAPPER = '"$@"; code=$?; echo "$code" > "$0.new" && mv "$0.new" "$0"'
_TAIL = 64 * 1024


class JobStatus(StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    LOST = "lost"  # killed before it could say how it ended


@dataclass(frozen=True)
class Job:
    """One piece of work, in its folder `path`."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def log(self) -> Path:
        return self.path / "log"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def exit(self) -> Path:
        return self.path / "exit"

    @property
    def asked(self) -> Path:
        return self.path / "job.json"


@dataclass(frozen=True)
class JobState:
    """arguments: of `python -m gptailor`. exit_code: None until it ended by itself. output: the log's last part."""

    status: JobStatus
    arguments: tuple[str, ...]
    started_at: datetime | None
    exit_code: int | None
    output: str

    @property
    def events(self) -> list[Event]:
        """What a command with `--json` has said so far, as far as the log's last part goes back."""
        return read_events(self.output)


def start_job(place: RunFolder | Path, arguments: Sequence[str], name: str) -> Job:
    """Run `python -m gptailor ARGUMENTS` under `place`, once: a job of this name that still runs is returned as it is.

    A job of the same name that ended is replaced. Raises UserError for a name that is no name, or an unwritable place.
    """
    if not RUN_ID.fullmatch(name):
        raise UserError(f"job name {ascii(name)[:60]}: must be 1-96 lower-case letters, digits or '-'")
    job = Job(_jobs(place) / name)
    try:
        job.path.mkdir(parents=True, exist_ok=True)
        if is_held(job.lock):
            return job
        job.exit.unlink(missing_ok=True)
        job.log.write_bytes(b"")
        command = ["/bin/sh", "-c", _WRAPPER, str(job.exit.resolve()), *python(*arguments)]
        started = {"arguments": list(arguments), "started_at": now().isoformat()}
        write_atomically(job.asked, json.dumps(started))
        spawn(command, job.lock, job.log)
    except OSError as error:
        raise UserError(f"job {name}: cannot be started: {error}") from error
    return job


def job_state(job: Job) -> JobState:
    """How a job is doing. Raises UserError where there is no such job."""
    alive = is_held(job.lock)  # before the exit code, which is written before the lock is let go
    try:
        started = json.loads(job.asked.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"job {job.name}: there is none in {job.path.parent}") from error
    try:
        code = int(job.exit.read_text())
    except (OSError, ValueError):
        code = None
    if alive:
        status = JobStatus.RUNNING
    elif code is None:
        status = JobStatus.LOST
    else:
        status = JobStatus.FAILED if code else JobStatus.DONE
    when = datetime.fromisoformat(started["started_at"])
    return JobState(status, tuple(started["arguments"]), when, code, _tail(job.log))


def list_jobs(place: RunFolder | Path) -> list[Job]:
    """Every job under `place`, by name."""
    return [Job(path) for path in sorted(_jobs(place).glob("*/")) if (path / "job.json").exists()]


def stop_job(job: Job, patience: float = 5.0) -> bool:
    """End a job: SIGTERM to its process group, then SIGKILL. Whether it is over."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        signal_holder(job.lock, number)
        if wait_until(lambda: not is_held(job.lock), patience):
            return True
    return False


def _jobs(place: RunFolder | Path) -> Path:
    return (place.path if isinstance(place, RunFolder) else place) / "jobs"


def _tail(log: Path) -> str:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            return file.read(_TAIL).decode("utf-8", "replace")
    except OSError:
        return ""
