"""Which differences between held-out results are more than noise.

Frames in, frames out. Tests are paired: two subjects answered the very same examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from gptailor.results.scores import BENCHMARK
from gptailor.trial import REPAIRED, ItemKey, Subject, is_repaired

Items = Mapping[ItemKey, Sequence[Any]]
"""What each example gave."""

DRAWS = 4000
SIGNIFICANT = 0.05
"""Differences of a greater p are called noise."""


def paired(frame: pd.DataFrame, items: Items, one: Subject, other: Subject) -> pd.DataFrame:
    """Does `one` answer better than `other` on the same examples? A row a benchmark, and one (benchmark "average").

    Columns: benchmark, metric, split, n, difference (in the metric, more is better), low, high (95 % interval), p (two
    sided), test. Right-or-wrong answers: McNemar's exact test, and an interval by bootstrap; other numbers and the
    average: paired bootstrap, which draws examples with replacement within each benchmark. Benchmarks whose examples
    are no plain numbers (perplexities, say) are left out, and then the average is of those that are left.
    """
    rng = np.random.default_rng(0)
    rows, draws, differences = [], [], []
    for key, pair in frame[frame["subject"].isin([str(one), str(other)])].groupby(BENCHMARK, sort=False):
        sides = {row.subject: _numbers(items.get(ItemKey(row.plan_hash, *key))) for row in pair.itertuples()}
        first, second = sides.get(str(one)), sides.get(str(other))
        if first is None or second is None or not min(len(first), len(second)):
            continue
        n = min(len(first), len(second), int(pair["n"].min()))
        sign = 1.0 if bool(pair["higher"].iloc[0]) else -1.0
        apart = sign * (first[:n] - second[:n])
        drawn = _bootstrap(apart, rng)
        if set(np.unique(first[:n])) | set(np.unique(second[:n])) <= {0.0, 1.0}:
            p, test = _mcnemar(apart), "McNemar"
        else:
            p, test = _p(drawn), "bootstrap"
        low, high = np.quantile(drawn, [0.025, 0.975])
        rows.append((*key, n, apart.mean(), low, high, p, test))
        draws.append(drawn)
        differences.append(apart.mean())
    if len(rows) > 1:
        drawn = np.mean(draws, axis=0)
        low, high = np.quantile(drawn, [0.025, 0.975])
        rows.append(
            (
                "average",
                "",
                "",
                sum(row[3] for row in rows),
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

    By how much it is better (in the mean of the metrics), the 95 % interval, p, and the number of examples.
    """

    config_id: int
    difference: float
    low: float
    high: float
    p: float
    n: int

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
        return (
            f"plan {self.config_id} repaired is {verdict} than itself unrepaired{shown}: {self.difference:+.4f} "
            f"[{self.low:+.4f}, {self.high:+.4f}], p {self.p:.3g} ({self.n} examples)"
        )


def repaired(frame: pd.DataFrame, items: Items, config_id: int) -> Repaired | None:
    """How configuration `config_id` does once it is repaired; None where it was not, or no example can be compared.

    frame: see scores.judged.
    """
    table = paired(frame, items, Subject.config(REPAIRED + config_id), Subject.config(config_id))
    if table.empty:
        return None
    row = table.iloc[-1]  # the average, where there are several benchmarks
    difference, low, high, p = (float(row[column]) for column in ("difference", "low", "high", "p"))
    return Repaired(config_id, difference, low, high, p, int(row["n"]))


def repairs(frame: pd.DataFrame, items: Items) -> list[Repaired]:
    """All of `frame`'s repaired plans beside themselves unrepaired."""
    ids = sorted({int(config) for config in frame["config_id"].dropna()})
    found = (repaired(frame, items, config_id - REPAIRED) for config_id in ids if is_repaired(config_id))
    return [one for one in found if one is not None]


def _mcnemar(apart: np.ndarray) -> float:
    """Exact McNemar test: of the examples that only one of the two got right, is the share of either a half?"""
    wins, losses = int((apart > 0).sum()), int((apart < 0).sum())
    return 1.0 if wins + losses == 0 else float(stats.binomtest(wins, wins + losses).pvalue)


def _bootstrap(apart: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of DRAWS resamples. Differences take few values (right or wrong), so counts are drawn, not examples."""
    values, counts = np.unique(apart, return_counts=True)
    if len(values) <= 64:
        return rng.multinomial(len(apart), counts / len(apart), size=DRAWS) @ values / len(apart)
    return np.array([apart[rng.integers(len(apart), size=len(apart))].mean() for _ in range(DRAWS)])


def _p(drawn: np.ndarray) -> float:
    """Two-sided: how often the resampled mean is on the other side of no difference, or on it."""
    smaller = min((drawn <= 0).mean(), (drawn >= 0).mean())
    return float(min(1.0, max(2 * smaller, 1 / DRAWS)))


def _numbers(items: Sequence[Any] | None) -> np.ndarray | None:
    if items is None or not all(isinstance(item, (int, float, bool)) for item in items):
        return None
    return np.asarray(items, dtype=float)
