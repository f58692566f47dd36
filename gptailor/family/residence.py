"""Where layers live: on the device if all of them fit, else on the host, with a bounded number of visitors.

The base always lives on the device, or over several (spread.py). A candidate that does not fit beside it stays in
pinned host memory; its layers are copied when a plan needs them, on a stream of their own, and the most recently used
ones are kept. Tensors that models share are moved once.
"""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from gptailor.errors import UserError
from gptailor.family.spread import Room, place_layers, spread
from gptailor.family.structure import layer_list, with_tensors
from gptailor.wording import gigabytes

log = logging.getLogger(__name__)

RESERVE = 0.25
"""Share of a GPU's memory that is left to activations, merged layers and visiting layers."""

Key = tuple[str, int]


def pick_device(wanted: str) -> torch.device:
    """'auto' is cuda, then mps, then cpu. Raises UserError where the device is not there."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {wanted} is not here ({torch.cuda.device_count()} CUDA devices); use auto or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: mps is not here; use auto or cpu")
    return torch.empty(0, device=device).device  # with its index, as tensors there will say it


def pick_devices(wanted: str) -> list[torch.device]:
    """pick_device, and the devices that a base may be split over if it does not fit there.

    These are all other GPUs, unless a certain one is wanted. Raises UserError.
    """
    main = pick_device(wanted)
    others = range(torch.cuda.device_count()) if main.type == "cuda" and wanted in ("auto", "cuda") else ()
    return [main, *(torch.device("cuda", index) for index in others if index != main.index)]


def rooms_for(needed: int, devices: Sequence[torch.device]) -> dict[torch.device, Room]:
    """The room on the first device.

    Where `needed` bytes do not fit there, on all: to look at a GPU takes some of its memory. Without bound elsewhere
    than on GPUs.
    """
    rooms = {devices[0]: _room(devices[0])}
    if needed > rooms[devices[0]].usable:
        rooms |= {device: _room(device) for device in devices[1:]}
    return rooms


def _room(device: torch.device) -> Room:
    if device.type != "cuda":
        return Room(sys.maxsize)
    free, total = torch.cuda.mem_get_info(device)
    return Room(free, int(RESERVE * total))


def n_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of distinct tensors: what is shared (equal address) counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def tensors_of(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """All parameters and buffers."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def settle(
    model: PreTrainedModel, candidates: dict[str, list[nn.Module]], rooms: Mapping[torch.device, Room]
) -> dict[torch.device, Visitors]:
    """Move the base to the first device, then what fits beside it of each candidate, device by device.

    Where the base does not fit there, over all. A candidate's layers live where the base's do, or wait on the host and
    will visit.

    `candidates` is changed in place: its layers become twins of the moved base's, so what they share is moved once.
    Raises UserError where the base does not fit even on all devices. Returns the visitors of each device that has any.
    """
    main = next(iter(rooms))
    sizes = [n_bytes(tensors_of([layer])) for layer in layer_list(model)]
    needed = n_bytes(tensors_of([model]))
    others = max(0, needed - sum(sizes))
    homes = place_layers(sizes, others, rooms)
    if homes is None:
        free = ", ".join(f"{device} has {gigabytes(room.free)} free" for device, room in rooms.items())
        raise UserError(f"device: the base needs {gigabytes(needed)}, {free}; use cpu")
    own = {
        name: [_own(layer, base) for layer, base in zip(layers, layer_list(model), strict=True)]
        for name, layers in candidates.items()
    }
    if set(homes) == {main}:
        cast(nn.Module, model).to(main)
    else:
        log.info("the base is split over %s", ", ".join(map(str, rooms)))
        spread(model, homes, main)
    left = {device: room.free for device, room in rooms.items()}
    for device, size in zip((main, *homes), (others, *sizes), strict=True):
        left[device] -= size
    visited: dict[torch.device, list[str]] = {}
    for name, states in own.items():
        waits = {}
        for device in dict.fromkeys(homes):
            here = [state for home, state in zip(homes, states, strict=True) if home == device]
            size = n_bytes(tensor for state in here for tensor in state.values())
            waits[device] = size > left[device] - rooms[device].reserve
            if waits[device]:
                visited.setdefault(device, []).append(name)
            else:
                left[device] -= size
        candidates[name] = [
            with_tensors(base, {key: _hold(t) if waits[home] else t.to(home) for key, t in state.items()})
            for base, home, state in zip(layer_list(model), homes, states, strict=True)
        ]
    for device, names in visited.items():
        log.info("%s: no room on %s; their layers wait in host memory and visit it", ", ".join(names), device)
    return {device: Visitors(device, _capacity(left[device], rooms[device].reserve)) for device in visited}


def _capacity(left: int, reserve: int) -> int:
    """Bytes of visitors: what is left beside the reserve, or half of the reserve, as far as that is left."""
    return max(left - reserve, min(left, reserve) // 2)


def _own(layer: nn.Module, base: nn.Module) -> dict[str, torch.Tensor]:
    """What a candidate's layer does not share with the base's."""
    theirs = {tensor.data_ptr() for tensor in tensors_of([base])}
    named = (*layer.named_parameters(), *layer.named_buffers())
    return {name: tensor.detach() for name, tensor in named if tensor.data_ptr() not in theirs}


def _hold(tensor: torch.Tensor) -> torch.Tensor:
    """Pinned host memory is copied from without the processor's help; it exists only beside a GPU."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


class Visitors:
    """Layers that live on the host and visit the device: the most recently used stay, up to `capacity` bytes."""

    def __init__(self, device: torch.device, capacity: int) -> None:
        self.device = device
        self.capacity = capacity
        self._here: OrderedDict[Key, tuple[nn.Module, int]] = OrderedDict()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def n_bytes(self) -> int:
        return sum(size for _, size in self._here.values())

    def get(self, key: Key, home: nn.Module) -> nn.Module:
        """The layer on the device, copied there now if it is not. A dropped one lives on while a model uses it."""
        if key not in self._here:
            named = (*home.named_parameters(), *home.named_buffers())
            away = {name: tensor.detach() for name, tensor in named if tensor.device != self.device}
            layer = with_tensors(home, {name: self._copy(tensor) for name, tensor in away.items()})
            self._here[key] = (layer, n_bytes(away.values()))
            if self._stream is not None:  # the GPU waits, the host goes on preparing
                torch.cuda.current_stream(self.device).wait_stream(self._stream)
            while self.n_bytes > self.capacity and len(self._here) > 1:
                self._here.popitem(last=False)
        self._here.move_to_end(key)
        return self._here[key][0]

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._stream is None:
            return tensor.to(self.device)
        with torch.cuda.stream(self._stream):
            copy = tensor.to(self.device, non_blocking=True)
        copy.record_stream(torch.cuda.current_stream(self.device))
        return copy
