"""LLM-Streamline's choice (Chen et al., arXiv 2403.19135): the n layers in a row that change the stream least.

    the mean over all tokens of cos(h_l, h_{l+n}) is greatest

UIDL asks the same of the last token alone, by the angle. The first layer and the last one stay, as in the published
code. The paper then trains one small layer in the gap's place; here the layers go, as everywhere. Cost: one forward
pass over the calibration texts.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from gptailor.baselines.case import Case, watch_layers
from gptailor.plan import StitchPlan


def similarities(case: Case) -> dict[int, float]:
    """First layer of the block -> mean cosine of what enters and what leaves it."""
    n, starts = case.n_removed, range(case.n_layers - case.n_removed + 1)
    totals: dict[int, float] = defaultdict(float)
    n_tokens = 0
    entered: dict[int, torch.Tensor] = {}  # of one batch: layer -> [tokens, hidden]

    def see(index: int, h: torch.Tensor, h_next: torch.Tensor, mask: torch.Tensor) -> None:
        nonlocal n_tokens
        entered[index] = h[mask].float()
        start, left = index + 1 - n, h_next[mask].float()
        if start in starts:
            totals[start] += float(torch.cosine_similarity(entered.pop(start), left, dim=-1).double().sum())
        n_tokens += len(left) if index == 0 else 0

    case.passes += 1
    watch_layers(case.model(), case.batches, see)
    return {start: total / n_tokens for start, total in totals.items()}


def cut(case: Case) -> StitchPlan:
    """The model less the block of the greatest similarity."""
    found = similarities(case)
    inner = {start: -one for start, one in found.items() if 0 < start < case.n_layers - case.n_removed}
    return case.best_block(inner or {start: -one for start, one in found.items()}, "LLM-Streamline")
