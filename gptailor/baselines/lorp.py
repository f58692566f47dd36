"""LoRP (Yun et al., arXiv 2605.27786, and its published code): the most redundant layers of each phase of the model.

S_ij is the mean over tokens of the cosine of what enters layers i and j. The Representation Locality Score is -log2 of
the mean of S off its diagonal: from 1 on, redundancy is local, and there are two phases; from 0.7 on three, below four.
Phases are spectral clusters of the affinity (S + 1) / 2. A layer's redundancy is its mean S with the others of its
phase. First the most redundant layer of every phase goes, then, again and again, the next one of the phase whose
remaining layers are most alike. The first and the last layer stay. Cost: one forward pass over the calibration texts.
"""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import torch

from gptailor.baselines.case import Case, watch_layers
from gptailor.errors import UserError
from gptailor.plan import StitchPlan

DECIMALS = 6
"""Of a cosine in float32."""

Phases = list[list[int]]
"""Layers of each phase, ascending."""


def similarities(case: Case) -> np.ndarray:
    """S, [layers, layers], float64, to DECIMALS: of layers that are equally alike the order is not left to rounding."""
    total = torch.zeros(case.n_layers, case.n_layers, dtype=torch.float64)
    n_tokens = 0
    entered: list[torch.Tensor] = []  # of one batch, each [tokens, hidden]

    def see(index: int, h: torch.Tensor, _h_next: torch.Tensor, mask: torch.Tensor) -> None:
        nonlocal n_tokens
        entered.append(torch.nn.functional.normalize(h[mask].float(), dim=-1))
        if index == case.n_layers - 1:
            rows = torch.stack(entered).flatten(1)
            total.add_((rows @ rows.T).double().cpu())
            n_tokens += len(entered[0])
            entered.clear()

    case.passes += 1
    watch_layers(case.model(), case.batches, see)
    found = np.round((total / n_tokens).numpy(), DECIMALS)
    if not np.isfinite(found).all():
        raise UserError("LoRP: a layer gives hidden states that are not finite")
    np.fill_diagonal(found, 1.0)
    return found


def locality(similarity: np.ndarray) -> float:
    """The Representation Locality Score; infinite where layers have nothing in common."""
    mean = float(similarity[np.triu_indices(len(similarity), k=1)].mean())
    return -math.log2(mean) if mean > 0 else math.inf


def phases(similarity: np.ndarray) -> Phases:
    """Spectral clusters of layers, as many as the locality asks for."""
    from sklearn.cluster import SpectralClustering

    score = locality(similarity)
    n = min(2 if score >= 1.0 else 3 if score >= 0.7 else 4, len(similarity))
    clusters = SpectralClustering(n, affinity="precomputed", random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that are all alike, k-means says that it finds fewer clusters
        labels = clusters.fit_predict((similarity + 1) / 2)
    found = [[layer for layer, one in enumerate(labels) if one == label] for label in set(labels.tolist())]
    return sorted(found)


def choose(similarity: np.ndarray, clusters: Phases, may_go: set[int], n_removed: int) -> list[int]:
    """The layers to remove, in their order. Raises UserError where too few may go."""

    def alike(layers: list[int]) -> float:
        pairs = list(itertools.combinations(layers, 2))
        return float(np.mean([similarity[pair] for pair in pairs])) if pairs else -math.inf

    def redundancy(layer: int, phase: list[int]) -> float:
        others = [other for other in phase if other != layer]
        return round(float(similarity[layer, others].mean()), DECIMALS) if others else -math.inf

    waiting = [
        sorted((layer for layer in phase if layer in may_go), key=lambda layer: (-redundancy(layer, phase), layer))
        for phase in clusters
    ]
    removed = [queue.pop(0) for queue in waiting if queue][:n_removed]
    while len(removed) < n_removed:
        open_phases = [number for number, queue in enumerate(waiting) if queue]
        if not open_phases:
            raise UserError(f"LoRP: only {len(removed)} layers may go, {n_removed} are to be removed")
        left = {number: [layer for layer in clusters[number] if layer not in removed] for number in open_phases}
        removed.append(waiting[max(open_phases, key=lambda number: alike(left[number]))].pop(0))
    return removed


def cut(case: Case) -> StitchPlan:
    """The model less the layers that LoRP finds redundant."""
    similarity = similarities(case)
    inner = {layer for layer in case.free if 0 < layer < case.n_layers - 1}
    may_go = inner if len(inner) >= case.n_removed else set(case.free)
    return case.plan(choose(similarity, phases(similarity), may_go, case.n_removed))
