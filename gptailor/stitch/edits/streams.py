"""Teacher and student side by side, a layer at a time: what repairs learn from.

The student is the stitched model, the teacher a dense one. Both read the calibration texts once (see walk.py), so that
a repaired layer works on the already repaired ones before it, and a whole repair costs about one pass of each model.

Memory: two streams, [texts, tokens, hidden], and what one layer's projection reads and writes, in the model's type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gptailor.errors import UserError
from gptailor.stitch.edits.case import EditCase
from gptailor.stitch.edits.walk import States, Walk, reading, wide

HELD_EVERY = 5
"""Of so many texts, one is kept out of a fit, to judge it by."""
ABOUT_ONE = 0.02
"""As far from 1 a residual factor may be measured in half precision."""


@dataclass(frozen=True)
class Site:
    """A kept layer's output projection at work. A row is one token of the texts, padding left out.

    read: what enters the projection, [n, inner]. wrote: what it gives, [n, hidden]. missing: what would have to be
    added to that for the stream to be the teacher's, [n, hidden]. wanted: the teacher's stream, [n, hidden]. held: rows
    of texts that are kept out of a fit, [n]. factor: what the projection's output is multiplied by in the stream.
    """

    read: torch.Tensor
    wrote: torch.Tensor
    missing: torch.Tensor
    wanted: torch.Tensor
    held: torch.Tensor
    factor: float

    @property
    def weights(self) -> torch.Tensor:
        """One over the norm of the teacher's stream, [n], float64.

        A few tokens (attention sinks) have norms a thousand times those of others, and would rule the fit alone; what
        the next layer reads is normalised anyway.
        """
        return 1.0 / wide(self.wanted).norm(dim=-1).clamp(min=1e-6)


class Streams(Walk):
    """The residual streams of student and teacher, moved on by `enter` and `leave`."""

    def __init__(self, case: EditCase, teacher: str) -> None:
        """teacher: its name in the family. Raises UserError."""
        self.projections = case.family.projections_for(case.edit.method)
        super().__init__(case)
        self._name = teacher
        self.teacher = self.student = self.begin()  # one and the same, until they part
        self._is_one = True
        self._at = 0
        self._held = _held(self.masks)
        self.factor = 1.0
        self._is_measured = False

    def _taught(self, index: int) -> nn.Module:
        """One of the teacher's layers; where a device has no room for them all, they come one after another."""
        return self.case.family.layer(index, self._name)

    def layer_of(self, position: int) -> int:
        return self.case.plan.kept[position].layer

    def target_of(self, position: int) -> int:
        """The layer whose input the kept layer at this position should give; the number of layers for the last."""
        kept = self.case.plan.kept
        return kept[position + 1].layer if position + 1 < len(kept) else self.case.family.n_layers

    def is_before_a_gap(self, position: int) -> bool:
        return position in self.case.plan.before_gaps

    def teach(self, until: int) -> None:
        """Move the teacher on, alone, until its stream enters this layer."""
        self._is_one = False
        self._teach(until)

    def _teach(self, until: int) -> None:
        while self._at < until:
            layer = self._taught(self._at)
            self.teacher = [self.run(layer, self._at, b, states) for b, states in enumerate(self.teacher)]
            self._at += 1

    def skip(self, position: int, layer: nn.Module) -> None:
        """Move the student through a kept layer that nothing is learnt for."""
        index = self.layer_of(position)
        if self._is_one and self._at == index and layer is self._taught(index):
            self._teach(index + 1)
            self.student = self.teacher
            return
        self._is_one = False
        self.student = [self.run(layer, index, b, states) for b, states in enumerate(self.student)]

    def watch(self, position: int, layer: nn.Module, name: str) -> tuple[Site, States]:
        """The kept layer's projection `name` at work on the student's stream, and the stream behind the layer.

        The student stays before the layer until `leave` is called with it.
        """
        index = self.layer_of(position)
        if name == self.projections[0]:
            self.teach(index)
            wanted = self._behind(self._taught(index), index, name, self.teacher)[0]
        else:
            self.teach(self.target_of(position))
            wanted = self.rows(self.teacher)
        stream, read, wrote, after = self._behind(layer, index, name, self.student)
        missing = (wanted - stream) / self.factor
        if not bool(torch.isfinite(missing).all()):
            raise UserError(f"{self.case.edit.method}: layer {index} gives hidden states that are not finite")
        return Site(read, wrote, missing, wanted, self._held, self.factor), after

    def leave(self, states: States) -> None:
        """The student's stream is this one now."""
        self.student = states

    def corrected(self, states: States, layer: nn.Module, name: str, site: Site) -> States:
        """The stream behind a layer whose MLP projection writes something else now."""
        projection = layer.get_submodule(name)
        wrote = projection(site.read.to(next(projection.parameters()).device)).to(site.wrote.device)
        change = (wrote - site.wrote) * self.factor
        changed = []
        for states_of, mask in zip(states, self.masks, strict=True):
            n = int(mask.sum())
            moved = states_of.clone()
            moved[mask] += change[:n].to(moved)
            changed.append(moved)
            change = change[n:]
        return changed

    def measure_factor(self, position: int, layer: nn.Module) -> None:
        """What the MLP's output is multiplied by before it is added to the stream: nearly always 1.

        Tried with noise that is added to it. Raises UserError where it is not added as it is.
        """
        if self._is_measured:
            return
        self._is_measured = True
        index, states = self.layer_of(position), self.student[0]
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(states.shape, generator=generator).to(states) * states.std()
        projection = layer.get_submodule(self.projections[1])
        whole = self.run(layer, index, 0, states)
        hook = projection.register_forward_hook(
            lambda _, _args, output: output + noise.to(output.device).view(output.shape)
        )
        try:
            apart = wide(self.run(layer, index, 0, states)) - wide(whole)
        finally:
            hook.remove()
        added = wide(noise)
        factor = float((apart * added).sum() / added.square().sum())
        if not float((apart - factor * added).norm()) < 0.1 * float(apart.norm()):
            name = type(self.case.family.model).__name__
            raise UserError(f"{self.case.edit.method}: {name} does not add its MLP's output to the stream as it is")
        self.factor = 1.0 if abs(factor - 1) < ABOUT_ONE else factor

    def _behind(
        self, layer: nn.Module, index: int, name: str, states: States
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, States]:
        """Rows of: the stream behind the projection, what it read, what it wrote; and the stream behind the layer."""
        after, reads, writes, streams = [], [], [], []
        for b, entering in enumerate(states):
            with reading(layer, name) as seen:
                after.append(self.run(layer, index, b, entering))
            mask = self.masks[b]
            # OPT's MLP sees all texts' tokens as one row of them
            read, wrote = (rows.to(entering.device).reshape(*mask.shape, -1) for rows in seen[0])
            reads.append(read[mask])
            writes.append(wrote[mask])
            is_mlp = name == self.projections[1]
            streams.append(after[-1][mask] if is_mlp else entering[mask] + self.factor * wrote[mask])
        return torch.cat(streams), torch.cat(reads), torch.cat(writes), after

    def run(self, layer: Callable[..., Any], index: int, batch: int, states: torch.Tensor) -> torch.Tensor:
        self.case.between(f"{self.case.edit.method}: reading", self._at / self.case.family.n_layers)
        return super().run(layer, index, batch, states)


def _held(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of every HELD_EVERY-th text, [n]; of fewer texts, the last tokens of them all."""
    texts = [text for mask in masks for text in mask]
    if len(texts) >= HELD_EVERY:
        marks = [text[text] & (number % HELD_EVERY == HELD_EVERY - 1) for number, text in enumerate(texts)]
    else:
        marks = [
            torch.arange(int(t.sum()), device=t.device) >= int(t.sum()) * (HELD_EVERY - 1) // HELD_EVERY for t in texts
        ]
    return torch.cat(marks)
