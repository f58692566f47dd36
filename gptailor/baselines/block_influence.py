"""Block Influence (ShortGPT, Men et al., arXiv 2403.03853, section 3): drop the layers that change their input least.

BI_i = 1 - mean over tokens of cos(h_i, h_{i+1}), with h_i the residual stream that enters layer i. The published code
takes the last state from transformers' hidden_states, which is past the final norm and distorts the last layer's
score; here every layer is watched by hooks of its own.

Published order of removal, 7B: 27 26 25 28 24 29 23 21 22. Cost: one forward pass over the calibration texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel

from gptailor.baselines.case import Batch, Case, watch_layers
from gptailor.errors import UserError
from gptailor.family.structure import layer_list
from gptailor.plan import BASE, StitchPlan


class Influence:
    """The BI of each of a model's layers, from what `watch_layers` shows of it."""

    def __init__(self, n_layers: int) -> None:
        self._totals, self._n_tokens = [0.0] * n_layers, 0

    def see(self, index: int, h: torch.Tensor, h_next: torch.Tensor, mask: torch.Tensor) -> None:
        cosine = torch.cosine_similarity(h.float(), h_next.float(), dim=-1)  # [batch, tokens]
        self._totals[index] += float(cosine[mask].double().sum())
        self._n_tokens += int(mask.sum()) if index == 0 else 0

    def scores(self) -> list[float]:
        """Raises UserError where it has none."""
        if not self._n_tokens:
            raise UserError("Block Influence needs text: the batches hold no tokens")
        scores = [1.0 - total / self._n_tokens for total in self._totals]
        broken = [index for index, score in enumerate(scores) if not math.isfinite(score)]
        if broken:
            raise UserError(f"Block Influence: layer {broken[0]} gives hidden states that are not finite")
        return scores


def block_influence(model: PreTrainedModel, token_batches: Iterable[torch.Tensor | Batch]) -> list[float]:
    """The BI of each of the model's layers, from one pass over the batches. Raises UserError where it has none.

    token_batches: token ids [batch, tokens], or mappings with input_ids and attention_mask; padding does not count.
    """
    influence = Influence(len(layer_list(model)))
    watch_layers(model, (_masked(batch, model.device) for batch in token_batches), influence.see)
    return influence.scores()


def cut(case: Case) -> StitchPlan:
    """The model less its least influential layers."""
    case.passes += 1
    order = removal_order(block_influence(case.model(), case.batches))
    return case.plan([layer for layer in order if layer in case.free][: case.n_removed])


def removal_order(scores: Sequence[float]) -> list[int]:
    """Layers from the least to the most influential; of equal ones the deeper first."""
    return sorted(range(len(scores)), key=lambda index: (scores[index], -index))


def plan(n_layers: int, scores: Sequence[float], n_removed: int, source: str = BASE) -> StitchPlan:
    """The base (or one candidate) without its `n_removed` least influential layers. Raises UserError."""
    if len(scores) != n_layers:
        raise UserError(f"Block Influence has {len(scores)} scores for {n_layers} layers")
    if not 0 <= n_removed < n_layers:
        raise UserError(f"cannot remove {n_removed} of {n_layers} layers; at least one must stay")
    return StitchPlan.without(removal_order(scores)[:n_removed], n_layers, source)


def _masked(batch: torch.Tensor | Batch, device: torch.device) -> dict[str, torch.Tensor]:
    ids = batch if isinstance(batch, torch.Tensor) else batch["input_ids"]
    mask = None if isinstance(batch, torch.Tensor) else batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
