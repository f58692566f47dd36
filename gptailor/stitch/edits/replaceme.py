"""ReplaceMe (Shopkhoev et al., arXiv 2505.02819; mts-ai/ReplaceMe, lstsq.py and cosine_dist.py).

The layers of a gap are replaced by one linear map behind the MLP before it, which is multiplied into that MLP's output
projection.

With M the MLP's output, Y the stream it is added to and L the teacher's stream behind the gap, T is
(M^T M + alpha I)^-1 M^T (L - Y), or what maximises the mean cosine of M T + Y and L (Adam, 10 epochs at 1e-4), and
W becomes T^T W. Here tokens count by one over the norm of L in the first, and the second begins at T = I.
"""

from __future__ import annotations

import torch
from torch import nn

from gptailor.stitch.edits.case import EditCase
from gptailor.stitch.edits.repair import repair
from gptailor.stitch.edits.solve import Normal
from gptailor.stitch.edits.streams import Site

ALPHA = 1e-6
"""As a share of the mean square of M."""
EPOCHS, RATE, ROWS = 10, 1e-4, 1024


def least_squares(case: EditCase) -> list[nn.Module]:
    """The layers, those before gaps with T by least squares."""

    def fit(site: Site, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        rows = torch.ones_like(site.held)
        turn = Normal.of(site.wrote, site.wrote + site.missing, site.weights, rows).solve(ALPHA)
        return None if turn is None else (turn @ weight.to(turn.device), turn)

    return repair(case, fit)


def cosine(case: EditCase) -> list[nn.Module]:
    """The layers, those before gaps with T by the cosine distance."""

    def fit(site: Site, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turn = _by_cosine(site, case)
        return turn @ weight.to(turn.device), turn

    return repair(case, fit)


def _by_cosine(site: Site, case: EditCase) -> torch.Tensor:
    """T^T, [hidden, hidden], float64."""
    generator = torch.Generator().manual_seed(case.seed)
    hidden = site.wrote.shape[1]
    turn = torch.eye(hidden, device=site.wrote.device, requires_grad=True)
    optimiser = torch.optim.Adam([turn], lr=RATE)
    for epoch in range(EPOCHS):
        case.between(f"{case.edit.method}: epoch {epoch + 1} of {EPOCHS} at a gap", epoch / EPOCHS)
        for rows in torch.randperm(len(site.wrote), generator=generator).split(ROWS):
            rows = rows.to(site.wrote.device)
            wrote, wanted = site.wrote[rows].float(), site.wanted[rows].float()
            before = wanted - site.factor * (site.missing[rows].float() + wrote)
            with torch.enable_grad():
                behind = site.factor * (wrote @ turn.T) + before
                loss = 1 - torch.cosine_similarity(behind, wanted, dim=-1).mean()
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
    return turn.detach().double() if turn.device.type != "mps" else turn.detach().cpu().double()
