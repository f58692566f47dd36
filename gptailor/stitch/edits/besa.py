"""BESA (Xu et al., arXiv 2402.16880; OpenGVLab/LLMPrune-BESA): zeros in single weights, as many as each row can spare.

The model gets zeros, neither smaller nor faster. Layers in order, each on what the already sparse ones before it give.
The weights of each row of each linear map are ordered by Wanda's |W_ij| |x_j|; what is learnt is how many of a row go,
while the layer as a whole loses the wanted share:

- candidates p_d from 0 to twice the share (at 50 % these are the paper's), with beta = softmax(sigmoid(logits)) a row;
- the row's sparsity is sum p_d beta_d; a weight goes with the probability that p_d is above its rank;
- the lowest ones are zero in the forward pass, the probability has the gradient (straight-through);
- loss: |(dense - sparse) / its column's norm|^2 / hidden + 5 ((s - share) / share)^2, with s the layer's sparsity and
  both layers on the sparse model's stream.

Adam instead of Prodigy, which has no rate to set: 128 steps, a batch of texts each. Cost: 128 forward and backward
passes of each layer, and its weights' ranks in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from gptailor.errors import UserError
from gptailor.family.structure import with_tensors
from gptailor.stitch.edits.case import EditCase
from gptailor.stitch.edits.walk import States, Walk, reading
from gptailor.stitch.edits.width import parameters_to_go, told

CANDIDATES, STEPS, RATE, KEEP_SHARE = 101, 128, 0.05, 5.0
LEAST_LINEAR = 0.9
"""Share of a layer's parameters that must be in linear maps: others get no zeros."""


@dataclass
class Rows:
    """A linear map whose rows learn how many of their weights go.

    weight: [out, in]. ranks: of each weight in its row, the least first. logits: [out, candidates].
    """

    weight: torch.Tensor
    ranks: torch.Tensor
    logits: torch.Tensor
    candidates: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, norms: torch.Tensor, share: float) -> Rows:
        """norms: of what enters each column, over all texts, [in]."""
        order = (weight.float().abs() * norms).argsort(dim=1, stable=True)
        ranks = order.argsort(dim=1)
        logits = torch.zeros(len(weight), CANDIDATES, device=weight.device, requires_grad=True)
        low = max(0.0, 2 * share - 1)
        return cls(weight, ranks, logits, torch.linspace(low, 2 * share - low, CANDIDATES, device=weight.device))

    def sparsities(self) -> torch.Tensor:
        """Of each row, [out]."""
        return self._beta() @ self.candidates

    def masked(self) -> torch.Tensor:
        """The weight with what goes as zeros; its gradient is that of the probabilities."""
        beta, n = self._beta(), self.ranks.shape[1]
        below = torch.nn.functional.pad(beta.cumsum(dim=1), (1, 0))
        which = torch.searchsorted(self.candidates, torch.arange(n, device=beta.device) / n, right=True)
        goes = 1.0 - below.gather(1, which[self.ranks])
        hard = self.kept(self.sparsities().detach()).to(goes.dtype)
        return self.weight * (hard - goes + goes.detach()).to(self.weight.dtype)

    def kept(self, sparsities: torch.Tensor) -> torch.Tensor:
        """Which weights stay at these sparsities of rows, [out, in]."""
        return self.ranks >= (sparsities * self.ranks.shape[1]).round()[:, None]

    def _beta(self) -> torch.Tensor:
        return self.logits.sigmoid().softmax(dim=1)


