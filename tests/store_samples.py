"""One small run's records, for the store's tests and for the processes they start (quick to import)."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from gptailor.plan import LayerChoice, StitchPlan
from gptailor.store import RunFolder, RunWriter, new_run_id
from gptailor.trial import Origin, Outcome, RunRecord, Score, Trial, TrialStatus

NOON = datetime(2026, 11, 1, 12, 0, 0, 123456, tzinfo=UTC)
SPEC = {
    "objectives": [
        {"benchmark": "piqa", "metric": "acc", "split": "validation"},
        {"benchmark": "wikitext", "metric": "word_perplexity", "split": "validation"},
    ],
    "budget": {"min": 10, "max": 90, "eta": 3},
    "trials": 20,
    "device": "cpu",
}
PLAN = StitchPlan(
    5,
    (
        LayerChoice(0),
        LayerChoice(1, ("math",)),
        LayerChoice(3, ("math", "code"), "task_arithmetic", 0.5, (), 1.25),
        LayerChoice(4),
    ),
)


def new_writer(root: Path, name: str = "test", **changes) -> RunWriter:
    folder = RunFolder.of(root, new_run_id(name))
    record = replace(RunRecord(folder.run_id, name, SPEC, "models/base", 5, 1, 7, NOON), **changes)
    return RunWriter.create(folder, record, "name: test\n")


def a_trial(trial_id: int = 0, config_id: int = 0, budget: int = 90) -> Trial:
    return Trial(trial_id, config_id, budget, 7, Origin.MODEL, {"removed_0": 2}, NOON, 0.25)


def scores(accuracy: float = 0.5, perplexity: float = 20.0, n: int = 90) -> tuple[Score, ...]:
    return (
        Score("piqa", "acc", accuracy, 0.05, n, higher_is_better=True),
        Score("wikitext", "word_perplexity", perplexity, None, min(n, 62), higher_is_better=False),
    )


def success(*given: Score) -> Outcome:
    return Outcome(TrialStatus.SUCCESS, NOON + timedelta(seconds=9), given or scores(), 0.5, 8.0)
