"""What to try next: SMAC behind `ask` and `tell`.

SMAC gives Hyperband over the budget, ParEGO over the objectives, the random forest, expected improvement and the run
history; what it learns from and where it looks is put in terms of plans (`surrogate.py`). Two settings are not its
defaults because those fail: costs are always finite (the forest refuses the infinite crash cost), and incumbents are
selected on the highest budget (several objectives over budgets die of an assertion otherwise, SMAC 2.4).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ConfigSpace import Configuration
from smac import HyperparameterOptimizationFacade, Scenario
from smac.acquisition.function import EI
from smac.initial_design.abstract_initial_design import AbstractInitialDesign
from smac.intensifier.hyperband import Hyperband
from smac.intensifier.hyperband_utils import determine_HB
from smac.multi_objective.parego import ParEGO
from smac.random_design import ProbabilityRandomDesign
from smac.runhistory.dataclasses import TrialInfo, TrialValue
from smac.runhistory.encoder import RunHistoryEncoder
from smac.runhistory.enumerations import StatusType

from gptailor.plan import StitchPlan
from gptailor.search.space import PlanSpace
from gptailor.search.surrogate import PlanForest, PlanSearch, PlanSelector, SpaceExhausted
from gptailor.spec.run import RunSpec
from gptailor.trial import SIZE, Origin, Score

WORST_COST = 1.0
"""Cost of a trial without scores: a model that retains nothing."""

RANDOM_SHARE = 0.1
"""Share of configurations drawn at random, so that the forest's blind spots are seen."""


@dataclass(frozen=True)
class Suggestion:
    """One trial that SMAC asks for. `info` is SMAC's own record of it, handed back on tell."""

    config_id: int
    plan: StitchPlan
    budget: int
    seed: int
    origin: Origin
    configuration: dict[str, Any]
    info: TrialInfo


def cost(score: Score, dense: float, dense_there: float | None = None, slope: float = 1.0) -> float:
    """What SMAC minimises: 1 - retention, so that accuracies and perplexities share one scale.

    The only place where a score becomes a cost. dense: the dense base's score on the benchmark at the full budget;
    dense_there: on the very examples of `score`. The first examples may be easy or hard ones, for the plan as for the
    dense base: what the base's score says of them is taken off, so that rungs can be compared. slope: what a difference
    on these examples amounts to on those of the full budget (gptailor/search/example_order.py).
    """
    there = dense if dense_there is None else dense_there
    if not score.higher_is_better:
        return 1.0 - there / score.score if score.score > 0 else 0.0
    return 1.0 - (slope * (score.score - there) + dense) / dense if dense > 0 else 1.0 - score.score


def size_of(plan: StitchPlan) -> float:
    """The share of the base's layers that a plan keeps: what SMAC minimises beside the benchmarks' costs."""
    return len(plan.kept) / plan.n_layers


def scenario_of(spec: RunSpec, space: PlanSpace, output: Path) -> Scenario:
    """A run in SMAC's words."""
    names = [objective.name for objective in spec.objectives] if spec.aim == "front" else ["mean"]
    names += [SIZE] if space.has_range else []
    several = len(names) > 1
    return Scenario(
        space.configspace,
        name="smac",
        output_directory=output,
        deterministic=True,
        objectives=names if several else names[0],
        crash_cost=[WORST_COST] * len(names) if several else WORST_COST,
        n_trials=max(spec.trials, 1),
        # Not the lowest rung, which is rounded; and a hair below, lest log(max/min)/log(eta) lose a rung.
        min_budget=spec.budget.max / spec.budget.eta ** (len(spec.budget.rungs) - 1) * (1 - 1e-9),
        max_budget=spec.budget.max,
        seed=spec.seed,
    )


