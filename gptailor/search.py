"""The search: ask, decode, stitch, evaluate, record, tell. One process runs it, alone, for one run folder.

It counts trials and time itself (SMAC enforces neither in ask and tell), and it is the one writer of the run's store.
A run that was stopped or killed is gone through again from the start: SMAC is asked with the same seed, stored trials
are told as they were, and the first trial that is missing is run. That brings Hyperband's brackets back exactly, which
SMAC's own state files do not: they are not safe against a kill.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import Any, Protocol

from gptailor import __version__, launch
from gptailor.errors import UserError
from gptailor.evaluate import NonFinite, Stopped
from gptailor.evaluate.tasks import find_tasks
from gptailor.family import preflight
from gptailor.family.residence import pick_device
from gptailor.plan import StitchPlan
from gptailor.selection import select
from gptailor.space import PlanSpace, build_space, initial_design
from gptailor.spec import RunSpec, SpaceOperation, load_spec
from gptailor.stitch import merge_method_problem, merge_source_counts
from gptailor.store import RunFolder, RunWriter, queries
from gptailor.store.connection import StoreFull, StoreUnwritable
from gptailor.store.folder import write_atomically
from gptailor.suggest import Suggester, Suggestion, cost
from gptailor.trial import Evaluation, Origin, Outcome, RunRecord, RunStatus, Score, Trial, TrialStatus
from gptailor.workbench import PlanScores, Workbench

log = logging.getLogger("gptailor")

EQUAL_FAILURES_BEFORE_GIVING_UP = 3
HEARTBEAT_SECONDS = 5.0
FULL_DISK_SECONDS = 5.0
INITIAL_SHARE = 0.25
"""Share of the trials that the initial design may take."""
PACKAGES = ("gptailor", "torch", "transformers", "smac", "ConfigSpace", "scikit-learn", "lm-eval", "duckdb", "mergekit")

BLOCK_INFLUENCE = "baseline:block_influence"


class Progress(Protocol):
    """Who is told how the search goes (a terminal, a log)."""

    def started(self, spec: RunSpec, done: int) -> None: ...
    def reference(self, subject: str, scores: tuple[Score, ...]) -> None: ...
    def trial(self, trial: Trial, outcome: Outcome, retention: float | None, replayed: bool) -> None: ...
    def note(self, text: str) -> None: ...
    def ended(self, status: RunStatus, error: str | None) -> None: ...


def search(folder: RunFolder, progress: Progress) -> RunStatus:
    """Run, or go on with, the run of this folder until its trials or its time are used up. Returns how it ended.

    Raises UserError where it cannot begin (a wrong path, an unfit family); the run is then marked failed.
    """
    spec = load_spec(folder.spec)
    with launch.EngineLock(folder), _stop_on_signal() as signalled:
        writer = _open_writer(folder, spec)
        error: str | None = None
        with _heartbeat(writer):
            try:
                _look_up_benchmarks(spec)
                with launch.DeviceQueue(folder, str(pick_device(spec.device))):
                    writer.set_status(RunStatus.RUNNING)
                    status, error = _work_of(spec)(folder, spec, writer, progress, signalled).run()
            except (Stopped, launch.StopAsked):
                status = RunStatus.STOPPED
            except UserError as problem:
                writer.set_status(RunStatus.FAILED, str(problem))
                raise
            except Exception:  # the engine's last word: whatever broke becomes the run's recorded cause
                status, error = RunStatus.FAILED, traceback.format_exc()
                log.exception("the search failed")
            writer.set_status(status, error)
    progress.ended(status, error)
    return status


def _look_up_benchmarks(spec: RunSpec) -> None:
    """Raise UserError for a name that is nowhere, also of what only judges: now, not after days."""
    asked = (*spec.objectives, *spec.selection, *spec.held_out)
    find_tasks([benchmark.benchmark for benchmark in asked], spec.include_path)


def _work_of(spec: RunSpec) -> type[Search]:
    if not spec.baselines:
        return Search
    from gptailor.controls import Controls  # which builds on this module

    return Controls


class Asked(Protocol):
    """What a trial is to try."""

    @property
    def config_id(self) -> int: ...
    @property
    def plan(self) -> StitchPlan: ...
    @property
    def budget(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def origin(self) -> Origin: ...
    @property
    def configuration(self) -> dict[str, Any]: ...


class Search:
    """One search in progress: the parts, and what was learnt so far."""

    def __init__(
        self, folder: RunFolder, spec: RunSpec, writer: RunWriter, progress: Progress, signalled: threading.Event
    ) -> None:
        self.folder, self.spec, self.writer, self.progress = folder, spec, writer, progress
        self.signalled = signalled
        writer.retry = self._wait_for_space
        self.stored = _stored_trials(folder)
        self.dense: dict[str, float] = {}
        self.failures: list[str] = []
        self.deadline = math.inf

    def run(self) -> tuple[RunStatus, str | None]:
        spec = self.spec
        if spec.walltime_seconds is not None:
            self.deadline = time.monotonic() + spec.walltime_seconds - _seconds_spent(self.stored)
        bench = Workbench.open(spec, spec.objectives, max_examples=spec.budget.max)
        bench.known = queries.load_examples(self.folder)
        space = build_space(spec, bench.family.n_layers, merge_source_counts(spec.merge.method))
        self.progress.started(spec, len(self.stored))
        initial = self._start(bench, space)
        self._reference(bench, "dense", StitchPlan.dense(space.n_layers))
        if space.n_removed:
            one_shot = StitchPlan.without(set(initial[0].removed), space.n_layers)  # the initial design begins with it
            self._reference(bench, BLOCK_INFLUENCE, one_shot)
        suggester = Suggester(spec, space, initial, self.folder.smac)
        status, error = self._loop(bench, space, suggester)
        suggester.save()
        if status is RunStatus.FINISHED and spec.selection:
            select(self.folder, spec, bench, self.writer, self.progress.note, self._stop_asked)
        return status, error

    def _loop(self, bench: Workbench, space: PlanSpace, suggester: Suggester) -> tuple[RunStatus, str | None]:
        for trial_id in range(self.spec.trials):
            if trial_id not in self.stored:
                self._wait_while_paused()
                if self._stop_asked():
                    return RunStatus.STOPPED, None
                if time.monotonic() > self.deadline:
                    self.progress.note(f"the time of {self.spec.walltime} is used up")
                    break
            before = time.monotonic()
            suggestion = suggester.ask()
            if suggestion is None:
                self.progress.note("every plan of the space has been tried")
                break
            suggest_seconds = time.monotonic() - before
            known = self.stored.get(trial_id)
            if known is not None and not known.matches(suggestion):
                raise UserError(
                    f"trial {trial_id} of this run was stored for another configuration than the search now asks for: "
                    "libraries or the run file changed since. Start a new run, or go back to the versions that "
                    "`show --json` lists."
                )
            outcome = known.outcome if known else self._trial(bench, trial_id, suggestion, suggest_seconds)
            if outcome.status is TrialStatus.CANCELLED:
                return RunStatus.STOPPED, None
            costs = [cost(score, self.dense[score.name]) for score in outcome.scores] or None
            suggester.tell(suggestion, costs, outcome.evaluate_seconds)
            trial = trial_record(trial_id, suggestion, suggest_seconds)
            retention = 1.0 - sum(costs) / len(costs) if costs else None
            self.progress.trial(trial, outcome, retention, replayed=known is not None)
            if problem := self._same_failure_again(outcome):
                return RunStatus.FAILED, problem
        return RunStatus.FINISHED, None

    def _trial(self, bench: Workbench, trial_id: int, suggestion: Asked, suggest_seconds: float) -> Outcome:
        """Run one trial and record it. Whatever goes wrong inside is its status and cause, never a score."""
        trial = trial_record(trial_id, suggestion, suggest_seconds)
        with self.writer.batch():
            self.writer.record_plan(suggestion.config_id, suggestion.plan, bench.stitcher.n_parameters(suggestion.plan))
            self.writer.start_trial(trial)
        try:
            result = bench.score(suggestion.plan, suggestion.budget, self._stop_asked)
            outcome = Outcome(TrialStatus.SUCCESS, now(), result.scores, result.stitch_seconds, result.evaluate_seconds)
        except Stopped:
            result, outcome = None, Outcome(TrialStatus.CANCELLED, now(), error="stopped while it ran")
        except NonFinite as problem:
            result, outcome = None, Outcome(TrialStatus.CRASHED, now(), error=f"NonFinite: {problem}")
        except Exception:  # a trial may fail in any way (memory, a driver, a merge); the search goes on without it
            result, outcome = None, Outcome(TrialStatus.CRASHED, now(), error=traceback.format_exc())
        with self.writer.batch():
            if result is not None:
                self._remember(suggestion.plan, result)
            self.writer.finish_trial(trial_id, outcome)
        return outcome

    def _reference(self, bench: Workbench, subject: str, plan: StitchPlan) -> None:
        """Score a plan outside the search at every rung, for retention and as a control (one-shot pruning)."""
        for budget in self.spec.budget.rungs:
            result = bench.score(plan, budget, self._stop_asked)
            with self.writer.batch():
                self._remember(plan, result)
                for objective, score in zip(self.spec.objectives, result.scores, strict=True):
                    self.writer.record_evaluation(Evaluation(subject, None, objective.split, score, now(), plan.hash))
        self.progress.reference(subject, result.scores)
        if subject == "dense":
            self.dense = {score.name: score.score for score in result.scores}

    def _remember(self, plan: StitchPlan, result: PlanScores) -> None:
        for benchmark, first, items in result.fresh:
            asked = benchmark.spec
            self.writer.record_examples(plan.hash, asked.benchmark, asked.metric, asked.split, first, items)

    def _start(self, bench: Workbench, space: PlanSpace) -> list[StitchPlan]:
        """The plans to start from; kept in the run's folder, so that a resumed or extended run starts from the same."""
        path = self.folder.path / "initial.json"
        if path.exists():
            return [StitchPlan.from_json(plan) for plan in json.loads(path.read_text())]
        plans = initial_design(space, bench.influence_orders())[: max(1, round(INITIAL_SHARE * self.spec.trials))]
        write_atomically(path, json.dumps([plan.to_json() for plan in plans]))
        return plans

    def _wait_for_space(self, problem: StoreUnwritable) -> bool:
        """A full disk is waited for: nothing that was scored is lost while somebody makes room."""
        if not isinstance(problem, StoreFull) or self._stop_asked():
            return False
        self.progress.note(f"{problem}; waiting for space")
        time.sleep(FULL_DISK_SECONDS)
        return True

    def _stop_asked(self) -> bool:
        return self.signalled.is_set() or launch.asked(self.folder, "stop")

    def _wait_while_paused(self) -> None:
        if not launch.asked(self.folder, "pause"):
            return
        self.writer.set_status(RunStatus.PAUSED)
        self.progress.note("paused")
        began = time.monotonic()
        while launch.asked(self.folder, "pause") and not self._stop_asked():
            time.sleep(0.2)
        self.deadline += time.monotonic() - began
        self.writer.set_status(RunStatus.RUNNING)

    def _same_failure_again(self, outcome: Outcome) -> str | None:
        if outcome.status is not TrialStatus.CRASHED:
            self.failures = []
            return None
        self.failures.append(_last_line(outcome.error))
        recent = self.failures[-EQUAL_FAILURES_BEFORE_GIVING_UP:]
        if len(recent) == EQUAL_FAILURES_BEFORE_GIVING_UP and len(set(recent)) == 1:
            return f"{len(recent)} trials in a row failed alike: {recent[0]}"
        return None


