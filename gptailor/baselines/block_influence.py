"""Block Influence (ShortGPT, Men et al., arXiv 2403.03853, section 3): drop the layers that change their input least.

BI_i = 1 - mean over tokens of cos(h_i, h_{i+1}), with h_i the residual stream that enters layer i. The published code
takes the last state from transformers' hidden_states, which is past the final norm and distorts the last layer's
score; here every layer is watched by hooks of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from gptailor.errors import UserError
from gptailor.family.structure import layer_list
from gptailor.plan import BASE, StitchPlan

Batch = torch.Tensor | Mapping[str, torch.Tensor]


@torch.inference_mode()
def block_influence(model: PreTrainedModel, token_batches: Iterable[Batch]) -> list[float]:
    """The BI of each of the model's layers, from one pass over the batches. Raises UserError where it has none.

    token_batches: token ids [batch, tokens], or mappings with input_ids and attention_mask; padding does not count.
    """
    layers = layer_list(model)
    totals = [0.0] * len(layers)
    n_tokens = 0
    entering: list[torch.Tensor | None] = [None] * len(layers)
    mask = torch.ones(0)

    def before(index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        entering[index] = args[0] if args else kwargs["hidden_states"]

    def after(index: int, output: Any) -> None:
        h, entering[index] = entering[index], None
        assert h is not None
        cosine = torch.cosine_similarity(h.float(), _states(output).float(), dim=-1)  # [batch, tokens]
        totals[index] += float(cosine[mask].double().sum())

    hooks = []
    for index, layer in enumerate(layers):
        hooks += [
            layer.register_forward_pre_hook(lambda _, args, kw, i=index: before(i, args, kw), with_kwargs=True),
            layer.register_forward_hook(lambda _, args, output, i=index: after(i, output)),
        ]
    try:
        for batch in token_batches:
            ids, attention = (batch, None) if isinstance(batch, torch.Tensor) else _fields(batch)
            mask = (torch.ones_like(ids) if attention is None else attention).bool().to(model.device)
            n_tokens += int(mask.sum())
            attention = None if attention is None else attention.to(model.device)
            model(input_ids=ids.to(model.device), attention_mask=attention, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    if not n_tokens:
        raise UserError("Block Influence needs text: the batches hold no tokens")
    scores = [1.0 - total / n_tokens for total in totals]
    broken = [index for index, score in enumerate(scores) if not math.isfinite(score)]
    if broken:
        raise UserError(f"Block Influence: layer {broken[0]} gives hidden states that are not finite")
    return scores


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


def _fields(batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    return batch["input_ids"], batch.get("attention_mask")


def _states(output: Any) -> torch.Tensor:
    """The residual stream that a layer gives, whether it comes alone or first in a tuple."""
    return output if isinstance(output, torch.Tensor) else output[0]
