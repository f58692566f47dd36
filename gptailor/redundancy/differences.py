"""How far each candidate's layer is from the base's, and whether candidates went the same way.

Tensor by tensor, in slices: beside the models, SLICE numbers of each are held. The weights are those that the search
has (adapters merged, in the run's type), so that rounding to that type is no difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

import torch

from gptailor.family.models import Family
from gptailor.plan import BASE

SLICE = 1 << 22
"""Numbers of a tensor that are compared at a time."""


@dataclass(frozen=True)
class Differences:
    """Of every layer. distance: candidate -> the norm of what it differs by, in units of the base's layer.

    agreement: two candidates -> the cosine between their differences: 1 the same way, 0 apart, -1 opposite ways; None
    where one of them does not differ.
    """

    distance: dict[str, list[float]]
    agreement: dict[tuple[str, str], list[float | None]]


def differences(family: Family, told: Callable[[int], None] = lambda _layer: None) -> Differences:
    """Compare all candidates' layers with the base's. told: of each layer that is done."""
    names = family.names
    found = Differences({name: [] for name in names}, {pair: [] for pair in combinations(names, 2)})
    for layer in range(family.n_layers) if names else ():
        gram = _gram(family, layer).tolist()
        own, its = gram[0][0], {name: place for place, name in enumerate(names, start=1)}
        for name, place in its.items():
            found.distance[name].append(math.sqrt(gram[place][place] / own) if own > 0 else 0.0)
        for (one, other), cosines in found.agreement.items():
            a, b = its[one], its[other]
            norm = math.sqrt(gram[a][a] * gram[b][b])
            cosines.append(max(-1.0, min(1.0, gram[a][b] / norm)) if norm > 0 else None)
        told(layer)
    return found


def copies(family: Family, name: str) -> dict[int, int]:
    """Layers of a model whose weights are an earlier layer's, as models that were made longer have: layer -> that."""
    firsts: dict[tuple[float, ...], list[int]] = {}
    found: dict[int, int] = {}
    for index in range(family.n_layers):
        mine = family.layer(index, name).state_dict()
        key = tuple(float(tensor.reshape(-1)[-1]) for tensor in mine.values() if tensor.numel())
        alike = firsts.setdefault(key, [])
        first = next((other for other in alike if _same(mine, family.layer(other, name).state_dict())), None)
        if first is None:
            alike.append(index)
        else:
            found[index] = first
    return found


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _gram(family: Family, layer: int) -> torch.Tensor:
    """[1 + candidates, 1 + candidates]: products of the base's weights and what each candidate's differ by."""
    states = [family.layer(layer, name).state_dict() for name in (BASE, *family.names)]
    gram = torch.zeros(len(states), len(states), dtype=torch.float64)
    for name, base in states[0].items():
        if base.is_floating_point():
            for slices in _slices([state[name] for state in states]):
                vectors = torch.stack([slices[0], *(one - slices[0] for one in slices[1:])])
                gram += (vectors @ vectors.T).double().cpu()
    return gram


def _slices(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), SLICE):
        yield [one[start : start + SLICE].float() for one in flat]
