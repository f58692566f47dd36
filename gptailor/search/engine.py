"""The engine: one process that runs one run's folder, alone, from its lock to its last status.

What it runs is a search (`loop.py`) or a run of baselines (`baseline_run.py`).
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from gptailor.errors import UserError
from gptailor.evaluate.evaluator import Stopped
from gptailor.evaluate.tasks import find_tasks
from gptailor.family.preflight import preflight
from gptailor.family.residence import pick_devices
from gptailor.launch import devices
from gptailor.launch.devices import devices_of
from gptailor.launch.engine import EngineLock
from gptailor.launch.process import began
from gptailor.launch.queue import DeviceQueue, StopAsked
from gptailor.launch.signals import heartbeat, stop_on_signal
from gptailor.launch.supervisor import DEATHS
from gptailor.results.redundancy import adopt
from gptailor.scoring.memory import predict_memory
from gptailor.scoring.removal_speed import layers_for_speed
from gptailor.search.baseline_run import BaselineRun
from gptailor.search.loop import Search
from gptailor.search.progress import Progress
from gptailor.search.recording import blame_the_trial, open_writer
from gptailor.search.run_base import RunBase
from gptailor.spec.files import load_spec
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Removal
from gptailor.stopwatch import Part, Stopwatch
from gptailor.store.asked import spec_of
from gptailor.store.connection import StoreUnwritable
from gptailor.store.folder import RunFolder
from gptailor.store.writer import RunWriter
from gptailor.trial import RunStatus

log = logging.getLogger("gptailor")


def run_engine(folder: RunFolder, progress: Progress) -> RunStatus:
    """Run, or go on with, the run of this folder until its trials or its time are used up. Returns how it ended.

    Raises UserError where it cannot begin (a wrong path, an unfit family); the run is then marked failed.
    """
    watch = Stopwatch(began(), Part.START)
    with EngineLock(folder), stop_on_signal() as signalled:
        writer = open_writer(folder, load_spec(folder.spec))
        writer.watch = watch
        writer.set_status(RunStatus.QUEUED)  # one that goes on had ended; it may wait long for its device
        spec = spec_of(folder)
        error: str | None = None
        with heartbeat(writer.heartbeat):
            try:
                if cause := os.environ.pop(DEATHS, None):
                    blame_the_trial(folder, writer, cause)
                watch.turn_to(Part.LOADING)
                _look_up_benchmarks(spec)
                work = _work_of(spec)(folder, spec, writer, progress, signalled)
                work.provenance.models()
                adopt(folder)
                with _devices(folder, spec, progress.note, watch, work.stop_asked):
                    writer.set_status(RunStatus.RUNNING)
                    work.spec = _with_number(spec, writer, progress.note, work.stop_asked)
                    status, error = work.run()
                watch.turn_to(Part.LOADING)
                work.provenance.models()  # files may have been replaced while it was at work
            except (Stopped, StopAsked):
                status = RunStatus.STOPPED
            except KeyboardInterrupt:
                _end(writer, RunStatus.STOPPED)
                raise
            except StoreUnwritable:
                raise  # nothing can be written of it, and nothing is wrong with the run
            except UserError as problem:
                _end(writer, RunStatus.FAILED, str(problem))
                raise
            except Exception:  # the engine's last word: whatever broke becomes the run's recorded cause
                status, error = RunStatus.FAILED, traceback.format_exc()
                log.exception("the search failed")
            _end(writer, status, error)
    progress.ended(status, error)
    return status


def _end(writer: RunWriter, status: RunStatus, error: str | None = None) -> None:
    """The run's last status, and where its seconds went until then."""
    with writer.batch():
        writer.record_seconds()
        writer.set_status(status, error)


def _with_number(
    spec: RunSpec, writer: RunWriter, say: Callable[[str], None], should_stop: Callable[[], bool]
) -> RunSpec:
    """The run file with a number of layers for `remove`: what a speed comes to is measured now, once, and stored.

    Raises Stopped.
    """
    if spec.has_range or not isinstance(spec.remove, Removal):
        return spec
    n_removed = layers_for_speed(spec, say, should_stop)
    say(f"remove: {spec.remove}: {n_removed} layers")
    writer.record_run({"n_removed": n_removed})
    return spec.removing(n_removed)


@contextmanager
def _devices(
    folder: RunFolder, spec: RunSpec, say: Callable[[str], None], watch: Stopwatch, should_stop: Callable[[], bool]
) -> Iterator[None]:
    """Everything that this run computes on is its own meanwhile. Jobs of its own it need not wait for."""
    with ExitStack() as held:
        for name in _device_names(spec):  # in one order for all runs, so that none waits for another that waits for it
            with watch.of(Part.WAITING):
                held.enter_context(DeviceQueue(folder, name, say, should_stop))
        yield


def _device_names(spec: RunSpec) -> Iterator[str]:
    if spec.workers is None or spec.baselines:
        main, *others = map(str, pick_devices(spec.device))
        yield main
        if others and predict_memory(spec, preflight(spec)).split:  # which can be told once the first device is ours
            yield from sorted(others)
    elif spec.workers.local is not None:
        places = devices.places(spec.workers.local, spec.device)
        yield from sorted({device for place in places for device in devices_of(place)}, key=devices.card)
    elif spec.workers.scheduler:
        yield spec.workers.scheduler


def _look_up_benchmarks(spec: RunSpec) -> None:
    """Raise UserError for a name that is nowhere, also of what only judges: now, not after days."""
    find_tasks([benchmark.benchmark for benchmark in spec.benchmarks], spec.include_path)


def _work_of(spec: RunSpec) -> type[RunBase]:
    return BaselineRun if spec.baselines else Search
