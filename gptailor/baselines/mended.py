"""Published cuts with published repairs: Prune&Comp (arXiv 2507.18212) and ReplaceMe (arXiv 2505.02819).

Cuts are Block Influence's and UIDL's block, repairs those of gptailor/stitch/edits/, computed from the run file's
`baselines_texts`. Prune&Comp removes the layers one by one: after each, what is left is scaled and ranked anew, as the
paper found best. A run that repairs (`--repair`) does the same to every cut, with a method of its choice.
"""

from __future__ import annotations

from gptailor.baselines import angular_distance
from gptailor.baselines import block_influence as shortgpt
from gptailor.baselines.case import Case
from gptailor.plan import Edit, StitchPlan

TOKENS = 16_384


def block_influence_prune_comp(case: Case) -> StitchPlan:
    """Prune&Comp on Block Influence: scaled and ranked anew after each removal."""
    removed: set[int] = set()
    for _ in range(case.n_removed):
        case.passes += 1
        case.between()
        model = case.stitcher.stitch(_mended(case, case.plan(removed), "prune_comp") if removed else case.plan())
        left = [layer for layer in range(case.n_layers) if layer not in removed]
        order = shortgpt.removal_order(shortgpt.block_influence(model, case.batches))
        removed.add(next(left[place] for place in order if left[place] in case.free))
    return _mended(case, case.plan(removed), "prune_comp")


def angular_prune_comp(case: Case) -> StitchPlan:
    """Prune&Comp's scale on UIDL's block, which is one gap."""
    return _mended(case, angular_distance.cut(case), "prune_comp")


def block_influence_replaceme(case: Case) -> StitchPlan:
    """ReplaceMe's linear maps, by least squares, at the gaps of Block Influence."""
    return _mended(case, shortgpt.cut(case), "replaceme")


def angular_replaceme(case: Case) -> StitchPlan:
    """ReplaceMe's linear map, by least squares, at UIDL's gap."""
    return _mended(case, angular_distance.cut(case), "replaceme")


def _mended(case: Case, plan: StitchPlan, method: str) -> StitchPlan:
    case.passes += 2
    return plan.edited(Edit(method, (), case.texts(TOKENS), case.seed))
