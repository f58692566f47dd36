"""What a search asks for, brought back to where it was: the trials that a run has already are told once more.

A run that goes on asks SMAC from the start, with the same seed, and tells it what is stored: in the order in which it
was asked and told then, for trials of several workers overlap. As long as the suggester asks for what was stored, it
is in the state that it had (Hyperband's brackets included), and trials that were begun and never ended are begun again.
Where it asks for something else (other versions of libraries, a run file that somebody changed), the replay departs: a
fresh suggester is told everything that is stored, at once, and the run goes on from there. What was scored is not
scored again either way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from gptailor.errors import UserError
from gptailor.measures import covered
from gptailor.plan import StitchPlan
from gptailor.search.suggest import Suggester, Suggestion
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.trial import Outcome, Score, TrialStatus


@dataclass(frozen=True)
class Stored:
    """A trial that this run finished earlier.

    suggest_seconds: what making its plan took, which of a baseline is most of it.
    """

    config_id: int
    plan: StitchPlan
    budget: int
    seed: int
    outcome: Outcome
    suggest_seconds: float = 0.0

    def matches(self, suggestion: Suggestion) -> bool:
        return (self.plan.hash, self.budget) == (suggestion.plan.hash, suggestion.budget)


@dataclass(frozen=True)
class History:
    """What a run has tried.

    finished: successes and crashes by their number; running and cancelled trials are to be run again. asked_after: for
    every trial that was begun, how many had been told then.
    """

    finished: dict[int, Stored]
    asked_after: dict[int, int]

    @property
    def seconds(self) -> float:
        """The time in which trials were made and at work; where several overlap, it counts once."""
        works = ((*trial.outcome.at_work, trial.suggest_seconds) for trial in self.finished.values())
        spans = np.array([(start - making, end) for start, end, making in works], dtype=float).reshape(-1, 2)
        return covered(spans[:, 0], spans[:, 1])


def read_history(folder: RunFolder) -> History:
    """The run's trials as its database has them."""
    tables = queries.read_run(folder)
    plans = {row.config_id: StitchPlan.from_json(json.loads(row.plan)) for row in tables.plans.itertuples()}
    scores: dict[int, list[Score]] = {}
    for row in tables.scores.itertuples():
        stderr = None if row.stderr is None or math.isnan(row.stderr) else float(row.stderr)
        scores.setdefault(row.trial_id, []).append(
            Score(row.benchmark, row.metric, row.score, stderr, row.n_samples, bool(row.higher_is_better))
        )
    finished, asked_after = {}, {}
    for row in tables.trials.itertuples():
        number = int(row.trial_id)
        asked_after[number] = _whole(row.asked_after, number)
        if row.status in (TrialStatus.SUCCESS, TrialStatus.CRASHED):
            outcome = Outcome(
                TrialStatus(row.status),
                row.ended_at.to_pydatetime(),
                tuple(scores.get(row.trial_id, ())),
                float(row.stitch_seconds),
                float(row.evaluate_seconds),
                row.error if isinstance(row.error, str) else None,
                _whole(row.told_as, number),
                row.worker if isinstance(row.worker, str) else None,
            )
            suggesting = float(row.suggest_seconds)
            plan = plans[row.config_id]
            finished[number] = Stored(int(row.config_id), plan, int(row.budget), int(row.seed), outcome, suggesting)
    return History(finished, asked_after)


def changed_versions(then: dict[str, str], now: dict[str, str]) -> str:
    """`smac 2.4.0 is 2.4.1 now`, or '' where nothing that a run notes has changed."""
    changes = [
        f"{name} {version} is {now.get(name, 'absent')} now"
        for name, version in then.items()
        if name in now and now[name] != version
    ]
    return ", ".join(changes)


def teach(suggester: Suggester, known: Sequence[tuple[Stored, list[float] | None]]) -> int:
    """Tell a fresh suggester of stored trials with their costs, as a warm start.

    How many it could not be told: plans that are not of its space any more.
    """
    refused = 0
    for trial, costs in known:
        try:
            suggester.learn(trial.config_id, trial.plan, trial.budget, trial.seed, costs, trial.outcome.at_work)
        except UserError:
            refused += 1
    return refused


def _whole(value: object, default: int) -> int:
    return default if pd.isna(value) else int(value)  # type: ignore[call-overload] # pandas knows what is missing
