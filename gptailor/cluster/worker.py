"""What a Dask worker does for a run: it opens the run's family once, and answers examples with plans' models.

Everything that goes wrong comes back as text, so that no traceback of a library reaches a person, and no worker has to
be of the mind of another about classes of errors.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from distributed import get_worker

from gptailor.errors import UserError
from gptailor.family.residence import pick_device
from gptailor.ledger import Gap, items_key
from gptailor.plan import StitchPlan
from gptailor.recording import versions
from gptailor.scorer import attempt
from gptailor.spec import Reading, RunSpec
from gptailor.watch import TimeLimit
from gptailor.workbench import Workbench

SAME_EVERYWHERE = ("gptailor", "torch", "transformers", "lm-eval", "mergekit")
"""Packages whose other versions would give other scores."""

_gate = threading.Lock()
"""One trial at a time: they share the live model."""
_bench: tuple[str, Workbench] | None = None
"""The last run's, by its key."""


@dataclass(frozen=True)
class Run:
    """What a worker has to know of a run. topic: where it says what it does. threads: of its share of a CPU. orders: in
    which the objectives' examples are read."""

    key: str
    topic: str
    spec: RunSpec
    versions: dict[str, str]
    threads: int | None
    orders: Mapping[Reading, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """Examples [first, end) of a benchmark, by its place under a key of the run file, for a plan (as JSON)."""

    plan: dict[str, Any]
    on: str
    benchmark: int
    first: int
    end: int


@dataclass(frozen=True)
class Answer:
    """What came of an order: items for each piece, or an error of the trial, or why the run cannot go on here. None of
    these: it was called off. Of what calculates orders of layers: those."""

    worker: str
    device: str = ""
    items: list[list[Any]] | None = None
    orders: list[tuple[str, list[int]]] | None = None
    error: str | None = None
    refused: str | None = None
    stitch_seconds: float = 0.0
    evaluate_seconds: float = 0.0


def answer(run: Run, trial_id: int, pieces: list[Piece]) -> Answer:
    """Items of all pieces."""

    def work(bench: Workbench) -> Answer:
        began = time.monotonic()

        def hung() -> None:  # it cannot be interrupted; Dask gives the trial to another worker
            os._exit(1)

        limit = TimeLimit(run.spec.trial_walltime_seconds, hung)
        gaps = [_gap(bench, piece) for piece in pieces]
        done, error = attempt(limit, _is_called_off(), lambda should_stop: bench.answers(gaps, should_stop))
        if done is None:
            bench.free()
            return Answer(_name(), str(bench.family.device), error=error)
        items, stitch_seconds = done
        seconds = time.monotonic() - began - stitch_seconds
        return Answer(_name(), str(bench.family.device), items, stitch_seconds=stitch_seconds, evaluate_seconds=seconds)

    return _with_bench(run, trial_id, work)


def influence_orders(run: Run) -> Answer:
    """Layers by rising Block Influence, see Workbench."""
    return _with_bench(run, None, lambda bench: Answer(_name(), orders=bench.influence_orders()))


def _with_bench(run: Run, trial_id: int | None, work: Callable[[Workbench], Answer]) -> Answer:
    is_called_off = _is_called_off()
    while not _gate.acquire(timeout=0.5):
        if is_called_off():
            return Answer(_name())
    worker = get_worker()
    try:
        if is_called_off():
            return Answer(_name())
        worker.log_event(run.topic, {"worker": worker.address, "trial_id": trial_id, "is_opening": not _is_open(run)})
        return work(_open(run))
    except UserError as problem:
        return Answer(_name(), refused=str(problem))
    finally:
        worker.log_event(run.topic, {"worker": worker.address, "trial_id": None, "is_opening": False})
        _gate.release()


def _is_open(run: Run) -> bool:
    return _bench is not None and _bench[0] == run.key


def _open(run: Run) -> Workbench:
    """The run's workbench, opened at the first trial. Raises UserError."""
    global _bench
    if _bench is None or _bench[0] != run.key:
        _bench = None  # another run's models have to go first
        gc.collect()
        _refuse_other_versions(run.versions)
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        pick_device(run.spec.device)
        bench = Workbench.open(run.spec, run.spec.objectives, max_examples=run.spec.budget.max)
        _look_at_the_dense_model(bench)
        _bench = (run.key, bench)
    _bench[1].reorder(run.orders)
    return _bench[1]


def _refuse_other_versions(engines: dict[str, str]) -> None:
    mine = versions()
    for name in SAME_EVERYWHERE:
        if mine.get(name) != engines.get(name):
            raise UserError(
                f"it has {name} {mine.get(name)}, the engine {engines.get(name)}; install the same, as other versions "
                "may give other scores"
            )


def _look_at_the_dense_model(bench: Workbench) -> None:
    """How models are scored is settled on the first one that is looked at: on every worker, it is the dense one."""
    dense = StitchPlan.dense(bench.family.n_layers)
    for benchmark in bench.benchmarks:
        for place, example in enumerate(benchmark.examples):
            if example.windows:
                bench.answers([Gap(dense, benchmark, place, place + 1, items_key(dense, benchmark))])
                return


def _gap(bench: Workbench, piece: Piece) -> Gap:
    plan, benchmark = StitchPlan.from_json(piece.plan), bench.opened(piece.on)[piece.benchmark]
    return Gap(plan, benchmark, piece.first, piece.end, items_key(plan, benchmark))


def _is_called_off() -> Callable[[], bool]:
    """Whether Dask has no use for this task any more: it was cancelled, or who asked for it has gone."""
    worker = get_worker()
    key = worker.get_current_task()

    def is_called_off() -> bool:
        task = worker.state.tasks.get(key)
        return task is None or task.state == "cancelled"

    return is_called_off


def _name() -> str:
    return str(get_worker().name)
