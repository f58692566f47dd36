"""Greedy removal by the benchmarks themselves (after TALE, github.com/omyokun/tale).

One layer at a time, the one whose removal leaves the best score.

TALE goes on until its task's accuracy falls by more than a margin; here it goes on until as many layers are gone as
were asked for, judged by the mean retention over the objectives. Cost: about n_removed * n_layers plans, each on as
many examples as the search's whole allowance of examples gives them, at most the highest rung's.
"""

from __future__ import annotations

import math

from gptailor.baselines.case import Case
from gptailor.errors import UserError
from gptailor.plan import StitchPlan


def cut(case: Case) -> StitchPlan:
    """The model less the layers that greedy removal by score picks."""
    n_plans = sum(case.n_layers - step for step in range(case.n_removed))
    n = max(1, min(case.rungs[-1], case.allowed // max(n_plans, 1)))
    removed: list[int] = []
    for _ in range(case.n_removed):
        left = [layer for layer in case.free if layer not in removed]
        scores = {layer: case.score([*removed, layer], n) for layer in left}
        removed.append(max(left, key=lambda layer: (scores[layer], layer)))
        if scores[removed[-1]] == -math.inf:
            raise UserError(f"greedy: without {len(removed)} layers no model gives numbers")
    return case.plan(removed)
