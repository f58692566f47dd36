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
from gptailor.family.sameness import refuse_difference
from gptailor.plan import StitchPlan, Texts
from gptailor.scoring.item_cache import Gap, items_key
from gptailor.scoring.plan_scorer import OBJECTIVES, PlanScorer
from gptailor.scoring.provenance import digests_of, summary_digest
from gptailor.scoring.scorer import attempt
from gptailor.scoring.time_limit import TimeLimit
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Reading
from gptailor.trial import Digests
from gptailor.versions import installed_versions

SAME_EVERYWHERE = ("gptailor", "torch", "transformers", "lm-eval", "mergekit")
"""Packages whose other versions would give other scores."""

_gate = threading.Lock()
"""One trial at a time: they share the live model."""
_plan_scorer: tuple[str, PlanScorer] | None = None
"""The last run's, by its key."""


@dataclass(frozen=True)
class Run:
    """What a worker has to know of a run.

    topic: where it says what it does. threads: of its share of a CPU. orders: in which the objectives' examples are
    read. texts: of edits, by digest, so that all workers have the same. digests: of the engine's models. examples: of
    its benchmarks under a key of the run file, in seeded order.
    """

    key: str
    topic: str
    spec: RunSpec
    versions: dict[str, str]
    threads: int | None
    orders: Mapping[Reading, list[int]] = field(default_factory=dict)
    texts: Mapping[str, list[list[int]]] = field(default_factory=dict)
    digests: Digests = field(default_factory=Digests)
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


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
    """What came of an order: items for each piece, or an error of the trial, or why the run cannot go on here.

    None of these: it was called off. Of what calculates orders of layers: those; of what reads texts: their name and
    token ids; of what counts parameters: their number.
    """

    worker: str
    device: str = ""
    items: list[list[Any]] | None = None
    orders: list[tuple[str, list[int]]] | None = None
    texts: tuple[Texts, list[list[int]]] | None = None
    n_parameters: int | None = None
    error: str | None = None
    refused: str | None = None
    stitch_seconds: float = 0.0
    evaluate_seconds: float = 0.0


def answer(run: Run, trial_id: int, pieces: list[Piece]) -> Answer:
    """Items of all pieces."""

    def work(plan_scorer: PlanScorer) -> Answer:
        began = time.monotonic()

        def hung() -> None:  # it cannot be interrupted; Dask gives the trial to another worker
            os._exit(1)

        limit = TimeLimit(run.spec.trial_walltime_seconds, hung)
        for on in {piece.on for piece in pieces} - {OBJECTIVES, *plan_scorer.others}:
            _refuse_other_examples(run, plan_scorer, on)
        gaps = [_gap(plan_scorer, piece) for piece in pieces]
        done, error = attempt(limit, _is_called_off(), lambda should_stop: plan_scorer.answers(gaps, should_stop))
        if done is None:
            plan_scorer.free()
            return Answer(_name(), str(plan_scorer.family.device), error=error)
        items, stitch_seconds = done
        seconds = time.monotonic() - began - stitch_seconds
        return Answer(
            _name(), str(plan_scorer.family.device), items, stitch_seconds=stitch_seconds, evaluate_seconds=seconds
        )

    return _with_plan_scorer(run, trial_id, work)


def influence_orders(run: Run) -> Answer:
    """Layers by rising Block Influence, see PlanScorer."""
    return _with_plan_scorer(run, None, lambda plan_scorer: Answer(_name(), orders=plan_scorer.influence_orders()))


def repair_texts(run: Run) -> Answer:
    """The texts of the run's repairs, read or written here for all workers."""

    def read(plan_scorer: PlanScorer) -> Answer:
        named = plan_scorer.repair_texts()
        return Answer(_name(), texts=(named, plan_scorer.texts.known[named.digest]))

    return _with_plan_scorer(run, None, read)


def n_parameters(run: Run, plan: dict[str, Any]) -> Answer:
    """Parameters of a plan (as JSON), counted in its tensors."""

    def count(plan_scorer: PlanScorer) -> Answer:
        return Answer(_name(), n_parameters=plan_scorer.stitcher.n_parameters(StitchPlan.from_json(plan)))

    return _with_plan_scorer(run, None, count)


def _with_plan_scorer(run: Run, trial_id: int | None, work: Callable[[PlanScorer], Answer]) -> Answer:
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
    except OSError as problem:  # of this machine's files; left to Dask, it would look like a lost connection
        return Answer(_name(), refused=f"{type(problem).__name__}: {problem}")
    finally:
        worker.log_event(run.topic, {"worker": worker.address, "trial_id": None, "is_opening": False})
        _gate.release()


def _is_open(run: Run) -> bool:
    return _plan_scorer is not None and _plan_scorer[0] == run.key


def _open(run: Run) -> PlanScorer:
    """The run's plan scorer, opened at the first trial. Raises UserError."""
    global _plan_scorer
    if _plan_scorer is None or _plan_scorer[0] != run.key:
        _plan_scorer = None  # another run's models have to go first
        gc.collect()
        _refuse_other_versions(run.versions)
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        pick_device(run.spec.device)
        refuse_difference(run.digests, digests_of(run.spec), "the engine")
        plan_scorer = PlanScorer.open(run.spec, run.spec.objectives, max_examples=run.spec.budget.max)
        _refuse_other_examples(run, plan_scorer, OBJECTIVES)
        _look_at_the_dense_model(plan_scorer)
        _plan_scorer = (run.key, plan_scorer)
    _plan_scorer[1].reorder(run.orders)
    _plan_scorer[1].texts.known.update(run.texts)
    return _plan_scorer[1]


def _refuse_other_versions(engines: dict[str, str]) -> None:
    mine = installed_versions()
    for name in SAME_EVERYWHERE:
        if mine.get(name) != engines.get(name):
            raise UserError(
                f"it has {name} {mine.get(name)}, the engine {engines.get(name)}; install the same, as other versions "
                "may give other scores"
            )


def _look_at_the_dense_model(plan_scorer: PlanScorer) -> None:
    """How models are scored is settled on the first one that is looked at: on every worker, it is the dense one."""
    dense = StitchPlan.dense(plan_scorer.family.n_layers)
    for benchmark in plan_scorer.benchmarks:
        for place, example in enumerate(benchmark.examples):
            if example.windows:
                plan_scorer.answers([Gap(dense, benchmark, place, place + 1, items_key(dense, benchmark))])
                return


def _refuse_other_examples(run: Run, plan_scorer: PlanScorer, on: str) -> None:
    for benchmark, theirs in zip(plan_scorer.opened(on), run.examples.get(on, ()), strict=False):
        if summary_digest(benchmark) != theirs:
            raise UserError(
                f"benchmark {benchmark.spec.key} ({benchmark.spec.split}): its examples are not the engine's; give "
                "workers the same task files and data sets"
            )


def _gap(plan_scorer: PlanScorer, piece: Piece) -> Gap:
    plan, benchmark = StitchPlan.from_json(piece.plan), plan_scorer.opened(piece.on)[piece.benchmark]
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
