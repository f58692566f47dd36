"""A run of baselines: the plans of published pruning methods, scored and stored as a search's plans are.

It is a run like any other (a run file whose `baselines` is not empty), because then everything that reads runs reads it
as it is: the front, the layers, the comparison with a search, the export, held-out evaluation, stop and resume. Each
method on each source (the base, then each candidate) is one configuration with one trial at the highest budget, and
one subject `baseline:NAME[@SOURCE]` among the evaluations, which gives it its name. What the method cost is in the
trial's configuration: forward passes over the calibration texts, and examples that it scored on its way.

Where the run asks for a range of sizes, each method cuts at its ends and its middle (`NAME_less_NUMBER`).

Calibration texts, objectives, budgets and the allowance of examples are those that the run file gives a search.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptailor.baselines.case import Case
from gptailor.baselines.registry import METHODS, Cut, cuts
from gptailor.errors import UserError
from gptailor.evaluate.evaluator import Stopped
from gptailor.measures import retention
from gptailor.plan import StitchPlan
from gptailor.schedule import schedule
from gptailor.scoring.local import LocalScorer
from gptailor.scoring.plan_scorer import SELECTION, PlanScorer
from gptailor.scoring.scorer import Ended
from gptailor.search.recording import outcome_of, trial_record
from gptailor.search.run_base import RunBase
from gptailor.search.selection import FINALISTS
from gptailor.spec.run import RunSpec
from gptailor.stopwatch import Part
from gptailor.store import queries
from gptailor.trial import DENSE, Evaluation, Origin, Outcome, RunStatus, TrialStatus, averaged_together, now

SECONDS_BETWEEN_NOTES = 60.0


def _allowance(plan_scorer: PlanScorer, spec: RunSpec) -> int:
    """Examples per objective that the run's search may score, what its selection scores among them."""
    selected = sum(benchmark.n_examples for benchmark in plan_scorer.opened(SELECTION)) if spec.selection else 0
    searched = sum(rung.examples for rung in schedule(spec.budget, spec.trials))
    return searched + round(FINALISTS * selected / len(spec.objectives))


@dataclass(frozen=True)
class Made:
    """A cut's plan as a trial asks for it."""

    config_id: int
    plan: StitchPlan
    budget: int
    seed: int
    configuration: dict[str, Any]
    origin: Origin = Origin.BASELINE