@dataclass(frozen=True)
class _Stored:
    """A trial that this run finished earlier."""

    plan_hash: str
    budget: int
    outcome: Outcome

    def matches(self, suggestion: Suggestion) -> bool:
        return (self.plan_hash, self.budget) == (suggestion.plan.hash, suggestion.budget)


def _stored_trials(folder: RunFolder) -> dict[int, _Stored]:
    """Finished trials (successes and crashes) by their number; running and cancelled ones are to be run again."""
    tables = queries.read_run(folder)
    hashes = dict(zip(tables.plans.config_id, tables.plans.plan_hash, strict=True))
    scores: dict[int, list[Score]] = {}
    for row in tables.scores.itertuples():
        stderr = None if row.stderr is None or math.isnan(row.stderr) else float(row.stderr)
        scores.setdefault(row.trial_id, []).append(
            Score(row.benchmark, row.metric, row.score, stderr, row.n_samples, bool(row.higher_is_better))
        )
    stored = {}
    for row in tables.trials.itertuples():
        if row.status in (TrialStatus.SUCCESS, TrialStatus.CRASHED):
            outcome = Outcome(
                TrialStatus(row.status),
                row.ended_at.to_pydatetime(),
                tuple(scores.get(row.trial_id, ())),
                float(row.stitch_seconds),
                float(row.evaluate_seconds),
                row.error if isinstance(row.error, str) else None,
            )
            stored[int(row.trial_id)] = _Stored(hashes[row.config_id], int(row.budget), outcome)
    return stored


