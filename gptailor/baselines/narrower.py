"""Methods that make layers narrower or sparser, not fewer: all layers are kept, and one edit takes parameters of them.

As many parameters go as the run's removed layers have, so that they stand beside cuts of layers. What is done is in
gptailor/stitch/edits/: llm_pruner.py, slimgpt.py and besa.py. They read texts of their own (the run file's
`baselines_texts`), more than the other methods look at. BESA leaves the model its size: it gets as many zeros.
"""

from __future__ import annotations

from gptailor.baselines.case import Case
from gptailor.plan import Edit, Setting, StitchPlan

LLM_PRUNER_TOKENS = 5_120
"""Ten texts of 512 tokens, of which it reads the beginnings."""
TOKENS = 16_384


def llm_pruner(case: Case) -> StitchPlan:
    """LLM-Pruner with its first-order importance."""
    return _edited(case, "llm_pruner", LLM_PRUNER_TOKENS, passes=3)


def llm_pruner_mixed(case: Case) -> StitchPlan:
    """LLM-Pruner with its mixed importance."""
    return _edited(case, "llm_pruner", LLM_PRUNER_TOKENS, passes=6, importance="mixed")


def slimgpt(case: Case) -> StitchPlan:
    """SlimGPT."""
    return _edited(case, "slimgpt", TOKENS, passes=3)


def besa(case: Case) -> StitchPlan:
    """BESA."""
    return _edited(case, "besa", TOKENS, passes=130)


def _edited(case: Case, method: str, n_tokens: int, passes: float, **settings: Setting) -> StitchPlan:
    """The whole model with this edit, at the share of layers that the case removes. passes: about what it costs."""
    case.passes += passes
    settings["ratio"] = round(case.n_removed / case.n_layers, 6)
    return case.plan().edited(Edit(method, tuple(settings.items()), case.texts(n_tokens), case.seed))
