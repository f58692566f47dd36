"""How a score joins its examples' items, and how it varies where that is not their plain mean.

A mean's items are numbers, so two subjects' can be compared one by one. A perplexity, an F1, a correlation, a corpus
metric or a group whose tasks count alike is a number of all examples together: it is computed again on examples drawn
with replacement, the same draws for every subject, and differences between subjects are read from those (the paired
bootstrap of corpus metrics, Koehn 2004). A group's tasks keep their sizes.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptailor.evaluate.scoring import aggregation_of

if TYPE_CHECKING:
    from gptailor.evaluate.benchmarks import OpenBenchmark

MEAN, MEAN_BY_TASK = "mean", "mean by task"
DRAWS, SLOW_DRAWS = 500, 100
SLOW = ("bleu", "chrf", "chrfpp", "ter")
"""Corpus metrics of which lm-eval too takes 100 samples."""


def aggregation_name(benchmark: OpenBenchmark) -> str:
    """`mean`; `mean by task` where a group's tasks count alike; else lm-eval's name of the function."""
    names = sorted({aggregation_of(benchmark, task).__name__ for task in range(len(benchmark.tasks))})
    by_task = len(benchmark.tasks) > 1 and not benchmark.weight_by_size
    return " and ".join(names) + (" by task" if by_task else "")


def resampled(benchmark: OpenBenchmark, items: Sequence[Any]) -> tuple[float, ...] | None:
    """The score on each of DRAWS resamples of examples 0, 1, ... in nested order.

    None for a plain mean of items, which need none. Draws depend on the benchmark and the number of examples alone.
    NaN: no score on that draw.
    """
    if aggregation_name(benchmark) == MEAN and all(item is not None for item in items):
        return None
    functions = [aggregation_of(benchmark, task) for task in range(len(benchmark.tasks))]
    n_draws = SLOW_DRAWS if any(function.__name__ in SLOW for function in functions) else DRAWS
    of = benchmark.spec
    seed = hashlib.blake2b(f"{of.key}/{of.split}/{len(items)}".encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(seed, "little"))
    total, weights = np.zeros(n_draws), 0
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # a draw may hold one class only
        for task, function in enumerate(functions):
            places = [place for place, item in enumerate(items) if benchmark.examples[place].task == task]
            own = [items[place] for place in places if items[place] is not None]
            draws = rng.integers(len(own), size=(n_draws, len(own))) if own else np.zeros((n_draws, 0), dtype=int)
            if own:
                weight = len(own) if benchmark.weight_by_size else 1
                total += weight * _scores(function, own, draws)
                weights += weight
    return tuple((total / weights).tolist()) if weights else None


def _scores(function: Any, own: list[Any], draws: NDArray[np.int64]) -> NDArray[np.float64]:
    if function.__name__ == MEAN:
        return np.asarray(own, dtype=float)[draws].mean(axis=1)
    found = []
    for draw in draws:
        try:
            found.append(float(function([own[place] for place in draw])))
        except (ValueError, ZeroDivisionError, OverflowError):  # not defined on this draw
            found.append(np.nan)
    return np.asarray(found)
