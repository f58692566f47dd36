"""Does the leaner SMAC find what SMAC's own settings find? `python tests/bench/suggester.py [--seeds 5] [--trials 60]`

The demo search, several seeds, with the project's suggester and with SMAC's multi-fidelity facade as it comes. Both get
the same space, initial design, rungs and scores; two settings without which SMAC 2.4 dies on several objectives over
budgets (finite crash costs, incumbents by the highest budget) are given to both. Says what each found and how long
asking took.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from smac import MultiFidelityFacade
from smac.intensifier.hyperband import Hyperband
from smac.multi_objective.parego import ParEGO

from gptailor.measures import hypervolume
from gptailor.plan import StitchPlan
from gptailor.scoring.plan_scorer import PlanScorer
from gptailor.search.loop import INITIAL_SHARE
from gptailor.search.space import PlanSpace, build_space, initial_design
from gptailor.search.suggest import Listed, Suggester, cost, scenario_of
from gptailor.spec.files import load_spec
from gptailor.spec.run import RunSpec

RUN_FILE = "data/presets/demo.yaml"


def never(config: object, seed: int, budget: float) -> float:  # noqa: ARG001 (SMAC looks at the names)
    raise RuntimeError("trials are run here, not by SMAC's runner")


class Plain(Suggester):
    """SMAC's own forest, acquisition search and configuration selector."""

    def __init__(self, spec: RunSpec, space: PlanSpace, initial: Sequence[StitchPlan], output: Path) -> None:
        logging.getLogger("smac").setLevel(logging.WARNING)
        self._space, self._learnt, scenario = space, {}, scenario_of(spec, space, output)
        self._smac = MultiFidelityFacade(
            scenario,
            never,
            initial_design=Listed(scenario, [space.encode(plan) for plan in initial]),
            intensifier=Hyperband(scenario, eta=spec.budget.eta, incumbent_selection="highest_budget"),
            multi_objective_algorithm=ParEGO(scenario) if scenario.count_objectives() > 1 else None,
            overwrite=True,
            logging_level=False,
        )


def search(kind: type[Suggester], spec: RunSpec, bench: PlanScorer, space: PlanSpace) -> tuple[float, float, float]:
    """Hypervolume of the retentions at the full budget, the best mean retention there, and seconds of a suggestion."""
    dense = {n: bench.score(StitchPlan.dense(space.n_layers), n).scores for n in spec.budget.rungs}
    start = initial_design(space, bench.influence_orders())[: round(INITIAL_SHARE * spec.trials)]
    found, asking = [], []
    with tempfile.TemporaryDirectory() as output:
        suggester = kind(spec, space, start, Path(output))
        for _ in range(spec.trials):
            before = time.perf_counter()
            suggestion = suggester.ask()
            asking.append(time.perf_counter() - before)
            if suggestion is None:
                break
            scores = bench.score(suggestion.plan, suggestion.budget).scores
            whole, there = dense[spec.budget.max], dense[suggestion.budget]
            costs = [cost(s, w.score, t.score) for s, w, t in zip(scores, whole, there, strict=True)]
            suggester.tell(suggestion, costs)
            if suggestion.budget == spec.budget.max:
                found.append([1.0 - value for value in costs])
    kept = np.array(found)
    covered = hypervolume(kept, np.zeros(kept.shape[1]))
    assert covered is not None, "fewer objectives than measures.MAX_HYPERVOLUME"
    return covered, float(kept.mean(axis=1).max()), statistics.mean(asking)


def main() -> None:
    parser = argparse.ArgumentParser(description="the project's suggester beside SMAC's own settings")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=60)
    asked = parser.parse_args()
    spec = load_spec(RUN_FILE, [f"trials={asked.trials}"])
    bench = PlanScorer.open(spec, spec.objectives, max_examples=spec.budget.max)
    print(f"{'':<12}{'seed':>5}{'hypervolume':>14}{'best retention':>17}{'s a suggestion':>17}")
    for name, kind in (("gptailor", Suggester), ("SMAC's own", Plain)):
        rows = []
        for seed in range(asked.seeds):
            seeded = spec.model_copy(update={"seed": seed})
            rows.append(search(kind, seeded, bench, build_space(seeded, bench.family.n_layers)))
            print(f"{name:<12}{seed:>5}{rows[-1][0]:>14.3f}{rows[-1][1]:>17.1%}{rows[-1][2]:>17.3f}", flush=True)
        mean, spread = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) if len(rows) > 1 else np.zeros(3)
        print(f"{name:<12}{'mean':>5}{mean[0]:>14.3f}{mean[1]:>17.1%}{mean[2]:>17.3f}")
        print(f"{'':<12}{'sd':>5}{spread[0]:>14.3f}{spread[1]:>17.1%}{spread[2]:>17.3f}", flush=True)


if __name__ == "__main__":
    main()
