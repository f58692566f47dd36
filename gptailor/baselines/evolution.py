"""Evolution over the removed layers: the best optimiser among the published baselines.

After EvoPress (Sieberling et al., arXiv 2410.14649, algorithm 1, with --drop_entire_block).

(1 + lambda): every generation, copies of the best cut swap a few removed layers with kept ones (how many: the lesser of
two draws from 1 to 3), and go through a selection in steps, few examples for many, many examples for few; the parent
stays where no child beats it. EvoPress measures the divergence from the dense model on text; here the fitness is the
search's own, the mean retention over the objectives, on the search's own rungs. It begins with random cuts and that of
Block Influence, and ends when it has scored as many examples as the search may.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

from gptailor.baselines import block_influence
from gptailor.baselines.case import Case
from gptailor.errors import UserError
from gptailor.plan import StitchPlan

CHILDREN = 16
MOST_SWAPS = 3
IDLE_GENERATIONS = 10
"""Generations in a row without a new cut after which a small space counts as exhausted."""

Cut = frozenset[int]


def cut(case: Case) -> StitchPlan:
    """The model less the layers that evolution ends with."""
    rng = random.Random(f"evolution/{case.seed}/{case.source}")
    first = [frozenset(rng.sample(case.free, case.n_removed)) for _ in range(CHILDREN - 1)]
    best = _select(case, [frozenset(block_influence.cut(case).removed), *first], None)
    idle = 0
    while case.examples < case.allowed and idle < IDLE_GENERATIONS:
        before = case.examples
        best = _select(case, [_mutated(best, case.free, rng) for _ in range(CHILDREN)], best)
        idle = idle + 1 if case.examples == before else 0
    if case.score(best, case.rungs[-1]) == -math.inf:
        raise UserError(f"evolution: none of its cuts of {case.n_removed} layers gives numbers")
    return case.plan(best)


def _select(case: Case, cuts: Iterable[Cut], parent: Cut | None) -> Cut:
    """The best by the highest rung, among those that the lower rungs let through."""
    left = list(dict.fromkeys(cuts))
    for step, n in enumerate(case.rungs):
        if step == len(case.rungs) - 1 and parent is not None:
            left = list(dict.fromkeys([parent, *left]))
        scores = {one: case.score(one, n) for one in left}
        left.sort(key=lambda one: -scores[one])
        left = left[: max(1, len(left) // 4)]
    return left[0]


def _mutated(parent: Cut, free: Sequence[int], rng: random.Random) -> Cut:
    swaps = min(rng.randint(1, MOST_SWAPS), rng.randint(1, MOST_SWAPS))
    gone = sorted(parent)
    kept = [layer for layer in free if layer not in parent]
    swaps = min(swaps, len(gone), len(kept))
    return parent - set(rng.sample(gone, swaps)) | set(rng.sample(kept, swaps))
