"""What an edit is given: the stitched model as it stands, its family, the calibration texts, a seed, and a way to stop.

An edit gives back the model's layers, one a kept layer of the plan: the same module where it changes nothing, a twin
(family/structure.py, with_tensors) with tensors of its own where it does. It never writes into a tensor that it was
given: those are the family's. Tensors of other shapes are allowed, each layer its own, as long as the layer still
takes and gives the residual stream; such an edit says so in the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from gptailor.errors import UserError
from gptailor.family.models import Family
from gptailor.plan import BASE, Edit, Setting, StitchPlan, Texts

Between = Callable[[str, float], None]
"""Told now and then what is computed and the share of it that is done; it may raise, to stop."""

CalibrationTexts = Callable[[Texts, Callable[[], PreTrainedModel]], list[list[int]]]
"""Token ids of the texts that are meant; it may ask for the dense base, live, to write them. Raises UserError."""

Shapes = Sequence[Mapping[str, torch.Size]]
"""Of each layer's tensors, by their names in it."""

HealedWeights = Callable[[str, Shapes], Sequence[Mapping[str, torch.Tensor]]]
"""The layers' tensors of the healed plan whose weights have this digest and these shapes (healed.py); or UserError."""

Batch = Mapping[str, torch.Tensor]
"""input_ids and attention_mask, [texts, tokens], padded on the right."""

ROWS = 64
"""Texts in a batch at most."""
BATCH_TOKENS = 8192
"""Tokens in a batch at most, padding among them, unless one text has more."""


def no_texts(asked: Texts, _dense: Callable[[], PreTrainedModel]) -> list[list[int]]:
    """Where nobody said how texts are read."""
    raise UserError(f"edits: the plan's calibration texts ({asked.source}) cannot be read here")


class Stitches(Protocol):
    """What an edit asks of whom it works for (gptailor/stitch/stitcher.py)."""

    family: Family
    healed: HealedWeights

    def stitch(self, plan: StitchPlan) -> PreTrainedModel:
        """The plan's model, live, until the next one is asked for. Raises UserError."""

    def point(self, plan: StitchPlan, layers: Sequence[nn.Module]) -> PreTrainedModel:
        """The same with other layers in the places of the plan's."""


def no_weights(digest: str, _shapes: Shapes) -> Sequence[Mapping[str, torch.Tensor]]:
    """Where nobody said where healed plans are."""
    raise UserError(f"edits: the weights that the plan was healed to ({digest}) cannot be read here")


@dataclass
class EditCase:
    """plan: what the model is before this edit. settings: the edit's, defaults included. layers: the plan's layers.

    texts: token ids, none for an edit without texts. between: told what is done and the share of it, often enough that
    a person does not wonder; it may raise, to stop.
    """

    stitcher: Stitches
    plan: StitchPlan
    edit: Edit
    settings: Mapping[str, Setting]
    layers: list[nn.Module]
    texts: Sequence[Sequence[int]]
    between: Between

    @property
    def family(self) -> Family:
        return self.stitcher.family

    @property
    def device(self) -> torch.device:
        """Where the family takes tokens."""
        return self.family.device

    @property
    def seed(self) -> int:
        return self.edit.seed

    def parameter(self, name: str) -> Setting:
        """A setting of the edit, or its default."""
        return self.settings[name]

    def model(self, layers: Sequence[nn.Module] | None = None) -> PreTrainedModel:
        """The plan's model, live, with the layers it has or others in their places, until the next one is asked for."""
        return self.stitcher.point(self.plan, self.layers if layers is None else layers)

    def teacher(self, name: str = "") -> str:
        """The dense model to learn from.

        The named one, or whom most kept layers come from (of equally many the base, then the first by name). Raises
        UserError for a name that is not in the family.
        """
        if name:
            self.family.layer(0, name)
            return name
        return most_kept(self.plan)

    def batches(self, rows: int = ROWS) -> list[Batch]:
        """The texts, shortest first, on the family's device. Raises UserError where there are none."""
        ordered = sorted((text for text in self.texts if text), key=len)
        if not ordered:
            raise UserError(f"edits: {self.edit.method} needs calibration texts, and they hold no tokens")
        return [padded(some, self.device) for some in _cut(ordered, rows)]


def most_kept(plan: StitchPlan) -> str:
    """The model that most kept layers come from; of equally many the base, then the first by name."""
    sole = [choice.sources[0] if choice.sources else BASE for choice in plan.kept if not choice.is_merged]
    names = sorted(set(sole), key=lambda source: (source != BASE, source))
    return max(names, key=sole.count, default=BASE)


def _cut(ordered: Sequence[Sequence[int]], rows: int) -> list[list[Sequence[int]]]:
    """Texts of rising length, in batches of so many rows at most."""
    batches: list[list[Sequence[int]]] = [[]]
    for text in ordered:
        full = len(batches[-1]) == rows or (len(batches[-1]) + 1) * len(text) > BATCH_TOKENS
        if batches[-1] and full:
            batches.append([])
        batches[-1].append(text)
    return batches


def padded(texts: Sequence[Sequence[int]], device: torch.device, step: int = 1) -> dict[str, torch.Tensor]:
    """Token ids as one batch, padded on the right to a multiple of `step` tokens, with their mask."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    ids = torch.nn.functional.pad(ids, (0, -ids.shape[1] % step))
    lengths = torch.tensor([len(text) for text in texts])
    mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}
