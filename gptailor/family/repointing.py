"""A live model whose list of layers is re-pointed, with all that knows the layers kept in step.

Nothing is copied: the list is new, its layers are whoever's they are. The configuration, the places that layers know,
and the few settings and tensors outside the layers that depend on them follow, so that the model computes, caches and
is saved as one that was made so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gptailor.family.renumbering import Renumbering
from gptailor.family.structure import find_layers, set_layer_index

_ABSENT = object()


class Repointing:
    """A model and what it was when all its layers stood in it."""

    def __init__(self, model: PreTrainedModel, renumbering: Renumbering) -> None:
        self.model = model
        self.renumbering = renumbering
        parent, _, self._name = find_layers(model).rpartition(".")
        self._parent = model.get_submodule(parent)
        self._config = model.config.get_text_config()
        self._before: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}  # namespace -> what was changed in it
        self._packed: dict[str, nn.Parameter] = {}

    def show(self, layers: Sequence[nn.Module], kept: Sequence[int]) -> PreTrainedModel:
        """The model with these layers, which stand for the base's layers `kept`."""
        for place, layer in enumerate(layers):
            set_layer_index(layer, place, self.renumbering.indices)
        setattr(self._parent, self._name, nn.ModuleList(layers))
        self._restore()
        for key, value in self.renumbering.settings(kept).items():
            self._change(vars(self._config), key, value)
        if self.renumbering.outside or self.renumbering.packed:
            self._follow(kept)
        return self.model

    def _follow(self, kept: Sequence[int]) -> None:
        """Settings and packed tensors outside the layers, as a model made for these layers has them."""
        made = self.renumbering.skeleton(kept)
        for path, name in self.renumbering.outside:
            value = vars(made.get_submodule(path)).get(name, _ABSENT)
            if value is not _ABSENT:
                self._change(vars(self.model.get_submodule(path)), name, value)
        for full, dimension in self.renumbering.packed.items():
            path, _, name = full.rpartition(".")
            module = self.model.get_submodule(path)
            whole = self._packed.setdefault(full, module._parameters[name])  # type: ignore[arg-type]
            part = whole.unflatten(dimension, (self.renumbering.n_layers, -1))
            chosen = part.index_select(dimension, torch.tensor(list(kept), device=whole.device))
            tensor = chosen.flatten(dimension, dimension + 1)
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
            for key, value in vars(made.get_submodule(path)).items():
                if isinstance(value, int) and not key.startswith("_"):  # its width, say
                    self._change(vars(module), key, value)

    def _change(self, namespace: dict[str, Any], key: str, value: Any) -> None:
        _, before = self._before.setdefault(id(namespace), (namespace, {}))
        before.setdefault(key, namespace.get(key, _ABSENT))
        namespace[key] = copy.deepcopy(value)

    def _restore(self) -> None:
        for namespace, before in self._before.values():
            for key, value in before.items():
                if value is _ABSENT:
                    namespace.pop(key, None)
                else:
                    namespace[key] = value
        self._before.clear()


@contextmanager
def passing_through(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let what enters these layers leave them unchanged."""
    entered: dict[nn.Module, torch.Tensor] = {}

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[layer] = (args[0] if args else kwargs["hidden_states"]).clone()

    def after(layer: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        states = entered.pop(layer)
        return states if torch.is_tensor(output) else (states, *output[1:])

    hooks: list[Any] = []
    for layer in layers:
        hooks += [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
