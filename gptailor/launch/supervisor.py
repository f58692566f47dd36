"""A small process beside the engine: it holds the run's lock, and starts the engine anew when that dies.

The engine is gigabytes of memory and other people's kernels: the machine may kill it for its memory, a driver may crash
it, a kernel may never return. None of this can be caught inside. So the work is done by a child process. A child that
dies of a crash is started again and runs the trial it was at once more; one at which it died three times is told so by
GPTAILOR_DEATHS and records that trial as crashed. The child never outlives its parent (Linux sees to that): who kills
the parent has stopped the run.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

import psutil

from gptailor.launch.engine import EngineLock, asked
from gptailor.launch.process import BEGAN, LOCK_FD, python, with_fixed
from gptailor.launch.warm import leave
from gptailor.store.folder import RunFolder

SUPERVISOR = "GPTAILOR_SUPERVISOR"
"""Environment variable: process id of the supervisor, for its child."""
DEATHS = "GPTAILOR_DEATHS"
"""Environment variable: what the engine died of, where it did so DEATHS_AT_A_TRIAL times without ending a trial."""
DEATHS_AT_A_TRIAL = 3
START_ME_AGAIN = 75
"""Exit code (EX_TEMPFAIL) of an engine that cannot go on in its process: what it computed never came back."""
_CRASHES = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
_PR_SET_PDEATHSIG = 1


def is_child() -> bool:
    """Whether this process is the one that a supervisor started for the work. It then dies with the supervisor."""
    if os.environ.get(SUPERVISOR) != str(os.getppid()):
        return False
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.environ[SUPERVISOR] != str(os.getppid()):  # it died in between
            os.kill(os.getpid(), signal.SIGKILL)
    return True


class Child(Protocol):
    """A process that was started or forked."""

    def wait(self) -> int: ...
    def send_signal(self, number: int) -> None: ...


class Forked:
    """A copy of this process that runs a command in an environment of its own, used like a subprocess.Popen."""

    def __init__(self, run: Callable[[list[str]], int], command: list[str], environment: Mapping[str, str]) -> None:
        self._pid = os.fork()
        if not self._pid:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)  # ours pass signals on
            os.environ.clear()
            os.environ.update(environment)
            leave(run, command)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def send_signal(self, number: int) -> None:
        os.kill(self._pid, number)


def supervise(folder: RunFolder, fork: Callable[[list[str]], int] | None = None) -> int:
    """Run the engine of this run in a child, again after each crash, and return its exit code.

    fork: what runs a command here, where the child can be a copy of this process, which has imported all it needs.
    SIGINT and SIGTERM are passed on. Raises UserError where the run has an engine.
    """
    with EngineLock(folder) as lock, _passing_on() as (children, told):
        ended, deaths, cause = -1, 0, None
        since = os.environ.get(BEGAN) or str(psutil.Process().create_time())
        while True:
            told_child = {SUPERVISOR: str(os.getpid()), LOCK_FD: str(lock.handle), BEGAN: since}
            environment = with_fixed(os.environ) | told_child
            if cause is not None and deaths == DEATHS_AT_A_TRIAL:
                environment[DEATHS] = cause
            command = ["engine", folder.run_id, "--runs", str(folder.root)]
            child: Child
            if fork is not None:
                child = Forked(fork, command, environment)
            else:
                child = subprocess.Popen(python(*command), env=environment, pass_fds=[lock.handle])
            children.append(child)
            code = child.wait()
            lock.is_mine()
            since = str(time.time())
            cause = _crash(code)
            before, ended = ended, _trials_ended(folder)
            deaths = deaths + 1 if ended == before else 1
            if cause is None or told or asked(folder, "stop") or deaths > DEATHS_AT_A_TRIAL:
                return 128 - code if code < 0 else code
            print(f"the engine's process died ({cause}); it is started again", file=sys.stderr, flush=True)


def _crash(code: int) -> str | None:
    """What the engine died of; None where it ended by itself, or by a signal that asks for it."""
    if code == START_ME_AGAIN:
        return "what it computed did not come back"
    if -code not in _CRASHES:
        return None
    name = signal.Signals(-code).name
    return f"{name}: killed, perhaps by the machine for its memory" if name == "SIGKILL" else f"{name}: crashed"


def _trials_ended(folder: RunFolder) -> int:
    try:
        return folder.journal.read_bytes().count(b'"event":"trial_finished"')
    except OSError:
        return 0


@contextmanager
def _passing_on() -> Iterator[tuple[list[Child], list[int]]]:
    """Signals that ask for the end go to the newest child. Yields where children are put, and what was told."""
    children: list[Child] = []
    told: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        told.append(number)
        if children:
            children[-1].send_signal(number)

    kept = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield children, told
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