class Suggester:
    """Asks SMAC for configurations and tells it what came of them. Deterministic for a seed and PYTHONHASHSEED.

    spec: the run. space: its plans. initial: plans to begin with, the most promising first. output: folder for SMAC's
    own files, which DeepCAVE reads.
    """

    def __init__(self, spec: RunSpec, space: PlanSpace, initial: Sequence[StitchPlan], output: Path) -> None:
        logging.getLogger("smac").setLevel(logging.WARNING)
        self._space = space
        self._by_mean = spec.aim == "mean"
        scenario = scenario_of(spec, space, output)
        design = [space.encode(plan) for plan in initial[: scenario.n_trials]]  # SMAC refuses to have more of them
        acquisition = EI()
        self._smac = HyperparameterOptimizationFacade(
            scenario,
            _never_called,
            model=PlanForest(space, seed=spec.seed),
            acquisition_function=acquisition,
            acquisition_maximizer=PlanSearch(space, acquisition, seed=spec.seed),
            initial_design=Listed(scenario, design),
            random_design=ProbabilityRandomDesign(
                seed=spec.seed, probability=RANDOM_SHARE if spec.suggester == "smac" else 1.0
            ),
            intensifier=Hyperband(scenario, eta=spec.budget.eta, incumbent_selection="highest_budget"),
            multi_objective_algorithm=ParEGO(scenario) if scenario.count_objectives() > 1 else None,
            runhistory_encoder=RunHistoryEncoder(scenario),
            config_selector=PlanSelector(scenario, retrain_after=4, min_trials=2),
            overwrite=True,
            logging_level=False,
        )
        lowest, highest = float(scenario.min_budget or 0), float(scenario.max_budget or 0)
        brackets = determine_HB(lowest, highest, spec.budget.eta)["budgets_in_stage"].values()
        self._budgets = {round(budget): budget for budgets in brackets for budget in budgets}
        self._learnt: dict[Configuration, int] = {}

    def ask(self) -> Suggestion | None:
        """The next trial; None when SMAC finds no new configuration (a small space is exhausted)."""
        try:
            info = self._smac.ask()
        except (StopIteration, SpaceExhausted):
            return None
        assert info.budget is not None and info.seed is not None
        fresh_id = self._smac.runhistory.get_config_id(info.config) + max(self._learnt.values(), default=0)
        return Suggestion(
            config_id=self._learnt.get(info.config, fresh_id),
            plan=self._space.decode(info.config),
            budget=round(info.budget),
            seed=int(info.seed),
            origin=_origin(info.config),
            configuration=dict(info.config),
            info=info,
        )

    def tell(
        self, suggestion: Suggestion, costs: Sequence[float] | None, at_work: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        """Tell SMAC what a trial cost.

        costs: one an objective, in the run file's order; None for a trial that crashed. at_work: Outcome.at_work, from
        which DeepCAVE draws cost over time.
        """
        self._tell(suggestion.info, suggestion.plan, costs, at_work)

    def learn(
        self,
        config_id: int,
        plan: StitchPlan,
        budget: int,
        seed: int,
        costs: Sequence[float] | None,
        at_work: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Tell of a trial that was not asked for here, before the first ask.

        Its configuration keeps its number, and later ones get higher numbers. Raises UserError for a plan that is not
        of this space.
        """
        config = self._space.encode(plan)
        self._learnt.setdefault(config, config_id)
        # SMAC's own number for the budget is a hair off the whole one, and another budget to it if it is not equal.
        info = TrialInfo(config, seed=seed, budget=self._budgets.get(budget, float(budget)))
        self._tell(info, plan, costs, at_work)

    def _tell(
        self, info: TrialInfo, plan: StitchPlan, costs: Sequence[float] | None, at_work: tuple[float, float]
    ) -> None:
        n_objectives = self._smac.scenario.count_objectives()
        if costs is None:
            values = [WORST_COST] * n_objectives
        else:
            values = [sum(costs) / len(costs)] if self._by_mean else list(costs)
            values += [size_of(plan)] if self._space.has_range else []
        self._smac.tell(
            info,
            TrialValue(
                cost=values if n_objectives > 1 else values[0],
                time=at_work[1] - at_work[0],
                starttime=at_work[0],
                endtime=at_work[1],
                status=StatusType.CRASHED if costs is None else StatusType.SUCCESS,
            ),
            save=False,
        )

    def save(self) -> None:
        """Write SMAC's own files. They are for other tools; a resumed run does not need them."""
        self._smac.optimizer.save()


class Listed(AbstractInitialDesign):
    """Exactly the given configurations, in their order (SMAC's own designs add drawn ones or shuffle)."""

    def __init__(self, scenario: Scenario, configurations: Sequence[Configuration]) -> None:
        super().__init__(scenario, n_configs=0, additional_configs=list(configurations))

    def _select_configurations(self) -> list[Configuration]:
        return []


def _origin(config: Configuration) -> Origin:
    text = config.origin or ""
    if text.lower().startswith("initial design"):
        return Origin.INITIAL
    return Origin.MODEL if text.startswith("Acquisition") else Origin.RANDOM


def _never_called(config: Configuration, seed: int, budget: float) -> float:  # noqa: ARG001 (SMAC looks at the names)
    raise RuntimeError("trials are run by gptailor's own loop, not by SMAC's runner")
