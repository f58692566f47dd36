"""What a search and a run of baselines share: history, references, time, pauses, a full disk.

A run has one time limit, of which pauses do not count and what earlier sessions took does.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress

from gptailor.errors import UserError
from gptailor.evaluate.scoring import NonFinite
from gptailor.launch import engine
from gptailor.launch.supervisor import START_ME_AGAIN
from gptailor.plan import StitchPlan
from gptailor.schedule import REFERENCES
from gptailor.scoring.device_speed import type_advice
from gptailor.scoring.item_cache import Items, PlanScores, items_key
from gptailor.scoring.local import LocalScorer
from gptailor.scoring.plan_scorer import OBJECTIVES
from gptailor.scoring.provenance import Provenance
from gptailor.scoring.scorer import Ended, Scorer
from gptailor.scoring.shared import Shared
from gptailor.search.example_order import known_orders, put_in_order, slopes, telling_orders
from gptailor.search.progress import Progress
from gptailor.search.replay import read_history
from gptailor.spec.run import RunSpec
from gptailor.stopwatch import Part
from gptailor.store.connection import StoreFull, StoreUnwritable
from gptailor.store.folder import RunFolder
from gptailor.store.writer import RunWriter
from gptailor.trial import DENSE, Evaluation, Outcome, RunStatus, Score, Subject, TrialStatus, now
from gptailor.wording import now_and_then

log = logging.getLogger("gptailor")

FULL_DISK_SECONDS = 5.0
SECONDS_BETWEEN_SECONDS = 20.0
"""How often is written down where the seconds went: a killed engine's last ones are not known."""


