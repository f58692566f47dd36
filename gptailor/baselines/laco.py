"""LaCo (Yang et al., arXiv 2402.11187, algorithm 1): collapse runs of layers into their first one, from the top down.

For layer l, from the top: layers l+1 .. l+m are merged into l; the merge stays if the model's last hidden state keeps a
mean cosine above a threshold T with the original's; then l moves down by an interval, else by one. Two versions differ:

- the paper: W_l + sum over k of (W_{l+k} - W_l);
- the published notebooks subtract the already updated weight, so that the sum telescopes to W_{l+m}: the last layer of
  the run survives, under the norms of the first.

Both are plans with folds (factors of the layers folded in; norms stay those of layer l, as in the notebooks). LaCo ends
where T lets it; so that every method removes equally many layers, T goes down in steps until that many are gone, and
the last merge takes only as many layers as are still to go. Cost: two forward passes over a few texts for each T and
layer at most.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gptailor.baselines.case import Case, watch_layers
from gptailor.errors import UserError
from gptailor.plan import BASE, LayerChoice, StitchPlan

COLLAPSED, INTERVAL = 4, 2
"""Layers that become one (the paper's C), and how far down the next try starts after a merge (I): those of its 7B."""
THRESHOLDS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.3, 0.2, 0.0, -1.0)

Weights = dict[int, float]
"""A layer as a sum of the original's: layer -> coefficient; they sum to 1."""
Layers = dict[int, Weights]
"""The layers that are left, by their original index."""


def paper_cut(case: Case) -> StitchPlan:
    """Merged by the paper's formula."""
    return _collapse(case, _sum_of_differences)


def notebook_cut(case: Case) -> StitchPlan:
    """Merged as the published notebooks do."""
    return _collapse(case, lambda _home, others: dict(others[-1]))


def _sum_of_differences(home: Weights, others: list[Weights]) -> Weights:
    merged = {layer: (1 - len(others)) * share for layer, share in home.items()}
    for other in others:
        for layer, share in other.items():
            merged[layer] = merged.get(layer, 0.0) + share
    return {layer: share for layer, share in merged.items() if share}


def _collapse(case: Case, merge: Callable[[Weights, list[Weights]], Weights]) -> StitchPlan:
    original = _last_states(case, case.plan())

    def alike(layers: Layers) -> float:
        return _similarity(original, _last_states(case, _plan(case, layers)))

    for threshold in THRESHOLDS:
        layers: Layers = {index: {index: 1.0} for index in range(case.n_layers)}
        place = case.n_layers - 2  # among the layers that are left
        while place >= 0 and len(layers) > case.n_layers - case.n_removed:
            to_go = len(layers) - (case.n_layers - case.n_removed)
            home, *others = list(layers)[place : place + 1 + min(COLLAPSED - 1, to_go)]
            tried = {index: weights for index, weights in layers.items() if index not in others}
            tried[home] = merge(layers[home], [layers[other] for other in others])
            if set(others) <= set(case.free) and (threshold <= -1 or alike(tried) > threshold):
                layers = tried
                place = min(place - INTERVAL, len(layers) - 2)
            else:
                place -= 1
        if len(layers) == case.n_layers - case.n_removed:
            return _plan(case, layers)
    must_stay = f", {case.n_layers - len(case.free)} of which must stay" if len(case.free) < case.n_layers else ""
    raise UserError(
        f"LaCo: merging {COLLAPSED} layers at a time cannot remove {case.n_removed} of {case.n_layers}{must_stay}"
    )


def _plan(case: Case, layers: Layers) -> StitchPlan:
    sources = () if case.source == BASE else (case.source,)
    kept = []
    for index, weights in layers.items():
        folds = tuple(sorted((layer, share) for layer, share in weights.items() if layer != index))
        kept.append(LayerChoice(index, sources, folds=folds))
    return StitchPlan(case.n_layers, tuple(kept))


def _last_states(case: Case, plan: StitchPlan) -> torch.Tensor:
    """What leaves the last layer, at every token of the first calibration texts: [tokens, hidden]."""
    case.between()
    case.passes += 1 / len(case.batches)
    found: list[torch.Tensor] = []

    def see(index: int, _h: torch.Tensor, h_next: torch.Tensor, mask: torch.Tensor) -> None:
        if index == len(plan.kept) - 1:
            found.append(h_next[mask].float())

    watch_layers(case.stitcher.stitch(plan), case.batches[:1], see)
    return torch.cat(found)


def _similarity(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.cosine_similarity(one, other, dim=-1).mean())
