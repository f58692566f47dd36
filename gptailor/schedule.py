"""How the trials of a search spread over the rungs, by arithmetic: Hyperband's brackets as SMAC runs them.

SMAC starts bracket after bracket, each one rung higher than the last and then from the lowest again, and finishes a
bracket before it begins the next, so the number of trials at each rung follows from the run file alone (SMAC 2.4,
intensifier/successive_halving.py and hyperband.py; tested against our own suggester).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Budget, SpaceOperation

REFERENCES = 5
"""Plans that are scored at the full budget before the first trial, where there are several rungs: the dense base and
the first of the initial design, by which the examples are put in order (gptailor/search/example_order.py)."""

SCREENED_FROM = 6
"""Candidates from which on a run with `screen: auto` screens them: up to here, all merges of them can be chosen."""
SWAPS = 2
"""Single layers that a candidate is given a chance with (gptailor/search/screening.py)."""


@dataclass(frozen=True)
class Rung:
    """What is planned on one rung.

    budget: examples per benchmark. trials: at this budget. examples: per benchmark, really computed in these trials; a
    promoted configuration keeps what it scored on the rung below (a budget's examples are the first of the next's).
    """

    budget: int
    trials: int
    examples: int


def brackets(budget: Budget) -> list[list[tuple[int, int]]]:
    """One cycle of Hyperband: for each bracket its stages as (rung index, configurations)."""
    top = len(budget.rungs) - 1
    cycle = []
    for first in range(top + 1):
        steps = top - first
        start = math.ceil(budget.eta**steps * (top + 1) / (steps + 1))
        cycle.append([(first + k, max(1, start // budget.eta**k)) for k in range(steps + 1)])
    return cycle


def schedule(budget: Budget, trials: int) -> tuple[Rung, ...]:
    """The rungs, lowest first, with the `trials` first trials of the search spread over them."""
    counts = [0] * len(budget.rungs)
    fresh = [0] * len(budget.rungs)
    for (index, is_first), _ in zip(_trials(budget), range(trials), strict=False):
        counts[index] += 1
        fresh[index] += budget.rungs[index] - (0 if is_first else budget.rungs[index - 1])
    return tuple(Rung(*row) for row in zip(budget.rungs, counts, fresh, strict=True))


def is_screened(spec: RunSpec) -> bool:
    """Whether the run's candidates are screened before its search."""
    lends = {SpaceOperation.SELECT, SpaceOperation.MERGE} & set(spec.operations)
    wanted = len(spec.candidates) >= SCREENED_FROM if spec.screen == "auto" else spec.screen
    return bool(lends) and bool(wanted) and len(spec.candidates) > 1 and not spec.baselines


def screening_rounds(spec: RunSpec) -> tuple[int, ...]:
    """Examples of each objective that the rounds of a screening read: the two lowest rungs."""
    return spec.budget.rungs[:2]


def n_examples(spec: RunSpec) -> int:
    """Examples that the whole search scores, at most: a benchmark with fewer ends at its size.

    Beside the trials, the references are scored at the full budget: with one rung, the dense base and Block Influence's
    pick, of a range of sizes its picks at the ends and the middle. Candidates are screened, where they are, on the
    lowest rungs.
    """
    one_shot = 3 if spec.has_range else 1 if spec.remove else 0
    references = REFERENCES if len(spec.budget.rungs) > 1 else 1 + one_shot
    each = sum(rung.examples for rung in schedule(spec.budget, spec.trials)) + references * spec.budget.max
    rounds = screening_rounds(spec)
    screened = len(spec.candidates) * (rounds[-1] + SWAPS * rounds[0]) if is_screened(spec) else 0
    return (each + screened) * len(spec.objectives)


def _trials(budget: Budget) -> Iterator[tuple[int, bool]]:
    """Without end: the rung index of each trial, and whether its configuration is new."""
    cycle = brackets(budget)
    while True:
        for stages in cycle:
            for place, (index, configurations) in enumerate(stages):
                for _ in range(configurations):
                    yield index, place == 0
