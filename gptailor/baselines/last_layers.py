"""The last layers.

"reverse order" in ShortGPT (arXiv 2403.03853, table 5), and the cut that "Reassessing layer pruning in LLMs" (arXiv
2411.15558) recommends before fine-tuning. Cost: nothing.
"""

from __future__ import annotations

from gptailor.baselines.case import Case
from gptailor.plan import StitchPlan


def cut(case: Case) -> StitchPlan:
    """The model less its last layers."""
    return case.plan(case.free[len(case.free) - case.n_removed :])
