"""Engines that start at once: forked from a process that has imported what they need.

Most of an engine's start are imports. So the first engine that a server starts comes from a *host*: a process that does
the imports, forks the engine off, and waits some minutes for the next one, which then starts in a fraction of a second.
An engine is a process of its own all the same, in a session of its own, with its own lock, log and supervisor; it has
of the host only what was imported, and no thread of it. Where the code, the environment or the folder is not what the
host began with, the host ends and another one begins. Where anything is wrong with it, the engine is started as ever.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from gptailor import shipped
from gptailor.launch.process import BEGAN, LOCK_FD, clean_environment, python, start_process, take_lock, write_holder

COMMAND = "warm-engines"
"""What a host's process is called with; it is no command for people."""
IDLE_SECONDS = 600.0
PATIENCE = 5.0
"""Seconds within which a host that is ready forks; after that the engine is started otherwise."""
FORKED = "GPTAILOR_FORKED"
"""Environment variable of engines that were forked: whatever they start themselves can be forked too."""
_WORD = 16
"""Bytes of a host's word: `ready`, or a process id."""


class WarmEngines:
    """A server's way to start engines; there is a host from the first one on until it was idle for long."""

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._host: _Host | None = None

    def spawn(self, command: list[str], lock: Path, log: Path) -> int | None:
        """Like process.spawn, for commands of gptailor. Raises OSError."""
        handle = take_lock(lock, wait=0.5)
        if handle is None:
            return None
        try:
            with self._gate:
                pid = self._forked(command, handle, log)
            pid = pid or start_process(command, handle, log)
            write_holder(handle, pid)
            return pid
        finally:
            os.close(handle)

    def close(self) -> None:
        """End the host; its engines go on."""
        with self._gate:
            self._end()

    def _forked(self, command: list[str], handle: int, log: Path) -> int | None:
        """The process that is to be the engine: forked, or the host that will fork it. None: start it otherwise."""
        now = surroundings()
        if self._host is not None and not (self._host.is_ready() and self._host.surroundings == now):
            if self._host.is_busy:
                return None  # still at its imports
            self._end()
        if self._host is None:
            self._host = _Host.start(now, log)
        pid = self._host.ask(command[len(python()) :], handle, log)
        if pid is None:
            self._end()
        return pid

    def _end(self) -> None:
        if self._host is not None:
            self._host.channel.close()
            self._host = None


@dataclass
class _Host:
    """A host as its server sees it. is_busy: it imports, and will fork the first engine when it has."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    surroundings: object
    is_busy: bool = True

    @classmethod
    def start(cls, surroundings: object, log: Path) -> _Host:
        """log: of the engine that it is started for, where its imports may fail. Raises OSError."""
        channel, theirs = socket.socketpair()
        with open(log, "ab") as output:
            process = subprocess.Popen(
                python(COMMAND, str(theirs.fileno())),
                env=clean_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[theirs.fileno()],
            )
        theirs.close()
        threading.Thread(target=process.wait, name=f"reap-{process.pid}", daemon=True).start()
        return cls(process, channel, surroundings)

    def is_ready(self) -> bool:
        """Whether it forks at once; False while it imports, or where it has ended."""
        if self.is_busy and select.select([self.channel], [], [], 0)[0]:
            self.is_busy = False
            return self._word() is not None and self._word() is not None  # ready, and its first engine's id
        return not self.is_busy and not select.select([self.channel], [], [], 0)[0]

    def ask(self, command: list[str], handle: int, log: Path) -> int | None:
        """Have an engine forked. Its id, or the host's while that imports; None where it does not answer."""
        may_go, go = os.pipe()  # an engine that is forked too late, when another one was started, ends
        try:
            with open(log, "ab") as output:
                asked = "\0".join([str(time.time()), *command]).encode()
                socket.send_fds(self.channel, [asked], [handle, output.fileno(), may_go])
            word = str(self.process.pid).encode() if self.is_busy else self._word()
            if word is not None:
                os.write(go, b"!")
            return None if word is None else int(word)
        except OSError:
            return None
        finally:
            os.close(may_go)
            os.close(go)

    def _word(self) -> bytes | None:
        self.channel.settimeout(PATIENCE)
        try:
            return self.channel.recv(_WORD, socket.MSG_WAITALL).strip() or None
        except OSError:
            return None


@lru_cache
def shared() -> WarmEngines:
    """One for a server."""
    return WarmEngines()


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """For imports: no collection of garbage meanwhile, and none ever of what they brought.

    Else the collector looks through all that was imported before, over and over: a quarter of an engine's imports.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def import_all(modules: Sequence[str]) -> None:
    """Import these at once, see collector_at_rest."""
    with collector_at_rest():
        for module in modules:
            import_module(module)


def serve(channel: socket.socket, imports: Sequence[str], run: Callable[[list[str]], int]) -> int:
    """Be a host: import, then fork engines that `run` their commands, until the server ends or nothing is asked."""
    import_all(imports)  # and what the engines share is not touched by their collections
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    _say(channel, b"ready")
    while select.select([channel], [], [], IDLE_SECONDS)[0]:
        asked, handles, _, _ = socket.recv_fds(channel, 65536, 3)
        if not asked:
            return 0
        led, leads = os.pipe()
        pid = os.fork()
        if not pid:
            channel.close()
            os.close(led)
            began, *command = asked.decode().split("\0")
            _become_an_engine(command, began, handles, leads, run)
        for handle in (*handles, leads):
            os.close(handle)
        os.read(led, 1)  # until it leads a session of its own: before, a signal to its group would be one to ours
        os.close(led)
        _say(channel, str(pid).encode())
    return 0


def _say(channel: socket.socket, word: bytes) -> None:
    """To a server that may have ended meanwhile: what it asked for before is done all the same."""
    with suppress(OSError):
        channel.sendall(word.ljust(_WORD))


def _become_an_engine(
    command: list[str], began: str, handles: Sequence[int], leads: int, run: Callable[[list[str]], int]
) -> NoReturn:
    """What a forked process does first, and all its life.

    handles: the lock it holds, its log, and where it is told to go on, or by its end that it is not wanted.
    """
    os.setsid()
    os.close(leads)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    lock, log, may_go = handles
    if not os.read(may_go, 1):
        os._exit(0)
    os.close(may_go)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ |= {LOCK_FD: str(lock), BEGAN: began, FORKED: "1"}
    leave(run, command)


def leave(run: Callable[[list[str]], int], command: list[str]) -> NoReturn:
    """Run a command in a forked process, and end it as Python would."""
    code = 1
    try:
        code = run(command)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:  # the last words of a process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def is_forked() -> bool:
    """Whether this engine came from a host, and what it starts may be forked."""
    return os.environ.pop(FORKED, None) is not None and "torch" in sys.modules and not is_bad_fork()


def is_bad_fork() -> bool:
    """Whether this process was forked after a GPU had been looked at: CUDA refuses to work in it."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda._is_in_bad_fork())


def surroundings() -> object:
    """All that an engine's imports depend on: the environment, the folder, this package's files, what is installed."""
    code = [(str(file), of.st_mtime_ns, of.st_size) for file in shipped.PACKAGE.rglob("*.py") if (of := file.stat())]
    installed = [os.stat(path).st_mtime_ns for path in sorted(set(map(sysconfig.get_path, ("purelib", "platlib"))))]
    return sys.executable, os.getcwd(), sorted(clean_environment().items()), sorted(code), installed
