"""Who scores trials, as the search sees it, and the simplest one: here, in the engine's own process, one at a time.

The other one is a team of Dask workers (gptailor/cluster/team.py). The search's loop does not know which it has.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from gptailor.evaluate import NonFinite, OpenBenchmark, Stopped, is_out_of_memory
from gptailor.ledger import Items, Ledger, PlanScores
from gptailor.plan import StitchPlan
from gptailor.spec import Reading, RunSpec
from gptailor.watch import TimeLimit, TookTooLong
from gptailor.workbench import OBJECTIVES, Workbench

T = TypeVar("T")


@dataclass(frozen=True)
class Ended:
    """How the scoring of a trial ended: with a result, with an error, or with neither, because the run is to stop.

    worker: the name of who did it, where there are several.
    """

    trial_id: int
    result: PlanScores | None = None
    error: str | None = None
    worker: str | None = None

    @property
    def is_given_up(self) -> bool:
        return self.result is None and self.error is None


class Scorer(Protocol):
    """Scores plans of one run.

    begin: take a trial, if there is `room`; others: how many more are to come at once, that want a worker too. wait:
    the trials that ended, at least one; of those that are given up because the run is to stop, all.
    """

    n_layers: int
    ledger: Ledger

    @property
    def room(self) -> int: ...
    def opened(self, on: str) -> Sequence[OpenBenchmark]: ...
    def reorder(self, orders: Mapping[Reading, list[int]]) -> None:
        """Read the objectives' examples in these orders from now on; the ledger's items are in them."""

    def begin(self, trial_id: int, plan: StitchPlan, budget: int, others: int) -> None: ...
    def wait(self) -> list[Ended]: ...

    def score(self, plan: StitchPlan, budget: int, on: str = OBJECTIVES) -> PlanScores:
        """One plan, now. on: OBJECTIVES or SELECTION. Raises Stopped, NonFinite."""

    def n_parameters(self, plan: StitchPlan) -> int: ...
    def influence_orders(self) -> list[tuple[str, list[int]]]: ...
    def close(self) -> None: ...


class Here:
    """The engine's own process scores, whenever it is waited for."""

    def __init__(
        self, spec: RunSpec, known: Items, should_stop: Callable[[], bool], hung: Callable[[int, str], None]
    ) -> None:
        """known: what each example gave, so far. hung: told of a trial that will not come back; ends the process.

        Raises UserError.
        """
        self.bench = Workbench.open(spec, spec.objectives, max_examples=spec.budget.max)
        self.bench.known = known
        self.ledger = self.bench.ledger
        self.n_layers = self.bench.family.n_layers
        self._spec, self._should_stop, self._hung = spec, should_stop, hung
        self._taken: tuple[int, StitchPlan, int] | None = None

    @property
    def room(self) -> int:
        return int(self._taken is None)

    def begin(self, trial_id: int, plan: StitchPlan, budget: int, others: int) -> None:
        self._taken = (trial_id, plan, budget)

    def wait(self) -> list[Ended]:
        assert self._taken is not None
        trial_id, plan, budget = self._taken
        limit = TimeLimit(self._spec.trial_walltime_seconds, lambda: self._hung(trial_id, hung_error(self._spec)))
        result, error = attempt(
            limit, self._should_stop, lambda should_stop: self.bench.score(plan, budget, should_stop)
        )
        self._taken = None
        if error is not None:
            self.bench.free()
        return [Ended(trial_id, result, error)]

    def opened(self, on: str) -> Sequence[OpenBenchmark]:
        return self.bench.opened(on)

    def reorder(self, orders: Mapping[Reading, list[int]]) -> None:
        self.bench.reorder(orders)

    def score(self, plan: StitchPlan, budget: int, on: str = OBJECTIVES) -> PlanScores:
        return self.bench.score(plan, budget, self._should_stop, self.bench.opened(on))

    def n_parameters(self, plan: StitchPlan) -> int:
        return self.bench.stitcher.n_parameters(plan)

    def influence_orders(self) -> list[tuple[str, list[int]]]:
        return self.bench.influence_orders()

    def close(self) -> None:
        """Nothing is held that does not end with the process."""


def attempt(
    limit: TimeLimit, should_stop: Callable[[], bool], work: Callable[[Callable[[], bool]], T]
) -> tuple[T | None, str | None]:
    """The result of a trial's work, or what went wrong: its status and cause, never a score. Neither: it was stopped.

    work: is given what it has to ask between packs.
    """

    def between() -> bool:
        limit.check()
        return should_stop()

    try:
        with limit:
            return work(between), None
    except Stopped:
        return None, None
    except (NonFinite, TookTooLong) as problem:
        return None, f"{type(problem).__name__}: {problem}"
    except Exception as problem:  # a trial may fail in any way (a driver, a merge); the search goes on
        memory = f"OutOfMemory: {last_line(str(problem))}\n" if is_out_of_memory(problem) else ""
        return None, traceback.format_exc() + memory


def hung_error(spec: RunSpec) -> str:
    return f"TookTooLong: longer than {spec.trial_walltime}, and it never came back"


def last_line(error: str | None) -> str:
    return ((error or "").strip() or "unknown").splitlines()[-1]
