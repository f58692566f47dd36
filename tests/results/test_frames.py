"""The data step of the pages on values: facts, the table of trials, progress, fidelity."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.make_runs import PERPLEXITY, make_run
from helpers.run_tables import SPEC, START, run_tables
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gptailor.measures import MAX_HYPERVOLUME, hypervolume
from gptailor.results import scores
from gptailor.results.frames import fidelity, progress
from gptailor.results.frames.facts import Average
from gptailor.results.frames.seconds import seconds
from gptailor.results.frames.tradeoffs import hypervolume_of_all
from gptailor.results.frames.trials import judged
from gptailor.results.frames.view import View
from gptailor.results.summary import run_summary
from gptailor.store import queries

DENSE = [
    {"subject": "dense", "name": "piqa/acc", "score": 0.8, "n_samples": 900},
    {"subject": "dense", "name": "piqa/acc", "score": 0.75, "n_samples": 100},
    {"subject": "dense", "name": "piqa/acc", "score": 0.1, "n_samples": 900, "split": "test"},
    {"subject": "dense", "name": "wiki/ppl", "score": 10.0, "n_samples": 900},
]


def success(config_id: int, budget: int, piqa: float, ppl: float) -> dict[Any, Any]:
    return {"config_id": config_id, "budget": budget, "scores": {"piqa/acc": piqa, "wiki/ppl": ppl}}


def crash(config_id: int, budget: int, error: str | None = "Traceback …\nOutOfMemoryError: 2 GiB") -> dict[str, Any]:
    return {"config_id": config_id, "budget": budget, "status": "crashed", "error": error}


def test_seconds_of_all_processes_in_the_order_of_a_runs_life() -> None:
    again = START + timedelta(hours=1)
    kept = [(START, "score", 6.0), (START, "start", 1.0), (again, "start", 1.0), (again, "unheard of", 9.0)]
    found = seconds(run_tables(seconds=kept).seconds)
    assert found.values.tolist() == [["start", 2.0, 0.25], ["score", 6.0, 0.75]]
    assert seconds(run_tables().seconds).empty, "a run of an older version"


# --- facts and the table of trials ------------------------------------------------------------------------------------


def test_facts_of_a_run() -> None:
    facts = View(run_tables([success(1, 900, 0.6, 20.0)], evaluations=DENSE)).facts
    assert facts.names == ["piqa/acc", "wiki/ppl"]
    assert [o.higher_is_better for o in facts.objectives] == [True, False]
    assert facts.rungs == (100, 300, 900) and facts.full_budget == 900
    assert facts.candidates == ("math", "code")
    assert facts.average is Average.RETENTION and facts.average_label == "Retention", "of one of them"
    assert facts.dense == {"piqa/acc": 0.8, "wiki/ppl": 10.0}


def test_objectives_are_known_before_the_first_score() -> None:
    assert View(run_tables()).facts.names == ["piqa/acc", "wiki/ppl"]


def test_a_budget_outside_the_rungs_is_a_rung_too() -> None:
    assert View(run_tables([success(1, 50, 0.6, 20.0)])).facts.rungs == (50, 900)


def test_retention_is_of_the_dense_score_over_as_many_examples_else_over_the_most() -> None:
    trials = View(run_tables([success(1, 100, 0.6, 20.0), success(1, 900, 0.6, 20.0)], evaluations=DENSE)).trials
    assert trials["piqa/acc kept"].tolist() == pytest.approx([0.6 / 0.75, 0.6 / 0.8])
    assert trials["wiki/ppl kept"].tolist() == pytest.approx([0.5, 0.5])  # lower is better: dense / score
    assert trials["average"].tolist() == pytest.approx([0.8, 0.75]), "a perplexity is averaged with no accuracy"


def test_the_error_of_the_average() -> None:
    trials = View(run_tables([success(1, 900, 0.6, 20.0)], evaluations=DENSE)).trials
    assert trials["average ±"].iloc[0] == pytest.approx(0.01 / 0.8)


def test_without_dense_scores_the_average_is_of_scores_that_are_shares() -> None:
    view = View(run_tables([success(1, 900, 0.6, 20.0)]))
    assert view.facts.average is Average.SCORE
    assert view.trials["average"].iloc[0] == pytest.approx(0.6), "a perplexity has a unit of its own"


def test_a_trial_without_all_scores_has_no_average() -> None:
    lacking = {"config_id": 2, "budget": 900, "scores": {"piqa/acc": 0.9}}
    view = View(run_tables([success(1, 900, 0.6, 20.0), lacking, crash(3, 900)], evaluations=DENSE))
    assert view.trials["average"].isna().tolist() == [False, True, True]
    assert view.plans["config_id"].tolist() == [1]


def test_best_is_judged_at_the_highest_budget_that_succeeded() -> None:
    low_but_better = success(7, 300, 0.79, 11.0)
    view = View(run_tables([low_but_better, success(1, 900, 0.5, 20), success(2, 900, 0.6, 20), crash(3, 900)]))
    assert view.top_budget == 900 and view.judged_in_full
    assert view.plans["config_id"].tolist() == [2, 1]
    early = View(run_tables([low_but_better, success(1, 100, 0.8, 11)]))
    assert early.top_budget == 300 and not early.judged_in_full
    assert early.plans["config_id"].tolist() == [7]


def test_a_plan_scored_twice_counts_once_by_its_last_trial() -> None:
    view = View(run_tables([success(1, 900, 0.5, 20), success(1, 900, 0.7, 20)], evaluations=DENSE))
    assert view.plans["piqa/acc"].tolist() == [0.7]


@pytest.mark.parametrize("benchmarks", [("piqa", "csqa"), ("piqa", "csqa", f"wiki/{PERPLEXITY}"), ("piqa",)])
def test_the_best_plan_is_the_one_that_the_store_names(tmp_path: Path, benchmarks: tuple[str, ...]) -> None:
    folder = make_run(tmp_path, "same", n_trials=60, benchmarks=benchmarks, seed=4)
    view, summary = View(queries.read_run(folder)), run_summary(folder)
    best = view.plans.iloc[0]
    assert best["config_id"] == summary.best_config
    assert best["average"] == pytest.approx(summary.retention)
    assert hypervolume_of_all(view.plans, view.facts) == pytest.approx(summary.hypervolume)


def test_frames_are_not_changed_by_those_who_read_them(tmp_path: Path) -> None:
    view = View(queries.read_run(make_run(tmp_path, "still", n_trials=40)))
    before = view.trials.copy(), view.plans.copy(), view.layers.copy()
    progress.best_so_far(view.trials, view.facts)
    progress.failures(view.trials)
    fidelity.agreement(view.trials, view.facts)
    for old, new in zip(before, (view.trials, view.plans, view.layers), strict=True):
        pd.testing.assert_frame_equal(old, new)


# --- progress ---------------------------------------------------------------------------------------------------------


def test_numbers_of_a_running_run() -> None:
    trials = [success(1, 100, 0.5, 20), crash(2, 100), {"config_id": 3, "budget": 300, "status": "running"}]
    view = View(run_tables(trials, status="running"))
    now = progress.numbers(view.trials, view.facts, START + timedelta(minutes=3))
    assert (now.done, now.asked, now.failed) == (2, 20, 1)
    assert (now.trial_id, now.config_id, now.budget) == (2, 3, 300)
    assert now.rate == pytest.approx(60) and now.seconds_left == pytest.approx(18 * 60)
    assert now.elapsed == pytest.approx(180)


def test_a_trial_that_was_given_up_is_not_done() -> None:
    """The same on Progress, in the table of runs and in what `show` says."""
    trials = [success(1, 900, 0.5, 20), crash(2, 900), {"config_id": 3, "budget": 900, "status": "cancelled"}]
    tables = run_tables(trials, status="stopped")
    view = View(tables)
    now = progress.numbers(view.trials, view.facts, START + timedelta(minutes=3))
    assert (now.done, now.failed, len(scores.ended(tables.trials))) == (2, 1, 2)


def test_a_run_of_baselines_asks_for_as_many_trials_as_it_makes() -> None:
    tables = run_tables([success(1, 900, 0.5, 20)])
    made = replace(tables, runs=tables.runs.assign(n_trials=3))
    assert (tables.n_asked, made.n_asked, View(made).facts.trials_asked) == (20, 3, 3)


def test_a_time_limit_bounds_the_time_left() -> None:
    view = View(run_tables([success(1, 100, 0.5, 20)], status="running", spec=SPEC | {"walltime": "10m"}))
    now = progress.numbers(view.trials, view.facts, START + timedelta(minutes=4))
    assert now.seconds_left == pytest.approx(540)  # the trial took one minute


def test_numbers_before_the_first_trial() -> None:
    view = View(run_tables(status="running"))
    now = progress.numbers(view.trials, view.facts, START)
    assert (now.done, now.rate, now.seconds_left, now.budget) == (0, None, None, None)


def test_best_so_far_counts_all_trials_and_only_the_top_rung() -> None:
    trials = [success(1, 100, 0.9, 10), success(1, 900, 0.5, 20), crash(2, 900), success(3, 900, 0.4, 20)]
    trials += [success(4, 900, 0.7, 16)]
    frame = progress.best_so_far((view := View(run_tables(trials, evaluations=DENSE))).trials, view.facts)
    assert frame["trials"].tolist() == [2, 4, 5]
    assert frame["hours"].tolist() == pytest.approx([2 / 60, 4 / 60, 5 / 60])
    assert frame["best"].tolist() == pytest.approx([0.625, 0.625, 0.875])
    assert frame["is_best"].tolist() == [True, False, True]
    assert frame["hypervolume"].tolist() == pytest.approx([0.5 / 20, 0.5 / 20, 0.7 / 16])


def test_hypervolume_so_far_is_that_of_the_plans_so_far(tmp_path: Path) -> None:
    view = View(queries.read_run(make_run(tmp_path, "hv", n_trials=80, seed=2)))
    frame = progress.best_so_far(view.trials, view.facts)
    scores = view.plans.set_index("config_id").loc[frame["config_id"], view.facts.names].to_numpy()
    for n in (1, 5, len(frame)):
        assert frame["hypervolume"].iloc[n - 1] == pytest.approx(hypervolume(scores[:n], [0, 0]))
    assert frame["hypervolume"].is_monotonic_increasing


def test_hypervolume_is_not_told_of_too_many_objectives() -> None:
    names = [f"b{i}/acc" for i in range(MAX_HYPERVOLUME + 1)]
    trials = [{"config_id": 1, "budget": 900, "scores": dict.fromkeys(names, 0.5)}]
    view = View(run_tables(trials, spec={**SPEC, "objectives": []}))
    assert progress.best_so_far(view.trials, view.facts)["hypervolume"].isna().all()


def test_the_timeline_ends_running_trials_now_and_drops_the_oldest() -> None:
    view = View(run_tables([success(1, 100, 0.5, 20), {"config_id": 3, "budget": 300, "status": "running"}]))
    bars = progress.timeline(view.trials, now_hours=0.5)
    assert bars["end_hours"].tolist() == pytest.approx([1 / 60, 0.5])
    assert progress.timeline(view.trials, None)["end_hours"].tolist() == pytest.approx([1 / 60, 1 / 60])
    many = pd.concat([view.trials] * progress.TIMELINE_MARKS, ignore_index=True)
    assert len(progress.timeline(many, None)) == progress.TIMELINE_MARKS


def of_worker(worker: str | None, minute: float, seconds: float) -> dict[str, object]:
    """A trial that was asked for at the start, and ended at that minute."""
    ended = START + timedelta(minutes=minute)
    times = {"started_at": START, "ended_at": ended, "stitch_seconds": 0.0, "evaluate_seconds": seconds}
    return success(1, 100, 0.5, 20) | times | {"worker": worker}


def test_trials_that_waited_for_a_worker_last_as_long_as_they_were_scored() -> None:
    view = View(run_tables([of_worker("a", 1, 60), of_worker("b", 2, 90), of_worker("a + b", 3, 30)]))
    assert view.trials["seconds"].tolist() == [60, 90, 30]
    assert view.trials["start_hours"].tolist() == pytest.approx([0, 0.5 / 60, 2.5 / 60])
    lanes = progress.worker_lanes(view.trials)
    assert lanes["worker"].tolist() == ["a", "b", "a", "b"] and lanes["trial_id"].tolist() == [0, 1, 2, 2]
    assert progress.worker_lanes(View(run_tables([success(1, 100, 0.5, 20)])).trials).empty
    assert progress._took(view.trials) == pytest.approx(150), (
        "overlaps count once, and nobody was at work from 2:00 to 2:30"
    )


def test_what_workers_do() -> None:
    idle = {"name": "cpu-1", "host": "here", "joined": 0.0, "device": "", "state": "idle", "trial_id": None}
    idle |= {"since": 0.0, "done": 0, "seconds": 0.0, "memory": 2_000_000_000}
    busy = idle | {"name": "cpu-0", "state": "scoring", "trial_id": 4, "since": 95.0, "done": 3, "seconds": 75.0}
    table = progress.workers([idle, busy], at=100.0)
    assert table["worker"].tolist() == ["cpu-0", "cpu-1"] and table["doing"].tolist() == ["scoring", "waiting"]
    assert table["time_share"].tolist() == [0.75, 0.0] and table["gigabytes"].tolist() == [2.0, 2.0]
    assert table.loc[0, ["trial_id", "for_seconds", "trials"]].tolist() == [4, 5, 3]
    assert table.loc[1, ["trial_id", "for_seconds"]].isna().all()


def test_failures_and_their_causes() -> None:
    view = View(run_tables([crash(1, 100), crash(2, 100, "x\nOutOfMemoryError: 3 GiB"), crash(3, 900, None)]))
    failed = progress.failures(view.trials)
    assert failed["trial_id"].tolist() == [2, 1, 0]
    assert failed["cause"].tolist() == [
        "no cause was recorded", "OutOfMemoryError: 3 GiB", "OutOfMemoryError: 2 GiB",
    ]  # fmt: skip
    assert progress.causes(failed)["trials"].tolist() == [2, 1]  # the two differ in a number only


# --- fidelity ---------------------------------------------------------------------------------------------------------


def ladder_run() -> View:
    """Six plans on the lowest rung, three of them on the next, two on the highest; the first two swap places."""
    trials = [success(c, 100, 0.80 - 0.05 * c, 10) for c in range(6)]
    trials += [success(c, 300, piqa, 10) for c, piqa in ((0, 0.70), (1, 0.72), (2, 0.60))]
    trials += [success(c, 900, piqa, 10) for c, piqa in ((0, 0.66), (1, 0.71))]
    return View(run_tables([*trials, crash(6, 100)], evaluations=DENSE))


def test_shares_of_trials_examples_and_time() -> None:
    view = ladder_run()
    shares = fidelity.rung_shares(view.trials, view.facts)
    assert shares["trials"].tolist() == [7, 3, 2] and shares["failed"].tolist() == [1, 0, 0]
    assert shares["trial_share"].tolist() == pytest.approx([7 / 12, 3 / 12, 2 / 12])
    assert shares["examples"].tolist() == [1200, 1800, 3600]
    assert shares["example_share"].sum() == pytest.approx(1) and shares["time_share"].sum() == pytest.approx(1)
    long = fidelity.share_rows(shares)
    assert len(long) == 9 and long.groupby("of")["share"].sum().tolist() == pytest.approx([1, 1, 1])


def test_the_ladder_and_who_climbed_it() -> None:
    view = ladder_run()
    rungs = fidelity.ladder(view.trials, view.facts)
    assert rungs.set_index("config_id")["top"].to_dict() == {0: 900, 1: 900, 2: 300, 3: 100, 4: 100, 5: 100}
    climbed = fidelity.promotions(rungs, view.facts)
    assert climbed[["scored", "promoted"]].to_numpy().tolist() == [[6, 3], [3, 2]]
    assert fidelity.promotion_words(climbed)[0] == "3 of 6 plans climbed from 100 to 300 examples."
    assert len(fidelity.ladder_rows(rungs, view.facts)) == 11


def test_agreement_between_rungs() -> None:
    view = ladder_run()
    agreed = fidelity.agreement(view.trials, view.facts).set_index(["objective", "low", "high"])
    row = agreed.loc[("piqa/acc", 100, 300)]
    assert (row["n"], row["spearman"]) == (3, pytest.approx(0.5))
    assert row["flips"] == pytest.approx(1 / 3)
    assert agreed.loc[("average", 300, 900), "n"] == 2
    assert np.isnan(agreed.loc[("average", 300, 900), "spearman"])  # two points tell nothing
    assert np.isnan(agreed.loc[("wiki/ppl", 100, 300), "spearman"])  # nor does a constant


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=30))
def test_rank_correlations_are_scipys(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, dtype=float).T
    rho, tau, _ = fidelity.rank_correlation(a, b)
    if len(set(a)) < 2 or len(set(b)) < 2:
        assert np.isnan(rho)
    else:
        assert rho == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-9)
        assert tau == pytest.approx(stats.kendalltau(a, b).statistic, abs=1e-9)


def test_rank_moves() -> None:
    view = ladder_run()
    moves = fidelity.rank_moves(view.trials, 100, 300)
    high = moves[moves["budget"] == 300].set_index("config_id")
    assert high["rank"].to_dict() == {1: 1, 0: 2, 2: 3}
    assert high["moved"].to_dict() == {1: 1, 0: -1, 2: 0}
    assert high["kind"].to_dict() == {1: "up", 0: "down", 2: "steady"}


@pytest.mark.parametrize(
    ("rho", "n", "words"),
    [(0.95, 30, "can be trusted:"), (0.5, 30, "can be trusted roughly"), (0.0, 60, "cannot be trusted"),
     (0.5, 6, "cannot be judged yet"), (1.0, 3, "cannot be judged yet")],
)  # fmt: skip
def test_the_verdict_in_words(rho: float, n: int, words: str) -> None:
    facts = ladder_run().facts
    low, high = fidelity._interval(rho, n)
    row = {"objective": "average", "low": 100, "high": 900, "n": n, "spearman": rho, "spearman_low": low}
    agreed = pd.DataFrame([row | {"spearman_high": high, "kendall": rho, "flips": 0.2}])
    moves = pd.DataFrame(
        {"config_id": [1], "budget": [900], "rank": [1], "moved": [4], "average": [0.9], "kind": ["up"]}
    )
    text = fidelity.verdict(agreed, moves, facts)
    assert words in text and f"n = {n} plans" in text and "number 5" in text
    assert ("few plans" in text) == (n < fidelity.ENOUGH)


def test_the_verdict_where_nothing_can_be_said() -> None:
    view = View(run_tables([success(1, 900, 0.5, 20)]))
    agreed, moves = fidelity.agreement(view.trials, view.facts), pd.DataFrame()
    assert "Too few plans" in fidelity.verdict(agreed, moves, view.facts)
    assert "single rung" in fidelity.verdict(agreed, moves, replace(view.facts, rungs=(900,)))


def test_judged_is_sorted_by_the_average() -> None:
    view = ladder_run()
    assert judged(view.trials, view.facts)["average"].is_monotonic_decreasing
