"""From a model's answers to scores: lm-eval's filters, process_results and aggregations, and our own standard errors.

An *item* is what process_results said of one example for the metric, as plain JSON, so that it can be stored and a
score be continued later from stored items and new ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gptailor.errors import UserError
from gptailor.evaluate.benchmarks import OpenBenchmark
from gptailor.evaluate.metrics import (
    ANSWER_PERPLEXITY,
    CHOICE_PROB,
    OUR_METRICS,
    RELATIVE,
    bytes_of,
    choice_prob,
    gold_options,
    levels,
)
from gptailor.evaluate.tasks import cause_of
from gptailor.trial import Score

if TYPE_CHECKING:
    from gptailor.evaluate.examples import Example

JACKKNIFE_GROUPS = 20


class NonFinite(FloatingPointError):
    """The model answered with infinities or NaN; such a trial has no score."""


def needs_greedy(benchmark: OpenBenchmark) -> bool:
    """Whether the metric asks if greedy decoding would have written an answer; finding out costs time."""
    return not all(
        task.OUTPUT_TYPE in ("multiple_choice", "loglikelihood_rolling")
        and not callable(task.get_config("process_results"))
        and benchmark.metric != "exact_match"
        for task in benchmark.tasks
    )


def item_of(benchmark: OpenBenchmark, example: Example, answers: Sequence[Any], precise: Sequence[float]) -> Any:
    """One example's item. `answers` in lm-eval's format, one per request; `precise`: log-likelihoods in float64.

    For a metric of RELATIVE: what `item_beside` asks for, a list of the options' log-likelihoods per byte.
    """
    if any(not math.isfinite(value) for value in precise):
        raise NonFinite(f"{benchmark.name}: the model's log-likelihoods are not finite")
    task = benchmark.tasks[example.task]
    if benchmark.metric == CHOICE_PROB:
        return choice_prob(task, example, precise)
    if benchmark.metric == ANSWER_PERPLEXITY:
        gold = gold_options(task, example)[0]
        return [float(precise[gold]), bytes_of(example)[gold]]
    if benchmark.metric in RELATIVE:
        return [float(value) for value in levels(task, example, precise)]
    instances = [
        replace(instance, resps=[answer] * instance.repeats, filtered_resps={})
        for instance, answer in zip(example.instances, answers, strict=True)
    ]
    chosen = benchmark.filters[example.task]
    next(ensemble for ensemble in task._filters if ensemble.name == chosen).apply(instances)
    metrics = task.process_results(example.doc, [instance.filtered_resps[chosen] for instance in instances])
    value = metrics.get(benchmark.metric)
    if isinstance(value, float) and math.isnan(value) and aggregation_of(benchmark, example.task).__name__ == "nanmean":
        return None  # not for this example, says the task
    return _plain(value)


TRIED = 200
"""Examples on which a metric is tried before a run begins."""


def try_metric(benchmark: OpenBenchmark) -> None:
    """Score made-up answers, so that a metric that cannot be computed is found before a model is opened.

    Raises UserError.
    """
    made: dict[str, Any] = {"loglikelihood": (-1.0, False), "loglikelihood_rolling": -1.0, "generate_until": "0"}
    items = []
    try:
        for example in benchmark.examples[:TRIED]:
            answers = [made[instance.request_type] for instance in example.instances]
            precise = [-1.0 - 0.1 * place for place, answer in enumerate(answers) if not isinstance(answer, str)]
            items.append(item_of(benchmark, example, answers, precise))
        if benchmark.metric not in RELATIVE:
            _aggregate(benchmark, items, [example.task for example in benchmark.examples[: len(items)]])
    except Exception as error:  # metrics are others' code, and whatever they raise says what does not suit them
        raise UserError(
            f"benchmark {benchmark.spec.benchmark}: its metric {benchmark.metric} cannot be computed: {cause_of(error)}"
        ) from error


def score_of(benchmark: OpenBenchmark, items: Sequence[Any], is_objective: bool = True) -> Score:
    """Aggregate the items of examples 0, 1, ... in nested order as lm-eval would. Raises NonFinite."""
    if not items:
        raise ValueError(f"{benchmark.name}: no items to score")
    owners = [example.task for example in benchmark.examples[: len(items)]]
    value = _aggregate(benchmark, items, owners)
    if not math.isfinite(value):
        raise NonFinite(f"{benchmark.name}: the score is {value}")
    return Score(
        benchmark=benchmark.spec.key,
        metric=benchmark.spec.metric,
        score=value,
        stderr=_stderr(benchmark, items, owners),
        n_samples=len(items),
        higher_is_better=benchmark.higher_is_better,
        is_objective=is_objective,
    )


def _aggregate(benchmark: OpenBenchmark, items: Sequence[Any], owners: Sequence[int]) -> float:
    """lm-eval's score of one task, or of a group: its tasks' scores weighted by their sizes or equally."""
    values, sizes = [], []
    for task in sorted(set(owners)):
        own = [item for item, owner in zip(items, owners, strict=True) if owner == task and item is not None]
        if own:
            values.append(float(aggregation_of(benchmark, task)(own)))
            sizes.append(len(own) if benchmark.weight_by_size else 1)
    if not values:
        return math.nan
    if len(values) == 1:
        return values[0]
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def aggregation_of(benchmark: OpenBenchmark, task: int) -> Callable[[Sequence[Any]], float]:
    """What joins a task's items to its score: lm-eval's function, or that of our own metric."""
    from lm_eval.api.metrics import mean, weighted_perplexity

    if benchmark.metric in OUR_METRICS:
        return weighted_perplexity if benchmark.metric == ANSWER_PERPLEXITY else mean
    return benchmark.tasks[task].aggregation()[benchmark.metric]


def _stderr(benchmark: OpenBenchmark, items: Sequence[Any], owners: Sequence[int]) -> float | None:
    """Sample deviation over sqrt(n) for means, a delete-a-group jackknife for everything else; None if unknown."""
    from lm_eval.api.metrics import mean

    present = [item for item in items if item is not None]
    if len(present) < 2:
        return None
    if benchmark.weight_by_size and all(aggregation_of(benchmark, task) is mean for task in set(owners)):
        return float(np.std(present, ddof=1) / math.sqrt(len(present)))
    n_groups = min(JACKKNIFE_GROUPS, len(items))
    left_out = []
    for group in range(n_groups):
        kept = [i for i in range(len(items)) if i % n_groups != group]
        left_out.append(_aggregate(benchmark, [items[i] for i in kept], [owners[i] for i in kept]))
    spread = np.asarray(left_out)
    if not np.isfinite(spread).all():
        return None
    return float(math.sqrt((n_groups - 1) / n_groups * np.square(spread - spread.mean()).sum()))


def _plain(value: Any) -> Any:
    """A metric's value as JSON has it. Raises NonFinite where a number is not finite."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise NonFinite(f"a metric's value is {value}")
    return value
