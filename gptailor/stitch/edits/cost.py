"""What a repair takes, before it is started: bytes at once and arithmetic, from sizes alone.

From above: how many layers stand before a gap is not known before there is a plan, so every removed layer may make one.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptailor.spec import Repair, RepairMethod

BATCH_TOKENS, SLICE = 8192, 2048
"""Tokens of a batch (case.py), and rows that are in float64 at a time (solve.py)."""
WIDE = 8
"""Bytes of a float64."""
GRAMS = 6
"""Matrices of [inner, inner] at once: of the fit, of what is kept out of it, their sum, damped, its factor, and one of
an error."""
CROSSES = 5
"""Matrices of [hidden, inner] at once, in float64."""
RIDGES_TRIED = 6
UPPER = 0.625
"""Share of a Gram matrix that is multiplied (solve.py, BLOCKS)."""
WIDE_SLOWER = 2.0
"""How many times longer a product takes in float64: so on a CPU; on a GPU that is not made for it, up to 64 times."""


@dataclass(frozen=True)
class Sizes:
    """Of a model: layers, kept ones, the stream's width, the MLP's, parameters of a layer, bytes of a number."""

    n_layers: int
    n_kept: int
    hidden: int
    inner: int
    layer_parameters: int
    itemsize: int


@dataclass(frozen=True)
class Cost:
    """n_bytes: beside the models, at once. operations: floating-point, those in float64 as so many more."""

    n_bytes: int
    operations: float


def repair_cost(repair: Repair, of: Sizes) -> Cost:
    """What repairing one plan takes."""
    n, hidden = repair.tokens, of.hidden
    is_refit = repair.method is RepairMethod.REFIT
    at_gaps = not is_refit or repair.layers == "gaps"
    n_fitted = min(of.n_layers - of.n_kept, of.n_kept) if at_gaps else of.n_kept
    streams = 3 * n * hidden * of.itemsize  # student, teacher, and what is behind the layer
    streams += min(n, BATCH_TOKENS) * (2 * of.inner + 4 * hidden) * of.itemsize  # while a layer is called
    reading = 2 * n * of.layer_parameters * (of.n_layers + of.n_kept + n_fitted)
    if repair.method is RepairMethod.PRUNE_COMP:
        edited = 2 * of.n_kept * hidden * max(of.inner, hidden) * of.itemsize
        return Cost(streams + edited + 3 * n * hidden * WIDE, reading)
    site = n * (2 * of.inner + 6 * hidden) * of.itemsize  # what a projection reads, batch by batch and together
    width = of.inner if is_refit else hidden
    matrices = WIDE * (GRAMS * width**2 + CROSSES * hidden * width + min(n, SLICE) * (width + hidden) + n * hidden)
    edited = n_fitted * hidden * of.inner * of.itemsize
    fit = 2 * n * width * (UPPER * width + hidden) + RIDGES_TRIED * (width**3 / 3 + 4 * width**2 * hidden)
    if is_refit and repair.projections == "both":
        edited += n_fitted * hidden**2 * of.itemsize
        fit += 2 * n * hidden * (UPPER * hidden + hidden) + RIDGES_TRIED * (hidden**3 / 3 + 4 * hidden**3)
        reading += 4 * n * of.layer_parameters * n_fitted
    return Cost(streams + site + matrices + edited, reading + WIDE_SLOWER * n_fitted * fit)
