"""Where workers come from: processes of this machine, a scheduler that runs already, or jobs that SLURM is asked for.

Each is a `Cluster`: how to reach its scheduler, and how to end what was started for this run alone.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Nanny, Scheduler, Security, SpecCluster, Worker
from distributed.utils import get_mp_context

from gptailor.errors import UserError
from gptailor.launch.devices import devices_of, n_cores, places
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Slurm
from gptailor.spec.values import parse_duration
from gptailor.store.folder import RunFolder

LOSSES = 2
"""A trial whose worker is lost is given to another as often as this."""
CONNECT_SECONDS = 10.0
CLOSE_SECONDS = 3.0
LOOPBACK = "127.0.0.1"
SETTINGS = {
    "distributed.scheduler.allowed-failures": LOSSES,
    "distributed.client.scheduler-info-interval": "2s",
}


@dataclass(frozen=True)
class Cluster:
    """How to reach the workers' scheduler, and how to end what was started for this run.

    connect: a new client of its scheduler; raises OSError. close: end what was started. threads: of a worker, where
    that is ours to say. where: for people.
    """

    where: str
    connect: Callable[[], Client]
    close: Callable[[], None]
    threads: int | None = None


def start(spec: RunSpec, folder: RunFolder) -> Cluster:
    """Start, or find, the run's workers. Raises UserError."""
    assert spec.workers is not None
    for name in ("distributed", "distributed.client"):  # what becomes of workers is told in our words
        logging.getLogger(name).setLevel(logging.CRITICAL)  # Dask gives the client's a level and a stream of its own
    dask.config.set(SETTINGS)
    if spec.workers.scheduler is not None:
        address = spec.workers.scheduler
        return Cluster(f"the scheduler {address}", lambda: _client(address), lambda: None)
    if spec.workers.slurm is not None:
        return _slurm(spec.workers.slurm, folder)
    return _local(spec, folder)


def _close(cluster: SpecCluster) -> None:
    cluster.close(timeout=CLOSE_SECONDS)


def _client(address: str | SpecCluster, security: Security | None = None) -> Client:
    return Client(address, timeout=CONNECT_SECONDS, security=security, set_as_default=False)


# --- this machine -----------------------------------------------------------------------------------------------------


class _Scheduler(Scheduler):
    """Without Dask's web pages."""

    def start_http_server(self, *arguments: Any, **options: Any) -> None:  # noqa: ARG002 (Dask's signature)
        self.http_server = None  # type: ignore[assignment]  # which Dask looks for before it ends it


class _Worker(Worker):
    """Without Dask's web pages."""

    def start_http_server(self, *arguments: Any, **options: Any) -> None:  # noqa: ARG002 (Dask's signature)
        self.http_server = None  # type: ignore[assignment]  # which Dask looks for before it ends it


def _local(spec: RunSpec, folder: RunFolder) -> Cluster:
    """Processes that listen on loopback alone, with certificates of their own, and die with this one."""
    assert spec.workers is not None and spec.workers.local is not None
    names = places(spec.workers.local, spec.device)
    on_gpus = names[0].startswith("cuda")
    _choose_start_method(on_gpus)
    scratch = folder.path / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)  # of an engine that was killed
    security = Security.temporary()
    shared = {"host": LOOPBACK, "security": security, "dashboard": False}
    workers = {
        name: {
            "cls": Nanny,
            "options": shared
            | {
                "name": name,
                "nthreads": 1,
                "memory_limit": 0,
                "local_directory": str(scratch),
                "worker_class": _Worker,
                "silence_logs": logging.CRITICAL,
                "env": _only_gpus(name) if on_gpus else {},
            },
        }
        for name in names
    }
    scheduler = {"cls": _Scheduler, "options": shared | {"port": 0, "protocol": "tls://"}}
    cluster = SpecCluster(
        workers=workers, scheduler=scheduler, security=security, silence_logs=logging.CRITICAL, name=folder.run_id
    )

    def close() -> None:
        _close(cluster)
        shutil.rmtree(scratch, ignore_errors=True)

    threads = None if on_gpus else max(1, n_cores() // len(names))
    return Cluster("this machine", lambda: _client(cluster, security), close, threads)


def _only_gpus(name: str) -> dict[str, str]:
    """Let a process see the GPUs of its place: the n-th of those that this one may use."""
    own = [device.removeprefix("cuda:") for device in devices_of(name)]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is not None:
        own = [seen.split(",")[int(index)].strip() for index in own]
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)}


def _choose_start_method(on_gpus: bool) -> None:
    """On a CPU, workers are forked from one process that has imported everything.

    They share its memory, and one that is lost is back in no time. CUDA does not survive a fork.
    """
    dask.config.set({"distributed.worker.multiprocessing-method": "spawn" if on_gpus else "forkserver"})
    context = get_mp_context()  # which sets its own list first
    if not on_gpus:
        context.set_forkserver_preload(["gptailor.scoring.cluster.worker", "gptailor.scoring.cluster.start"])


# --- SLURM ------------------------------------------------------------------------------------------------------------


def _slurm(asked: Slurm, folder: RunFolder) -> Cluster:
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise UserError("workers.slurm: needs dask-jobqueue; pip install dask-jobqueue") from error
    if shutil.which("sbatch") is None:
        raise UserError("workers.slurm: there is no sbatch here; start the run on a node that may submit jobs")
    cluster = SLURMCluster(**slurm_options(asked, folder))
    cluster.scale(jobs=asked.jobs)
    return Cluster("SLURM", lambda: _client(cluster, cluster.security), lambda: _close(cluster))


def slurm_options(asked: Slurm, folder: RunFolder) -> dict[str, Any]:
    """Of dask-jobqueue: one worker a job, that stands where the engine stands, in the same environment."""
    hours, seconds = divmod(int(parse_duration(asked.walltime)), 3600)
    return {
        "queue": asked.queue,
        "account": asked.account,
        "cores": asked.cores,
        "memory": asked.memory,
        "processes": 1,
        "walltime": f"{hours:02d}:{seconds // 60:02d}:{seconds % 60:02d}",
        "job_name": folder.run_id,
        "python": sys.executable,
        "job_extra_directives": [f"--gres=gpu:{asked.gpus}"] if asked.gpus else [],
        "job_script_prologue": [f"cd {_quoted(Path.cwd())}", f"export OMP_NUM_THREADS={asked.cores}"],
        "worker_extra_args": ["--nthreads", "1", "--memory-limit", "0", "--no-dashboard"],
        "log_directory": str(folder.path / "slurm"),
        "scheduler_options": {"dashboard": False},
        "security": Security.temporary(),
        "shared_temp_directory": str(folder.path / "slurm"),
    }


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))
