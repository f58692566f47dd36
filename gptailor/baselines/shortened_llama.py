"""Shortened LLaMA (Kim et al., arXiv 2402.02834, section 3): a score for each layer, taken once.

Perplexity: of the calibration texts without the layer. Cost: about n_layers / 2 forward passes.
Taylor: sum over the layer's weights of |w * dL/dw|, the loss summed over the texts; what is least is removed. Its "+"
form keeps the first four and the last two layers, as the paper found necessary; so does this one, as far as
enough others are left. Cost: one forward and backward pass (counted as three), and memory for the layers' gradients.

Neither retrains, as everything here.
"""

from __future__ import annotations

import torch

from gptailor.baselines.case import Case, lowest
from gptailor.family.structure import layer_list
from gptailor.plan import StitchPlan
from gptailor.stitch.edits.gradients import trainable

FIRST, LAST = 4, 2


def perplexity_cut(case: Case) -> StitchPlan:
    """The model less the layers that the texts miss least, one by one."""
    losses = case.losses(case.free)
    return case.plan(lowest(losses, case.n_removed, "Shortened LLaMA, perplexity"))


def taylor_cut(case: Case) -> StitchPlan:
    """The model less the layers of the least first-order importance."""
    scores = taylor_scores(case)
    inner = [layer for layer in case.free if FIRST <= layer < case.n_layers - LAST]
    usable = inner if len(inner) >= case.n_removed else case.free
    return case.plan(lowest({layer: scores[layer] for layer in usable}, case.n_removed, "Shortened LLaMA, Taylor"))


def taylor_scores(case: Case) -> dict[int, float]:
    """Layer -> sum of |w * dL/dw| over its weights."""
    case.passes += 3
    model = case.model()
    layers = list(layer_list(model))
    parameters = [[p for p in layer.parameters() if p.is_floating_point()] for layer in layers]
    with trainable([p for own in parameters for p in own]), torch.enable_grad():
        for batch in case.batches:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
            predicted = logits[:, :-1].float().flatten(0, 1)
            torch.nn.functional.cross_entropy(predicted, targets.flatten(), reduction="sum").backward()
        return {
            index: sum(float((p.detach().float() * p.grad.float()).abs().sum()) for p in own if p.grad is not None)
            for index, own in enumerate(parameters)
        }
