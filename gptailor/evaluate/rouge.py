"""ROUGE as a metric that any task file can name: data, not code.

lm-eval's own tasks with ROUGE bring a Python function each, which a task file outside its package may not. So the
metrics `rouge1`, `rouge2` and `rougeL` are put into lm-eval's registry: F-measures in [0, 1] without stemming, by the
rouge-score package that lm-eval depends on (the same numbers as Hugging Face's `evaluate`, by which OpenCompass
reports). They see Latin letters and digits only, so they say nothing about Chinese texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

KINDS = ("rouge1", "rouge2", "rougeL")


@cache
def register() -> None:
    """Make the metrics known to lm-eval."""
    from lm_eval.api.registry import register_metric

    for kind in KINDS:
        register_metric(metric=kind, higher_is_better=True, output_type="generate_until", aggregation="mean")(_of(kind))


def _of(kind: str) -> Callable[..., float]:
    def rouge(references: Sequence[str], predictions: Sequence[str]) -> float:
        return float(_scorer(kind).score(references[0], predictions[0])[kind].fmeasure)

    return rouge


@cache
def _scorer(kind: str) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk, which takes a while to import

    return RougeScorer([kind], use_stemmer=False)
