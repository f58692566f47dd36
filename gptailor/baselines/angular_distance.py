"""Angular distance of blocks: drop the n layers in a row whose input and output are closest.

UIDL: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887, section 3.2. At the last
token,

    d(l, n) = 1/pi * arccos(cos(h_l, h_{l+n})), averaged over texts.

Without the healing by fine-tuning. arcee-ai/PruneMe leaves out the block that starts at layer 0; here every block
counts. Cost: one forward pass over the calibration texts.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch

from gptailor.baselines.case import Case, lowest, watch_layers
from gptailor.plan import StitchPlan


def distances(case: Case) -> dict[int, float]:
    """First layer of the block -> the angular distance that the block travels, 0 to 1."""
    states: dict[int, list[torch.Tensor]] = defaultdict(list)  # layer that they enter -> [texts, hidden]

    def see(index: int, h: torch.Tensor, h_next: torch.Tensor, mask: torch.Tensor) -> None:
        rows, last = torch.arange(len(mask), device=mask.device), mask.sum(dim=1) - 1
        states[index].append(h[rows, last].float().clone())
        if index == case.n_layers - 1:
            states[index + 1].append(h_next[rows, last].float().clone())

    case.passes += 1
    watch_layers(case.model(), case.batches, see)
    at = {index: torch.cat(parts) for index, parts in states.items()}
    n = case.n_removed
    cosines = {
        start: torch.cosine_similarity(at[start], at[start + n], dim=-1).clamp(-1, 1)
        for start in range(case.n_layers - n + 1)
    }
    return {start: float(cosine.arccos().mean()) / math.pi for start, cosine in cosines.items()}


def cut(case: Case) -> StitchPlan:
    """The model less the block of the least angular distance."""
    (start,) = lowest(distances(case), 1, "angular distance")
    return case.plan(range(start, start + case.n_removed))
