"""Texts as batches, as many as a number of tokens takes: the same in every process, and after a kill.

A batch is as wide as a multiple of STEP tokens, and as high as its width allows: whatever the texts, a heal sees a few
shapes again and again. A CPU's products are planned anew for each shape that they have not seen, which costs more than
the product, and the plans are kept, so that batches of ever new shapes took twice the time and more memory at every
step (docs/heal.md).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch

from gptailor.stitch.edits.case import padded

BATCH_TOKENS = 1024
"""Tokens of a step and device, padding among them, unless one text has more."""
STEP = 8
"""A batch's width is a multiple of so many tokens."""

Batch = list[list[int]]


def batches_of(texts: Sequence[Sequence[int]], n_tokens: int, seed: int) -> list[Batch]:
    """Batches of at least n_tokens tokens together, at most one batch more; each pass over the texts in new order."""
    rng = random.Random(seed)
    found: list[Batch] = []
    left = n_tokens
    whole = max(map(len, texts)) // STEP * STEP or STEP  # no batch is wider than a text, which the model's window holds
    while left > 0:
        order = [list(text[:whole]) for text in texts if len(text) > 1]
        rng.shuffle(order)
        one_pass = _cut(order)
        rng.shuffle(one_pass)
        for batch in one_pass:
            if left <= 0:
                break
            found.append(batch)
            left -= sum(map(len, batch))
    return found


def inputs(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, [texts, width], padded on the right."""
    return padded(batch, device, STEP)


def _cut(texts: Sequence[list[int]]) -> list[Batch]:
    """Texts of one width together, as they come; what does not fill a batch joins the next width's."""
    found: list[Batch] = []
    waiting: Batch = []
    for text in sorted(texts, key=_width):
        if waiting and (len(waiting) + 1) * _width(text) > BATCH_TOKENS:
            found.append(waiting)
            waiting = []
        waiting.append(text)
    return [*found, waiting] if waiting else found


def _width(text: list[int]) -> int:
    return math.ceil(len(text) / STEP) * STEP
