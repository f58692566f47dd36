"""As many workers as a cluster has, simulated: do they stay busy, and is everything written down?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.simulated import busy, run_search, simulated_workers

from gptailor.launch.engine import prepare
from gptailor.plan import StitchPlan
from gptailor.scoring.item_cache import ItemCache, PlanScores
from gptailor.scoring.scorer import Ended
from gptailor.search.loop import Search
from gptailor.search.recording import open_writer
from gptailor.spec.files import load_spec
from gptailor.spec.sections import Benchmark
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.writer import RunWriter
from gptailor.trial import RunStatus, Score, TrialStatus

N_WORKERS, SECONDS = 12, 3.75
"""A trial is asked for as often as 64 workers with trials of 20 s would."""


@pytest.mark.alone
def test_workers_stay_busy(run_file: Path, tmp_path: Path) -> None:
    """`python tests/bench/workers.py simulated` is the long form: 64 workers, trials of 20 s."""
    n_trials = 3 * N_WORKERS
    with simulated_workers(tmp_path, N_WORKERS, SECONDS) as (cluster, done):
        spec = load_spec(run_file, [f"workers.scheduler={cluster.address}", f"trials={n_trials}"])
        folder = prepare(tmp_path / "runs", spec)
        run_search(folder)
    trials = queries.read_run(folder).trials
    assert len(trials) == n_trials and set(trials.status) == {TrialStatus.SUCCESS}
    assert busy(done, N_WORKERS) >= 0.9  # the bar is 0.95 on a machine that does nothing else


OBJECTIVES = (("first_words", "acc"), ("other_words", "acc_norm"))


class Holding:
    """A scorer that takes everything before it gives anything back, in another order."""

    n_layers = 6
    fixed: frozenset[int] = frozenset()

    def __init__(self, most: int) -> None:
        self.most = most
        self.cache = ItemCache(6)
        self.taken: list[tuple[int, int]] = []

    @property
    def room(self) -> int:
        return self.most - len(self.taken)

    def begin(self, trial_id: int, plan: StitchPlan, budget: int, others: int) -> None:  # noqa: ARG002 (the protocol's signature)
        self.taken.append((trial_id, budget))

    def wait(self) -> list[Ended]:
        taken, self.taken = self.taken, []
        return [Ended(trial_id, self.made(budget), worker="w") for trial_id, budget in sorted(taken, key=_shuffled)]

    def made(self, budget: int) -> PlanScores:
        scores = [
            Score("first_words", "acc", 0.5, None, budget, True),
            Score("other_words", "acc_norm", 0.4, None, 9, True),
        ]
        return PlanScores(tuple(scores), 0.1, 1.0, ())

    def score(self, plan: StitchPlan, budget: int, on: str = "") -> PlanScores:  # noqa: ARG002 (the protocol's signature)
        return self.made(budget)

    def publish(self) -> None:
        """Nothing that others could share was computed."""

    def opened(self, on: str) -> Sequence[Any]:  # noqa: ARG002 (the protocol's signature)
        """As much of benchmarks as the search looks at: nothing was scored on them, so they keep their order."""
        specs = [Benchmark(benchmark=name, metric=metric) for name, metric in OBJECTIVES]
        return [SimpleNamespace(spec=spec, name=spec.name, chance=None, n_examples=9, cut_note=None) for spec in specs]

    def reorder(self, orders: Any) -> None:  # noqa: ARG002 (the protocol's signature)
        raise AssertionError("there is no order to be put in")

    def n_parameters(self, plan: StitchPlan) -> int:  # noqa: ARG002 (the protocol's signature)
        return 1

    def influence_orders(self) -> list[tuple[str, list[int]]]:
        return [("base", list(range(6)))]

    def close(self) -> None:
        pass


def _shuffled(taken: tuple[int, int]) -> int:
    return taken[0] * 389 % 1000


class Told:
    """Counts what a terminal would show."""

    def __init__(self) -> None:
        self.replayed = 0

    def trial(self, trial: Any, outcome: Any, retention: Any, replayed: bool) -> None:  # noqa: ARG002 (the protocol's signature)
        self.replayed += replayed

    def __getattr__(self, name: str) -> Any:
        return lambda *_arguments: None


@pytest.mark.slow
@pytest.mark.parametrize(("n_trials", "again"), [(1000, False), (250, True)])
def test_a_thousand_trials_in_flight_are_recorded(
    run_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    n_trials: int,
    again: bool,
) -> None:
    """And gone through again, in the order in which they were asked for and told: SMAC asks for the very same."""

    @contextmanager
    def holding(self: Search) -> Iterator[Holding]:  # noqa: ARG001 (the protocol's signature)
        yield Holding(n_trials)

    monkeypatch.setattr(Search, "_scorer", holding)
    spec = load_spec(run_file, [f"trials={n_trials}", "suggester=random"])
    folder = prepare(tmp_path, spec)
    told = Told()
    assert Search(folder, spec, open_writer(folder, spec), told, Event()).run() == (RunStatus.FINISHED, None)
    assert_all_are_there(folder, n_trials)
    if again:
        assert Search(folder, spec, RunWriter.open(folder), told, Event()).run() == (RunStatus.FINISHED, None)
        assert told.replayed == n_trials
        assert_all_are_there(folder, n_trials)


def assert_all_are_there(folder: RunFolder, n_trials: int) -> None:
    tables = queries.read_run(folder)
    trials = tables.trials
    assert trials.trial_id.tolist() == list(range(n_trials)) and set(trials.status) == {TrialStatus.SUCCESS}
    assert sorted(trials.told_as) == trials.trial_id.tolist() and (trials.told_as != trials.trial_id).any()
    assert set(trials.asked_after) == {0}, "all were asked for before the first was told"
    assert len(tables.scores) == 2 * n_trials
