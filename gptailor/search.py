"""The search: ask, decode, stitch, evaluate, record, tell. One process runs it, alone, for one run folder.

It counts trials and time itself (SMAC enforces neither in ask and tell), and it is the one writer of the run's store.
A run that was stopped or killed is gone through again from the start: SMAC is asked with the same seed, stored trials
are told as they were, and the first trial that is missing is run. That brings Hyperband's brackets back exactly, which
SMAC's own state files do not: they are not safe against a kill. Where the replay departs, see `replay.py`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from gptailor import __version__, launch
from gptailor.errors import UserError
from gptailor.evaluate import NonFinite, Stopped, is_out_of_memory
from gptailor.evaluate.tasks import find_tasks
from gptailor.family import preflight
from gptailor.family.residence import pick_device
from gptailor.plan import StitchPlan
from gptailor.replay import changed_versions, seconds_spent, stored_trials, teach
from gptailor.selection import select
from gptailor.space import PlanSpace, build_space, initial_design
from gptailor.spec import RunSpec, SpaceOperation, load_spec
from gptailor.stitch import merge_method_problem, merge_source_counts
from gptailor.store import RunFolder, RunWriter, queries
from gptailor.store.connection import StoreFull, StoreUnwritable
from gptailor.store.folder import write_atomically
from gptailor.suggest import Suggester, Suggestion, cost
from gptailor.trial import Evaluation, Origin, Outcome, RunRecord, RunStatus, Score, Trial, TrialStatus
from gptailor.watch import TimeLimit, TookTooLong, heartbeat, stop_on_signal
from gptailor.workbench import PlanScores, Workbench

log = logging.getLogger("gptailor")

FAILURES_BEFORE_GIVING_UP = 3
"""In a row and alike, from the first trial on: nothing works."""
FAILURES_AFTER_A_SUCCESS = 10
"""One broken layer of a candidate fails every trial that has it, until the search has learnt to avoid it."""
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
    with launch.EngineLock(folder), stop_on_signal() as signalled:
        writer = _open_writer(folder, spec)
        error: str | None = None
        with heartbeat(writer.heartbeat):
            try:
                if cause := os.environ.pop(launch.DEATHS, None):
                    _blame_the_trial(folder, writer, cause)
                _look_up_benchmarks(spec)
                with launch.DeviceQueue(folder, str(pick_device(spec.device))):
                    writer.set_status(RunStatus.RUNNING)
                    status, error = _work_of(spec)(folder, spec, writer, progress, signalled).run()
            except (Stopped, launch.StopAsked):
                status = RunStatus.STOPPED
            except KeyboardInterrupt:
                writer.set_status(RunStatus.STOPPED)
                raise
            except StoreUnwritable:
                raise  # nothing can be written of it, and nothing is wrong with the run
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


def _blame_the_trial(folder: RunFolder, writer: RunWriter, cause: str) -> None:
    """Record the trial at which the engine died again and again as crashed. Raises UserError where there is none."""
    trials = queries.read_run(folder).trials
    if not (open_trials := trials.trial_id[trials.status == TrialStatus.RUNNING].tolist()):
        raise UserError(f"the engine's process died again and again before a trial began: {cause}")
    error = f"Died: the engine's process died {launch.DEATHS_AT_A_TRIAL} times while it ran this trial ({cause})"
    writer.finish_trial(open_trials[-1], Outcome(TrialStatus.CRASHED, now(), error=error))


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
        self.stored = stored_trials(folder)
        self.dense: dict[str, float] = {}
        self.dense_at: dict[int, dict[str, float]] = {}
        self.failures: list[str] = []
        self.has_succeeded = any(_was_computed(trial.outcome) for trial in self.stored.values())
        self.deadline = math.inf

    def run(self) -> tuple[RunStatus, str | None]:
        spec = self.spec
        if spec.walltime_seconds is not None:
            self.deadline = time.monotonic() + spec.walltime_seconds - seconds_spent(self.stored)
        bench = Workbench.open(spec, spec.objectives, max_examples=spec.budget.max)
        bench.known = queries.load_examples(self.folder)
        space = build_space(spec, bench.family.n_layers, merge_source_counts(spec.merge.method))
        self.progress.started(spec, len(self.stored))
        initial = self._start(bench, space)
        self._reference(bench, "dense", StitchPlan.dense(space.n_layers))
        if space.n_removed:
            one_shot = StitchPlan.without(set(initial[0].removed), space.n_layers)  # the initial design begins with it
            self._reference(bench, BLOCK_INFLUENCE, one_shot)
        status, error = self._loop(bench, space, initial)
        if status is RunStatus.FINISHED and spec.selection:
            select(self.folder, spec, bench, self.writer, self.progress.note, self._stop_asked)
        return status, error

    def _loop(self, bench: Workbench, space: PlanSpace, initial: list[StitchPlan]) -> tuple[RunStatus, str | None]:
        suggester = Suggester(self.spec, space, initial, self.folder.smac)
        has_departed = False
        for trial_id in range(self.spec.trials):
            known = self.stored.get(trial_id)
            if known is None:
                self._wait_while_paused()
                if self._stop_asked():
                    return RunStatus.STOPPED, None
                if time.monotonic() > self.deadline:
                    self.progress.note(f"the time of {self.spec.walltime} is used up")
                    break
            elif has_departed:
                continue  # it was told with all the others
            before = time.monotonic()
            suggestion = self._ask_for_new(suggester) if has_departed else suggester.ask()
            if known is not None and (suggestion is None or not known.matches(suggestion)):
                suggester, has_departed = self._depart(trial_id, space, initial), True
                continue
            if suggestion is None:
                self.progress.note("every plan of the space has been tried")
                break
            suggest_seconds = time.monotonic() - before
            outcome = known.outcome if known else self._trial(bench, trial_id, suggestion, suggest_seconds)
            if outcome.status is TrialStatus.CANCELLED:
                return RunStatus.STOPPED, None
            costs = self._costs(outcome, suggestion.budget)
            suggester.tell(suggestion, costs, outcome.evaluate_seconds)
            trial = trial_record(trial_id, suggestion, suggest_seconds)
            retention = 1.0 - sum(costs) / len(costs) if costs else None  # as SMAC is told it
            self.progress.trial(trial, outcome, retention, replayed=known is not None)
            if known is None and (problem := self._same_failure_again(outcome)):
                return RunStatus.FAILED, problem
        with suppress(OSError):  # a full disk; these files are for other tools alone
            suggester.save()
        return RunStatus.FINISHED, None

    def _depart(self, trial_id: int, space: PlanSpace, initial: list[StitchPlan]) -> Suggester:
        """A suggester that was told of every stored trial, for a run whose own would not ask for them again."""
        then = json.loads(queries.read_run(self.folder).runs.versions.iloc[0] or "{}")
        why = changed_versions(then, _versions()) or "its run file or gptailor's search changed"
        self.progress.note(
            f"trial {trial_id + 1} was stored for another configuration than the search asks for now ({why}): the "
            f"search goes on from the {len(self.stored)} stored trials as a warm start, with brackets of its own"
        )
        tried = {trial.plan.hash for trial in self.stored.values()}
        fresh = [plan for plan in initial if plan.hash not in tried]
        suggester = Suggester(self.spec, space, fresh, self.folder.smac)
        if refused := teach(
            suggester, [(trial, self._costs(trial.outcome, trial.budget)) for trial in self.stored.values()]
        ):
            self.progress.note(f"{refused} of them are not of this space any more, and stay in the store only")
        return suggester

    def _ask_for_new(self, suggester: Suggester) -> Suggestion | None:
        """Like ask; what was scored before the replay departed is answered from the store."""
        answers = {(trial.plan.hash, trial.budget): trial.outcome for trial in self.stored.values()}
        while (suggestion := suggester.ask()) is not None:
            outcome = answers.get((suggestion.plan.hash, suggestion.budget))
            if outcome is None:
                break
            suggester.tell(suggestion, self._costs(outcome, suggestion.budget), outcome.evaluate_seconds)
        return suggestion

    def _costs(self, outcome: Outcome, budget: int) -> list[float] | None:
        """One an objective, in the run file's order, which that of stored scores need not be; None for a crash."""
        scores, there = {score.name: score for score in outcome.scores}, self.dense_at.get(budget, self.dense)
        return [cost(scores[name], dense, there[name]) for name, dense in self.dense.items()] if scores else None

    def _trial(self, bench: Workbench, trial_id: int, suggestion: Asked, suggest_seconds: float) -> Outcome:
        """Run one trial and record it. Whatever goes wrong inside is its status and cause, never a score."""
        trial = trial_record(trial_id, suggestion, suggest_seconds)
        with self.writer.batch():
            self.writer.record_plan(suggestion.config_id, suggestion.plan, bench.stitcher.n_parameters(suggestion.plan))
            self.writer.start_trial(trial)

        def hung() -> None:
            error = f"TookTooLong: longer than {self.spec.trial_walltime}, and it never came back"
            self.writer.finish_trial(trial_id, Outcome(TrialStatus.CRASHED, now(), error=error))
            os._exit(launch.START_ME_AGAIN)

        result, error = None, None
        with TimeLimit(self.spec.trial_walltime_seconds, hung) as limit:

            def should_stop() -> bool:
                limit.check()
                return self._stop_asked()

            try:
                result = bench.score(suggestion.plan, suggestion.budget, should_stop)
            except (Stopped, KeyboardInterrupt) as problem:
                cancelled = Outcome(TrialStatus.CANCELLED, now(), error="stopped while it ran")
                self.writer.finish_trial(trial_id, cancelled)
                if isinstance(problem, KeyboardInterrupt):
                    raise
                return cancelled
            except (NonFinite, TookTooLong) as problem:
                error = f"{type(problem).__name__}: {problem}"
            except Exception as problem:  # a trial may fail in any way (a driver, a merge); the search goes on
                memory = f"OutOfMemory: {_last_line(str(problem))}\n" if is_out_of_memory(problem) else ""
                error = traceback.format_exc() + memory
        if result is None:
            bench.free()
            outcome = Outcome(TrialStatus.CRASHED, now(), error=error)
        else:
            outcome = Outcome(TrialStatus.SUCCESS, now(), result.scores, result.stitch_seconds, result.evaluate_seconds)
        with self.writer.batch():
            if result is not None:
                self._remember(result)
            self.writer.finish_trial(trial_id, outcome)
        return outcome

    def _reference(self, bench: Workbench, subject: str, plan: StitchPlan) -> None:
        """Score a plan outside the search at every rung, for retention and as a control (one-shot pruning)."""
        for budget in self.spec.budget.rungs:
            result = bench.score(plan, budget, self._stop_asked)
            with self.writer.batch():
                self._remember(result)
                for objective, score in zip(self.spec.objectives, result.scores, strict=True):
                    self.writer.record_evaluation(Evaluation(subject, None, objective.split, score, now(), plan.hash))
            if subject == "dense":
                self.dense = self.dense_at[budget] = {score.name: score.score for score in result.scores}
        self.progress.reference(subject, result.scores)

    def _remember(self, result: PlanScores) -> None:
        for key, first, items in result.fresh:
            self.writer.record_examples(*key, first, items)

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
            self.has_succeeded |= _was_computed(outcome)
            return None
        self.failures.append(_last_line(outcome.error))
        enough = FAILURES_AFTER_A_SUCCESS if self.has_succeeded else FAILURES_BEFORE_GIVING_UP
        recent = self.failures[-enough:]
        alike = {re.sub(r"\d[\d.]*", "#", failure) for failure in recent}  # "tried to allocate 20 MiB", then 24
        if len(recent) == enough and len(alike) == 1:
            return f"{len(recent)} trials in a row failed alike: {recent[-1]}"
        return None


def _was_computed(outcome: Outcome) -> bool:
    """Whether a model was scored: the first trial's examples, for one, are known from the references."""
    return outcome.status is TrialStatus.SUCCESS and outcome.stitch_seconds > 0


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
    return ((error or "").strip() or "unknown").splitlines()[-1]


def now() -> datetime:
    return datetime.now(UTC)
