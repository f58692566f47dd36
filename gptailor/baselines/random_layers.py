"""Random layers: what any score has to beat, and whose spread says how much luck there is.

Cost: nothing. The reviewers of GPTailor asked for it; so does "Calibration matters more than search in LLM depth
pruning" (arXiv 2604.24938).
"""

from __future__ import annotations

import random

from gptailor.baselines.case import Case
from gptailor.plan import StitchPlan


def cut(case: Case) -> StitchPlan:
    """The model less layers drawn by the case's seed."""
    return case.plan(random.Random(f"random/{case.seed}").sample(case.free, case.n_removed))
