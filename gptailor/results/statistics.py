"""Which differences between held-out results are more than noise.

Tests are paired: two subjects answered the very same examples. A score that is the mean of its examples' items is
tested by these; one that is not (a perplexity, an F1, a BLEU, a group whose tasks count alike) by the score itself,
computed on resamples of the examples when it was judged (gptailor/evaluate/resampling.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gptailor.results.scores import BENCHMARK
from gptailor.store.queries import Answers
from gptailor.trial import REPAIRED, ItemKey, Subject, is_repaired

AVERAGE = "average"
"""Stands for a benchmark in the row of all of them."""
DRAWS = 4000
SIGNIFICANT = 0.05
"""Differences of a greater p are called noise."""


@dataclass(frozen=True)
class _Apart:
    """One subject less another on one benchmark, in its metric, so that more is better; drawn: on resamples."""

    n: int
    difference: float
    drawn: np.ndarray
    p: float
    test: str


def paired(frame: pd.DataFrame, answers: Answers, one: Subject, other: Subject) -> pd.DataFrame:
    """Does `one` answer better than `other` on the same examples? A row a benchmark, and one (benchmark "average").

    frame: see `judged`. Columns: benchmark, metric, split, n, difference (in the metric, positive where `one` is
    better), low, high (95 % interval), p (two sided), test. Scores that are means of right-or-wrong answers: McNemar's
    exact test, and an interval by bootstrap. Other means and the average: paired bootstrap, which draws examples with
    replacement within each benchmark. Other scores: the same of the score itself, computed on each draw when it was
    judged; where that was not stored, or not on as many examples, the benchmark is left out. The average is of shares
    alone.
    """
    rng = np.random.default_rng(0)
    rows, draws, differences, n_averaged = [], [], [], 0
    for key, pair in frame[frame["subject"].isin([str(one), str(other)])].groupby(BENCHMARK, sort=False):
        sides = {row.subject: row for row in pair.itertuples()}
        if len(sides) < 2:
            continue
        apart = _means_apart(sides[str(one)], sides[str(other)], key, answers, rng)
        apart = apart or _scores_apart(sides[str(one)], sides[str(other)], key, answers)
        if apart is None:
            continue
        low, high = np.quantile(apart.drawn, [0.025, 0.975])
        rows.append((*key, apart.n, apart.difference, low, high, apart.p, apart.test))
        if pair["share"].all():
            draws.append(rng.choice(apart.drawn, DRAWS) if len(apart.drawn) < DRAWS else apart.drawn)
            differences.append(apart.difference)
            n_averaged += apart.n
    if draws and len(rows) > 1:
        drawn = np.mean(draws, axis=0)
        low, high = np.quantile(drawn, [0.025, 0.975])
        rows.append(
            (
                AVERAGE,
                "",
                "",
                n_averaged,
                float(np.mean(differences)),
                low,
                high,
                _p(drawn),
                "bootstrap",
            )
        )
    return pd.DataFrame(rows, columns=[*BENCHMARK, "n", "difference", "low", "high", "p", "test"])


@dataclass(frozen=True)
class Repaired:
    """A repaired plan beside itself unrepaired, on the same examples.

    By how much it is better (in the mean of the metrics that are shares of examples; where none is, on `benchmark`
    alone: the clearest loss, else the clearest difference), the 95 % interval, p, and the number of examples.
    """

    config_id: int
    difference: float
    low: float
    high: float
    p: float
    n: int
    benchmark: str = ""

    @property
    def is_noise(self) -> bool:
        return self.p >= SIGNIFICANT

    @property
    def is_better(self) -> bool:
        return self.difference > 0 and not self.is_noise

    @property
    def text(self) -> str:
        verdict = "neither better nor worse" if self.is_noise else "better" if self.is_better else "worse"
        shown = ", as far as these examples can show" if self.is_noise else ""
        where = f", on {self.benchmark}" if self.benchmark else ""
        return (
            f"plan {self.config_id} repaired is {verdict} than itself unrepaired{shown}{where}: {self.difference:+.4f} "
            f"[{self.low:+.4f}, {self.high:+.4f}], p {self.p:.3g} ({self.n} examples)"
        )


def repaired(frame: pd.DataFrame, answers: Answers, config_id: int) -> Repaired | None:
    """How configuration `config_id` does once it is repaired; None where it was not, or no example can be compared.

    frame: see scores.judged.
    """
    table = paired(frame, answers, Subject.config(REPAIRED + config_id), Subject.config(config_id))
    if table.empty:
        return None
    row = _overall(table)
    name = f"{row['benchmark']}/{row['metric']}" if len(table) > 1 and row["benchmark"] != AVERAGE else ""
    difference, low, high, p = (float(row[column]) for column in ("difference", "low", "high", "p"))
    return Repaired(config_id, difference, low, high, p, int(row["n"]), name)


def _overall(table: pd.DataFrame) -> pd.Series:
    """The row of `paired` that the whole is judged by: the average, or, of scores that make none, one benchmark's.

    The clearest loss, where there is one that is more than noise, else the clearest gain: better is what is better
    somewhere and worse nowhere.
    """
    average = table[table["benchmark"] == AVERAGE]
    if len(average):
        return average.iloc[-1]
    losses = table[(table["p"] < SIGNIFICANT) & (table["difference"] < 0)]
    found = losses if len(losses) else table
    return found.loc[found["p"].idxmin()]


def repairs(frame: pd.DataFrame, answers: Answers) -> list[Repaired]:
    """All of `frame`'s repaired plans beside themselves unrepaired."""
    ids = sorted({int(config) for config in frame["config_id"].dropna()})
    found = (repaired(frame, answers, config_id - REPAIRED) for config_id in ids if is_repaired(config_id))
    return [one for one in found if one is not None]


