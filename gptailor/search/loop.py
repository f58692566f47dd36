"""The search's loop: ask, decode, stitch, evaluate, record, tell.

It counts trials and time itself (SMAC enforces neither in ask and tell), and it is the one writer of the run's store.
A run that was stopped or killed is gone through again from the start: SMAC is asked with the same seed, stored trials
are told as they were, and the first trial that is missing is run. That brings Hyperband's brackets back exactly, which
SMAC's own state files do not: they are not safe against a kill. Where the replay departs, see `replay.py`.
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress

from gptailor.baselines.registry import BASELINE_SIZES, sized
from gptailor.evaluate.scoring import NonFinite
from gptailor.launch import engine
from gptailor.plan import StitchPlan
from gptailor.schedule import REFERENCES, is_screened
from gptailor.scoring.item_cache import PlanScores
from gptailor.scoring.plan_scorer import OBJECTIVES
from gptailor.scoring.scorer import Ended, Scorer, last_line
from gptailor.search.progress import Progress
from gptailor.search.recording import outcome_of, trial_record
from gptailor.search.replay import changed_versions
from gptailor.search.run_base import RunBase, was_computed
from gptailor.search.screening import screen, without_candidates
from gptailor.search.selection import select
from gptailor.search.space import PlanSpace, build_space, initial_design
from gptailor.search.suggest import Suggester, cost
from gptailor.search.trial_queue import NextTrial, TrialQueue
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Baseline
from gptailor.stitch.merging import merge_source_counts
from gptailor.stopwatch import Part
from gptailor.store import queries
from gptailor.store.folder import RunFolder, write_atomically
from gptailor.store.screening import read_screening, write_screening
from gptailor.store.writer import RunWriter
from gptailor.trial import DENSE, Outcome, RunStatus, Subject, TrialStatus, averaged_together
from gptailor.versions import installed_versions

log = logging.getLogger("gptailor")

FAILURES_BEFORE_GIVING_UP = 3
"""In a row and alike, from the first trial on: nothing works."""
FAILURES_AFTER_A_SUCCESS = 10
"""One broken layer of a candidate fails every trial that has it, until the search has learnt to avoid it."""
INITIAL_SHARE = 0.125
"""Share of the trials that the initial design may take."""


def n_one_shot(space: PlanSpace) -> int:
    """Block Influence's cuts of the base that the initial design begins with: at a range's middle and its ends."""
    return min(len(space.removals), BASELINE_SIZES) if space.n_removed else 0


def one_shot_cuts(space: PlanSpace, initial: Sequence[StitchPlan]) -> Iterator[tuple[Subject, StitchPlan]]:
    """These cuts, as baselines that the search has to beat."""
    for plan in initial[: n_one_shot(space)]:
        name = sized(Baseline.BLOCK_INFLUENCE, len(plan.removed), space.removals)
        yield Subject.baseline(name), StitchPlan.without(set(plan.removed), space.n_layers)


class Search(RunBase):
    """One search in progress: the parts, and what was learnt so far."""

    def __init__(
        self, folder: RunFolder, spec: RunSpec, writer: RunWriter, progress: Progress, signalled: threading.Event
    ) -> None:
        super().__init__(folder, spec, writer, progress, signalled)
        self.failures: list[str] = []
        self.orders: list[tuple[str, list[int]]] = []
        self.interrupted_at = math.nan

    def run(self) -> tuple[RunStatus, str | None]:
        spec = self.spec
        with self._scorer() as scorer:
            space = self._space(scorer, spec)
            self.progress.started(spec, len(self.history.finished))
            with self.watch.of(Part.REFERENCES):
                initial = self._start(scorer, space)
                self._order(scorer, initial)
                self._reference(scorer, DENSE, StitchPlan.dense(space.n_layers))
                for subject, plan in one_shot_cuts(space, initial):
                    try:
                        self._reference(scorer, subject, plan)
                    except NonFinite as problem:  # it can be spared
                        self.progress.note(f"{subject}: {problem}")
                self._publish(scorer)
                if is_screened(spec):
                    space, initial = self._screened(scorer, space, initial)
            self._record_seconds()
            self._start_clock()
            with self.watch.of(Part.OTHER):
                status, error = self._loop(scorer, space, initial)
                self.writer.flush()  # which the selection reads
            if status is RunStatus.FINISHED and spec.selection:
                with self.watch.of(Part.SELECTION):
                    select(self.folder, spec, scorer, self.writer, self.provenance, self.progress.note)
                    self._publish(scorer)
        return status, error

    @contextmanager
    def _scorer(self) -> Iterator[Scorer]:
        known = queries.load_examples(self.folder)
        scorer: Scorer
        if self.spec.workers is None:
            scorer = self._local_scorer(known)
        else:
            from gptailor.scoring.cluster.dask_scorer import DaskScorer  # Dask, which one worker does not need

            scorer = DaskScorer(
                self.spec,
                self.folder,
                known,
                self.provenance.known,
                self.stop_asked,
                self.progress.note,
                self._interrupted,
            )
        try:
            self.provenance.objectives(scorer.opened(OBJECTIVES))
            yield scorer
        finally:
            scorer.close()

    def _interrupted(self, cause: str | None) -> None:
        """The workers cannot be reached, for this cause; None: they can again."""
        if cause is not None:
            self.progress.note(cause)
            self.interrupted_at = time.monotonic()
            self.writer.set_status(RunStatus.PAUSED, cause)
        else:
            self.deadline += time.monotonic() - self.interrupted_at
            self.writer.set_status(RunStatus.RUNNING)

    def _loop(self, scorer: Scorer, space: PlanSpace, initial: list[StitchPlan]) -> tuple[RunStatus, str | None]:
        """Ask ahead of whoever scores, and tell what came of it in the order in which it ends."""
        with self.watch.of(Part.SUGGEST):
            queue = self._trial_queue(space, initial)
        running: dict[int, NextTrial] = {}
        while True:
            with self.watch.of(Part.SUGGEST):
                queue.catch_up(self.stop_asked)
            is_time_up = self._begin(scorer, queue, running)
            if not running:
                if self.stop_asked() and queue.n_told < self.spec.trials:
                    return RunStatus.STOPPED, None
                break
            try:
                with self.watch.of(Part.SCORE):
                    ended = scorer.wait()
                self._count_trial(ended)
            except KeyboardInterrupt:
                self._finish(queue, running, [Ended(trial_id) for trial_id in running])
                raise
            problem = self._finish(queue, running, ended)
            if problem or any(one.is_given_up for one in ended):
                self._finish(queue, running, [Ended(trial_id) for trial_id in running])
                return (RunStatus.FAILED, problem) if problem else (RunStatus.STOPPED, None)
        if is_time_up:
            self._say_that_time_is_up()
        elif queue.is_exhausted:
            self.progress.note("every plan of the space has been tried")
        with suppress(OSError):  # a full disk; these files are for other tools alone
            queue.save()
        return RunStatus.FINISHED, None

    def _begin(self, scorer: Scorer, queue: TrialQueue, running: dict[int, NextTrial]) -> bool:
        """Begin trials while there is room for more. Whether none is begun because the time is used up."""
        begun: list[NextTrial] = []
        try:
            while scorer.room:
                if engine.asked(self.folder, "pause"):
                    if running:
                        return False
                    self._wait_while_paused()
                if self.stop_asked():
                    return False
                is_time_up = self._is_time_up
                with self.watch.of(Part.SUGGEST):
                    trial = None if is_time_up else queue.next()
                if trial is None:
                    return is_time_up and queue.n_told < self.spec.trials
                running[trial.trial_id] = trial
                begun.append(trial)
                asked = trial.suggestion
                scorer.begin(trial.trial_id, asked.plan, asked.budget, self.spec.trials - trial.trial_id - 1)
            return False
        finally:
            with self.writer.batch(journal_only=not self.writer.is_due):
                for trial in begun:
                    asked = trial.suggestion
                    self.writer.record_plan(asked.config_id, asked.plan, scorer.n_parameters(asked.plan))
                    self.writer.start_trial(trial_record(trial.trial_id, asked, trial.seconds, trial.asked_after))

    def _finish(self, queue: TrialQueue, running: dict[int, NextTrial], ended: Sequence[Ended]) -> str | None:
        """Record how trials ended, and tell. Returns what is wrong with all of them, if anything is."""
        outcomes: list[tuple[NextTrial, Outcome]] = []
        with self.writer.batch(journal_only=True):  # `_begin` follows at once
            for one in ended:
                trial = running.pop(one.trial_id)
                outcome = outcome_of(one, None if one.is_given_up else queue.n_told + len(outcomes))
                if one.result is not None:
                    self._remember(one.result)
                self.writer.finish_trial(one.trial_id, outcome)
                if not one.is_given_up:
                    outcomes.append((trial, outcome))
            self._record_seconds()
        problem = None
        for trial, outcome in outcomes:
            with self.watch.of(Part.SUGGEST):
                queue.tell(trial, outcome)
            self._report(trial, outcome, replayed=False)
            problem = problem or self._same_failure_again(outcome)
        return problem

    def _report(self, trial: NextTrial, outcome: Outcome, replayed: bool) -> None:
        costs = self._costs(outcome, trial.suggestion.budget)
        retention = self._kept(outcome, costs) if costs else None
        asked = trial_record(trial.trial_id, trial.suggestion, trial.seconds)
        self.progress.trial(asked, outcome, retention, replayed)

    def _kept(self, outcome: Outcome, costs: Sequence[float]) -> float:
        """Mean retention as SMAC is told it, over the objectives whose scores are averaged together."""
        scores = {score.name: score for score in outcome.scores}
        taken = averaged_together([(scores[name].metric, scores[name].higher_is_better) for name in self.dense])
        return 1.0 - sum(costs[place] for place in taken) / len(taken)

    def _trial_queue(self, space: PlanSpace, initial: list[StitchPlan]) -> TrialQueue:
        def departed(trial_id: int, refused: int) -> None:
            then = queries.read_run(self.folder).versions
            why = changed_versions(then, installed_versions()) or "its run file or gptailor's search changed"
            self.progress.note(
                f"trial {trial_id + 1} was stored for another configuration than the search asks for now ({why}): the "
                f"search goes on from the {len(self.history.finished)} stored trials as a warm start, with brackets of "
                "its own"
            )
            if refused:
                self.progress.note(f"{refused} of them are not of this space any more, and stay in the store only")

        return TrialQueue(
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

    def _space(self, scorer: Scorer, spec: RunSpec) -> PlanSpace:
        return build_space(spec, scorer.n_layers, merge_source_counts(spec.merge.method), scorer.fixed)

    def _start(self, scorer: Scorer, space: PlanSpace, left_out: Collection[str] = ()) -> list[StitchPlan]:
        """The plans to start from; kept in the run's folder, so that a resumed or extended run starts from the same.

        left_out: candidates that count for nothing any more.
        """
        path = self.folder.path / ("initial_screened.json" if left_out else "initial.json")
        if path.exists():
            return [StitchPlan.from_json(plan) for plan in json.loads(path.read_text())]
        least = REFERENCES - 1 if len(self.spec.budget.rungs) > 1 else n_one_shot(space)  # which are scored anyway
        count = max(least, 1, round(INITIAL_SHARE * self.spec.trials))
        self.orders = self.orders or scorer.influence_orders()
        plans = initial_design(space, [(name, order) for name, order in self.orders if name not in left_out])[:count]
        write_atomically(path, json.dumps([plan.to_json() for plan in plans]))
        return plans

    def _screened(
        self, scorer: Scorer, space: PlanSpace, initial: list[StitchPlan]
    ) -> tuple[PlanSpace, list[StitchPlan]]:
        """The space of the candidates that help, and the plans to start from there; kept in the run's folder too."""
        found = read_screening(self.folder)
        if found is None:
            found = screen(self.spec, scorer, initial[0].removed, self._remember_at_once)
            write_screening(self.folder, found)
        self.progress.note(found.text)
        if not found.left_out:
            return space, initial
        space = self._space(scorer, without_candidates(self.spec, found.left_out))
        return space, self._start(scorer, space, found.left_out)

    def _remember_at_once(self, result: PlanScores) -> None:
        with self.writer.batch():
            self._remember(result)

    def _same_failure_again(self, outcome: Outcome) -> str | None:
        if outcome.status is not TrialStatus.CRASHED:
            if was_computed(outcome):
                self.failures, self.has_succeeded = [], True
            return None
        self.failures.append(last_line(outcome.error))
        enough = FAILURES_AFTER_A_SUCCESS if self.has_succeeded else FAILURES_BEFORE_GIVING_UP
        recent = self.failures[-enough:]
        alike = {re.sub(r"\d[\d.]*", "#", failure) for failure in recent}  # "tried to allocate 20 MiB", then 24
        if len(recent) == enough and len(alike) == 1:
            return f"{len(recent)} trials in a row failed alike: {recent[-1]}"
        return None
