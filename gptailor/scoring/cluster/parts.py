"""A trial in parts: what one lacks, cut for several workers, and put together again.

Cut between benchmarks and at rungs, where examples are never computed together (see Evaluator): so that a score does
not depend on who computed what.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from gptailor.scoring.item_cache import Gap


def cut(gaps: Sequence[Gap], n_parts: int, rungs: Iterable[int]) -> list[list[Gap]]:
    """What a trial lacks in up to `n_parts` parts of about the same size."""
    if n_parts == 1:
        return [list(gaps)]
    pieces: list[Gap] = []
    for gap in gaps:
        cuts = [gap.first, *(rung for rung in sorted(rungs) if gap.first < rung < gap.end), gap.end]
        pieces += [replace(gap, first=first, end=end) for first, end in itertools.pairwise(cuts)]
    readings: dict[Hashable, list[Gap]] = {}  # a benchmark's metrics stay together: one worker reads it once
    for piece in pieces:
        key = (piece.plan.hash, id(piece.benchmark.examples), piece.first, piece.end)
        readings.setdefault(key, []).append(piece)
    parts: list[list[Gap]] = [[] for _ in range(min(n_parts, len(readings)))]
    loads = [0] * len(parts)
    for same in sorted(readings.values(), key=lambda same: _size(same[0]), reverse=True):
        least = loads.index(min(loads))
        parts[least] += same
        loads[least] += _size(same[0])
    return parts


def _size(gap: Gap) -> int:
    """Tokens that are read, roughly."""
    examples = gap.benchmark.examples[gap.first : gap.end]
    return sum(len(window.tokens) for example in examples for window in example.windows) + len(examples)


def join(gaps: Sequence[Gap], answers: Iterable[tuple[Gap, list[Any]]]) -> list[tuple[Gap, list[Any]]]:
    """The answers to `gaps`, of the answers to their pieces."""
    found = {(piece.key, piece.first): items for piece, items in answers}
    joined = []
    for gap in gaps:
        whole: list[Any] = []
        while gap.first + len(whole) < gap.end:
            whole += found[gap.key, gap.first + len(whole)]
        joined.append((gap, whole))
    return joined
