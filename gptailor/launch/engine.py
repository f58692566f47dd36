"""A run's engine process: prepared once, started once, alive while it holds the run's lock, stopped step by step."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from gptailor.errors import UserError
from gptailor.launch.process import (
    inherited_lock,
    is_held,
    python,
    read_holder,
    signal_holder,
    spawn,
    take_lock,
    wait_until,
    write_holder,
)
from gptailor.store.folder import STARTED_IN, RunFolder, new_run_id, write_atomically
from gptailor.trial import RunStatus

if TYPE_CHECKING:
    from gptailor.spec.run import RunSpec

LOST: Literal["lost"] = "lost"
"""State of a run that says it is queued, running or paused while no process holds its lock."""
GRACE = 15.0
"""Seconds that a freshly prepared run may be without its first engine before it is lost."""
STOP, PAUSE = "stop", "pause"
Request = Literal["stop", "pause", "resume"]
Spawn = Callable[[list[str], Path, Path], int | None]
"""Starts a command that is to hold a lock and to write to a log; its process id, None where one runs already."""
_ACTIVE = (RunStatus.QUEUED, RunStatus.RUNNING, RunStatus.PAUSED)


class StopResult(StrEnum):
    """What it took to stop an engine."""

    NOT_RUNNING = "not running"
    ASKED = "stopped when asked"
    TERMINATED = "stopped by SIGTERM"
    KILLED = "stopped by SIGKILL"
    STILL_RUNNING = "still running"


def prepare(root: str | Path, spec: RunSpec, token: str | None = None) -> RunFolder:
    """The folder of a new run, with its run file.

    The same token gives the same run, however often and by whomever it is used. Raises UserError where `root` cannot be
    written.
    """
    root = Path(root)
    suffix = hashlib.sha256(token.encode()).hexdigest()[:12] if token else None
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(root):
            if suffix and (known := [name for name in os.listdir(root) if name.endswith(f"-{suffix}")]):
                return RunFolder.of(root, known[0])
            run_id = new_run_id(spec.name, suffix)
            # Made elsewhere and moved, so that nobody sees a run without its run file.
            with tempfile.TemporaryDirectory(dir=root, prefix=".new-") as scratch:
                made = Path(scratch) / run_id
                made.mkdir()
                write_atomically(made / "run.yaml", spec.to_yaml())
                write_atomically(made / STARTED_IN, str(Path.cwd()))
                os.rename(made, root / run_id)
    except OSError as error:
        raise UserError(f"runs folder {root}: no run can be made in it: {error.strerror}") from error
    return RunFolder.of(root, run_id)


def launch(root: str | Path, spec: RunSpec, token: str, spawn: Spawn | None = None) -> tuple[RunFolder, bool]:
    """Prepare and start a run once for one token. Returns its folder, and whether it was this call that started it."""
    folder = prepare(root, spec, token)
    if folder.log.exists():  # it was started before, and may have ended since
        return folder, False
    return folder, start(folder, spawn) is not None


def start(folder: RunFolder, spawn_by: Spawn | None = None) -> int | None:
    """Start the run's engine, also to go on with it: its process id, None where one runs. Raises UserError.

    spawn_by: how, by default process.spawn.
    """
    if not folder.path.is_dir():
        raise UserError(f"run {folder.run_id}: there is none in {folder.root}")
    command = python("engine", folder.run_id, "--runs", str(folder.root.resolve()))
    try:
        if not is_alive(folder):
            _clear(folder, STOP, PAUSE)
        return (spawn_by or spawn)(command, folder.lock, folder.log)
    except OSError as error:
        raise UserError(f"run {folder.run_id}: its engine cannot be started: {error}") from error


class EngineLock:
    """Held by a run's engine for its life, handed over by the process that started it or taken here.

    Raises UserError on entering where another engine holds it.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.handle = -1

    def __enter__(self) -> EngineLock:
        handle = inherited_lock(self.folder.lock)
        try:
            if handle is None:
                handle = take_lock(self.folder.lock, wait=1.0)
                if handle is not None:
                    _clear(self.folder, STOP, PAUSE)  # what was asked of an engine before this one
        except OSError as error:
            raise UserError(f"run {self.folder.run_id}: its folder cannot be written: {error.strerror}") from error
        if handle is None:
            holder = read_holder(self.folder.lock)
            who = f"process {holder.pid} on {holder.host}" if holder else "another process"
            raise UserError(f"run {self.folder.run_id}: {who} is running it already")
        self.handle = handle
        self.is_mine()
        return self

    def is_mine(self) -> None:
        """Note that this process is the one to send signals to."""
        write_holder(self.handle, os.getpid())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.handle)


