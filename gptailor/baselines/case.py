"""What a baseline is given: one model to be shortened, the calibration texts, and a way to score plans.

Every method sees the same: the base or one candidate, texts from the objectives' own examples, and the objectives'
scores where it asks for them. Its cost is counted while it works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from gptailor.errors import UserError
from gptailor.evaluate.scoring import NonFinite
from gptailor.plan import StitchPlan, Texts
from gptailor.stitch.stitcher import Stitcher

Batch = Mapping[str, torch.Tensor]
"""input_ids and attention_mask, [texts, tokens], padded on the right."""


def no_texts(_n_tokens: int) -> Texts:
    """Where nobody said which texts are read."""
    raise RuntimeError("this method edits weights, and no texts are named for it here")


@dataclass
class Case:
    """source: "base" or the candidate that every kept layer comes from; embeddings, final norm and head are the base's.

    fitness: mean retention of a plan over the objectives on the first n examples of each (more is better). rungs: the
    run's budgets. allowed: examples per benchmark that the run's search may score. passes: over the calibration texts
    so far, forward or the like; examples: scored so far, per benchmark. between: called before each model is looked at
    or scored; it may raise, to stop. texts: names so many tokens of what methods that edit weights read.
    """

    stitcher: Stitcher
    source: str
    n_removed: int
    batches: Sequence[Batch]
    fitness: Callable[[StitchPlan, int], float]
    rungs: tuple[int, ...] = (1,)
    allowed: int = 0
    seed: int = 0
    between: Callable[[], None] = lambda: None
    texts: Callable[[int], Texts] = no_texts
    passes: float = 0.0
    examples: int = 0
    _scored: dict[str, dict[int, float]] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        return self.stitcher.family.n_layers

    @property
    def free(self) -> list[int]:
        """Layers that may be removed, ascending."""
        return [layer for layer in range(self.n_layers) if layer not in self.stitcher.family.renumbering.fixed]

    def plan(self, removed: Iterable[int] = ()) -> StitchPlan:
        """The model less some layers."""
        return StitchPlan.without(set(removed), self.n_layers, self.source)

    def model(self, removed: Iterable[int] = ()) -> PreTrainedModel:
        """The same, live: the family's own model, until the next one is asked for."""
        self.between()
        return self.stitcher.stitch(self.plan(removed))

    def losses(self, tried: Collection[int], removed: Collection[int] = ()) -> dict[int, float]:
        """Mean negative log-likelihood of the texts' tokens without `removed` and each tried layer in turn.

        In nats; infinite where the model gives no numbers.

        The layers before a tried one do the same work whatever is tried: they run once a batch, and what enters each
        tried layer, a batch's residual stream a layer, enters the one behind it instead.
        """
        if len(self.free) < self.n_layers:
            return self._losses_one_by_one(tried, removed)
        kept = [layer for layer in range(self.n_layers) if layer not in removed]
        sums = {layer: LossSum() for layer in tried}
        for batch in self.batches:
            entering = dict(zip(kept, _entering(self.model(removed), batch), strict=True))
            self.passes += 1 / len(self.batches)
            for layer, total in sums.items():
                behind = [other for other in kept if other > layer]
                gone = set(range(self.n_layers)) - set(behind) if behind else {*removed, layer}
                model = self.model(gone)
                with _fed(model, entering[layer]) if behind else nullcontext():
                    total.add(model, batch)
                self.passes += (len(behind) or len(kept) - 1) / (len(kept) - 1) / len(self.batches)
        return {layer: total.mean() for layer, total in sums.items()}

    def _losses_one_by_one(self, tried: Collection[int], removed: Collection[int]) -> dict[int, float]:
        """The same from whole models, where some layers cannot be left out even for a moment."""
        sums = {layer: LossSum() for layer in tried}
        for layer, total in sums.items():
            model = self.model({*removed, layer})
            for batch in self.batches:
                total.add(model, batch)
            self.passes += 1
        return {layer: total.mean() for layer, total in sums.items()}

    def score(self, removed: Iterable[int], n: int) -> float:
        """The fitness of the model less some layers on the first n examples of each objective.

        -infinity where the model gives no numbers.
        """
        plan = self.plan(removed)
        known = self._scored.setdefault(plan.hash, {})
        if n not in known:
            self.between()
            self.examples += max(n - max(known, default=0), 0)
            try:
                known[n] = self.fitness(plan, n)
            except NonFinite:
                known[n] = -math.inf
        return known[n]

    def best_block(self, costs: Mapping[int, float], what: str) -> StitchPlan:
        """The model less the n_removed layers in a row that cost least. costs: by the first layer of each block.

        Blocks with a layer that must stay do not count. Raises UserError where none is left.
        """
        blocks = {start: range(start, start + self.n_removed) for start in costs}
        may_go = {start: cost for start, cost in costs.items() if set(blocks[start]) <= set(self.free)}
        if not may_go:
            raise UserError(f"{what}: every block of {self.n_removed} layers has one that this model cannot do without")
        (start,) = lowest(may_go, 1, what)
        return self.plan(blocks[start])


