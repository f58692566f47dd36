"""Every way in which lm-eval joins answers to a score: the same score, a test of its own, averages of shares alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gptailor.evaluate import resampling
from gptailor.evaluate.resampling import MEAN, aggregation_name, resampled
from gptailor.evaluate.scoring import aggregation_of, score_of
from gptailor.results import statistics
from gptailor.spec.sections import Benchmark
from gptailor.store.queries import Answers
from gptailor.trial import ItemKey, Subject, is_share

pytest.importorskip("torch")

N = 120
A, B = Subject.config(1), Subject.config(2)
REFERENCE = ["the", "cat", "sat", "on", "a", "mat", "and", "one", "plus", "two", "is", "three"]


def registered() -> dict[str, Any]:
    import lm_eval.api.metrics  # noqa: F401 (which registers them)
    from lm_eval.api.registry import aggregation_registry

    return {name: aggregation_registry[name] for name in list(aggregation_registry)}


def shares(rng: np.random.Generator, skill: float) -> list[Any]:
    return [float(right) for right in rng.random(N) < skill]


def labels(rng: np.random.Generator, skill: float) -> list[Any]:
    gold = np.arange(N) % 2
    return [[int(g), int(g if right else 1 - g)] for g, right in zip(gold, rng.random(N) < skill, strict=True)]


def texts(rng: np.random.Generator, skill: float) -> list[Any]:
    said = [[word if rng.random() < skill else "dog" for word in REFERENCE] for _ in range(N)]
    return [[" ".join(REFERENCE), " ".join(words)] for words in said]


def log_likelihoods(rng: np.random.Generator, skill: float) -> list[Any]:
    return (-2.0 + skill + 0.1 * rng.standard_normal(N)).tolist()


def weighted(rng: np.random.Generator, skill: float) -> list[Any]:
    lengths = rng.integers(3, 9, N).tolist()
    return [[value * n, n] for value, n in zip(log_likelihoods(rng, skill), lengths, strict=True)]


def probabilities(_rng: np.random.Generator, skill: float) -> list[Any]:
    return [[place % 2, [skill, 1 - skill] if place % 2 == 0 else [1 - skill, skill]] for place in range(N)]


MADE = {
    "mean": shares,
    "nanmean": shares,
    "median": log_likelihoods,
    "perplexity": log_likelihoods,
    "weighted_perplexity": weighted,
    "bits_per_byte": weighted,
    "f1": labels,
    "matthews_corrcoef": labels,
    "bleu": texts,
    "chrf": texts,
    "chrf++": texts,
    "ter": texts,
    "brier_score": probabilities,
}
LOWER = ("perplexity", "weighted_perplexity", "bits_per_byte", "ter", "brier_score")
NOT_A_SCORE = ("bypass",)
"""Always 999."""


@dataclass
class Joined:
    """What scoring needs of a benchmark: tasks of one aggregation, their examples in turn."""

    function: Any
    higher_is_better: bool
    sizes: tuple[int, ...] = (N,)
    weight_by_size: bool = True
    metric: str = "m"
    spec: Benchmark = field(default_factory=lambda: Benchmark(benchmark="x", metric="m"))

    def __post_init__(self) -> None:
        self.name = "x/m"
        self.tasks = [SimpleNamespace(aggregation=lambda: {"m": self.function}) for _ in self.sizes]
        owners = [task for task, size in enumerate(self.sizes) for _ in range(size)]
        self.examples = [SimpleNamespace(task=task) for task in owners]


def compared(benchmark: Any, one: list[Any], other: list[Any]) -> Any:
    """The row of the paired test of `one` against `other`."""
    given: dict[ItemKey, list[Any]] = {}
    resamples: dict[tuple[str, str, str, str, int], tuple[float, ...]] = {}
    rows = []
    for subject, items in ((str(A), one), (str(B), other)):
        score = score_of(benchmark, items)
        name = aggregation_name(benchmark)
        rows.append((subject, subject, "x", "m", "test", len(items), score.score, benchmark.higher_is_better, name))
        given[ItemKey(subject, "x", "m", "test")] = items
        if (drawn := resampled(benchmark, items)) is not None:
            resamples[subject, "x", "m", "test", len(items)] = drawn
    columns = ["subject", "plan_hash", "benchmark", "metric", "split", "n", "score", "higher", "aggregation"]
    frame = pd.DataFrame(rows, columns=columns).assign(share=False)
    (row,) = statistics.paired(frame, Answers(given, resamples), A, B).itertuples()
    return row


def test_all_of_them_are_here() -> None:
    assert set(registered()) == {*MADE, *NOT_A_SCORE}, "lm-eval has another way to join answers; say what it is"


@pytest.mark.parametrize("name", MADE)
def test_each_is_tested_in_its_own_unit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "SLOW_DRAWS", 40)
    benchmark: Any = Joined(registered()[name], name not in LOWER)
    better, worse = (MADE[name](np.random.default_rng(1), skill) for skill in (0.95, 0.7))
    scores = [score_of(benchmark, items).score for items in (better, worse)]
    assert scores[0] == pytest.approx(float(registered()[name](better)))
    ahead = compared(benchmark, better, worse)
    assert ahead.difference == pytest.approx(abs(scores[0] - scores[1])) and ahead.p < 0.05, "the better one is ahead"
    assert 0 < ahead.low <= ahead.difference <= ahead.high
    behind = compared(benchmark, worse, better)
    assert behind.difference == pytest.approx(-ahead.difference) and behind.high < 0
    same = compared(benchmark, worse, worse)
    assert (same.difference, same.p) == (0, 1)
    assert (ahead.test == "McNemar") == (name == "mean")
    assert is_share("m", benchmark.higher_is_better, aggregation_name(benchmark)) == (name in ("mean", "nanmean"))


def test_a_group_whose_tasks_count_alike() -> None:
    """A plan that is better on the small task and worse on the large one is ahead where they count alike."""
    from lm_eval.api.metrics import mean

    sizes = (20, 100)
    one, other = [1.0] * 20 + [0.0] * 30 + [1.0] * 70, [0.0] * 20 + [1.0] * 100
    groups: list[Any] = [Joined(mean, True, sizes, weight) for weight in (False, True)]
    alike, by_size = groups
    assert aggregation_name(alike) == "mean by task" and aggregation_name(by_size) == MEAN
    ahead, behind = compared(alike, one, other), compared(by_size, one, other)
    assert ahead.difference == pytest.approx((1.0 - 0.3) / 2) and ahead.low > 0
    assert behind.difference == pytest.approx((20 - 30) / 120) and behind.test == "McNemar"
    assert is_share("acc", True, "mean by task")


def test_examples_that_a_task_leaves_out() -> None:
    benchmark: Any = Joined(registered()["nanmean"], True, (6,))
    items = [1.0, None, 0.0, 1.0, None, 1.0]
    assert score_of(benchmark, items).score == 0.75
    assert np.std(resampled(benchmark, items) or ()) > 0


def test_a_last_word(tiny_family: Path, tmp_path: Path) -> None:
    """lambada's form, with a model: the lower perplexity is ahead."""
    from helpers.evaluate_tools import evaluator, opened, rows, write_task
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/validation.jsonl}}}}
output_type: loglikelihood
validation_split: validation
doc_to_text: query
doc_to_target: " {{{{choices[gold]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
"""
    write_task(tmp_path, "x", text, validation=rows(3, 30))
    tokenizer = AutoTokenizer.from_pretrained(tiny_family / "base")
    (benchmark,) = opened(tmp_path, tokenizer, Benchmark(benchmark="x", metric="perplexity"))
    assert aggregation_name(benchmark) == "perplexity" and aggregation_of(benchmark, 0)([0.0]) == 1.0
    engine, items = evaluator([benchmark], tokenizer), []
    for name in ("base", "math"):
        model = AutoModelForCausalLM.from_pretrained(tiny_family / name).eval()
        items.append(engine.items(model, benchmark, 0, 30))
    scores = [score_of(benchmark, own).score for own in items]
    benchmark_row = compared(Joined(aggregation_of(benchmark, 0), False, (30,)), *items)
    assert benchmark_row.difference == pytest.approx(scores[1] - scores[0]), "positive where the first one's is lower"
