"""Texts on their way through a model, a layer at a time: what edits look at that learn from a layer's inputs.

The residual streams of all texts are held, and each layer is called by itself, so that an edited layer works on the
already edited ones before it, and a whole edit costs about one pass of the model. What a layer is called with besides
the stream (masks, rotations) is taken from the model's own code, once for every kind of layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from gptailor.plan import LayerChoice, StitchPlan
from gptailor.stitch.edits.case import Batch, EditCase

States = list[torch.Tensor]
"""The residual stream of all batches, each [texts, tokens, hidden]."""
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with behind the stream."""


def wide(values: torch.Tensor) -> torch.Tensor:
    """In float64, on the host where the device has none (Apple's)."""
    return (values.cpu() if values.device.type == "mps" else values).double()


class Walk:
    """How the texts' residual streams go through layers. masks: real tokens of each batch, [texts, tokens]."""

    def __init__(self, case: EditCase, batches: Sequence[Batch] | None = None) -> None:
        """batches: the texts, by default all of the case's. Raises UserError where there are none."""
        self.case = case
        self._kinds = _kinds(case)
        chosen = case.batches() if batches is None else batches
        self._entering, self._calls, self.masks = _begin(case, self._kinds, chosen)

    def begin(self) -> States:
        """What enters the first layer; it is held here no longer."""
        entering, self._entering = self._entering, []
        return entering

    def run(self, layer: Callable[..., Any], index: int, batch: int, states: torch.Tensor) -> torch.Tensor:
        """The layer, or what computes as it does, standing for the base's layer `index`, on one batch."""
        args, kwargs = self._calls[batch][self._kinds[index]]
        left = layer(states, *args, **kwargs)
        return (left if isinstance(left, torch.Tensor) else left[0]).to(states.device)

    def rows(self, states: States) -> torch.Tensor:
        """Real tokens of all batches, [n, hidden]."""
        return torch.cat([one[mask] for one, mask in zip(states, self.masks, strict=True)])


class reading:  # a context manager, used as a function
    """While it lasts, what a layer's module reads and writes, one (input, output) a call."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.module = layer.get_submodule(name)
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        self.hook = self.module.register_forward_hook(lambda _, args, output: self.seen.append((args[0], output)))
        return self.seen

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def _kinds(case: EditCase) -> list[int]:
    """For every layer of the base, the first layer of its kind: what the configuration's per-layer lists say of it."""
    lists = case.family.per_layer_lists.values()
    firsts: dict[tuple[str, ...], int] = {}
    return [
        firsts.setdefault(tuple(str(values[index]) for values in lists), index) for index in range(case.family.n_layers)
    ]


def _begin(
    case: EditCase, kinds: Sequence[int], batches: Sequence[Batch]
) -> tuple[States, list[dict[int, Call]], list[torch.Tensor]]:
    """What enters the first layer, how each kind of layer is called, and the real tokens, by batch.

    A model of one layer of each kind is run for it.
    """
    firsts = sorted(set(kinds))
    shown = sorted({*firsts, *case.family.renumbering.fixed})  # without which the model cannot be
    plan = StitchPlan(case.family.n_layers, tuple(map(LayerChoice, shown)))
    model: Any = case.stitcher.stitch(plan)
    decoder = model.get_decoder()
    states, calls, masks = [], [], []
    for batch in batches:
        seen: dict[int, Any] = {}
        hooks = [
            case.family.layer(first).register_forward_pre_hook(_note(seen, first), with_kwargs=True) for first in firsts
        ]
        try:
            decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        states.append(seen[firsts[0]][0])
        calls.append({first: call for first, (_, call) in seen.items()})
        masks.append(batch["attention_mask"].bool())
    return states, calls, masks


def _note(seen: dict[int, Any], first: int) -> Callable[..., None]:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        seen[first] = (args[0] if args else kwargs["hidden_states"], (args[1:], rest))

    return note
