"""Where layers live: on the device if all of them fit, else on the host, with a bounded number of visitors.

The base always lives on the device. A candidate that does not fit beside it stays in pinned host memory; its layers are
copied when a plan needs them, on a stream of their own, and the most recently used ones are kept. Tensors that models
share are moved once.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from gptailor.errors import UserError
from gptailor.family.structure import layer_list, with_tensors

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


def n_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of distinct tensors: what is shared (equal address) counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def tensors_of(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """All parameters and buffers."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def settle(
    model: PreTrainedModel, candidates: dict[str, list[nn.Module]], device: torch.device, free: int | None = None
) -> Visitors | None:
    """Move the base to the device, then each candidate that fits beside it; the others wait on the host and will visit.

    `candidates` is changed in place: its layers become twins of the moved base's, so what they share is moved once.
    free: bytes to fill, by default a GPU's free memory less RESERVE, without bound elsewhere. Raises UserError where
    not even the base fits.
    """
    reserve = 0
    if free is None and device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserve = int(RESERVE * total)
    needed = n_bytes(tensors_of([model]))
    if free is not None and needed > free:
        raise UserError(f"device: the base needs {needed >> 20} MB, {device} has {free >> 20} MB free; use cpu")
    own = {
        name: [_own(layer, base) for layer, base in zip(layers, layer_list(model), strict=True)]
        for name, layers in candidates.items()
    }
    cast(nn.Module, model).to(device)
    room = None if free is None else free - needed - reserve
    waiting = []
    for name, states in own.items():
        size = n_bytes(tensor for state in states for tensor in state.values())
        fits = room is None or size <= room
        if fits:
            room = None if room is None else room - size
        else:
            waiting.append(name)
        candidates[name] = [
            with_tensors(base, {key: tensor.to(device) if fits else _hold(tensor) for key, tensor in state.items()})
            for base, state in zip(layer_list(model), states, strict=True)
        ]
    if not waiting:
        return None
    log.info("%s: no room on %s; their layers wait in host memory and visit it", ", ".join(waiting), device)
    return Visitors(device, capacity=max(room or 0, reserve // 2))


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
