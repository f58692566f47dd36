"""The same model with less work around its products: what a pack does not need, and a cheaper norm on a CPU.

At the size of models that are searched on a CPU, the passes over memory between the products cost as much as the
products. Everything here is put on for one forward and taken off again; weights are not touched.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from gptailor.family.structure import layer_list

ROW_WISE = ("mlp", "self_attn.q_proj", "self_attn.o_proj")
"""Parts of a decoder layer, as transformers names them, that look at one position at a time and give no keys."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEEP_BYTES = 2**29


def keep_freed_memory() -> None:
    """Let glibc keep up to half a GiB of freed memory instead of giving it back after every large tensor.

    A fresh page costs a fault; without this, the passes between two products spend most of their time on faults.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)


@contextmanager
def lean(model: PreTrainedModel, rows: torch.Tensor) -> Iterator[None]:
    """Run the model's last layer past its attention at `rows` [S] of the flat row only, and norms the cheap way."""
    patched: list[nn.Module] = []

    def patch(module: nn.Module, forward: Callable[..., Any]) -> None:
        module.forward = forward  # type: ignore[method-assign]
        patched.append(module)

    try:
        for module in _row_wise(model):
            patch(module, partial(_at_rows, module.forward, rows))
        if rows.device.type == "cpu":
            for module in model.modules():
                norm = _plain_norm(module)
                if norm is not None:
                    patch(module, norm)
        yield
    finally:
        for module in patched:
            del module.forward


def _at_rows(forward: Callable[..., torch.Tensor], rows: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """forward at some rows of [1, T, H]; zeros elsewhere, where nobody looks."""
    some = forward(states.index_select(1, rows))
    return some.new_zeros(1, states.shape[1], some.shape[2]).index_copy_(1, rows, some)


def _row_wise(model: PreTrainedModel) -> list[nn.Module]:
    """Modules of the last layer whose answers are only used at scored positions, each position by itself."""
    last = layer_list(model)[-1]
    return [module for name, module in last.named_modules() if name in ROW_WISE]


def _plain_norm(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The cheap way of a module that computes weight * x / rms(x), tried on a few numbers once for its class."""
    kind = type(module)
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not kind.__name__.endswith("RMSNorm") or not isinstance(weight, torch.Tensor) or epsilon is None:
        return None
    cheap = partial(_rms_norm, weight, epsilon)
    if kind not in _PLAIN:
        trial = torch.linspace(-3.0, 4.0, 3 * weight.shape[0]).view(1, 3, -1).to(weight.dtype)
        _PLAIN[kind] = torch.allclose(module(trial), cheap(trial), rtol=2e-2, atol=1e-6)
    return cheap if _PLAIN[kind] else None


_PLAIN: dict[type, bool] = {}


def _rms_norm(weight: torch.Tensor, epsilon: float, states: torch.Tensor) -> torch.Tensor:
    """RMSNorm of [..., H] in three passes over memory, rounded as in transformers' LlamaRMSNorm.

    Batch norm with the tokens as channels divides each token by a given root in one pass, in float32 inside.
    """
    flat = states.reshape(1, -1, states.shape[-1])
    squares = torch.linalg.vector_norm(flat[0], dim=-1, dtype=torch.float32).square_().div_(states.shape[-1])
    normed = F.batch_norm(flat, torch.zeros_like(squares), squares, eps=epsilon)
    return normed.mul_(weight).view(states.shape)
