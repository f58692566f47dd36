"""The simplest scorer: here, in the engine's own process, one trial at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from gptailor.errors import UserError
from gptailor.evaluate.benchmarks import OpenBenchmark
from gptailor.plan import StitchPlan
from gptailor.scoring.item_cache import Items, PlanScores
from gptailor.scoring.plan_scorer import OBJECTIVES, PlanScorer
from gptailor.scoring.scorer import Ended, attempt, hung_error, last_line
from gptailor.scoring.time_limit import TimeLimit
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Reading
from gptailor.store.folder import RunFolder

log = logging.getLogger("gptailor")


class LocalScorer:
    """The engine's own process scores, whenever it is waited for."""

    def __init__(
        self,
        spec: RunSpec,
        known: Items,
        should_stop: Callable[[], bool],
        hung: Callable[[int, str], None],
        folder: RunFolder | None = None,
    ) -> None:
        """known: what each example gave, so far. hung: told of a trial that will not come back; ends the process.

        Raises UserError.
        """
        self.plan_scorer = PlanScorer.open(spec, spec.objectives, max_examples=spec.budget.max, folder=folder)
        self.plan_scorer.known = known
        self.cache = self.plan_scorer.cache
        self.n_layers = self.plan_scorer.family.n_layers
        self.fixed = self.plan_scorer.family.renumbering.fixed
        self._spec, self._should_stop, self._hung = spec, should_stop, hung
        self._taken: tuple[int, StitchPlan, int] | None = None

    @property
    def room(self) -> int:
        return int(self._taken is None)

    def begin(self, trial_id: int, plan: StitchPlan, budget: int, others: int) -> None:  # noqa: ARG002 (the protocol's signature)
        self._taken = (trial_id, plan, budget)

    def wait(self) -> list[Ended]:
        assert self._taken is not None
        trial_id, plan, budget = self._taken
        limit = TimeLimit(self._spec.trial_walltime_seconds, lambda: self._hung(trial_id, hung_error(self._spec)))
        result, error = attempt(
            limit, self._should_stop, lambda should_stop: self.plan_scorer.score(plan, budget, should_stop)
        )
        self._taken = None
        if error is not None:
            self.plan_scorer.free()
        return [Ended(trial_id, result, error)]

    def opened(self, on: str) -> Sequence[OpenBenchmark]:
        return self.plan_scorer.opened(on)

    def reorder(self, orders: Mapping[Reading, list[int]]) -> None:
        self.plan_scorer.reorder(orders)

    def score(self, plan: StitchPlan, budget: int, on: str = OBJECTIVES) -> PlanScores:
        """One that other runs of the family ask for too, such as the dense base and one-shot cuts."""
        with self._said("a model that the search needs cannot be scored"):
            return self.plan_scorer.score(plan, budget, self._should_stop, self.plan_scorer.opened(on), share=True)

    def repaired(self, plan: StitchPlan) -> StitchPlan:
        with self._said("a plan cannot be repaired"):
            return self.plan_scorer.repaired(plan)

    @contextmanager
    def _said(self, what: str) -> Iterator[None]:
        """What torch dies of (memory, a matrix that has no solution) as a UserError, as workers have it."""
        try:
            yield
        except RuntimeError as error:
            log.exception("%s", what)
            self.plan_scorer.free()
            raise UserError(f"{what}: {type(error).__name__}: {last_line(str(error))}") from error

    def n_parameters(self, plan: StitchPlan) -> int:
        return self.plan_scorer.stitcher.n_parameters(plan)

    def influence_orders(self) -> list[tuple[str, list[int]]]:
        return self.plan_scorer.influence_orders()

    def publish(self) -> None:
        if self.plan_scorer.shared is not None:
            self.plan_scorer.shared.publish()

    def close(self) -> None:
        """Nothing is held that does not end with the process."""
