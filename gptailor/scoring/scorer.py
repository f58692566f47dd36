"""Who scores trials, as the search sees it.

Either the engine's own process (local.py) or Dask workers (cluster/dask_scorer.py): the search's loop does not know
which it has.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from gptailor.evaluate.benchmarks import OpenBenchmark
from gptailor.evaluate.evaluator import Stopped, is_out_of_memory
from gptailor.evaluate.scoring import NonFinite
from gptailor.plan import StitchPlan
from gptailor.scoring.item_cache import ItemCache, PlanScores
from gptailor.scoring.plan_scorer import OBJECTIVES
from gptailor.scoring.time_limit import TimeLimit, TookTooLong
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Reading

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
    the trials that ended, at least one; of those that are given up because the run is to stop, all. fixed: layers that
    every plan keeps.
    """

    n_layers: int
    fixed: frozenset[int]
    cache: ItemCache

    @property
    def room(self) -> int: ...
    def opened(self, on: str) -> Sequence[OpenBenchmark]: ...
    def reorder(self, orders: Mapping[Reading, list[int]]) -> None:
        """Read the objectives' examples in these orders from now on; the cache's items are in them."""

    def begin(self, trial_id: int, plan: StitchPlan, budget: int, others: int) -> None: ...
    def wait(self) -> list[Ended]: ...

    def score(self, plan: StitchPlan, budget: int, on: str = OBJECTIVES) -> PlanScores:
        """One plan, now. on: OBJECTIVES or SELECTION. Raises Stopped, NonFinite, UserError."""

    def repaired(self, plan: StitchPlan) -> StitchPlan:
        """The plan with the run's repair. Raises Stopped, UserError."""

    def n_parameters(self, plan: StitchPlan) -> int: ...
    def influence_orders(self) -> list[tuple[str, list[int]]]: ...
    def publish(self) -> None:
        """Let other runs have what `score` and `influence_orders` computed: the models were found to be the same."""

    def close(self) -> None: ...


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
