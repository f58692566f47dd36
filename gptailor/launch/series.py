"""Commands of gptailor one after another, as an experiment asks for them, without the wait for imports before each.

A process imports what engines need, and forks each command off when it is asked for: see launch/warm.py, whose hosts do
the same for a server. Here a command belongs to the terminal, or whatever else, that the series was begun in: its words
go there, and Ctrl-C reaches it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType

from gptailor.launch.process import python, with_fixed
from gptailor.launch.warm import FORKED, import_all, is_bad_fork, leave, surroundings

COMMAND = "series"
"""What the process is called with that forks; it is no command for people."""
PATIENCE = 5.0
"""Seconds within which it ends when the series does; it does at once, unless a command was left to itself."""
_ENDED = b"."


class Series:
    """The process to fork from begins with the first command, and ends with the series.

    Another one begins where the code, the environment or the folder is not what it began with.
    """

    def __init__(self) -> None:
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._surroundings: object = None

    def run(self, *command: str) -> None:
        """Run a command to its end, whatever comes of it."""
        now = surroundings()
        if self._process is not None and now != self._surroundings:
            self.close()
        if self._process is None:
            self._surroundings = now
            self._channel, theirs = socket.socketpair()
            with theirs:
                begin = python(COMMAND, str(theirs.fileno()))
                self._process = subprocess.Popen(begin, env=with_fixed(os.environ), pass_fds=[theirs.fileno()])
        if not self._is_done(command):
            subprocess.run(python(*command), check=False)

    def _is_done(self, command: Sequence[str]) -> bool:
        """Whether the process saw to it; False where there is none any more, as its imports failed."""
        assert self._channel is not None
        try:
            self._channel.sendall(json.dumps(command).encode() + b"\n")
            try:
                return self._channel.recv(1) == _ENDED
            except KeyboardInterrupt:  # which the command was sent too, and ends of in its own way
                self._channel.recv(1)
                raise
        except (BrokenPipeError, ConnectionResetError):
            return False

    def close(self) -> None:
        if self._channel is not None and self._process is not None:
            self._channel.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
        self._channel = self._process = None

    def __enter__(self) -> Series:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def serve(channel: socket.socket, imports: Sequence[str], run: Callable[[list[str]], int]) -> int:
    """Be the process to fork from, until whoever began the series ends it, or ends.

    Ctrl-C is for the command under way. Before there is one, the next one is not begun.
    """
    interrupts: list[int] = []
    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    import_all(imports)
    with channel.makefile("rb") as asked:
        for command in asked:
            if not interrupts:
                pid = os.fork()
                if not pid:
                    signal.signal(signal.SIGINT, usual)
                    if interrupts:  # between the fork and now
                        os._exit(128 + signal.SIGINT)
                    words = json.loads(command)
                    if is_bad_fork():
                        os.execv(sys.executable, python(*words))
                    channel.close()
                    os.environ[FORKED] = "1"
                    leave(run, words)
                os.waitpid(pid, 0)
            interrupts.clear()
            with suppress(OSError):  # who began the series may have ended meanwhile
                channel.sendall(_ENDED)
    return 0
