"""Where layers live: on the device if all of them fit, else on the host, with a bounded number of visitors.

The base always lives on the device. A candidate that does not fit beside it stays in pinned host memory; its layers are
copied when a plan needs them, on a stream of their own, and the most recently used ones are kept. Tensors that models
share are moved once.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import nn

from gptailor.errors import UserError
from gptailor.family.structure import with_tensors

log = logging.getLogger(__name__)

RESERVE = 0.25
"""Share of a GPU's memory that is left to activations, merged layers and visiting layers."""

Key = tuple[str, int]


def pick_device(wanted: str) -> torch.device:
    """'auto' is cuda, then mps, then cpu. Raises UserError where the device is not there."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {wanted} is not here ({torch.cuda.device_count()} CUDA devices); use auto or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: mps is not here; use auto or cpu")
    return device


def n_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of distinct tensors: what is shared (equal address) counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def tensors_of(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """All parameters and buffers."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def moved(layer: nn.Module, device: torch.device, move: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A twin of the layer, with `move` applied to those of its tensors that are not on the device yet."""
    named = (*layer.named_parameters(), *layer.named_buffers())
    return with_tensors(layer, {name: move(tensor.detach()) for name, tensor in named if tensor.device != device})


def settle(model: nn.Module, candidates: dict[str, list[nn.Module]], device: torch.device) -> Visitors | None:
    """Move the base to the device, then each candidate that fits beside it; the others are pinned and will visit.

    `candidates` is changed in place. What a candidate shares with the base moves with the base: it is the same
    parameter object. Raises UserError where not even the base fits.
    """
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (1 << 62, 0)
    needed = n_bytes(tensors_of([model]))
    if needed > free:
        raise UserError(f"device: the base needs {needed >> 20} MB, {device} has {free >> 20} MB free; use cpu")
    model.to(device)
    free -= needed + int(RESERVE * total)
    visiting = []
    for name, layers in candidates.items():
        extra = n_bytes(tensor for tensor in tensors_of(layers) if tensor.device != device)
        if extra <= free:
            free -= extra
            candidates[name] = [moved(layer, device, lambda tensor: tensor.to(device)) for layer in layers]
        else:
            visiting.append(name)
            candidates[name] = [moved(layer, device, torch.Tensor.pin_memory) for layer in layers]
    if not visiting:
        return None
    log.info("%s: no room on %s; their layers stay in host memory and visit it", ", ".join(visiting), device)
    return Visitors(device, capacity=max(free, int(RESERVE * total / 2)))


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
            size = n_bytes(tensor for tensor in tensors_of([home]) if tensor.device != self.device)
            self._here[key] = (moved(home, self.device, self._copy), size)
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