class LossSum:
    """The negative log-likelihood of the tokens that a model is to predict, batch by batch."""

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    @torch.inference_mode()
    def add(self, model: PreTrainedModel, batch: Batch) -> None:
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits
        for row, tokens, real in zip(logits, ids, mask, strict=True):  # float32 logits of one text at a time
            n = int(real.sum()) - 1
            if n > 0:
                nats = torch.nn.functional.cross_entropy(row[:n].float(), tokens[1 : n + 1], reduction="sum")
                self._total += float(nats)
                self._count += n

    def mean(self) -> float:
        """Per token, in nats. Infinite for NaN. Raises UserError without text."""
        if not self._count:
            raise UserError("calibration: the objectives' examples hold no text of two tokens or more")
        return self._total / self._count if math.isfinite(self._total) else math.inf


def _entering(model: PreTrainedModel, batch: Batch) -> list[torch.Tensor]:
    """The residual stream that enters each layer, each [texts, tokens, hidden]."""
    states: list[torch.Tensor] = []
    watch_layers(model, [batch], lambda _, h, *_others: states.append(h))
    return states


@contextmanager
def _fed(model: PreTrainedModel, h: torch.Tensor) -> Iterator[None]:
    """Let `h`, [texts, tokens, hidden], enter the first layer instead of the embeddings."""
    from gptailor.family.structure import layer_list

    def feed(_: object, args: tuple[Any, ...], kw: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = args[0] if args else kw["hidden_states"]
        fed = h.to(given.device)
        return ((fed, *args[1:]), kw) if args else (args, kw | {"hidden_states": fed})

    hook = layer_list(model)[0].register_forward_pre_hook(feed, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def watch_layers(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    see: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None],
) -> None:
    """Run the model over the batches and show every layer's work: see(layer, h, h_next, mask).

    h and h_next: the residual stream [texts, tokens, hidden] that enters and leaves the layer, on the batch's device,
    wherever the layer lives; mask: the real tokens.
    transformers' own hidden_states would not do: the last of them is past the final norm.
    """
    from gptailor.family.structure import layer_list

    decoder: Any = model.get_decoder()  # nobody reads logits here
    entering: dict[int, torch.Tensor] = {}
    mask = torch.ones(0)

    def before(index: int, given: torch.Tensor) -> None:
        entering[index] = given

    def after(index: int, output: object) -> None:
        left = output if isinstance(output, torch.Tensor) else output[0]  # type: ignore[index]
        see(index, entering.pop(index).to(mask.device), left.to(mask.device), mask)

    hooks = []
    for index, layer in enumerate(layer_list(model)):
        hooks += [
            layer.register_forward_pre_hook(
                lambda _, args, kw, i=index: before(i, args[0] if args else kw["hidden_states"]), with_kwargs=True
            ),
            layer.register_forward_hook(lambda _, _args, output, i=index: after(i, output)),
        ]
    try:
        with torch.inference_mode():
            for batch in batches:
                mask = batch["attention_mask"].bool()
                decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def lowest(scores: Mapping[int, float], n: int, what: str) -> list[int]:
    """The n layers of the lowest scores, of equal ones the deeper first. Raises UserError where numbers are lacking."""
    usable = {layer: score for layer, score in scores.items() if math.isfinite(score)}
    if len(usable) < n:
        raise UserError(f"{what}: only {len(usable)} layers have a finite score, {n} are to be removed")
    return sorted(usable, key=lambda layer: (usable[layer], -layer))[:n]
