"""What the edit of a baseline takes, before it is started."""

from __future__ import annotations

from gptailor.baselines import mended, narrower
from gptailor.spec.sections import Baseline, Repair, RepairMethod
from gptailor.stitch.edits.cost import Cost, Sizes, besa_cost, llm_pruner_cost, repair_cost, slimgpt_cost


def edit_cost(baseline: Baseline, of: Sizes) -> Cost | None:
    """Of one plan; None for a method that edits no weights."""
    if baseline in (Baseline.LLM_PRUNER, Baseline.LLM_PRUNER_MIXED):
        return llm_pruner_cost(of, is_mixed=baseline is Baseline.LLM_PRUNER_MIXED)
    if baseline is Baseline.SLIMGPT:
        return slimgpt_cost(narrower.TOKENS, of)
    if baseline is Baseline.BESA:
        return besa_cost(narrower.TOKENS, of)
    for repair in (RepairMethod.PRUNE_COMP, RepairMethod.REPLACEME):
        if baseline.endswith(f"_{repair}"):
            return repair_cost(Repair(method=repair, tokens=mended.TOKENS), of)
    return None