def sparsify(case: EditCase) -> list[nn.Module]:
    """The layers with zeros, as many as the ratio takes parameters of all layers."""
    names = {position: _linear(case, layer) for position, layer in enumerate(case.layers)}
    share = parameters_to_go(case) / sum(
        layer.get_submodule(name).get_parameter("weight").numel()
        for position, layer in enumerate(case.layers)
        for name in names[position]
    )
    if share >= 1:
        raise UserError(f"besa: a ratio of {float(case.parameter('ratio')):g} leaves every layer empty; ask for less")
    walk = Walk(case, case.batches(rows=max(1, -(-len(case.texts) // STEPS))))
    states, edited = walk.begin(), []
    for position in told(case, range(len(case.layers))):
        layer, index = case.layers[position], case.plan.kept[position].layer
        rows = _ranked(walk, layer, index, names[position], states, share)
        _learn(case, walk, layer, index, rows, states, share)
        layer = with_tensors(layer, _sparse(rows, share))
        with torch.no_grad():
            states = [walk.run(layer, index, b, entering) for b, entering in enumerate(states)]
        edited.append(layer)
    return edited


def _linear(case: EditCase, layer: nn.Module) -> list[str]:
    """Names of a layer's linear maps. Raises UserError where much of it is none."""
    names = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    inside = sum(layer.get_submodule(name).get_parameter("weight").numel() for name in names)
    if inside < LEAST_LINEAR * sum(p.numel() for p in layer.parameters()):
        model = type(case.family.model).__name__
        raise UserError(f"besa: the weights of {model}'s layers are not in linear maps; leave besa out")
    return names


@torch.no_grad()
def _ranked(
    walk: Walk, layer: nn.Module, index: int, names: Sequence[str], states: States, share: float
) -> dict[str, Rows]:
    """The layer's linear maps, their weights in Wanda's order."""
    squares: dict[str, torch.Tensor] = {}
    for batch, entering in enumerate(states):
        with ExitStack() as watched:
            seen = {name: watched.enter_context(reading(layer, name)) for name in names}
            walk.run(layer, index, batch, entering)
        for name, ((read, _),) in seen.items():
            mask = walk.masks[batch].to(read.device)
            added = read.reshape(*mask.shape, -1)[mask].float().square().sum(dim=0)
            squares[name] = squares[name] + added if name in squares else added
    weights = {name: layer.get_submodule(name).get_parameter("weight").detach() for name in names}
    return {name: Rows.of(weight, squares[name].sqrt(), share) for name, weight in weights.items()}


def _learn(
    case: EditCase, walk: Walk, layer: nn.Module, index: int, rows: dict[str, Rows], states: States, share: float
) -> None:
    """Divide the layer's zeros among its rows, so that it gives what the whole one gives."""
    optimiser = torch.optim.Adam([one.logits for one in rows.values()], lr=RATE)
    n_weights = sum(one.weight.numel() for one in rows.values())
    wanted: dict[int, torch.Tensor] = {}
    for step in range(STEPS):
        case.between(f"besa: step {step + 1} of {STEPS} of layer {index}", step / STEPS)
        batch = step % len(states)
        mask = walk.masks[batch]
        if batch not in wanted:
            with torch.no_grad():
                wanted[batch] = walk.run(layer, index, batch, states[batch])[mask].float()
        dense = wanted[batch]
        with torch.enable_grad():
            weights = {f"{name}.weight": one.masked() for name, one in rows.items()}

            def sparse(entering: torch.Tensor, *args: object, **settings: object) -> object:
                return functional_call(layer, weights, (entering, *args), settings)  # noqa: B023 (called at once)

            left = walk.run(sparse, index, batch, states[batch])[mask].float()
            off = torch.stack([one.sparsities().sum() * one.weight.shape[1] for one in rows.values()])
            sparsity = off.sum() / n_weights
            apart = ((dense - left) / dense.norm(dim=0).clamp(min=1e-6)).square().sum() / dense.shape[1]
            loss = apart + KEEP_SHARE * ((sparsity - share) / share).square()
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()


@torch.no_grad()
def _sparse(rows: dict[str, Rows], share: float) -> dict[str, torch.Tensor]:
    """The weights with their zeros; what was learnt is scaled so that the share is kept."""
    found = {name: one.sparsities() for name, one in rows.items()}
    n_weights = sum(one.weight.numel() for one in rows.values())
    off = sum(float(found[name].sum()) * one.weight.shape[1] for name, one in rows.items())
    factor = share * n_weights / off
    return {
        f"{name}.weight": one.weight * one.kept((found[name] * factor).clamp(max=1.0)).to(one.weight.dtype)
        for name, one in rows.items()
    }
