"""RCPU (arXiv 2510.07782): ReplaceMe's map, constrained to a rotation, because free least squares overfits few texts.

The orthogonal Q of the least |M Q - (L - Y)|^2 is U V^T of the singular value decomposition of (L - Y)^T M (Procrustes,
Schoenemann 1966); W becomes Q W. Tokens count by one over the norm of L.
"""

from __future__ import annotations

import torch
from torch import nn

from gptailor.stitch.edits.case import EditCase
from gptailor.stitch.edits.repair import repair
from gptailor.stitch.edits.streams import Site
from gptailor.stitch.edits.walk import wide


def rotation(case: EditCase) -> list[nn.Module]:
    """The layers, those before gaps with their MLP's output rotated."""
    return repair(case, _procrustes)


def _procrustes(site: Site, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights = site.weights[:, None]
    wrote, wanted = wide(site.wrote) * weights, wide(site.wrote + site.missing) * weights
    u, _, v = torch.linalg.svd(wanted.T @ wrote)
    turn = u @ v
    return turn @ weight.to(turn.device), turn
