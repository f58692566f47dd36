"""Least squares in float64, by sums that are taken slice by slice: no row is wide for longer than it is added."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from gptailor.stitch.edits.walk import wide

SLICE = 2048
"""Rows that are in float64 at a time."""
BLOCKS = 4
"""Column blocks of a Gram matrix: only those on and above its diagonal are multiplied."""
RIDGES = tuple(10.0**k for k in range(-8, 2))
"""Ridges that may be chosen, as shares of the mean square of an input."""
LEAST_GAIN = 0.01
"""Share of the squared error on texts kept out of the fit that a fit must take away: else it is noise."""


@dataclass
class Normal:
    """A weighted least-squares problem: find X, [out, inner], that brings X a near r over all rows (a, r).

    gram: sum of w^2 a a^T, [inner, inner]. cross: sum of w^2 r a^T, [out, inner]. square: sum of w^2 r.r.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    square: float

    @classmethod
    def of(cls, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor) -> Normal:
        """inputs: [n, inner]. targets: [n, out]. weights: [n]. rows: which of them count, [n]."""
        n, m, device = inputs.shape[1], targets.shape[1], weights.device
        gram = torch.zeros(n, n, dtype=torch.float64, device=device)
        cross = torch.zeros(m, n, dtype=torch.float64, device=device)
        square = 0.0
        cuts = [n * block // BLOCKS for block in range(BLOCKS + 1)]
        for some in rows.nonzero()[:, 0].split(SLICE):
            w = weights[some.to(device)][:, None]
            a, r = wide(inputs[some]) * w, wide(targets[some]) * w
            for first, end in itertools.pairwise(cuts):
                gram[first:end, first:].addmm_(a[:, first:end].T, a[:, first:])
            cross.addmm_(r.T, a)
            square += float(r.square().sum())
        gram.triu_()
        gram += gram.triu(1).T
        return cls(gram, cross, square)

    def __add__(self, other: Normal) -> Normal:
        return Normal(self.gram + other.gram, self.cross + other.cross, self.square + other.square)

    def solve(self, ridge: float) -> torch.Tensor | None:
        """X of the least error plus ridge * mean(diag(gram)) * |X|^2, [out, inner].

        None where that has no solution in float64.
        """
        damped = self.gram.clone()
        damped.diagonal().add_(ridge * float(self.gram.diagonal().mean()))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            return None
        return torch.cholesky_solve(self.cross.T, factor).T

    def error(self, x: torch.Tensor) -> float:
        """The squared error that X leaves."""
        return self.square - 2 * float((x * self.cross).sum()) + float((x @ self.gram * x).sum())


def best_ridge(fit: Normal, held: Normal) -> float | None:
    """The ridge whose solution of `fit` leaves the least error on `held`; None where none is worth it.

    The error falls and then rises with the ridge, so it is looked for from the middle.
    """
    errors: dict[int, float] = {}

    def error(place: int) -> float:
        if place not in errors:
            x = fit.solve(RIDGES[place])
            errors[place] = float("inf") if x is None else held.error(x)
        return errors[place]

    place = RIDGES.index(1e-3)
    for step in (-1, 1):
        while 0 <= place + step < len(RIDGES) and error(place + step) < error(place):
            place += step
    return RIDGES[place] if error(place) < (1 - LEAST_GAIN) * held.square else None
