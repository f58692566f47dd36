"""What the repairs that rewrite output projections share: layer after layer, each on the already repaired ones before.

A kept layer's target is what the teacher gives where the next kept layer begins: before a gap, that is behind the gap.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gptailor.family.structure import with_tensors
from gptailor.stitch.edits.case import EditCase
from gptailor.stitch.edits.registry import fitted_places
from gptailor.stitch.edits.streams import Site, Streams
from gptailor.stitch.edits.walk import wide

Fit = Callable[[Site, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None] | None]
"""From a projection at work and its weight W, [hidden, inner], float64: the weight to have instead, and what its bias
is multiplied by ([hidden, hidden]; None: it stays). None where all stays as it is."""


@torch.no_grad()
def repair(case: EditCase, fit: Fit, *, at_gaps: bool = True, with_attention: bool = False) -> list[nn.Module]:
    """The layers with their output projections fitted.

    Of the last layer before each gap alone, or of every kept layer from the first gap on; the MLP's, or the attention's
    before it too. Raises UserError.
    """
    streams = Streams(case, case.teacher(str(case.parameter("teacher"))))
    chosen = fitted_places(case.plan, at_gaps)
    names = streams.projections if with_attention else streams.projections[1:]
    edited = list(case.layers)
    for position in range(max(chosen, default=-1) + 1):
        case.between(f"{case.edit.method}: layer {position + 1} of {len(edited)}", position / len(edited))
        if position in chosen:
            edited[position] = _repaired(streams, position, edited[position], names, fit)
        else:
            streams.skip(position, edited[position])
    return edited


def _repaired(streams: Streams, position: int, layer: nn.Module, names: tuple[str, ...], fit: Fit) -> nn.Module:
    """One layer with its projections fitted, first the attention's; the student's stream is behind it then."""
    streams.measure_factor(position, layer)
    for name in names:
        site, after = streams.watch(position, layer, name)
        projection = layer.get_submodule(name)
        fitted = fit(site, wide(weight_of(projection)))
        if fitted is not None:
            layer = with_tensors(layer, _tensors(name, projection, *fitted))
            if name == streams.projections[1]:
                after = streams.corrected(after, layer, name, site)
    streams.leave(after)
    return layer


def weight_of(projection: nn.Module) -> torch.Tensor:
    """[out, in], whichever way the module holds it."""
    weight = projection.get_parameter("weight")
    return weight.T if isinstance(projection, Conv1D) else weight


def _tensors(
    name: str, projection: nn.Module, weight: torch.Tensor, turn: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    old = projection.get_parameter("weight")
    new = weight.T if isinstance(projection, Conv1D) else weight
    tensors = {f"{name}.weight": new.to(old.device, old.dtype).contiguous()}
    bias = getattr(projection, "bias", None)
    if turn is not None and bias is not None:
        tensors[f"{name}.bias"] = (turn @ wide(bias).to(turn.device)).to(bias.device, bias.dtype)
    return tensors
