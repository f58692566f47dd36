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
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from gptailor import launch
from gptailor.errors import UserError
from gptailor.evaluate import NonFinite, Stopped
from gptailor.evaluate.tasks import find_tasks
from gptailor.family import preflight
from gptailor.family.residence import pick_devices
from gptailor.informative import informative_orders, known_orders, put_in_order, slopes
from gptailor.ledger import Items, PlanScores
from gptailor.memory import predict_memory
from gptailor.pace import type_advice
from gptailor.plan import StitchPlan
from gptailor.progress import Progress
from gptailor.recording import blame_the_trial, now, open_writer, outcome_of, trial_record, versions
from gptailor.replay import Course, NextTrial, changed_versions, read_history
from gptailor.schedule import REFERENCES
from gptailor.scorer import Ended, Here, Scorer, last_line
from gptailor.selection import select
from gptailor.space import PlanSpace, build_space, initial_design
from gptailor.spec import RunSpec, load_spec
from gptailor.stitch import merge_source_counts
from gptailor.store import RunFolder, RunWriter, queries
from gptailor.store.connection import StoreFull, StoreUnwritable
from gptailor.store.folder import write_atomically
from gptailor.suggest import Suggester, cost
from gptailor.trial import Evaluation, Outcome, RunStatus, Score, TrialStatus
from gptailor.watch import heartbeat, stop_on_signal
from gptailor.workbench import OBJECTIVES

log = logging.getLogger("gptailor")

FAILURES_BEFORE_GIVING_UP = 3
"""In a row and alike, from the first trial on: nothing works."""
FAILURES_AFTER_A_SUCCESS = 10
"""One broken layer of a candidate fails every trial that has it, until the search has learnt to avoid it."""
FULL_DISK_SECONDS = 5.0
INITIAL_SHARE = 0.125
"""Share of the trials that the initial design may take."""
BLOCK_INFLUENCE = "baseline:block_influence"


def search(folder: RunFolder, progress: Progress) -> RunStatus:
    """Run, or go on with, the run of this folder until its trials or its time are used up. Returns how it ended.

    Raises UserError where it cannot begin (a wrong path, an unfit family); the run is then marked failed.
    """
    spec = load_spec(folder.spec)
    with launch.EngineLock(folder), stop_on_signal() as signalled:
        writer = open_writer(folder, spec)
        error: str | None = None
        with heartbeat(writer.heartbeat):
            try:
                if cause := os.environ.pop(launch.DEATHS, None):
                    blame_the_trial(folder, writer, cause)
                _look_up_benchmarks(spec)
                with _devices(folder, spec, progress.note):
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


@contextmanager
def _devices(folder: RunFolder, spec: RunSpec, say: Callable[[str], None]) -> Iterator[None]:
    """Everything that this run computes on is its own meanwhile. Jobs of its own it need not wait for."""
    with ExitStack() as held:
        for name in _device_names(spec):  # in one order for all runs, so that none waits for another that waits for it
            held.enter_context(launch.DeviceQueue(folder, name, say))
        yield


def _device_names(spec: RunSpec) -> Iterator[str]:
    if spec.workers is None or spec.baselines:
        main, *others = map(str, pick_devices(spec.device))
        yield main
        if others and predict_memory(spec, preflight(spec)).split:  # which can be told once the first device is ours
            yield from sorted(others)
    elif spec.workers.local is not None:
        places = launch.places(spec.workers.local, spec.device)
        yield from sorted({device for place in places for device in launch.devices_of(place)})
    elif spec.workers.scheduler:
        yield spec.workers.scheduler


def _look_up_benchmarks(spec: RunSpec) -> None:
    """Raise UserError for a name that is nowhere, also of what only judges: now, not after days."""
    asked = (*spec.objectives, *spec.selection, *spec.held_out)
    find_tasks([benchmark.benchmark for benchmark in asked], spec.include_path)


def _work_of(spec: RunSpec) -> type[Search]:
    if not spec.baselines:
        return Search
    from gptailor.controls import Controls  # which builds on this module

    return Controls


