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

from gptailor.baselines.case import Case, watch_layers
from gptailor.plan import StitchPlan


class LastTokens:
    """The residual stream at each text's last token, from what `watch_layers` shows of a model."""

    def __init__(self, n_layers: int) -> None:
        self._n_layers = n_layers
        self._states: dict[int, list[torch.Tensor]] = defaultdict(list)  # layer that they enter -> [texts, hidden]

    def see(self, index: int, h: torch.Tensor, h_next: torch.Tensor, mask: torch.Tensor) -> None:
        rows, last = torch.arange(len(mask), device=mask.device), mask.sum(dim=1) - 1
        self._states[index].append(h[rows, last].float().clone())
        if index == self._n_layers - 1:
            self._states[index + 1].append(h_next[rows, last].float().clone())

    def distances(self) -> torch.Tensor:
        """[L + 1, L + 1]: d(l, n) stands at [l, l + n]."""
        at = [torch.cat(self._states[index]) for index in range(self._n_layers + 1)]
        cosines = [torch.stack([torch.cosine_similarity(one, other, dim=-1) for other in at]) for one in at]
        return torch.stack([cosine.clamp(-1, 1).arccos().mean(dim=1) for cosine in cosines]).cpu() / math.pi


def distances(case: Case) -> dict[int, float]:
    """First layer of the block -> the angular distance that the block travels, 0 to 1."""
    last = LastTokens(case.n_layers)
    case.passes += 1
    watch_layers(case.model(), case.batches, last.see)
    found = last.distances()
    return {start: float(found[start, start + case.n_removed]) for start in range(case.n_layers - case.n_removed + 1)}


def cut(case: Case) -> StitchPlan:
    """The model less the block of the least angular distance."""
    return case.best_block(distances(case), "angular distance")
