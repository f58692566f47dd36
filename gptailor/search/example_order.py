"""Which examples the low rungs read: those on which the reference plans differ most.

A rung's examples are the first of a benchmark's order. In a random order most of them say nothing: every plan gets them
right, or none does. So before a search begins, a few plans (the dense base, the one-shot cuts of each model) are scored
on all examples that the highest rung reads, and these are put in the order of the variance of what the plans got. What
the highest rung reads, and what it says, stays the same. On SmolLM2, 27 examples of 81 that were picked so order other
plans nearly as well as all 81 do (docs/lab-notes.md). Picking informative examples for cheap evaluations is MERGE3's
idea (arXiv 2502.10436) and tinyBenchmarks' (arXiv 2402.14992), which fit item response models to many models' answers;
to rank examples, five plans are enough.

Differences between plans are larger on such examples than on all: `slopes` says by how much, and costs are brought to
the highest rung's scale by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gptailor.evaluate.benchmarks import OpenBenchmark
from gptailor.plan import StitchPlan
from gptailor.scoring.item_cache import OPTIONS, ORDER, Fresh, Items, items_key, reading_key
from gptailor.spec.sections import Reading

FLATTEST = 0.1
"""The least that a slope is taken for: few plans tell it roughly."""


def telling_orders(
    plans: Sequence[StitchPlan], benchmarks: Sequence[OpenBenchmark], known: Items
) -> dict[Reading, list[int]]:
    """For each benchmark the places of its examples, those on which the plans differ most first.

    plans: scored on all examples. Benchmarks whose items are no numbers (perplexities) have no order, nor has any where
    there are no two plans.
    """
    variances: dict[Reading, NDArray[np.float64]] = {}
    for benchmark in benchmarks:
        items = _items(plans, benchmark, known)
        if items is not None and len(items) > 1:
            found, reading = items.var(axis=0), benchmark.spec.reading
            variances[reading] = variances.get(reading, 0.0) + found / (found.mean() or 1.0)  # metrics weigh alike
    return {reading: np.argsort(-found, kind="stable").tolist() for reading, found in variances.items()}


def slopes(
    plans: Sequence[StitchPlan], benchmarks: Sequence[OpenBenchmark], rungs: Sequence[int], known: Items
) -> dict[int, dict[str, float]]:
    """By rung and objective, what a difference between plans amounts to on the highest rung's examples.

    The slope of the plans' scores there over those here, between FLATTEST and 1; 1 where that is not known.
    """
    found: dict[int, dict[str, float]] = {rung: {} for rung in rungs}
    for benchmark in benchmarks:
        items = _items(plans, benchmark, known)
        for rung in rungs:
            found[rung][benchmark.name] = 1.0
            if items is not None and len(items) > 2 and rung < items.shape[1]:
                here, there = items[:, :rung].mean(axis=1), items.mean(axis=1)
                spread = float(np.var(here))
                if spread > 0:
                    covariance = float(np.mean((here - here.mean()) * (there - there.mean())))
                    found[rung][benchmark.name] = min(max(covariance / spread, FLATTEST), 1.0)
    return found


def put_in_order(
    known: Items, orders: Mapping[Reading, list[int]], dense: StitchPlan, benchmarks: Sequence[OpenBenchmark]
) -> list[Fresh]:
    """Bring items that are known in the seeded order into these orders, and enter the orders; all of them, to store."""
    places = {
        key.of: orders[benchmark.spec.reading]
        for benchmark in benchmarks
        if benchmark.spec.reading in orders
        for key in (items_key(dense, benchmark), reading_key(dense, benchmark, OPTIONS))
    }
    for key in [key for key in known if key.of in places]:
        known[key] = [known[key][place] for place in places[key.of]]
    for benchmark in benchmarks:
        if benchmark.spec.reading in orders:
            known[reading_key(dense, benchmark, ORDER)] = orders[benchmark.spec.reading]
    return [(key, 0, items) for key, items in known.items()]


def known_orders(known: Items, dense: StitchPlan, benchmarks: Sequence[OpenBenchmark]) -> dict[Reading, list[int]]:
    """The orders that are stored with a run's items."""
    keys = {benchmark.spec.reading: reading_key(dense, benchmark, ORDER) for benchmark in benchmarks}
    return {reading: known[key] for reading, key in keys.items() if key in known}


def _items(plans: Sequence[StitchPlan], benchmark: OpenBenchmark, known: Items) -> NDArray[np.float64] | None:
    """plans x examples, of the plans that answered all; None where an item is no number."""
    rows = [known.get(items_key(plan, benchmark), []) for plan in plans]
    rows = [row for row in rows if len(row) == benchmark.n_examples]
    if not rows or not all(isinstance(item, (int, float)) for row in rows for item in row):
        return None
    return np.array(rows, dtype=np.float64)
