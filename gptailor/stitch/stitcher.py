"""A plan becomes a live model: the family's own, with its layer list re-pointed.

Nothing is copied or reloaded. A kept layer is the very module of its source; only merged, rescaled or edited layers
have tensors of their own, and those are kept, up to a bound in bytes, because a promoted configuration is stitched
again. Edits are computed here and nowhere else (gptailor/stitch/edits/), from the model as it stands before them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from gptailor.errors import UserError
from gptailor.family.models import Family
from gptailor.family.residence import n_bytes, tensors_of
from gptailor.family.spread import devices_of, home_of
from gptailor.family.structure import scaled, with_tensors
from gptailor.plan import BASE, Edit, LayerChoice, LayerShares, StitchPlan
from gptailor.stitch.edits.case import Between, CalibrationTexts, EditCase, HealedWeights, no_texts, no_weights
from gptailor.stitch.edits.registry import EDITS, edit_problem, keeps_shapes, settings_of
from gptailor.stitch.merging import choice_problem, fold, is_plain, merge
from gptailor.threads import side_by_side

CACHE_SHARE = 0.1
"""The cache's default bound, as a share of the family's bytes (about a dozen layers of a 30-layer model)."""


class LayerCache:
    """The most recently used layers, up to `capacity` bytes of tensors that are theirs alone. Threads may share it.

    keeps_last: whether the newest entry stays whatever its size.
    """

    def __init__(self, capacity: int, keeps_last: bool = False) -> None:
        self.capacity = capacity
        self.n_bytes = 0
        self._least = int(keeps_last)
        self._layers: OrderedDict[Hashable, tuple[nn.Module, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._layers)

    def get(self, key: Hashable, make: Callable[[], tuple[nn.Module, int]]) -> nn.Module:
        """The kept layer, or what `make` gives (layer, its own bytes)."""
        with self._lock:
            if key in self._layers:
                self._layers.move_to_end(key)
                return self._layers[key][0]
        layer, size = make()
        with self._lock:
            if (size <= self.capacity or self._least) and key not in self._layers:
                self._layers[key] = (layer, size)
                self.n_bytes += size
            while self.n_bytes > self.capacity and len(self._layers) > self._least:
                self.n_bytes -= self._layers.popitem(last=False)[1][1]
        return layer


class Stitcher:
    """Stitches plans into the family's live model, one at a time."""

    def __init__(
        self,
        family: Family,
        cache_bytes: int | None = None,
        texts: CalibrationTexts = no_texts,
        healed: HealedWeights = no_weights,
    ) -> None:
        """Stitch into this family's model.

        cache_bytes: bound of the cache of merged layers, and of that of edited ones beyond the last plan's; by default
        a share of the family, at most half of what is free on its device (of several, where least is free). texts:
        where the calibration texts of edits are read. healed: where the weights of healed plans are.
        """
        self.family = family
        capacity = _default_cache_bytes(family) if cache_bytes is None else cache_bytes
        self.cache = LayerCache(capacity)
        self.edited = LayerCache(capacity, keeps_last=True)
        self.texts = texts
        self.healed = healed

    def stitch(self, plan: StitchPlan, between: Between = lambda _what, _share: None) -> PreTrainedModel:
        """The plan's model: the family's own, re-pointed, and therefore valid until the next call.

        between: called while edits are computed. Raises UserError, and what `between` raises.
        """
        self.check(plan)
        return self.point(plan, self.layers(plan, between))

    def point(self, plan: StitchPlan, layers: Sequence[nn.Module]) -> PreTrainedModel:
        """The family's model with these layers in the places of the plan's kept ones."""
        return self.family.live.show(layers, [choice.layer for choice in plan.kept])

    def layers(self, plan: StitchPlan, between: Between = lambda _what, _share: None) -> list[nn.Module]:
        """The plan's layers with their edits; to compute those, other models are stitched on the way."""
        if not plan.edits:
            return self._all(plan.kept)
        kept = self.edited.get(plan.hash, lambda: self._edit(plan, between))
        assert isinstance(kept, nn.ModuleList)
        return list(kept)

    def _edit(self, plan: StitchPlan, between: Between) -> tuple[nn.Module, int]:
        """The plan's last edit, done to the layers that the plan has without it."""
        *before, edit = plan.edits
        start = replace(plan, edits=tuple(before))
        layers = self.layers(start, between)
        case = EditCase(self, start, edit, settings_of(edit), layers, self._texts_of(edit), between)
        edited = EDITS[edit.method].load()(case)
        known = {tensor.data_ptr() for tensor in tensors_of(self._all(plan.kept))}
        size = n_bytes(tensor for tensor in tensors_of(edited) if tensor.data_ptr() not in known)
        return nn.ModuleList(edited), size

    def _texts_of(self, edit: Edit) -> list[list[int]]:
        """Token ids. Raises UserError where they are not those that the plan means."""
        if edit.texts is None or not EDITS[edit.method].reads_texts:
            return []
        return self.texts(edit.texts, lambda: self.stitch(StitchPlan.dense(self.family.n_layers)))

    def check(self, plan: StitchPlan) -> None:
        """Raise UserError where the plan belongs to another family or asks for a merge that its method cannot do."""
        if plan.n_layers != self.family.n_layers:
            raise UserError(f"the plan is for {plan.n_layers} layers, this base has {self.family.n_layers}")
        if gone := self.family.renumbering.fixed.intersection(plan.removed):
            layers, name = ", ".join(map(str, sorted(gone))), self.family.renumbering.name
            raise UserError(f"the plan removes layers that no {name} can do without: {layers}")
        unknown = set(plan.candidates) - set(self.family.names)
        if unknown:
            raise UserError(f"the plan takes layers from {sorted(unknown)}; the family has {list(self.family.names)}")
        for choice in plan.kept:
            if choice.is_merged and (problem := choice_problem(choice)):
                raise UserError(f"layer {choice.layer}: {problem}")
        for edit in plan.edits:
            if problem := edit_problem(edit):
                raise UserError(problem)

    def _all(self, choices: Sequence[LayerChoice]) -> list[nn.Module]:
        """Merged side by side on a CPU; not by mergekit, whose random methods share torch's generator."""
        merged = [choice for choice in choices if choice.is_merged]
        if self.family.device.type == "cpu" and merged and all(map(is_plain, merged)):
            return side_by_side(self.layer, choices, [len(choice.sources) for choice in choices])
        return [self.layer(choice) for choice in choices]

    def layer(self, choice: LayerChoice) -> nn.Module:
        """One kept layer, merged and scaled as chosen."""
        if choice.output_scale == 1.0:
            return self._unscaled(choice)
        return self.cache.get((choice.weights_key, choice.output_scale), lambda: self._scale(choice))

    def _unscaled(self, choice: LayerChoice) -> nn.Module:
        if choice.folds:
            return self.cache.get(choice.weights_key, lambda: self._fold(choice))
        if choice.is_merged:
            return self.cache.get(choice.weights_key, lambda: self._merge(choice))
        return self.family.layer(choice.layer, choice.sources[0] if choice.sources else BASE)

    def _merge(self, choice: LayerChoice) -> tuple[nn.Module, int]:
        base = self.family.layer(choice.layer if choice.base_layer is None else choice.base_layer)
        candidates = {name: _state(self.family.layer(choice.layer, name), home_of(base)) for name in choice.sources}
        tensors = merge(choice, base.state_dict(), candidates)
        return with_tensors(base, tensors), n_bytes(tensors.values())

    def _fold(self, choice: LayerChoice) -> tuple[nn.Module, int]:
        """Folded layers come from the sources of the layer that they are folded into."""
        home, *others = (
            self._unscaled(replace(choice, layer=layer, folds=(), base_layer=None, output_scale=1.0))
            for layer in (choice.layer, *(layer for layer, _ in choice.folds))
        )
        own = home.state_dict()
        states = [_state(other, home_of(home)) for other in others]
        for (layer, _), state in zip(choice.folds, states, strict=True):
            if any(key not in state or state[key].shape != tensor.shape for key, tensor in own.items()):
                raise UserError(f"layer {layer} cannot be folded into layer {choice.layer}: their tensors differ")
        tensors = fold(own, [(state, factor) for state, (_, factor) in zip(states, choice.folds, strict=True)])
        return with_tensors(home, tensors), n_bytes(tensors.values())

    def _scale(self, choice: LayerChoice) -> tuple[nn.Module, int]:
        plain = self._unscaled(choice)
        layer = scaled(plain, self.family.output_projections, choice.output_scale)
        home = self._unscaled(LayerChoice(choice.layer, choice.sources[:1]))
        shared = {tensor.data_ptr() for tensor in tensors_of([home])}
        return layer, n_bytes(tensor for tensor in tensors_of([layer]) if tensor.data_ptr() not in shared)

    def n_parameters(self, plan: StitchPlan) -> int:
        """Parameters of the plan's model; a tied head counts once.

        Those of layers that an edit may make narrower are counted in its tensors.
        """
        if all(map(keeps_shapes, plan.edits)):
            kept = sum(self.family.layer_parameters[choice.layer] for choice in plan.kept)
        else:
            kept = sum(p.numel() for layer in self.layers(plan) for p in layer.parameters())
        return self.family.other_parameters + kept

    def shares(self, plan: StitchPlan) -> tuple[LayerShares, ...]:
        """What edits left of each kept layer; nothing where none of them leaves anything out."""
        if not any(EDITS[edit.method].leaves_out for edit in plan.edits):
            return ()
        return tuple(map(_shares, self.layers(plan), self._all(plan.kept)))

    def n_bytes(self, plan: StitchPlan) -> int:
        """Bytes of the plan's model as it would be saved."""
        return self.n_parameters(plan) * self.family.dtype.itemsize


def _shares(now: nn.Module, before: nn.Module) -> LayerShares:
    was, left = dict(before.named_parameters()), dict(now.named_parameters())

    def rows(*ends: str) -> float:
        """Of the first tensor that is called so; 1 where there is none."""
        name = next((name for name in was if name.endswith(ends)), None)
        return 1.0 if name is None else left[name].shape[0] / was[name].shape[0]

    weights = sum(int(torch.count_nonzero(p)) for p in left.values()) / sum(p.numel() for p in was.values())
    return LayerShares(rows("q_proj.weight"), rows("gate_proj.weight"), weights)


def _state(layer: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """A layer's tensors on the device of another that they are put together with: nearly always its own."""
    return {name: tensor.to(device) for name, tensor in layer.state_dict().items()}


def _default_cache_bytes(family: Family) -> int:
    if family.device.type == "cuda":
        free = min(torch.cuda.mem_get_info(device)[0] for device in devices_of(family.model))
    else:
        free = psutil.virtual_memory().available
    return min(int(CACHE_SHARE * family.distinct_bytes), free // 2)
