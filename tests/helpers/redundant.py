"""What was measured of a family's redundancy, written by hand: models that keep known shares without each layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gptailor.results.redundancy import Agreement, ModelFound, Redundancy, Scored, Without


def model_of(kept_shares: list[float], dense: float = 0.75, error: float = 0.01, **changes: Any) -> ModelFound:
    """A model that keeps these shares above guessing (0.25), without each layer."""
    n = len(kept_shares)
    square = [[1.0] * (n + 1) for _ in range(n + 1)]
    without: list[Without | None] = [Without(0.25 + share * (dense - 0.25), 0.005) for share in kept_shares]
    scored = Scored("choice_prob", True, 0.25, dense, 0.02, error, without)
    return replace(ModelFound([0.1] * n, square, square, square, {"words/acc": scored}), **changes)


def family_of(base: ModelFound, candidate: ModelFound, cosine: float = 0.0) -> Redundancy:
    """base; candidate `a`, and `b`, which is as good as the base; their differences at this cosine everywhere."""
    far = [0.02] * len(base.influence)
    models = {"base": base, "a": replace(candidate, distance=far), "b": replace(base, distance=far)}
    agreement = [Agreement("a", "b", [cosine] * len(far))]
    return Redundancy(models, agreement, {}, "", 64, 900, 900, 30, 1.0, "2026-11-01T08:00:00+00:00")
