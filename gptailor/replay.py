"""The trials that a run has already: read back, and told to the suggester once more.

As long as the suggester asks for what was stored, trial by trial, it is in the state that it had (Hyperband's brackets
included). Where it asks for something else (other versions of libraries, a run file that somebody changed), the replay
departs: a fresh suggester is told everything that is stored, at once, and the run goes on from there. What was scored
is not scored again either way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from gptailor.errors import UserError
from gptailor.plan import StitchPlan
from gptailor.store import RunFolder, queries
from gptailor.suggest import Suggester, Suggestion
from gptailor.trial import Outcome, Score, TrialStatus


@dataclass(frozen=True)
class Stored:
    """A trial that this run finished earlier."""

    config_id: int
    plan: StitchPlan
    budget: int
    seed: int
    outcome: Outcome

    def matches(self, suggestion: Suggestion) -> bool:
        return (self.plan.hash, self.budget) == (suggestion.plan.hash, suggestion.budget)


def stored_trials(folder: RunFolder) -> dict[int, Stored]:
    """Finished trials (successes and crashes) by their number; running and cancelled ones are to be run again."""
    tables = queries.read_run(folder)
    plans = {row.config_id: StitchPlan.from_json(json.loads(row.plan)) for row in tables.plans.itertuples()}
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
            stored[int(row.trial_id)] = Stored(
                int(row.config_id), plans[row.config_id], int(row.budget), int(row.seed), outcome
            )
    return stored


def seconds_spent(stored: dict[int, Stored]) -> float:
    return sum(trial.outcome.stitch_seconds + trial.outcome.evaluate_seconds for trial in stored.values())


def changed_versions(then: dict[str, str], now: dict[str, str]) -> str:
    """`smac 2.4.0 is 2.4.1 now`, or '' where nothing that a run notes has changed."""
    changes = [
        f"{name} {version} is {now.get(name, 'absent')} now"
        for name, version in then.items()
        if name in now and now[name] != version
    ]
    return ", ".join(changes)


def teach(suggester: Suggester, known: Sequence[tuple[Stored, list[float] | None]]) -> int:
    """Tell a fresh suggester of stored trials with their costs, as a warm start. How many it could not be told: plans
    that are not of its space any more."""
    refused = 0
    for trial, costs in known:
        try:
            suggester.learn(trial.config_id, trial.plan, trial.budget, trial.seed, costs)
        except UserError:
            refused += 1
    return refused