class RunBase(ABC):
    """A run in progress: its folder, what it has scored so far, and when it is to end."""

    def __init__(
        self, folder: RunFolder, spec: RunSpec, writer: RunWriter, progress: Progress, signalled: threading.Event
    ) -> None:
        self.folder, self.spec, self.writer, self.progress = folder, spec, writer, progress
        self.signalled = signalled
        self.provenance = Provenance(folder, spec, writer, progress.note)
        writer.retry = self._wait_for_space
        self.watch, self._seconds_due = writer.watch, 0.0
        self.history = read_history(folder)
        self.dense: dict[str, float] = {}
        self.dense_at: dict[int, dict[str, float]] = {}
        self.slopes: dict[int, dict[str, float]] = {}
        self.has_succeeded = any(was_computed(trial.outcome) for trial in self.history.finished.values())
        self.deadline = math.inf

    def _start_clock(self) -> None:
        """From here on the trials' time runs: neither what was waited for nor the references are of it."""
        if self.spec.walltime_seconds is not None:
            self.deadline = time.monotonic() + self.spec.walltime_seconds - self.history.seconds

    @abstractmethod
    def run(self) -> tuple[RunStatus, str | None]:
        """Do it. Returns how it ended, and what was wrong where it failed."""

    def _local_scorer(self, known: Items) -> LocalScorer:
        """This process as the one that scores. known: what each example gave, so far. Raises UserError."""
        scorer = LocalScorer(self.spec, known, self.stop_asked, self._give_up, self.folder)
        scorer.plan_scorer.told = now_and_then(self.progress.note)
        family = scorer.plan_scorer.family
        scorer.plan_scorer.shared = Shared(self.folder, self.provenance.known, family.device)
        if advice := type_advice(family.device.type, family.preflight.hidden_size, family.preflight.dtype):
            self.progress.note(advice)
        return scorer

    def _publish(self, scorer: Scorer) -> None:
        """Let other runs have the references, if the models' files are still those that were opened.

        Raises UserError where they are not.
        """
        self.provenance.models()
        scorer.publish()

    def _give_up(self, trial_id: int, error: str) -> None:
        """The only trial under way hangs: record it, and go on in another process."""
        outcome = Outcome(TrialStatus.CRASHED, now(), error=error, told_as=len(self.history.finished))
        self.writer.finish_trial(trial_id, outcome)
        os._exit(START_ME_AGAIN)

    def _reference(self, scorer: Scorer, subject: Subject, plan: StitchPlan) -> None:
        """Score a plan outside the search at every rung, for retention or as what the search has to beat."""
        with self.writer.batch():  # of several rungs all is known by now
            for budget in self.spec.budget.rungs:
                result = scorer.score(plan, budget)
                self._remember(result)
                for objective, score in zip(self.spec.objectives, result.scores, strict=True):
                    self.writer.record_evaluation(Evaluation(subject, None, objective.split, score, now(), plan.hash))
                if subject == DENSE:
                    self.dense = self.dense_at[budget] = {score.name: score.score for score in result.scores}
        self.progress.reference(subject, result.scores)
        if subject == DENSE:
            opened = scorer.opened(OBJECTIVES)
            for note in dict.fromkeys(filter(None, (benchmark.cut_note for benchmark in opened))):
                self.progress.note(note)
            for benchmark, score in zip(opened, result.scores, strict=True):
                if advice := _no_better_than_guessing(score, benchmark.chance):
                    self.progress.note(advice)

    def _record_seconds(self) -> None:
        """Where the time went, now and then: it changes with every trial."""
        if time.monotonic() >= self._seconds_due:
            self._seconds_due = time.monotonic() + SECONDS_BETWEEN_SECONDS
            self.writer.record_seconds()

    def _count_trial(self, ended: Sequence[Ended]) -> None:
        """Of the time in which these were waited for, what stitching took; with workers the two overlap."""
        for one in ended:
            if one.result is not None and one.worker is None:
                self.watch.move(one.result.stitch_seconds, Part.SCORE, Part.STITCH)

    def _remember(self, result: PlanScores) -> None:
        for key, first, items in result.fresh:
            self.writer.record_examples(*key, first, items)

    def _order(self, scorer: Scorer, plans: Sequence[StitchPlan]) -> None:
        """Read the examples that tell most first, where there are several rungs; a resumed run as it did before.

        plans: those to tell by, the first few of them, beside the dense base.
        """
        benchmarks, known = scorer.opened(OBJECTIVES), scorer.cache.known
        dense = StitchPlan.dense(scorer.n_layers)
        references = [dense, *plans[: REFERENCES - 1]]
        is_new = not any(items_key(dense, benchmark) in known for benchmark in benchmarks)  # whatever else was judged
        if is_new and len(self.spec.budget.rungs) > 1:
            scorer.score(dense, self.spec.budget.max)
            for number, plan in enumerate(references[1:]):
                with suppress(NonFinite, UserError):  # it can be spared
                    scorer.score(plan, self.spec.budget.max)
                    self.has_succeeded |= number > 0
            orders = telling_orders(references, benchmarks, known)
            with self.writer.batch():
                for key, first, items in put_in_order(known, orders, dense, benchmarks):
                    self.writer.record_examples(*key, first, items)
        if stored := known_orders(known, dense, benchmarks):
            scorer.reorder(stored)
            self.slopes = slopes(references, benchmarks, self.spec.budget.rungs, known)

    def _wait_for_space(self, problem: StoreUnwritable) -> bool:
        """A full disk is waited for: nothing that was scored is lost while somebody makes room."""
        if not isinstance(problem, StoreFull) or self.stop_asked():
            return False
        self.progress.note(f"{problem}; waiting for space")
        with self.watch.of(Part.WAITING):
            time.sleep(FULL_DISK_SECONDS)
        self.deadline += FULL_DISK_SECONDS
        return True

    @property
    def _is_time_up(self) -> bool:
        return time.monotonic() > self.deadline

    def _say_that_time_is_up(self) -> None:
        self.progress.note(f"the time of {self.spec.walltime} is used up")

    def stop_asked(self) -> bool:
        """Whether a signal or a request in the run's folder asks for its end."""
        return self.signalled.is_set() or engine.asked(self.folder, "stop")

    def _wait_while_paused(self) -> None:
        if not engine.asked(self.folder, "pause"):
            return
        self.writer.set_status(RunStatus.PAUSED)
        self.progress.note("paused")
        began = time.monotonic()
        with self.watch.of(Part.WAITING):
            while engine.asked(self.folder, "pause") and not self.stop_asked():
                time.sleep(0.2)
        self.deadline += time.monotonic() - began
        self.writer.set_status(RunStatus.RUNNING)


def was_computed(outcome: Outcome) -> bool:
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
