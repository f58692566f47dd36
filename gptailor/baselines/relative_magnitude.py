"""Relative magnitude (a baseline in ShortGPT, arXiv 2403.03853, after Samragh et al., arXiv 2309.14717).

Drop the layers whose contribution is small beside what they pass on, |f(x)| / |x + f(x)|, averaged over tokens.

x + f(x) is what leaves the layer, f(x) what it added; the ratio is that of the two vectors' norms. Cost: one forward
pass over the calibration texts.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from gptailor.baselines.case import Case, lowest, watch_layers
from gptailor.plan import StitchPlan


def magnitudes(case: Case) -> dict[int, float]:
    """Layer -> relative magnitude."""
    totals: dict[int, float] = defaultdict(float)
    counts: dict[int, int] = defaultdict(int)

    def see(index: int, h: torch.Tensor, h_next: torch.Tensor, mask: torch.Tensor) -> None:
        before, after = h[mask].float(), h_next[mask].float()
        totals[index] += float(((after - before).norm(dim=-1) / after.norm(dim=-1)).double().sum())
        counts[index] += len(after)

    case.passes += 1
    watch_layers(case.model(), case.batches, see)
    return {index: totals[index] / counts[index] for index in totals}


def cut(case: Case) -> StitchPlan:
    """The model less the layers of the least relative magnitude."""
    found = magnitudes(case)
    return case.plan(lowest({layer: found[layer] for layer in case.free}, case.n_removed, "relative magnitude"))