def _open_writer(folder: RunFolder, spec: RunSpec) -> RunWriter:
    """The run's writer; a new run gets its database here, once its family is known to fit. Raises UserError."""
    if folder.exists():
        return RunWriter.open(folder)
    record = RunRecord(
        folder.run_id,
        spec.name,
        spec.model_dump(mode="json"),
        spec.base_model,
        0,
        0,
        spec.seed,
        now(),
        _versions(),
    )
    try:
        n_layers = preflight(spec).n_layers
        if SpaceOperation.MERGE in spec.operations:
            _refuse_merge(spec)
        versions = record.versions | {"device": str(pick_device(spec.device))}
        record = replace(record, n_layers=n_layers, n_removed=spec.n_removed(n_layers), versions=versions)
    except UserError as problem:
        RunWriter.create(folder, record, spec.to_yaml()).set_status(RunStatus.FAILED, str(problem))
        raise
    return RunWriter.create(folder, record, spec.to_yaml())


def _refuse_merge(spec: RunSpec) -> None:
    """Raise UserError for a merge method that does not exist or does not fit the run."""
    if problem := merge_method_problem(spec.merge.method, spec.merge.parameters, len(spec.candidates)):
        raise UserError(problem)


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM asks the search to stop; a second one interrupts it where it is."""
    asked = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        print("stopping after the examples at hand; once more to stop at once", file=sys.stderr, flush=True)

    kept = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextmanager
def _heartbeat(writer: RunWriter) -> Iterator[None]:
    """A sign of life every few seconds while trials run."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            writer.heartbeat()

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def trial_record(trial_id: int, suggestion: Asked, suggest_seconds: float) -> Trial:
    return Trial(
        trial_id,
        suggestion.config_id,
        suggestion.budget,
        suggestion.seed,
        suggestion.origin,
        suggestion.configuration,
        now(),
        suggest_seconds,
    )


def _seconds_spent(stored: dict[int, _Stored]) -> float:
    return sum(trial.outcome.stitch_seconds + trial.outcome.evaluate_seconds for trial in stored.values())


def _versions() -> dict[str, str]:
    """What the run's results depend on: a replay on other versions may depart."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = __version__ if package == "gptailor" else "absent"
    return found


def _last_line(error: str | None) -> str:
    return (error or "unknown").strip().splitlines()[-1]


def now() -> datetime:
    return datetime.now(UTC)
