"""Engines without the wait for their imports: real processes, forked from one that has imported everything.

An engine spends ten seconds on imports before it does anything, which a test that starts thirty of them has not. A
`WarmEngines().spawn` takes the place of gptailor.launch.process.spawn: same lock, same log, same command line, a
process of its own session.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gptailor.launch.process import LOCK_FD, clean_environment, take_lock, write_holder
from gptailor.launch.supervisor import SUPERVISOR

ROOT = Path(__file__).resolve().parents[2]


class WarmEngines:
    """The process that engines are forked from. When it is closed, its engines die with it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            cwd=ROOT,
            env=clean_environment() | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        assert self._socket.recv(16) == b"ready", "the process to fork from did not come up"

    def spawn(self, command: list[str], lock: Path, log: Path) -> int | None:
        """Like gptailor.launch.process.spawn; command: of gptailor."""
        assert command[1:3] == ["-m", "gptailor"]
        handle = take_lock(lock, wait=0.5)
        if handle is None:
            return None
        with open(log, "ab") as output:
            pid = self._fork({"command": command[3:]}, handle, output.fileno())
        write_holder(handle, pid)
        os.close(handle)
        return pid

    def run(self, code: str, *arguments: object) -> str:
        """What Python code says on both its streams, run to its end in such a process; `arguments` are its own."""
        with tempfile.TemporaryFile() as output, open(os.devnull) as nothing:
            pid = self._fork({"code": code, "arguments": list(map(str, arguments))}, nothing.fileno(), output.fileno())
            while os.path.exists(f"/proc/{pid}"):
                time.sleep(0.01)
            output.seek(0)
            return output.read().decode()

    def command(
        self, arguments: list[str], timeout: float, environment: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """A command of gptailor, run to its end in such a process."""
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            ended, end = os.pipe()
            what = {"arguments": arguments, "environment": environment}
            pid = self._fork(what, output.fileno(), errors.fileno(), end)
            os.close(end)
            if not select.select([ended], [], [], timeout)[0]:
                os.killpg(pid, signal.SIGKILL)
            status = os.read(ended, 8)  # nothing, where it was killed
            os.close(ended)
            texts = []
            for stream in (output, errors):
                stream.seek(0)
                texts.append(stream.read().decode())
            return subprocess.CompletedProcess(arguments, int(status or -signal.SIGKILL), *texts)

    def start(self, code: str, lock: Path, log: Path) -> int:
        """The process id of Python code that runs in such a process and holds the lock."""
        handle = take_lock(lock, wait=0.5)
        assert handle is not None
        with open(log, "ab") as output:
            pid = self._fork({"code": code, "arguments": [str(lock.parent)]}, handle, output.fileno())
        write_holder(handle, pid)
        os.close(handle)
        return pid

    def _fork(self, what: dict[str, Any], *handles: int) -> int:
        """handles: of a command to its end, its two outputs and where its exit code goes; else a lock and a log."""
        socket.send_fds(self._socket, [json.dumps(what).encode()], handles)
        return int(self._socket.recv(32))

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


@lru_cache
def shared() -> WarmEngines:
    """One for all tests of a process."""
    engines = WarmEngines()
    atexit.register(engines.close)
    return engines


def serve(channel: socket.socket) -> None:
    import lm_eval.tasks  # noqa: F401 (imported here, so that no engine has to)
    import sklearn.ensemble  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import gptailor.search.engine  # noqa: F401
    from gptailor.__main__ import main

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    channel.send(b"ready")
    while True:
        asked, handles, _, _ = socket.recv_fds(channel, 65536, 3)
        told, tell = os.pipe()
        pid = os.fork()
        if pid:
            for handle in (*handles, tell):
                os.close(handle)
            os.read(told, 1)  # before it leads a group of its own, a kill of its group would be one of ours
            os.close(told)
            channel.send(str(pid).encode())
            continue
        os.setsid()
        os.close(tell)
        os.close(told)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        channel.close()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        what, code = json.loads(asked), 1
        os.dup2(handles[-2] if "environment" in what else handles[1], 2)
        os.dup2(handles[0] if "environment" in what else handles[1], 1)
        os.environ |= {SUPERVISOR: str(os.getppid())}
        try:
            if "environment" in what:
                os.environ |= what["environment"]
                code = _exit_code(what["arguments"])
            elif "command" in what:
                os.environ |= {LOCK_FD: str(handles[0])}
                code = main(what["command"])
            else:
                os.environ |= {LOCK_FD: str(handles[0])}
                exec(what["code"], {"__name__": "__main__", "arguments": what["arguments"]})
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            if "environment" in what:
                sys.stderr.flush()
                os.write(handles[2], str(code).encode())
            os._exit(code)


def _exit_code(arguments: list[str]) -> int:
    """Of a command, as Python itself would end: argparse leaves by SystemExit."""
    from gptailor.__main__ import main

    try:
        return main(arguments)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1


if __name__ == "__main__":
    with suppress(ValueError):  # nothing was received: who asked for engines is gone
        serve(socket.socket(fileno=int(sys.argv[1])))
