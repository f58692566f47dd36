"""What a baseline is given: one model to be shortened, the calibration texts, and a way to score plans.

Every method sees the same: the base or one candidate, texts from the objectives' own examples, and the objectives'
scores where it asks for them. Its cost is counted while it works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from gptailor.errors import UserError
from gptailor.plan import StitchPlan
from gptailor.stitch import Stitcher

Batch = Mapping[str, torch.Tensor]
"""input_ids and attention_mask, [texts, tokens], padded on the right."""


@dataclass
class Case:
    """source: "base" or the candidate that every kept layer comes from; embeddings, final norm and head are the base's.

    merit: mean retention of a plan over the objectives on the first n examples of each (more is better). rungs: the
    run's budgets. allowed: examples per benchmark that the run's search may score. passes: over the calibration texts
    so far, forward or the like; examples: scored so far, per benchmark. between: called before each model is looked at
    or scored; it may raise, to stop.
    """

    stitcher: Stitcher
    source: str
    n_removed: int
    batches: Sequence[Batch]
    merit: Callable[[StitchPlan, int], float]
    rungs: tuple[int, ...] = (1,)
    allowed: int = 0
    seed: int = 0
    between: Callable[[], None] = lambda: None
    passes: float = 0.0
    examples: int = 0
    _scored: dict[str, dict[int, float]] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        return self.stitcher.family.n_layers

    def plan(self, removed: Iterable[int] = ()) -> StitchPlan:
        """The model less some layers."""
        return StitchPlan.without(set(removed), self.n_layers, self.source)

    def model(self, removed: Iterable[int] = ()) -> PreTrainedModel:
        """The same, live: the family's own model, until the next one is asked for."""
        self.between()
        return self.stitcher.stitch(self.plan(removed))

    def loss(self, removed: Iterable[int] = ()) -> float:
        """Mean negative log-likelihood of the calibration texts' tokens; infinite where the model gives no numbers."""
        self.passes += 1
        return mean_loss(self.model(removed), self.batches)

    def score(self, removed: Iterable[int], n: int) -> float:
        """The merit of the model less some layers on the first n examples of each objective."""
        plan = self.plan(removed)
        known = self._scored.setdefault(plan.hash, {})
        if n not in known:
            self.between()
            self.examples += max(n - max(known, default=0), 0)
            known[n] = self.merit(plan, n)
        return known[n]


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Mean negative log-likelihood per predicted token, in nats. Infinite for NaN. Raises UserError without text."""
    total, count = 0.0, 0
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits
        for row, tokens, real in zip(logits, ids, mask, strict=True):  # float32 logits of one text at a time
            n = int(real.sum()) - 1
            if n > 0:
                total += float(torch.nn.functional.cross_entropy(row[:n].float(), tokens[1 : n + 1], reduction="sum"))
                count += n
    if not count:
        raise UserError("calibration: the objectives' examples hold no text of two tokens or more")
    return total / count if math.isfinite(total) else math.inf


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
            layer.register_forward_hook(lambda _, args, output, i=index: after(i, output)),
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
