"""SlimGPT (Ling et al., arXiv 2412.18110): what its outputs miss least, and the rest refitted to make up for it.

Layers in order, each on what the already pruned ones before it give. In a layer o_proj first, then down_proj, whose
inputs are read anew. With H the mean of 2 x x^T over what enters the projection W, damped by a hundredth of its mean
diagonal, and C the inverse of H over the columns that are left:

- heads, a group at a time: the error of group g is the sum over its columns j of |W_j|^2 / d_j, with d the squared
  diagonal of the Cholesky factor of C_gg (the paper's grouped Cholesky);
- channels, in blocks that shrink from 1024: the error of channel j is |W_j|^2 / C_jj;
- after each removal of columns S, W -= W_S C_SS^-1 C_S: (the optimal brain surgeon), so that what is left is the
  least-squares fit to what the whole projection gave.

The share that goes rises over the layers with log(i + 1); the first loses nothing. The published code removes single
columns of a head one after another and rounds to float32; the block at once, in float64, is the same fit. Cost: three
forward passes over the texts, and in each layer an inverse and an update a block, all of the MLP's width squared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from gptailor.errors import UserError
from gptailor.stitch.edits.case import EditCase
from gptailor.stitch.edits.solve import SLICE
from gptailor.stitch.edits.walk import States, Walk, reading, wide
from gptailor.stitch.edits.width import Cut, Widths, cuts, parameters_to_go, told, widths_of

LARGEST, SMALLEST, OFFSET = 1024, 64, 512
"""Blocks of channels: half of what is to go beyond OFFSET, between these."""
SHARE_AT_ONCE = 64
"""Of a narrow MLP, no more than one in so many channels at once: of two equal ones, one must stay."""


class Surgeon:
    """A projection that loses input columns, in float64.

    What is gone stays in its place, as zeros: to close the gaps after every removal would cost as much as the removals.
    """

    def __init__(self, weight: torch.Tensor, hessian: torch.Tensor, damping: float) -> None:
        """weight: [out, n]. hessian: [n, n]. Raises UserError where that has no inverse."""
        hessian, self._weight = hessian.clone(), weight.clone()
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1.0
        self._weight[:, dead] = 0.0
        hessian.diagonal().add_(damping * hessian.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if int(failed):
            raise UserError("slimgpt: inputs cannot be told apart on these calibration texts; give more or other texts")
        self._inverse = torch.cholesky_inverse(factor)
        self._stays = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)

    @property
    def left(self) -> torch.Tensor:
        """Columns that are left, ascending."""
        return self._stays.nonzero()[:, 0]

    @property
    def weight(self) -> torch.Tensor:
        """Theirs, [out, columns left]."""
        return self._weight[:, self._stays]

    def errors(self) -> torch.Tensor:
        """What the removal of each column would cost, [n]; infinite for those that are gone."""
        costs = self._weight.square().sum(dim=0) / self._inverse.diagonal()
        return costs.masked_fill(~self._stays, torch.inf)

    def group_errors(self, width: int) -> torch.Tensor:
        """What the removal of each span of so many columns would cost, [spans]; infinite for those that are gone."""
        stays = self._stays.view(-1, width).all(dim=1)
        n = len(stays)
        blocks = self._inverse.view(n, width, n, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)[stays]
        spread = torch.linalg.cholesky(blocks).diagonal(dim1=1, dim2=2).square()
        costs = torch.full((n,), torch.inf, dtype=spread.dtype, device=spread.device)
        costs[stays] = (self._weight.square().sum(dim=0).view(n, width)[stays] / spread).sum(dim=1)
        return costs

    def remove(self, columns: torch.Tensor) -> None:
        """Leave out columns; the others make up for them."""
        across = self._inverse[columns]
        solved = torch.linalg.solve(across[:, columns], across)
        self._weight.addmm_(self._weight[:, columns], solved, alpha=-1)
        self._inverse.addmm_(across.T, solved, alpha=-1)
        self._stays[columns] = False

    def remove_groups(self, n: int, width: int) -> torch.Tensor:
        """Leave out n spans of so many columns, one at a time; the spans that stay, ascending."""
        for _ in range(n):
            worst = int(self.group_errors(width).argmin())
            self.remove(torch.arange(worst * width, (worst + 1) * width, device=self._stays.device))
        return self._stays.view(-1, width).all(dim=1).nonzero()[:, 0]

    def remove_columns(self, n: int) -> torch.Tensor:
        """Leave out n columns, in shrinking blocks; those that stay, ascending."""
        least = min(SMALLEST, max(1, int(self._stays.sum()) // SHARE_AT_ONCE))
        while n:
            block = min(n, max(least, min(LARGEST, (n - OFFSET) // 2)))
            self.remove(self.errors().argsort(stable=True)[:block])
            n -= block
        return self.left


def cut(case: EditCase) -> list[nn.Module]:
    """The layers without what they can spare, the rest refitted."""
    positions = range(len(case.layers))
    widths = widths_of(case, positions)
    off = cuts(case, widths, rising_shares(case, widths))
    _refuse_few(case, widths.values())
    with torch.no_grad():
        walk = Walk(case)
        states, edited = walk.begin(), []
        for position in told(case, positions):
            index = case.plan.kept[position].layer
            layer = _pruned(case, walk, case.layers[position], index, states, widths[position], off[position])
            states = [walk.run(layer, index, b, entering) for b, entering in enumerate(states)]
            edited.append(layer)
    return edited


def rising_shares(case: EditCase, widths: Mapping[int, Widths]) -> dict[int, float]:
    """Of what each layer may lose, the share that goes: as log(i + 1), as large as the ratio needs."""
    heights = {position: math.log(position + 1) / math.log(max(2, len(widths))) for position in widths}
    whole = sum(height * widths[position].parameters for position, height in heights.items())
    return {position: height * parameters_to_go(case) / whole for position, height in heights.items()}


def _refuse_few(case: EditCase, widths: Iterable[Widths]) -> None:
    """Raise UserError where there are fewer tokens than a Hessian has columns."""
    columns = max(max(its.channels, its.groups * its.heads * its.head_dim) for its in widths)
    tokens = sum(map(len, case.texts))
    if tokens < columns:
        raise UserError(
            f"slimgpt: {tokens} tokens of calibration texts are too few for a Hessian of {columns} columns; give at "
            f"least {columns}, better ten times as many"
        )


def _pruned(
    case: EditCase, walk: Walk, layer: nn.Module, index: int, states: States, its: Widths, off: Cut
) -> nn.Module:
    """One layer, its heads pruned first."""
    damping = float(case.parameter("damping"))

    def surgeon(name: str) -> Surgeon:
        weight = layer.get_submodule(its.paths[name]).get_parameter("weight")
        hessian = _hessian(walk, layer, index, its.paths[name], states)
        return Surgeon(wide(weight.detach()).to(hessian.device), hessian, damping)

    if off.groups:
        heads = surgeon("o_proj")
        groups = heads.remove_groups(off.groups, its.heads * its.head_dim)
        layer = its.narrowed(layer, groups=groups, weights={"o_proj": heads.weight})
    if off.channels:
        mlp = surgeon("down_proj")
        channels = mlp.remove_columns(off.channels)
        layer = its.narrowed(layer, channels=channels, weights={"down_proj": mlp.weight})
    return layer


def _hessian(walk: Walk, layer: nn.Module, index: int, path: str, states: States) -> torch.Tensor:
    """2 / n times the sum of x x^T over what enters a projection, padding left out, [columns, columns], float64."""
    total, n = torch.zeros(0), 0
    for batch, entering in enumerate(states):
        with reading(layer, path) as seen:
            walk.run(layer, index, batch, entering)
        x = seen[0][0][walk.masks[batch].to(seen[0][0].device)]
        for rows in x.split(SLICE):
            added = _squares(rows)
            total = total.add_(added) if n else added
            n += len(rows)
    return total * (2.0 / n)


def _squares(x: torch.Tensor) -> torch.Tensor:
    """x^T x, in float64.

    Of numbers in half precision in float32, which holds their products and is twice as fast: a slice's sum is more
    exact than they are.
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
        return wide(x.T @ x)
    x = wide(x)
    return x.T @ x
