"""Texts as batches, as many as a number of tokens takes: the same in every process, and after a kill."""

from __future__ import annotations

import random
from collections.abc import Sequence

BATCH_TOKENS = 2048
"""Tokens of a step and device, padding among them, unless one text has more."""
WINDOW = 16 * BATCH_TOKENS
"""Tokens of texts that are put in order of their lengths at a time, so that little of a batch is padding."""

Batch = list[list[int]]


def batches_of(texts: Sequence[Sequence[int]], n_tokens: int, seed: int) -> list[Batch]:
    """Batches of at least n_tokens tokens together, at most one batch more; each pass over the texts in new order."""
    rng = random.Random(seed)
    found: list[Batch] = []
    left = n_tokens
    while left > 0:
        order = [list(text) for text in texts if len(text) > 1]
        rng.shuffle(order)
        one_pass = [batch for window in _windows(order) for batch in _cut(window)]
        rng.shuffle(one_pass)
        for batch in one_pass:
            if left <= 0:
                break
            found.append(batch)
            left -= sum(map(len, batch))
    return found


def _windows(texts: Sequence[list[int]]) -> list[Batch]:
    windows: list[Batch] = [[]]
    n_tokens = 0
    for text in texts:
        if n_tokens >= WINDOW:
            windows.append([])
            n_tokens = 0
        windows[-1].append(text)
        n_tokens += len(text)
    return windows


def _cut(window: Sequence[list[int]]) -> list[Batch]:
    batches: list[Batch] = [[]]
    for text in sorted(window, key=len):
        if batches[-1] and (len(batches[-1]) + 1) * len(text) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(text)
    return batches
