"""SLEB (Song et al., arXiv 2402.09025, algorithm 1): one layer at a time, the one whose loss hurts the text least.

Each step tries every remaining layer but the first and the last (the published code's barriers), measures the negative
log-likelihood of the calibration texts without it, and removes the best; scores are taken anew in every step. Cost:
about n_removed * n_layers / 2 forward passes over the calibration texts, as the layers before a tried one run once.
"""

from __future__ import annotations

from gptailor.baselines.case import Case, lowest
from gptailor.plan import StitchPlan

BARRIER = 1
"""Layers at either end that stay, as far as enough others are left."""


def cut(case: Case) -> StitchPlan:
    """The model less the layers that greedy removal by perplexity picks."""
    inner = [layer for layer in case.free if BARRIER <= layer < case.n_layers - BARRIER]
    open_layers = set(inner if len(inner) >= case.n_removed else case.free)
    removed: list[int] = []
    for _ in range(case.n_removed):
        losses = case.losses(sorted(open_layers), removed)
        removed += lowest(losses, 1, "SLEB")
        open_layers -= set(removed)
    return case.plan(removed)