def is_alive(folder: RunFolder) -> bool:
    """Whether an engine holds this run."""
    return is_held(folder.lock)


def state(folder: RunFolder, status: RunStatus) -> RunStatus | Literal["lost"]:
    """The run's state from what its engine wrote and whether it lives."""
    if status not in _ACTIVE:
        return status
    was_started = read_holder(folder.lock) is not None  # before the lock is looked at: one may start at this moment
    if is_alive(folder):
        return status
    if status is RunStatus.QUEUED and not was_started:
        try:
            age = time.time() - folder.spec.stat().st_mtime
        except OSError:
            return LOST
        if abs(age) < GRACE:  # a file from the future: the clock was set
            return status
    return LOST


def request(folder: RunFolder, what: Request) -> None:
    """Ask the engine to stop, pause, or go on; it looks between batches.

    Raises UserError where the folder is not writable.
    """
    try:
        if what == "resume":
            _clear(folder, PAUSE)
            return
        folder.control.mkdir(exist_ok=True)
        (folder.control / what).touch()
    except OSError as error:
        raise UserError(f"run {folder.run_id}: it cannot be asked to {what}: {error.strerror}") from error


def asked(folder: RunFolder, what: Literal["stop", "pause"]) -> bool:
    """Whether the engine is asked to stop or to pause."""
    return (folder.control / what).exists()


def resume(folder: RunFolder, spawn: Spawn | None = None) -> int | None:
    """Go on: lift a pause, or start the engine where none lives; its process id if it was started. Raises UserError."""
    request(folder, "resume")
    return None if is_alive(folder) else start(folder, spawn)


def stop(folder: RunFolder, patience: float = 8.0) -> StopResult:
    """Ask the engine to stop, SIGTERM after `patience` seconds, SIGKILL after half as many. Raises UserError.

    An engine that had to be killed could not say that it was stopped: then this is written here.
    """
    if not is_alive(folder):
        return StopResult.NOT_RUNNING
    try:
        request(folder, "stop")
        heard_within = patience
    except UserError:  # on a full or read-only disk the request cannot be left; a signal needs no disk
        heard_within = 0.0

    def over() -> bool:
        return not is_alive(folder)

    steps = (
        (StopResult.ASKED, None, heard_within),
        (StopResult.TERMINATED, signal.SIGTERM, patience / 2),
        (StopResult.KILLED, signal.SIGKILL, 5.0),
    )
    for result, number, seconds in steps:
        if number is not None:
            signal_holder(folder.lock, number)
        if wait_until(over, seconds):
            with suppress(OSError):  # a read-only disk holds no requests either
                _clear(folder, STOP, PAUSE)
            if result is not StopResult.ASKED:
                _note_stopped(folder)
            return result
    return StopResult.STILL_RUNNING


def _note_stopped(folder: RunFolder) -> None:
    from gptailor.store.writer import RunWriter  # pandas and DuckDB come with it, which a start does without

    # Nothing stored yet, or somebody started it again: then it is not for us to say.
    with suppress(UserError), EngineLock(folder):
        RunWriter.open(folder).note_stopped()


def delete_run(folder: RunFolder) -> None:
    """Remove a run and all its files. Raises UserError while its engine lives, or where it cannot be removed."""
    folder.refuse_links()
    try:
        handle = take_lock(folder.lock, wait=0.5)  # no engine may start while we are at it
        if handle is None:
            raise UserError(f"run {folder.run_id}: it is running; stop it before you delete it")
        try:
            if any(is_held(lock) for lock in folder.path.glob("jobs/*/lock")):
                raise UserError(f"run {folder.run_id}: a job (an export, say) is at work on it; stop that first")
            gone = folder.root / f".deleted-{folder.run_id}-{os.getpid()}"
            os.rename(folder.path, gone)  # at once for everybody, however long the removal takes
            shutil.rmtree(gone)
        finally:
            os.close(handle)
    except OSError as error:
        raise UserError(f"run {folder.run_id}: it cannot be deleted: {error.strerror}") from error


def _clear(folder: RunFolder, *requests: str) -> None:
    for what in requests:
        (folder.control / what).unlink(missing_ok=True)


@contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """Launches under one root take turns, between threads and processes alike."""
    handle = os.open(root / ".launch.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
