"""Commands of gptailor one after another, as an experiment asks for them, without the wait for imports before each.

A process imports what engines need, and forks each command off when it is asked for: see launch/warm.py, whose hosts do
the same for a server. Here a command belongs to the terminal, or whatever else, that the series was begun in: its words
go there, and Ctrl-C reaches it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType

from gptailor.launch.process import FIXED, python
from gptailor.launch.warm import FORKED, import_all, leave

COMMAND = "series"
"""What the process is called with that forks; it is no command for people."""
_ENDED = b"."


class Series:
    """The process to fork from begins with the first command, and ends with the series."""

    def __init__(self) -> None:
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, *command: str) -> None:
        """Run a command to its end, whatever comes of it."""
        if self._process is None:
            self._channel, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
            with theirs:
                self._process = subprocess.Popen(
                    python(COMMAND, str(theirs.fileno())), env=os.environ | FIXED, pass_fds=[theirs.fileno()]
                )
        if not self._is_done("\0".join(command).encode()):
            subprocess.run(python(*command), check=False)

    def _is_done(self, command: bytes) -> bool:
        """Whether the process ran it; False where there is none any more, as its imports failed."""
        assert self._channel is not None
        try:
            self._channel.sendall(command)
            try:
                return self._channel.recv(1) == _ENDED
            except KeyboardInterrupt:  # which the command was sent too, and ends of in its own way
                self._channel.recv(1)
                raise
        except (BrokenPipeError, ConnectionResetError):
            return False

    def __enter__(self) -> Series:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._channel is not None and self._process is not None:
            self._channel.close()
            self._process.wait()


def serve(channel: socket.socket, imports: Sequence[str], run: Callable[[list[str]], int]) -> int:
    """Be the process to fork from, until whoever began the series ends it, or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the command, and for who began the series
    import_all(imports)
    while asked := channel.recv(65536):
        pid = os.fork()
        if not pid:
            channel.close()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ[FORKED] = "1"
            leave(run, asked.decode().split("\0"))
        os.waitpid(pid, 0)
        with suppress(OSError):  # who began the series may have ended meanwhile
            channel.sendall(_ENDED)
    return 0