class BaselineRun(RunBase):
    """The run in progress."""

    def run(self) -> tuple[RunStatus, str | None]:
        spec = self.spec
        self.made = {trial.config_id: trial.plan for trial in self.history.finished.values()}
        scorer = self._local_scorer(queries.load_examples(self.folder))
        plan_scorer = scorer.plan_scorer
        n_layers = plan_scorer.family.n_layers
        asked = cuts(spec, spec.baselines, n_layers)
        self.provenance.objectives(plan_scorer.benchmarks)
        self.writer.record_run({"n_trials": len(asked)})
        self.progress.started(spec.model_copy(update={"trials": len(asked)}), len(self.history.finished))
        with self.watch.of(Part.REFERENCES):
            if any(METHODS[name].scores for name in spec.baselines):  # on the examples that a search reads
                removals = spec.removals(n_layers)
                n_removed = removals[len(removals) // 2]
                orders = plan_scorer.influence_orders()
                cut_by = [StitchPlan.without(set(order[:n_removed]), n_layers, name) for name, order in orders]
                self._order(scorer, cut_by)
            self._reference(scorer, DENSE, StitchPlan.dense(n_layers))
            self._publish(scorer)
        n_sizes = len({cut.n_removed for cut in asked})  # which share what one search may score
        batches, allowed = plan_scorer.calibration(), _allowance(plan_scorer, spec) // n_sizes
        done = self.history.finished.values()
        succeeded = any(trial.outcome.status is TrialStatus.SUCCESS for trial in done)
        self._start_clock()
        for trial_id, cut in enumerate(asked):
            if trial_id in self.history.finished:
                continue
            self._wait_while_paused()
            if self.stop_asked():
                return RunStatus.STOPPED, None
            if self._is_time_up:
                self._say_that_time_is_up()
                return RunStatus.FINISHED, None
            case = Case(
                plan_scorer.stitcher,
                cut.source,
                cut.n_removed,
                batches,
                fitness=lambda plan, n: self._fitness(plan_scorer, plan, n),
                rungs=spec.budget.rungs,
                allowed=allowed,
                seed=cut.seed,
                texts=plan_scorer.baseline_texts,
            )
            case.between = self._between(cut, case)
            with self.watch.of(Part.OTHER):
                outcome = self._cut(scorer, trial_id, cut, case)
            if outcome.status is TrialStatus.CANCELLED:
                return RunStatus.STOPPED, None
            succeeded = succeeded or outcome.status is TrialStatus.SUCCESS
        return (RunStatus.FINISHED, None) if succeeded else (RunStatus.FAILED, "every baseline failed")

    def _cut(self, scorer: LocalScorer, trial_id: int, cut: Cut, case: Case) -> Outcome:
        """Make one cut, score it, record both."""
        plan_scorer = scorer.plan_scorer
        self.progress.note(f"{cut.subject}: {METHODS[cut.baseline].title}")
        facts = {"baseline": str(cut.baseline), "source": cut.source, "subject": str(cut.subject)}
        begun = Made(trial_id, case.plan(), self.spec.budget.max, cut.seed, facts)
        self._note(plan_scorer, trial_id, begun, 0.0)  # so that a process that dies of it leaves a trial to blame
        before = time.monotonic()
        try:
            with self.watch.of(Part.SUGGEST):
                plan, problem = self._plan(plan_scorer, trial_id, cut, case), None
        except (Stopped, KeyboardInterrupt) as stop:
            outcome = Outcome(TrialStatus.CANCELLED, now(), error="stopped while its plan was made")
            self.writer.finish_trial(trial_id, outcome)
            if isinstance(stop, KeyboardInterrupt):
                raise
            return outcome
        except UserError as error:
            plan, problem = case.plan(), str(error)
        except Exception:  # a method may fail in any way on somebody's model; the others go on without it
            plan, problem = case.plan(), traceback.format_exc()
        self.made[trial_id] = plan
        seconds = time.monotonic() - before
        spent = {"passes": round(case.passes, 2), "examples": case.examples}
        made = Made(trial_id, plan, self.spec.budget.max, cut.seed, facts | spent)
        self._note(plan_scorer, trial_id, made, seconds)
        ended = Ended(trial_id, error=problem)
        if problem is None:
            scorer.begin(trial_id, plan, made.budget, 0)
            try:
                with self.watch.of(Part.SCORE):
                    (ended,) = scorer.wait()
                self._count_trial([ended])
            except KeyboardInterrupt:
                self.writer.finish_trial(trial_id, outcome_of(ended, None))
                raise
        outcome = outcome_of(ended, trial_id)
        with self.writer.batch():
            if ended.result is not None:
                self._remember(ended.result)
            self.writer.finish_trial(trial_id, outcome)
            self._record_seconds()
            for objective, score in zip(self.spec.objectives, outcome.scores, strict=False):
                self.writer.record_evaluation(
                    Evaluation(cut.subject, trial_id, objective.split, score, now(), plan.hash)
                )
        kept = self._fitness(plan_scorer, plan, self.spec.budget.max) if outcome.scores else None
        self.progress.trial(trial_record(trial_id, made, seconds), outcome, kept, replayed=False)
        return outcome

    def _note(self, plan_scorer: PlanScorer, trial_id: int, made: Made, seconds: float) -> None:
        """Record a trial as running, or again once its plan is known."""
        with self.writer.batch():
            stitcher = plan_scorer.stitcher
            self.writer.record_plan(trial_id, made.plan, stitcher.n_parameters(made.plan), stitcher.shares(made.plan))
            self.writer.start_trial(trial_record(trial_id, made, seconds, trial_id))

    def _plan(self, plan_scorer: PlanScorer, trial_id: int, cut: Cut, case: Case) -> StitchPlan:
        """A method's plan, its edits computed; that of a repaired cut is the one before it, with the run's repair."""
        if not cut.is_repaired:
            plan = METHODS[cut.baseline].load()(case)
            if plan.edits:
                plan_scorer.stitcher.stitch(plan, plan_scorer.between(self.stop_asked))
            return plan
        plain = self.made.get(trial_id - 1)
        return plan_scorer.repaired(plain if plain and plain.removed else METHODS[cut.baseline].load()(case))

    def _fitness(self, plan_scorer: PlanScorer, plan: StitchPlan, n: int) -> float:
        """Mean retention on the first n examples of each objective; what has none (dense is 0) counts 0.

        Of objectives whose scores are averaged together, as plans are ranked.
        """
        dense = plan_scorer.score(StitchPlan.dense(plan.n_layers), n, self.stop_asked)
        result = plan_scorer.score(plan, n, self.stop_asked)
        with self.writer.batch():
            self._remember(dense)
            self._remember(result)
        asked = [(score.metric, score.higher_is_better) for score in result.scores]
        pairs = [(result.scores[place], dense.scores[place]) for place in averaged_together(asked)]
        kept = [retention(one.score, whole.score, one.higher_is_better) or 0.0 for one, whole in pairs]
        return sum(kept) / len(kept)

    def _between(self, cut: Cut, case: Case) -> Callable[[], None]:
        """What a method does between two models: it stops if it is to, and now and then says how far it is."""
        said = time.monotonic()

        def between() -> None:
            nonlocal said
            if self.stop_asked():
                raise Stopped
            if time.monotonic() - said > SECONDS_BETWEEN_NOTES:
                said = time.monotonic()
                done = [f"{case.passes:.0f} passes over the calibration texts"] if case.passes else []
                done += [f"{case.examples} of {case.allowed} examples a benchmark"] if case.examples else []
                self.progress.note(f"{cut.subject}: {', '.join(done) or 'at work'} so far")

        return between
