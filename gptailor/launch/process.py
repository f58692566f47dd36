"""Processes that outlive the page which started them, and locks that tell whether they live.

A process lives if, and only if, somebody holds the flock on its lock file. The parent takes the lock and hands the open
file to the child, so there is no moment in which a started process is not yet seen, and none in which two are started.
Process ids are only used to send signals, and only while the lock is held: ids are used again, locks are not.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from gptailor import shipped
from gptailor.heap import tunables
from gptailor.trial import now

LOCK_FD = "GPTAILOR_LOCK_FD"
"""Environment variable by which a child learns which of its open files is the lock it was handed."""
BEGAN = "GPTAILOR_BEGAN"
"""Environment variable: when the command began that a child works for, in seconds since 1970."""
_ALLOWED = re.compile(
    r"(PATH|HOME|USER|LANG|TZ|TMPDIR|VIRTUAL_ENV|LD_LIBRARY_PATH|"
    r"(LC|CUDA|NVIDIA|HF|TRANSFORMERS|OMP|MKL|TORCH|PYTORCH|XDG|PYTHON|GLIBC|GPTAILOR)(_?[A-Z0-9_]*))"
)
_SECRET = re.compile(r"(?!.*DISABLE).*(SECRET|TOKEN|PASSWORD|KEY|COOKIE|CREDENTIAL|AUTH|OIDC).*")
HANDED_OVER = "GPTAILOR_ENGINE_ENV"
"""Environment variable in which an operator names, by commas, further variables that engines get, such as HF_TOKEN."""
FIXED = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1", "MALLOC_ARENA_MAX": "2"}
"""Devices are counted as nvidia-ml-py counts them. SMAC repeats itself only under a fixed hash seed. glibc gives each
new thread a heap of its own otherwise, and every heap keeps what it freed: 160 MB after ten trials."""


def with_fixed(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment with what is the same in every child that does model work."""
    return {**environment, **FIXED, **tunables(environment)}


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as written into the lock file."""

    pid: int
    host: str
    started_at: datetime


def clean_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What model work needs of the environment, and nothing of the dashboard's secrets.

    Streamlit puts them there. Nor anybody's tokens, unless the operator hands them over by name.
    """
    found = os.environ if environment is None else environment
    handed = set(filter(None, (name.strip() for name in found.get(HANDED_OVER, "").split(","))))
    kept = {
        name: value
        for name, value in found.items()
        if name in handed or (_ALLOWED.fullmatch(name) and not _SECRET.fullmatch(name))
    }
    return with_fixed(kept) | python_path(kept)


def python_path(environment: Mapping[str, str]) -> dict[str, str]:
    """A checkout that nobody installed is found by children in every folder, as this process found it."""
    if shipped.PACKAGE.parent != shipped.ROOT:
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(shipped.ROOT), environment.get("PYTHONPATH")]))}


def take_lock(path: Path, wait: float) -> int | None:
    """The open lock file, held; None where another process holds it for longer than `wait` seconds. Raises OSError."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(handle)
                return None
        time.sleep(0.02)


def inherited_lock(path: Path) -> int | None:
    """The lock that our parent took for us on this file, if it did."""
    text = os.environ.get(LOCK_FD, "")
    try:
        handle = int(text)
        if not os.path.samestat(os.fstat(handle), os.stat(path)):
            return None
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ValueError, OSError):  # not set, closed, or not ours
        return None
    del os.environ[LOCK_FD]
    os.set_inheritable(handle, False)
    return handle


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock. Looking does not disturb it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


def write_holder(handle: int, pid: int) -> None:
    data = asdict(Holder(pid, socket.gethostname(), now()))
    with suppress(OSError):  # on a full disk the lock holds all the same; only signals have no address
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(data, default=datetime.isoformat).encode(), 0)


def read_holder(path: Path) -> Holder | None:
    """Who holds (or last held) the lock; None where that is not known."""
    try:
        data = json.loads(path.read_text())
        return Holder(int(data["pid"]), str(data["host"]), datetime.fromisoformat(data["started_at"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def spawn(command: list[str], lock: Path, log: Path) -> int | None:
    """Start a process of its own session that holds `lock` and writes to `log`; its id, or None where one runs already.

    Raises OSError.
    """
    handle = take_lock(lock, wait=0.5)
    if handle is None:
        return None
    try:
        pid = start_process(command, handle, log)
        write_holder(handle, pid)
        return pid
    finally:
        os.close(handle)


def start_process(command: list[str], handle: int, log: Path) -> int:
    """Start a process of its own session that is handed a held lock and writes to `log`; its id. Raises OSError."""
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            env=clean_environment() | {LOCK_FD: str(handle), BEGAN: str(time.time())},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            close_fds=True,
            pass_fds=[handle],
        )
    # Reaps it when it ends, so that a long-lived server collects no zombies.
    threading.Thread(target=process.wait, name=f"reap-{process.pid}", daemon=True).start()
    return process.pid


def began() -> datetime:
    """When the command began that this process works for, as it was told; else now."""
    told = os.environ.pop(BEGAN, None)
    return now() if told is None else datetime.fromtimestamp(float(told), UTC)


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gptailor", *arguments]


def signal_holder(lock: Path, number: signal.Signals) -> bool:
    """Send a signal to the process (and its group, if it leads one) that holds the lock; False where none does."""
    holder = read_holder(lock)
    if holder is None or holder.host != socket.gethostname() or not is_held(lock):
        return False
    try:
        leads = os.getpgid(holder.pid) == holder.pid
    except ProcessLookupError:
        leads = True  # it has ended, and what it started holds the lock
    try:
        if leads:
            os.killpg(holder.pid, number)
        else:
            os.kill(holder.pid, number)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= until:
            return False
        time.sleep(0.05)
    return True
