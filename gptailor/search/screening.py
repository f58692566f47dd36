"""Which candidates widen the space: those that help nowhere are left out before the search begins.

A layer has a choice more for every candidate, and with several that may be merged many more, so a weak candidate costs
the search examples. Candidates are screened by successive elimination (Even-Dar, Mannor & Mansour, JMLR 7, 2006), a
bandit over candidates: all are scored on few examples, those that are clearly behind go, the others on more examples.

First as a whole: the base's one-shot cut with every kept layer the candidate's. Differences are taken example by
example, between candidates and from the base. Who is clearly behind another on every objective has one more chance:
single layers of its own in the base's cut, some early, some late. Where one clearly helps on any objective, it stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from gptailor.errors import UserError
from gptailor.evaluate.benchmarks import OpenBenchmark
from gptailor.evaluate.scoring import NonFinite
from gptailor.plan import BASE, LayerChoice, StitchPlan
from gptailor.schedule import SWAPS, screening_rounds
from gptailor.scoring.item_cache import PlanScores, items_key
from gptailor.scoring.plan_scorer import OBJECTIVES
from gptailor.scoring.scorer import Scorer
from gptailor.spec.run import RunSpec
from gptailor.store.screening import Screening

LEVEL = 0.05
"""How likely any candidate goes that is as good as the one it seems behind, over all candidates and rounds."""


def without_candidates(spec: RunSpec, left_out: Collection[str]) -> RunSpec:
    """The run as if these candidates had not been named; its operations stay, though they may have nobody left."""
    return spec.model_copy(update={"candidates": {n: at for n, at in spec.candidates.items() if n not in left_out}})


def screen(spec: RunSpec, scorer: Scorer, removed: Sequence[int], remember: Callable[[PlanScores], None]) -> Screening:
    """Screen the run's candidates. removed: by the base's one-shot cut. remember: is given what was scored.

    Where no objective gives a number for an example (perplexities), or the base's own cut none at all, everybody stays.
    Raises Stopped.
    """
    return _Screener(spec, scorer, tuple(removed), remember).screened()


class _Screener:
    def __init__(
        self, spec: RunSpec, scorer: Scorer, removed: tuple[int, ...], remember: Callable[[PlanScores], None]
    ) -> None:
        self.spec, self.scorer, self.remember = spec, scorer, remember
        self.reference = StitchPlan.without(set(removed), scorer.n_layers)
        self.removed = removed
        self.left_out: dict[str, float | None] = {}
        self.examples = 0
        tests = len(spec.candidates) * len(screening_rounds(spec))
        self.clear = NormalDist().inv_cdf(1 - LEVEL / tests)

    def screened(self) -> Screening:
        for n in screening_rounds(self.spec):
            try:
                self.remember(self.scorer.score(self.reference, n))
            except (NonFinite, UserError):  # nobody can be told from it: the base's own cut is at fault
                break
            gains = {name: self._gains(self._whole(name), n) for name in self._left}
            for name in [name for name, own in gains.items() if own is None]:
                self.left_out[name] = None
            known = {name: own for name, own in gains.items() if own}
            for name in [name for name in known if not self._keeps_up(name, known)]:
                if not self._lends_a_layer(name):
                    self.left_out[name] = _lag(name, known)
        return Screening(tuple(self._left), self.left_out, self.examples)

    @property
    def _left(self) -> list[str]:
        return [name for name in self.spec.candidates if name not in self.left_out]

    def _whole(self, name: str) -> StitchPlan:
        return StitchPlan.without(set(self.removed), self.scorer.n_layers, name)

    def _swaps(self, name: str) -> Iterator[StitchPlan]:
        """The reference with one layer of the candidate's: some over the whole depth, the same of every candidate."""
        kept = list(self.reference.kept)
        for place in sorted({round(share * (len(kept) - 1)) for share in np.linspace(0, 1, SWAPS + 2)[1:-1]}):
            own = LayerChoice(kept[place].layer, (name,))
            yield StitchPlan(self.reference.n_layers, (*kept[:place], own, *kept[place + 1 :]))

    def _keeps_up(self, name: str, known: Mapping[str, list[NDArray[np.float64]]]) -> bool:
        """Whether on some objective neither another candidate nor the base is clearly ahead."""
        nothing = [np.zeros_like(own) for own in known[name]]
        rivals = [*(own for other, own in known.items() if other != name), nothing]
        return any(
            not any(self._is_clear(rival[place] - own) for rival in rivals) for place, own in enumerate(known[name])
        )

    def _lends_a_layer(self, name: str) -> bool:
        """Whether one of its layers in the base's cut clearly helps on an objective, on the first round's examples."""
        for plan in self._swaps(name):
            gains = self._gains(plan, screening_rounds(self.spec)[0])
            if gains and any(map(self._is_clear, gains)):
                return True
        return False

    def _is_clear(self, apart: NDArray[np.float64]) -> bool:
        """Whether the mean of these differences is above 0 by more than chance."""
        error = float(apart.std(ddof=1)) / math.sqrt(len(apart)) if len(apart) > 1 else math.inf
        return float(apart.mean()) > self.clear * error and float(apart.mean()) > 0

    def _gains(self, plan: StitchPlan, n: int) -> list[NDArray[np.float64]] | None:
        """By objective, what the plan gains on each of the first n examples; None where it cannot be scored."""
        before = {benchmark.name: len(self._items(plan, benchmark)) for benchmark in self._benchmarks}
        try:
            self.remember(self.scorer.score(plan, n))
        except (NonFinite, UserError):
            return None
        self.examples += max(0, n - min(before.values(), default=0))
        gains = []
        for benchmark in self._benchmarks:
            own, theirs = (self._items(one, benchmark)[:n] for one in (plan, self.reference))
            if all(isinstance(item, (int, float)) for item in (*own, *theirs)):
                sign = 1.0 if benchmark.higher_is_better else -1.0
                gains.append(sign * (np.array(own, dtype=float) - np.array(theirs, dtype=float)))
        return gains

    @property
    def _benchmarks(self) -> Sequence[OpenBenchmark]:
        return self.scorer.opened(OBJECTIVES)

    def _items(self, plan: StitchPlan, benchmark: OpenBenchmark) -> list[object]:
        return self.scorer.cache.known.get(items_key(plan, benchmark), [])


def _lag(name: str, known: Mapping[str, list[NDArray[np.float64]]]) -> float:
    """By how much it is behind where it is least behind, in the objective's metric."""
    means = {other: np.array([own.mean() for own in gains]) for other, gains in known.items()}
    means[BASE] = np.zeros_like(means[name])
    behind = np.max([other - means[name] for key, other in means.items() if key != name], axis=0)
    return float(behind.min())
