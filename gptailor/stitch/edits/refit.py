"""Refit: an output projection's whole matrix by ridge regression, pulled towards the weights it had.

W' = W + R^T A (A^T A + lambda I)^-1, with A what the projection reads and R what is missing behind it to the teacher's
stream. ReplaceMe's place, and more room: a matrix of [hidden, inner] instead of one of [hidden, hidden] before it. The
more rows are missing, or the less they have in common, the more the pull wins: lambda is what leaves the least error on
texts that are kept out of the fit, and where no lambda takes a hundredth of it away, the weights stay as they were.
Then the fit is done again with all texts.
"""

from __future__ import annotations

import torch
from torch import nn

from gptailor.stitch.edits.case import EditCase
from gptailor.stitch.edits.repair import repair
from gptailor.stitch.edits.solve import Normal, best_ridge
from gptailor.stitch.edits.streams import Site


def refit(case: EditCase) -> list[nn.Module]:
    """The layers with refitted projections."""
    at_gaps, with_attention = case.parameter("layers") == "gaps", case.parameter("projections") == "both"
    return repair(case, _ridge, at_gaps=at_gaps, with_attention=with_attention)


def _ridge(site: Site, weight: torch.Tensor) -> tuple[torch.Tensor, None] | None:
    fit, held = (Normal.of(site.read, site.missing, site.weights, rows) for rows in (~site.held, site.held))
    ridge = best_ridge(fit, held)
    change = None if ridge is None else (fit + held).solve(ridge)
    return None if change is None else (weight.to(change.device) + change, None)
