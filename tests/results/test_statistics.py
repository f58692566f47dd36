"""Held-out results read against the dense model, against guessing, and against each other on the same examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.run_tables import SPEC, run_tables
from scipy import stats

from gptailor.plan import StitchPlan
from gptailor.results import scores, statistics
from gptailor.results.frames import held_out
from gptailor.store.queries import Answers
from gptailor.trial import REPAIRED, ItemKey, Subject, SubjectKind

RUN = SPEC | {
    "objectives": [{"benchmark": "piqa", "metric": "acc", "split": "validation"}],
    "held_out": [
        {"benchmark": "piqa", "metric": "acc", "split": "test"},
        {"benchmark": "arc", "metric": "acc", "split": "test"},
        {"benchmark": "wiki", "metric": "ppl", "split": "test"},
    ],
}
PLAN = StitchPlan.without([2], 4)


def evaluation(subject: str, name: str, score: float, n: int = 100, split: str = "test", **more):
    return {"subject": subject, "name": name, "score": score, "n_samples": n, "split": split} | more


EVALUATIONS = [
    evaluation("dense", "piqa/acc", 0.8, chance=0.5),
    evaluation("dense", "piqa/acc", 0.7, 50, chance=0.5),
    evaluation("dense", "arc/acc", 0.26, chance=0.25),
    evaluation("dense", "wiki/ppl", 8.0),
    evaluation("config:7", "piqa/acc", 0.65, chance=0.5),
    evaluation("config:7", "arc/acc", 0.25, chance=0.25),
    evaluation("config:7", "wiki/ppl", 16.0),
    evaluation("baseline:last", "piqa/acc", 0.6, 50, chance=0.5, plan_hash="abc"),
    evaluation("candidate:math", "piqa/acc", 0.75, chance=0.5),
    evaluation("dense", "piqa/acc", 0.8, 900, split="validation"),
]


@pytest.fixture
def tables():
    trials = [{"config_id": 7, "budget": 900, "scores": {"piqa/acc": 0.76}}]
    return run_tables(trials, {7: PLAN}, EVALUATIONS, spec=RUN)


@pytest.fixture
def frame(tables) -> pd.DataFrame:
    return scores.judged(tables)


def row(frame: pd.DataFrame, subject: str, benchmark: str) -> pd.Series:
    (found,) = [one for _, one in frame.iterrows() if (one.subject, one.benchmark) == (subject, benchmark)]
    return found


def test_each_result_is_read_against_dense_on_as_many_examples(frame: pd.DataFrame) -> None:
    assert list(dict.fromkeys(frame.subject)) == ["dense", "candidate:math", "baseline:last", "config:7"]
    assert set(frame.split) == {"test"}
    assert row(frame, "config:7", "piqa").retention == pytest.approx(0.65 / 0.8)
    assert row(frame, "baseline:last", "piqa").retention == pytest.approx(0.6 / 0.7), "50 examples, as dense's 50"
    assert row(frame, "config:7", "wiki").retention == pytest.approx(0.5)
    assert row(frame, "config:7", "piqa").calibrated and not row(frame, "config:7", "arc").calibrated


def test_retention_above_chance_is_for_what_dense_can_do(frame: pd.DataFrame) -> None:
    assert row(frame, "config:7", "piqa").above_chance == pytest.approx(0.15 / 0.3)
    assert np.isnan(row(frame, "config:7", "arc").above_chance), "dense is within two errors of guessing"
    assert np.isnan(row(frame, "config:7", "wiki").above_chance)


def test_plans_behind_results_are_known(frame: pd.DataFrame) -> None:
    assert row(frame, "config:7", "arc").plan_hash == PLAN.hash
    assert row(frame, "dense", "arc").plan_hash == StitchPlan.dense(4).hash
    assert row(frame, "candidate:math", "piqa").plan_hash == StitchPlan.dense(4, "math").hash
    assert row(frame, "baseline:last", "piqa").plan_hash == "abc"


def test_averages(tables, frame: pd.DataFrame) -> None:
    believed = scores.calibration(tables)
    assert believed[Subject.config(7)] == pytest.approx(0.76 / 0.8)
    table = scores.averages(frame, believed).set_index("subject")
    assert list(table.index) == ["dense", "config:7"], "the others were not scored on every benchmark"
    mine = table.loc["config:7"]
    assert (mine.benchmarks, mine.averaged) == (3, 2), "a perplexity is averaged with no accuracy"
    assert mine.average == pytest.approx((0.65 + 0.25) / 2)
    assert mine.stderr == pytest.approx(np.sqrt(0.01**2 + 0.01**2) / 2)
    assert mine.without_calibration == pytest.approx(0.25)
    kept = (0.65 / 0.8 + 0.25 / 0.26) / 2
    assert mine.retention == pytest.approx(kept)
    assert mine.gap == pytest.approx(0.95 - kept)
    assert scores.strongest(table.reset_index(), SubjectKind.CONFIG) == Subject.config(7)
    assert scores.strongest(table.reset_index(), SubjectKind.BASELINE) is None


def test_nothing_is_held_out_yet() -> None:
    frame = scores.judged(run_tables(spec=RUN))
    assert frame.empty and scores.averages(frame).empty


A, B = Subject.config(1), Subject.config(2)


def pair_of(first: list[Any], second: list[Any], metric: str = "acc", higher: bool = True) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "subject": [str(A), str(B)],
            "plan_hash": ["A", "B"],
            "benchmark": "x",
            "metric": metric,
            "split": "test",
            "n": len(first),
            "score": [np.mean(first), np.mean(second)],
            "higher": higher,
            "aggregation": None,
            "share": higher,
        }
    )
    items = {ItemKey("A", "x", metric, "test"): first, ItemKey("B", "x", metric, "test"): second}
    return statistics.paired(frame, Answers(items), A, B)


def test_right_or_wrong_is_tested_by_mcnemar() -> None:
    first, second = [1] * 30 + [0] * 10 + [1] * 60, [0] * 30 + [1] * 10 + [1] * 60
    (found,) = pair_of(first, second).itertuples()
    assert (found.test, found.n) == ("McNemar", 100) and found.difference == pytest.approx(0.2)
    assert found.p == pytest.approx(stats.binomtest(30, 40).pvalue)
    assert 0 < found.low < 0.2 < found.high < 0.35
    (same,) = pair_of(second, second).itertuples()
    assert (same.difference, same.p) == (0, 1)


def test_other_numbers_are_tested_by_bootstrap() -> None:
    rng = np.random.default_rng(1)
    second = rng.random(400)
    (better,) = pair_of(list(second + 0.05 + 0.1 * rng.standard_normal(400)), list(second)).itertuples()
    assert better.test == "bootstrap" and better.p < 0.01 and better.low > 0
    assert better.difference == pytest.approx(0.05, abs=0.02)
    (noise,) = pair_of(list(second + 0.1 * rng.standard_normal(400)), list(second)).itertuples()
    assert noise.p > 0.05 and noise.low < 0 < noise.high
    (worse,) = pair_of(list(second + 0.1), list(second), "ppl", higher=False).itertuples()
    assert worse.difference == pytest.approx(-0.1) and worse.p < 0.01


def test_scores_that_make_no_average_are_each_told() -> None:
    """A repaired plan that is clearly better in one perplexity is not better where another is clearly worse."""
    one, other = Subject.config(REPAIRED + 1), Subject.config(1)
    columns = ["subject", "config_id", "plan_hash", "benchmark", "metric", "split", "n", "score", "higher"]
    rows, drawn = [], {}
    common = np.random.default_rng(0).normal(0, 1, 500)
    for name, own in (("lambada", 9.0), ("wiki", 4.0)):
        for subject, score in ((one, own), (other, 5.0)):
            rows.append((str(subject), subject.config_id, str(subject), name, "ppl", "test", 3, score, False))
            drawn[str(subject), name, "ppl", "test", 3] = list(score + common)
    frame = pd.DataFrame(rows, columns=columns).assign(aggregation="weighted_perplexity", share=False)
    answers = Answers({}, drawn)
    found = statistics.repaired(frame, answers, 1)
    assert found is not None and not found.is_better and found.difference == pytest.approx(-4.0)
    assert "is worse than itself unrepaired, on lambada/ppl: -4.0000" in found.text
    told = held_out.verdict(statistics.paired(frame, answers, one, other), one, other)
    assert "behind plan 1 by 4.000 in ppl on lambada" in told.lower() and "ahead of plan 1 by 1.000" in told.lower()
    alone = frame[frame.benchmark == "wiki"]
    better = statistics.repaired(alone, answers, 1)
    assert better is not None and better.is_better and better.benchmark == ""


def test_without_the_dense_score_nothing_is_known_to_be_kept() -> None:
    rows = [evaluation("dense", "piqa/acc", 0.8, 900, split="validation")]
    spec = RUN | {"objectives": [*RUN["objectives"], {"benchmark": "wiki", "metric": "ppl", "split": "validation"}]}
    trials = [{"config_id": 7, "budget": 900, "scores": {"piqa/acc": 0.76, "wiki/ppl": 9.0}}]
    found = scores.searched(run_tables(trials, {7: PLAN}, rows, spec=spec))
    assert found.kept["piqa/acc"].tolist() == pytest.approx([0.95]) and found.kept["wiki/ppl"].isna().all()
    assert not found.is_share and found.average[7] == pytest.approx(0.76)


def test_the_average_is_tested_over_benchmarks() -> None:
    rows: list[tuple[Any, ...]] = []
    items: dict[ItemKey, list[Any]] = {}
    for name, gap in (("x", 6), ("y", -2)):
        for subject, right in ((str(A), 50 + gap), (str(B), 50)):
            rows.append((subject, subject, name, "acc", "test", 100, right / 100, True, "mean", True))
            items[ItemKey(subject, name, "acc", "test")] = [1] * right + [0] * (100 - right)
    drawn = np.random.default_rng(0)
    for subject, score in ((str(A), 4.0), (str(B), 4.2)):
        rows.append((subject, subject, "wiki", "ppl", "test", 3, score, False, "weighted_perplexity", False))
        items[ItemKey(subject, "wiki", "ppl", "test")] = [[-3.0, 2], [-4.0, 3], [-1.0, 1]]
        rows.append((subject, subject, "old", "ppl", "test", 3, score, False, None, False))
        items[ItemKey(subject, "old", "ppl", "test")] = [-1.0, -2.0, -1.5]
    common = drawn.normal(0, 1, 500)  # which examples are drawn moves both alike
    resamples = {(s, "wiki", "ppl", "test", 3): list(score + common) for s, score in ((str(A), 4.0), (str(B), 4.2))}
    columns = ["subject", "plan_hash", "benchmark", "metric", "split", "n", "score", "higher", "aggregation", "share"]
    found = statistics.paired(pd.DataFrame(rows, columns=columns), Answers(items, resamples), A, B)
    assert list(found.benchmark) == ["x", "y", "wiki", "average"], "what the old one's items mean is not known"
    wiki = found.set_index("benchmark").loc["wiki"]
    assert wiki.difference == pytest.approx(0.2) and wiki.p < 0.01, "the lower perplexity is ahead, in its own unit"
    assert wiki.test == "bootstrap of the score"
    last = found.iloc[-1]
    assert last.difference == pytest.approx(0.02) and last.n == 200 and last.low <= 0.02 <= last.high
