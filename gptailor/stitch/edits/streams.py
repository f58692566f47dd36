"""Teacher and student side by side, a layer at a time: what repairs learn from.

The student is the stitched model, the teacher a dense one. Both read the calibration texts once; their residual streams
are held for all texts, and each layer is called by itself, so that a repaired layer works on the already repaired ones
before it, and a whole repair costs about one pass of each model. What a layer is called with besides the stream (masks,
rotations) is taken from the model's own code, once for every kind of layer.

Memory: two streams, [texts, tokens, hidden], and what one layer's projection reads and writes, in the model's type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gptailor.errors import UserError
from gptailor.plan import LayerChoice, StitchPlan
from gptailor.stitch.edits.case import EditCase

States = list[torch.Tensor]
"""The residual stream of all batches, each [texts, tokens, hidden]."""
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with behind the stream."""

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


def wide(values: torch.Tensor) -> torch.Tensor:
    """In float64, on the host where the device has none (Apple's)."""
    return (values.cpu() if values.device.type == "mps" else values).double()


class Streams:
    """The residual streams of student and teacher, moved on by `enter` and `leave`."""

    def __init__(self, case: EditCase, teacher: str) -> None:
        """teacher: its name in the family. Raises UserError."""
        layers = [choice.layer for choice in case.plan.kept]
        if len(set(layers)) < len(layers):
            raise UserError(
                f"edits: {case.edit.method} repairs plans that keep each layer once, and this one repeats some"
            )
        self.case = case
        self.projections = case.family.projections_for(case.edit.method)
        self._name = teacher
        self._kinds = _kinds(case)
        self.student, self._calls, self._masks = _begin(case, self._kinds)
        self.teacher = self.student  # one and the same, until they part
        self._is_one = True
        self._at = 0
        self._held = _held(self._masks)
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
        return self.target_of(position) > self.layer_of(position) + 1

    def teach(self, until: int) -> None:
        """Move the teacher on, alone, until its stream enters this layer."""
        self._is_one = False
        self._teach(until)

    def _teach(self, until: int) -> None:
        while self._at < until:
            layer = self._taught(self._at)
            self.teacher = [self._run(layer, self._at, b, states) for b, states in enumerate(self.teacher)]
            self._at += 1

    def skip(self, position: int, layer: nn.Module) -> None:
        """Move the student through a kept layer that nothing is learnt for."""
        index = self.layer_of(position)
        if self._is_one and self._at == index and layer is self._taught(index):
            self._teach(index + 1)
            self.student = self.teacher
            return
        self._is_one = False
        self.student = [self._run(layer, index, b, states) for b, states in enumerate(self.student)]

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
        for states_of, mask in zip(states, self._masks, strict=True):
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
        whole = self._run(layer, index, 0, states)
        hook = projection.register_forward_hook(lambda _, _args, output: output + noise.to(output.device))
        try:
            apart = wide(self._run(layer, index, 0, states)) - wide(whole)
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
            with _reads(layer, name) as seen:
                after.append(self._run(layer, index, b, entering))
            read, wrote = (rows.to(entering.device) for rows in seen[0])
            mask = self._masks[b]
            reads.append(read[mask])
            writes.append(wrote[mask])
            is_mlp = name == self.projections[1]
            streams.append(after[-1][mask] if is_mlp else entering[mask] + self.factor * wrote[mask])
        return torch.cat(streams), torch.cat(reads), torch.cat(writes), after

    def rows(self, states: States) -> torch.Tensor:
        """Real tokens of all batches, [n, hidden]."""
        return torch.cat([one[mask] for one, mask in zip(states, self._masks, strict=True)])

    def _run(self, layer: nn.Module, index: int, batch: int, states: torch.Tensor) -> torch.Tensor:
        """The layer, standing for the base's layer `index`, on one batch."""
        self.case.between(f"{self.case.edit.method}: reading", self._at / self.case.family.n_layers)
        args, kwargs = self._calls[batch][self._kinds[index]]
        left = layer(states, *args, **kwargs)
        return (left if isinstance(left, torch.Tensor) else left[0]).to(states.device)


class _reads:  # a context manager, used as a function
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


def _begin(case: EditCase, kinds: Sequence[int]) -> tuple[States, list[dict[int, Call]], list[torch.Tensor]]:
    """What enters the first layer, how each kind of layer is called, and the real tokens, by batch.

    A model of one layer of each kind is run for it.
    """
    firsts = sorted(set(kinds))
    plan = StitchPlan(case.family.n_layers, tuple(map(LayerChoice, firsts)))
    model: Any = case.stitcher.stitch(plan)
    decoder = model.get_decoder()
    states, calls, masks = [], [], []
    for batch in case.batches():
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
