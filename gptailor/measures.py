"""Trade-offs between objectives: what is not dominated, how much the front covers, where it bends.

Arrays in, arrays out; every objective is maximised (turn lower-is-better scores round first). moocore counts.
"""

from __future__ import annotations

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_HYPERVOLUME = 6
"""Objectives up to which the hypervolume is computed: its cost is exponential in them. Of a front of a hundred plans, 6
take 10 ms, 7 take 0.2 s, 8 take 1.5 s, 14 never end."""
Points = NDArray[np.float64]


def _points(values: ArrayLike) -> Points:
    points = np.asarray(values, dtype=float)
    if points.ndim != 2:
        raise ValueError(f"points must be an n x m array, got shape {points.shape}")
    return points


def pareto_front(values: ArrayLike) -> NDArray[np.bool_]:
    """Which of n points (n x m, maximised) no other point dominates. Rows with a non-finite value never are.

    Equal points are all kept: they are different plans with the same scores.
    """
    points = _points(values)
    front = np.zeros(len(points), dtype=bool)
    finite = np.isfinite(points).all(axis=1)
    if not finite.any():
        return front
    if points.shape[1] == 1:
        front[finite] = points[finite, 0] == points[finite, 0].max()
    else:
        front[finite] = moocore.is_nondominated(points[finite], maximise=True, keep_weakly=True)
    return front


def hypervolume(values: ArrayLike, reference: ArrayLike) -> float | None:
    """Volume between the reference (m values, the worst corner) and n x m points, maximised; 0 if none is better.

    None with more than MAX_HYPERVOLUME objectives.
    """
    points = _points(values)
    if points.shape[1] > MAX_HYPERVOLUME:
        return None
    corner = np.asarray(reference, dtype=float)
    inside = points[np.isfinite(points).all(axis=1) & (points > corner).all(axis=1)]
    if not len(inside):
        return 0.0
    if points.shape[1] == 1:
        return float((inside - corner).max())
    return float(moocore.hypervolume(inside, ref=corner, maximise=True))


def knee(values: ArrayLike) -> int | None:
    """Index of the front's knee: the point furthest above the line (or plane) through the front's extremes.

    Distances are taken after scaling each objective to [0, 1] over the front (Das 1999). None where no point is
    finite; with one objective or a front of one point, the best one.
    """
    points = _points(values)
    members = np.flatnonzero(pareto_front(points))
    if not len(members):
        return None
    low, high = points[members].min(axis=0), points[members].max(axis=0)
    span = np.where(high > low, high - low, 1.0)
    scaled = (points[members] - low) / span
    # On the unit cube the extremes lie on one plane whose normal is the diagonal, so the sum orders the distances.
    return int(members[np.argmax(scaled.sum(axis=1))])


def gain(score: float, higher_is_better: bool) -> float:
    """A score turned so that more is better and 0 the worst: itself, or its inverse (perplexity's is a probability)."""
    if higher_is_better:
        return score
    return 1.0 / score if score > 0 else 0.0


def covered(start: NDArray[np.float64], end: NDArray[np.float64]) -> float:
    """The length that intervals [start, end] cover together: where several overlap, it counts once."""
    order = np.argsort(start, kind="stable")
    start, end = start[order], end[order]
    reached = np.concatenate([[-np.inf], np.maximum.accumulate(end)[:-1]]) if len(end) else end
    return float(np.maximum(end - np.maximum(start, reached), 0.0).sum())


def retention(score: float, dense: float, higher_is_better: bool) -> float | None:
    """Share of the dense model's score that is kept (1 = all of it); None where a ratio says nothing."""
    kept, whole = (score, dense) if higher_is_better else (dense, score)
    return max(kept, 0.0) / whole if whole > 0 else None
