"""A search space with known costs."""

from __future__ import annotations

import numpy as np

from gptailor.plan import StitchPlan
from gptailor.spec.files import build_spec
from gptailor.spec.run import RunSpec

N_LAYERS = 16

WORTH = np.linspace(3.0, 0.5, N_LAYERS)


def make_spec(n_objectives: int = 2, seed: int = 0, trials: int = 44, **others: object) -> RunSpec:
    return build_spec(
        {
            "name": "x",
            "base_model": "b",
            "candidates": {"math": "p", "code": "q"},
            "remove": 4,
            "objectives": [{"benchmark": f"t{k}"} for k in range(n_objectives)],
            "budget": {"min": 27, "max": 243},
            "trials": trials,
            "seed": seed,
            **others,
        }
    )


def costs_of(plan: StitchPlan, n_objectives: int) -> list[float]:
    """Deeper layers cost less to remove; each objective likes one candidate's layers."""
    lost = WORTH[list(plan.removed)].sum() / WORTH.sum()
    liked = [sum(name in choice.sources for choice in plan.kept) / N_LAYERS for name in ("math", "code")]
    return [float(lost - 0.2 * like) for like in liked[:n_objectives]]