def _mcnemar(apart: np.ndarray) -> float:
    """Exact McNemar test: of the examples that only one of the two got right, is the share of either a half?

    In whole numbers, because scipy would be a quarter of the time in which `show` starts.
    """
    wins, losses = int((apart > 0).sum()), int((apart < 0).sum())
    n, ways, as_uneven = wins + losses, 1, 0
    for k in range(min(wins, losses) + 1):
        as_uneven += ways
        ways = ways * (n - k) // (k + 1)  # n over k + 1
    return min(1.0, 2 * as_uneven / 2**n)


def _bootstrap(apart: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of DRAWS resamples. Differences take few values (right or wrong), so counts are drawn, not examples."""
    values, counts = np.unique(apart, return_counts=True)
    if len(values) <= 64:
        return rng.multinomial(len(apart), counts / len(apart), size=DRAWS) @ values / len(apart)
    return np.array([apart[rng.integers(len(apart), size=len(apart))].mean() for _ in range(DRAWS)])


def _p(drawn: np.ndarray) -> float:
    """Two-sided: how often the resampled mean is on the other side of no difference, or on it."""
    smaller = min((drawn <= 0).mean(), (drawn >= 0).mean())
    return float(min(1.0, max(2 * smaller, 1 / len(drawn))))


def _means_apart(one: Any, other: Any, key: Any, answers: Answers, rng: np.random.Generator) -> _Apart | None:
    """Where both scores are the means of their items."""
    first, second = _mean_items(one, key, answers), _mean_items(other, key, answers)
    if first is None or second is None:
        return None
    n = min(len(first), len(second))
    first, second = first[:n], second[:n]
    apart = (1.0 if one.higher else -1.0) * (first - second)
    drawn = _bootstrap(apart, rng)
    if set(np.unique(first)) | set(np.unique(second)) <= {0.0, 1.0}:
        return _Apart(n, float(apart.mean()), drawn, _mcnemar(apart), "McNemar")
    return _Apart(n, float(apart.mean()), drawn, _p(drawn), "bootstrap")


def _mean_items(row: Any, key: Any, answers: Answers) -> np.ndarray | None:
    """What stands behind a score as numbers; None where their mean is not the score, whatever their name."""
    items = list(answers.items.get(ItemKey(row.plan_hash, *key), ()))[: int(row.n)]
    known = row.aggregation if isinstance(row.aggregation, str) else "mean"
    if not items or known != "mean" or not all(isinstance(item, (int, float)) for item in items):
        return None
    numbers = np.asarray(items, dtype=float)
    return numbers if np.isclose(numbers.mean(), row.score, rtol=1e-6, atol=1e-9) else None


def _scores_apart(one: Any, other: Any, key: Any, answers: Answers) -> _Apart | None:
    """From the scores on resamples of as many examples."""
    drawn = [answers.resamples.get((row.plan_hash, *key, int(row.n))) for row in (one, other)]
    if one.n != other.n or drawn[0] is None or drawn[1] is None or len(drawn[0]) != len(drawn[1]):
        return None
    sign = 1.0 if one.higher else -1.0
    apart = sign * (np.asarray(drawn[0], dtype=float) - np.asarray(drawn[1], dtype=float))
    apart = apart[np.isfinite(apart)]
    if not len(apart):
        return None
    return _Apart(int(one.n), sign * float(one.score - other.score), apart, _p(apart), "bootstrap of the score")