class Search:
    """One search in progress: the parts, and what was learnt so far."""

    def __init__(
        self, folder: RunFolder, spec: RunSpec, writer: RunWriter, progress: Progress, signalled: threading.Event
    ) -> None:
        self.folder, self.spec, self.writer, self.progress = folder, spec, writer, progress
        self.signalled = signalled
        writer.retry = self._wait_for_space
        self.history = read_history(folder)
        self.dense: dict[str, float] = {}
        self.dense_at: dict[int, dict[str, float]] = {}
        self.slopes: dict[int, dict[str, float]] = {}
        self.failures: list[str] = []
        self.has_succeeded = any(_was_computed(trial.outcome) for trial in self.history.finished.values())
        self.deadline = math.inf
        self.interrupted_at = math.nan

    def run(self) -> tuple[RunStatus, str | None]:
        spec = self.spec
        if spec.walltime_seconds is not None:
            self.deadline = time.monotonic() + spec.walltime_seconds - self.history.seconds
        with self._scorer() as scorer:
            space = build_space(spec, scorer.n_layers, merge_source_counts(spec.merge.method))
            self.progress.started(spec, len(self.history.finished))
            initial = self._start(scorer, space)
            self._order(scorer, initial)
            self._reference(scorer, "dense", StitchPlan.dense(space.n_layers))
            if space.n_removed:
                one_shot = StitchPlan.without(set(initial[0].removed), space.n_layers)  # the initial design begins so
                self._reference(scorer, BLOCK_INFLUENCE, one_shot)
            status, error = self._loop(scorer, space, initial)
            if status is RunStatus.FINISHED and spec.selection:
                select(self.folder, spec, scorer, self.writer, self.progress.note)
        return status, error

    @contextmanager
    def _scorer(self) -> Iterator[Scorer]:
        known = queries.load_examples(self.folder)
        scorer: Scorer
        if self.spec.workers is None:
            scorer = self._here(known)
        else:
            from gptailor.cluster.team import Team  # Dask, which one worker does not need

            scorer = Team(self.spec, self.folder, known, self._stop_asked, self.progress.note, self._interrupted)
        try:
            yield scorer
        finally:
            scorer.close()

    def _here(self, known: Items) -> Here:
        """This process as the one that scores. known: what each example gave, so far. Raises UserError."""
        scorer = Here(self.spec, known, self._stop_asked, self._give_up)
        family = scorer.bench.family
        if advice := type_advice(family.device.type, family.preflight.hidden_size, family.preflight.dtype):
            self.progress.note(advice)
        return scorer

    def _interrupted(self, cause: str | None) -> None:
        """The workers cannot be reached, for this cause; None: they can again."""
        if cause is not None:
            self.progress.note(cause)
            self.interrupted_at = time.monotonic()
            self.writer.set_status(RunStatus.PAUSED, cause)
        else:
            self.deadline += time.monotonic() - self.interrupted_at
            self.writer.set_status(RunStatus.RUNNING)

    def _give_up(self, trial_id: int, error: str) -> None:
        """The only trial under way hangs: record it, and go on in another process."""
        outcome = Outcome(TrialStatus.CRASHED, now(), error=error, told_as=len(self.history.finished))
        self.writer.finish_trial(trial_id, outcome)
        os._exit(launch.START_ME_AGAIN)

    def _loop(self, scorer: Scorer, space: PlanSpace, initial: list[StitchPlan]) -> tuple[RunStatus, str | None]:
        """Ask ahead of whoever scores, and tell what came of it in the order in which it ends."""
        course = self._course(space, initial)
        running: dict[int, NextTrial] = {}
        while True:
            course.catch_up(self._stop_asked)
            is_time_up = self._begin(scorer, course, running)
            if not running:
                if self._stop_asked() and course.n_told < self.spec.trials:
                    return RunStatus.STOPPED, None
                break
            try:
                ended = scorer.wait()
            except KeyboardInterrupt:
                self._finish(course, running, [Ended(trial_id) for trial_id in running])
                raise
            problem = self._finish(course, running, ended)
            if problem or any(one.is_given_up for one in ended):
                self._finish(course, running, [Ended(trial_id) for trial_id in running])
                return (RunStatus.FAILED, problem) if problem else (RunStatus.STOPPED, None)
        if is_time_up:
            self.progress.note(f"the time of {self.spec.walltime} is used up")
        elif course.is_exhausted:
            self.progress.note("every plan of the space has been tried")
        with suppress(OSError):  # a full disk; these files are for other tools alone
            course.save()
        return RunStatus.FINISHED, None

    def _begin(self, scorer: Scorer, course: Course, running: dict[int, NextTrial]) -> bool:
        """Begin trials while there is room for more. Whether none is begun because the time is used up."""
        begun: list[NextTrial] = []
        try:
            while scorer.room:
                if launch.asked(self.folder, "pause"):
                    if running:
                        return False
                    self._wait_while_paused()
                if self._stop_asked():
                    return False
                is_time_up = time.monotonic() > self.deadline
                if is_time_up or (trial := course.next()) is None:
                    return is_time_up and course.n_told < self.spec.trials
                running[trial.trial_id] = trial
                begun.append(trial)
                asked = trial.suggestion
                scorer.begin(trial.trial_id, asked.plan, asked.budget, self.spec.trials - trial.trial_id - 1)
            return False
        finally:
            with self.writer.batch():
                for trial in begun:
                    asked = trial.suggestion
                    self.writer.record_plan(asked.config_id, asked.plan, scorer.n_parameters(asked.plan))
                    self.writer.start_trial(trial_record(trial.trial_id, asked, trial.seconds, trial.asked_after))

    def _finish(self, course: Course, running: dict[int, NextTrial], ended: Sequence[Ended]) -> str | None:
        """Record how trials ended, and tell. Returns what is wrong with all of them, if anything is."""
        outcomes: list[tuple[NextTrial, Outcome]] = []
        with self.writer.batch():
            for one in ended:
                trial = running.pop(one.trial_id)
                outcome = outcome_of(one, None if one.is_given_up else course.n_told + len(outcomes))
                if one.result is not None:
                    self._remember(one.result)
                self.writer.finish_trial(one.trial_id, outcome)
                if not one.is_given_up:
                    outcomes.append((trial, outcome))
        problem = None
        for trial, outcome in outcomes:
            course.tell(trial, outcome)
            self._report(trial, outcome, replayed=False)
            problem = problem or self._same_failure_again(outcome)
        return problem

    def _report(self, trial: NextTrial, outcome: Outcome, replayed: bool) -> None:
        costs = self._costs(outcome, trial.suggestion.budget)
        retention = 1.0 - sum(costs) / len(costs) if costs else None  # as SMAC is told it
        asked = trial_record(trial.trial_id, trial.suggestion, trial.seconds)
        self.progress.trial(asked, outcome, retention, replayed)

    def _course(self, space: PlanSpace, initial: list[StitchPlan]) -> Course:
        def departed(trial_id: int, refused: int) -> None:
            then = json.loads(queries.read_run(self.folder).runs.versions.iloc[0] or "{}")
            why = changed_versions(then, versions()) or "its run file or gptailor's search changed"
            self.progress.note(
                f"trial {trial_id + 1} was stored for another configuration than the search asks for now ({why}): the "
                f"search goes on from the {len(self.history.finished)} stored trials as a warm start, with brackets of "
                "its own"
            )
            if refused:
                self.progress.note(f"{refused} of them are not of this space any more, and stay in the store only")

        return Course(
            lambda plans: Suggester(self.spec, space, plans, self.folder.smac),
            initial,
            self.history,
            self.spec.trials,
            self._costs,
            lambda trial, outcome: self._report(trial, outcome, replayed=True),
            departed,
        )

    def _costs(self, outcome: Outcome, budget: int) -> list[float] | None:
        """One an objective, in the run file's order, which that of stored scores need not be; None for a crash."""
        scores, there = {score.name: score for score in outcome.scores}, self.dense_at.get(budget, self.dense)
        slope = self.slopes.get(budget, {})
        if not scores:
            return None
        return [cost(scores[name], dense, there[name], slope.get(name, 1.0)) for name, dense in self.dense.items()]

    def _reference(self, scorer: Scorer, subject: str, plan: StitchPlan) -> None:
        """Score a plan outside the search at every rung, for retention and as a control (one-shot pruning)."""
        for budget in self.spec.budget.rungs:
            result = scorer.score(plan, budget)
            with self.writer.batch():
                self._remember(result)
                for objective, score in zip(self.spec.objectives, result.scores, strict=True):
                    self.writer.record_evaluation(Evaluation(subject, None, objective.split, score, now(), plan.hash))
            if subject == "dense":
                self.dense = self.dense_at[budget] = {score.name: score.score for score in result.scores}
        self.progress.reference(subject, result.scores)
        if subject == "dense":
            for benchmark, score in zip(scorer.opened(OBJECTIVES), result.scores, strict=True):
                if advice := _no_better_than_guessing(score, benchmark.chance):
                    self.progress.note(advice)

    def _remember(self, result: PlanScores) -> None:
        for key, first, items in result.fresh:
            self.writer.record_examples(*key, first, items)

    def _start(self, scorer: Scorer, space: PlanSpace) -> list[StitchPlan]:
        """The plans to start from; kept in the run's folder, so that a resumed or extended run starts from the same."""
        path = self.folder.path / "initial.json"
        if path.exists():
            return [StitchPlan.from_json(plan) for plan in json.loads(path.read_text())]
        least = REFERENCES - 1 if len(self.spec.budget.rungs) > 1 else 1  # which are scored anyway
        count = max(least, round(INITIAL_SHARE * self.spec.trials))
        plans = initial_design(space, scorer.influence_orders())[:count]
        write_atomically(path, json.dumps([plan.to_json() for plan in plans]))
        return plans

    def _order(self, scorer: Scorer, plans: Sequence[StitchPlan]) -> None:
        """Read the examples that tell most first, where there are several rungs; a resumed run as it did before.

        plans: those to tell by, the first few of them, beside the dense base.
        """
        benchmarks, known = scorer.opened(OBJECTIVES), scorer.ledger.known
        dense = StitchPlan.dense(scorer.n_layers)
        references = [dense, *plans[: REFERENCES - 1]]
        if not known and len(self.spec.budget.rungs) > 1:
            scorer.score(dense, self.spec.budget.max)
            for number, plan in enumerate(references[1:]):
                with suppress(NonFinite, UserError):  # it can be spared
                    scorer.score(plan, self.spec.budget.max)
                    self.has_succeeded |= number > 0
            orders = informative_orders(references, benchmarks, known)
            with self.writer.batch():
                for key, first, items in put_in_order(known, orders, dense, benchmarks):
                    self.writer.record_examples(*key, first, items)
        if stored := known_orders(known, dense, benchmarks):
            scorer.reorder(stored)
            self.slopes = slopes(references, benchmarks, self.spec.budget.rungs, known)

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
            if _was_computed(outcome):
                self.failures, self.has_succeeded = [], True
            return None
        self.failures.append(last_line(outcome.error))
        enough = FAILURES_AFTER_A_SUCCESS if self.has_succeeded else FAILURES_BEFORE_GIVING_UP
        recent = self.failures[-enough:]
        alike = {re.sub(r"\d[\d.]*", "#", failure) for failure in recent}  # "tried to allocate 20 MiB", then 24
        if len(recent) == enough and len(alike) == 1:
            return f"{len(recent)} trials in a row failed alike: {recent[-1]}"
        return None


def _was_computed(outcome: Outcome) -> bool:
    """Whether a model was scored: the first trials' examples are known from the references."""
    return outcome.status is TrialStatus.SUCCESS and outcome.stitch_seconds > 0


def _no_better_than_guessing(dense: Score, chance: float | None) -> str | None:
    """What to say of an objective on which the dense base's score may be luck."""
    if chance is None or not dense.higher_is_better or dense.score - chance > 2 * (dense.stderr or 0.0):
        return None
    return (
        f"{dense.name}: the dense base scores {dense.score:.3f} on {dense.n_samples} examples, guessing {chance:.3f}: "
        f"plans that guess well will look good; more examples or another benchmark would tell more"
    )
