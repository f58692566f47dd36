"""One base over several devices: where each layer lives, and how hidden states get there.

accelerate finds the map, from measured free memory. Its dispatch_model would bind each layer's forward to that very
module, and a twin (structure.with_tensors) would compute with the other's tensors. So hooks, which twins share, bring
what a layer is given to where its parameters are. All that is no layer stays on the main device, and so do tokens,
logits and whoever reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from gptailor.family.structure import find_layers, layer_list

Place = TypeVar("Place", str, torch.device)


@dataclass(frozen=True)
class Room:
    """Bytes of a device. reserve: of those that are free, what is left to activations, merged and visiting layers."""

    free: int
    reserve: int = 0

    @property
    def usable(self) -> int:
        return self.free - self.reserve


def place_layers(layers: Sequence[int], others: int, rooms: Mapping[Place, Room]) -> list[Place] | None:
    """The device of each layer: the first one for all if the base fits there, else as even shares as possible of all.

    layers, others: bytes of each layer, and of all that is none and stays on the first device. Only where the base fits
    no other way does it take from the reserves. None where it does not fit at all.
    """
    main = next(iter(rooms))
    for free in ([room.usable for room in rooms.values()], [room.free for room in rooms.values()]):
        if others + sum(layers) <= free[0]:
            return [main] * len(layers)
        ranks = _ranks(layers, others, free) if len(rooms) > 1 else None
        if ranks is not None:
            return [list(rooms)[rank] for rank in ranks]
    return None


def _ranks(layers: Sequence[int], others: int, free: Sequence[int]) -> list[int] | None:
    """accelerate's map, by the devices' places in `free`; evenly filled, or one after another if that does not fit."""
    from accelerate import infer_auto_device_map  # slow to import, and seldom needed
    from accelerate.utils import get_balanced_memory

    parts = nn.ModuleList(_Part(size) for size in (others, *layers))  # in this order, so that the first comes first
    room = {rank: max(0, size) for rank, size in enumerate(free)}
    for share in (get_balanced_memory(parts, dict(room)), room):
        found = infer_auto_device_map(parts, dict(share), clean_result=False)
        home, *ranks = (found[str(number)] for number in range(len(parts)))
        if home == 0 and "disk" not in ranks:
            return cast(list[int], ranks)
    return None


class _Part(nn.Module):
    """So many bytes, and no memory."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bytes = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)


def spread(model: PreTrainedModel, homes: Sequence[torch.device], main: torch.device) -> None:
    """Move each layer to its home and the rest to the main device; from now on hidden states follow."""
    layers = layer_list(model)
    for layer, home in zip(layers, homes, strict=True):
        layer.to(home)
    parent, _, name = find_layers(model).rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList())
    cast(nn.Module, model).to(main)
    setattr(model.get_submodule(parent), name, layers)
    let_states_follow(model, main)


def let_states_follow(model: PreTrainedModel, main: torch.device) -> None:
    """Hooks that bring what a layer is given to where it lives, and what other modules are given to `main`."""
    for layer in layer_list(model):
        layer.register_forward_pre_hook(_follow, with_kwargs=True)
    for module in _beside(model, find_layers(model)):
        module.register_forward_pre_hook(partial(_bring, main), with_kwargs=True)


def is_spread(model: PreTrainedModel) -> bool:
    """Whether hidden states have to follow the model's layers, which only modules that are called see to."""
    return any(_follow in layer._forward_pre_hooks.values() for layer in layer_list(model))


def home_of(layer: nn.Module) -> torch.device:
    """Where a layer lives, by its first tensor: all are in one place, but for layers that wait to visit another."""
    return next(layer.parameters()).device


def devices_of(model: PreTrainedModel) -> set[torch.device]:
    """All that some of the model lives on."""
    return {parameter.device for parameter in model.parameters()}


def _beside(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """Modules that run before or after the list of layers at `path`: embeddings, rotary positions, final norm, head."""
    for part in path.split("."):
        yield from (child for name, child in model.named_children() if name != part)
        model = model.get_submodule(part)


def _follow(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return _bring(home_of(layer), layer, args, kwargs)


def _bring(device: torch.device, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return _moved(args, device), _moved(kwargs, device)


def _moved(value: Any, device: torch.device) -> Any:
    """The same with all tensors, masks and packs in it on the device.

    A cache of keys and values, which has no `to`, stays: each layer's part of it is made where the layer lives.
    """
    if type(value) in (tuple, list):
        return type(value)(_moved(part, device) for part in value)
    if type(value) is dict:
        return {name: _moved(part, device) for name, part in value.items()}
    return value.to(device) if hasattr(value, "to") else value
