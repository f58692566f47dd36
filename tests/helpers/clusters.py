"""Dask schedulers and workers as a cluster has them: processes of their own, found by TCP addresses.

`python tests/helpers/clusters.py ADDRESS N` is one process with N workers, for more of them than a machine could start.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUIET = {
    "DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "critical",
    "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "2",
    "DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD": "forkserver",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def dies(_run: object, _trial_id: int, _pieces: object) -> None:
    """An answer that costs its worker; workers import it from here."""
    os._exit(1)


class Cluster:
    """A scheduler on loopback, and what was started beside it. Everything ends with close()."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.address = f"tcp://127.0.0.1:{self.port}"
        self._processes: list[subprocess.Popen[bytes]] = []
        self.start_scheduler()

    def start_scheduler(self) -> None:
        self.scheduler = self._start(
            "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard"
        )

    def start_worker(self, name: str) -> subprocess.Popen[bytes]:
        """A nanny and its worker, as `dask worker` starts them in the project's folder."""
        return self._start(
            *("-m", "distributed.cli.dask_worker", self.address, "--nthreads", "1", "--memory-limit", "0"),
            *("--no-dashboard", "--name", name, "--local-directory", str(self.folder)),
        )

    def start_simulated(self, n: int) -> subprocess.Popen[bytes]:
        return self._start(__file__, self.address, str(n))

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        with open(self.folder / "cluster.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=os.environ | QUIET | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """With all that it started."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._processes.remove(process)

    def close(self) -> None:
        for process in list(self._processes):
            self.kill(process)


async def serve(address: str, n: int) -> None:
    from distributed import Worker

    class Plain(Worker):
        def start_http_server(self, *arguments: object, **options: object) -> None:  # noqa: ARG002 (Dask's signature)
            self.http_server = None  # type: ignore[assignment]  # which Dask looks for before it ends it

    workers = [Plain(address, nthreads=1, memory_limit=0, name=f"w{i}", host="127.0.0.1") for i in range(n)]
    await asyncio.gather(*workers)
    await asyncio.gather(*(worker.finished() for worker in workers))


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
