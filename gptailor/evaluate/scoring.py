"""From a model's answers to scores: lm-eval's filters, process_results and aggregations, and our own standard errors.

An *item* is what process_results said of one example for the metric, as plain JSON, so that it can be stored and a
score be continued later from stored items and new ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gptailor.trial import Score

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from gptailor.evaluate.benchmarks import OpenBenchmark
    from gptailor.evaluate.examples import Example

CHOICE_PROB = "choice_prob"
"""Our own metric: probability of the right option under a softmax of the options' log-likelihoods, per byte and times
the root of the options' mean length in bytes."""
ANSWER_PERPLEXITY = "answer_perplexity"
"""Our own metric: perplexity per byte of the right option after its prompt, over all examples together, as lm-eval's
byte_perplexity is taken over texts; less is better."""
AGREE = "agree"
"""Our own metric: whether the plan prefers (per byte) the same option as the dense base, right or wrong."""
CLOSENESS = "closeness"
"""Our own metric: 1 less the Jensen-Shannon distance (base 2) between the plan's and the dense base's softmax over the
options' log-likelihoods per byte. The distance and not its square, the divergence, which hardly sees small changes."""
RELATIVE = (AGREE, CLOSENESS)
"""Metrics for which an example first gives its options' log-likelihoods per byte: an item is made by `item_beside`."""
JACKKNIFE_GROUPS = 20
OUR_METRICS = (CHOICE_PROB, ANSWER_PERPLEXITY, *RELATIVE)
NEED_ANSWERS = (CHOICE_PROB, ANSWER_PERPLEXITY)
"""Metrics that cannot be read where the task does not say which option is right."""
_ACCURACIES = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", CHOICE_PROB, AGREE}


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
        return _choice_prob(task, example, precise)
    if benchmark.metric == ANSWER_PERPLEXITY:
        gold = gold_options(task, example)[0]
        return [float(precise[gold]), _bytes_of(example)[gold]]
    if benchmark.metric in RELATIVE:
        return [float(value) for value in _levels(task, example, precise)]
    instances = [
        replace(instance, resps=[answer] * instance.repeats, filtered_resps={})
        for instance, answer in zip(example.instances, answers, strict=True)
    ]
    ensemble = next(ensemble for ensemble in task._filters if ensemble.name == benchmark.filter)
    ensemble.apply(instances)
    metrics = task.process_results(example.doc, [instance.filtered_resps[benchmark.filter] for instance in instances])
    return _plain(metrics.get(benchmark.metric))


def item_beside(metric: str, plan: Sequence[float], dense: Sequence[float]) -> float:
    """One example's item for a metric of RELATIVE from both models' log-likelihoods per byte of its options."""
    if metric == AGREE:
        return float(np.argmax(plan) == np.argmax(dense))
    shares = np.stack([_shares(np.asarray(plan)), _shares(np.asarray(dense))])
    middle = shares.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.where(shares > 0, shares * np.log2(shares / middle), 0.0)
    return 1.0 - math.sqrt(min(1.0, max(0.0, float(parts.sum()) / 2)))


def score_of(benchmark: OpenBenchmark, items: Sequence[Any], is_objective: bool = True) -> Score:
    """Aggregate the items of examples 0, 1, ... in nested order as lm-eval would. Raises NonFinite."""
    if not items:
        raise ValueError(f"{benchmark.name}: no items to score")
    owners = [example.task for example in benchmark.examples[: len(items)]]
    value = _aggregate(benchmark, items, owners)
    if not math.isfinite(value):
        raise NonFinite(f"{benchmark.name}: the score is {value}")
    return Score(
        benchmark=benchmark.spec.benchmark,
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
            values.append(float(_aggregation(benchmark, task)(own)))
            sizes.append(len(own) if benchmark.weight_by_size else 1)
    if not values:
        return math.nan
    if len(values) == 1:
        return values[0]
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def _aggregation(benchmark: OpenBenchmark, task: int) -> Callable[[Sequence[Any]], float]:
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
    if benchmark.weight_by_size and all(_aggregation(benchmark, task) is mean for task in set(owners)):
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


def _choice_prob(task: Task, example: Example, precise: Sequence[float]) -> float:
    shares = _shares(_levels(task, example, precise))
    return float(shares[gold_options(task, example)].sum())


def _levels(task: Task, example: Example, precise: Sequence[float]) -> np.ndarray:
    """Each option's log-likelihood per byte, as acc_norm compares them, times the root of the options' mean length.

    Differences between sums over n bytes grow with sqrt(n). Times the length itself, nearly all long options come out
    as 0 or 1, and the probability sees little more than right or wrong; per byte alone, all are about equally likely.
    """
    n_options = _n_options(task, example)
    sizes = _bytes_of(example)[:n_options]
    return np.asarray(precise[:n_options], dtype=np.float64) / np.asarray(sizes) * math.sqrt(np.mean(sizes))


def _bytes_of(example: Example) -> list[int]:
    """Length of each option."""
    return [max(1, len(instance.args[1].encode())) for instance in example.instances]


def _shares(levels: np.ndarray) -> np.ndarray:
    """The options' probabilities: a softmax."""
    weights = np.exp(levels - levels.max())
    return np.asarray(weights / weights.sum())


def gold_options(task: Task, example: Example) -> list[int]:
    """Indices of the right options of a multiple-choice example; empty where the task does not say."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return []
    choices = task.doc_to_choice(example.doc)
    gold = task.doc_to_text(example.doc) if task.multiple_input else task.doc_to_target(example.doc)
    golds = gold if isinstance(gold, list) else [gold]
    named = [choices.index(g) if isinstance(g, str) and g in choices else g for g in golds]
    return [int(g) for g in named if isinstance(g, (int, np.integer)) and 0 <= g < len(choices)]


def _n_options(task: Task, example: Example) -> int:
    """Options of the example; mutual information asks for each a second time without the context."""
    return min(len(task.doc_to_choice(example.doc)), len(example.instances))


def chance_of(metric: str, tasks: Sequence[Task], examples: Sequence[Example]) -> float | None:
    """Score of guessing; None where the metric is no kind of choosing.

    Guessing is to take an option at random or, where all examples of a task offer the same options ("yes" and "no"),
    always the one that is right most often: a model that says nothing but "yes" has no capability either.
    """
    if metric not in _ACCURACIES or any(task.OUTPUT_TYPE != "multiple_choice" for task in tasks):
        return None
    total = 0.0
    for number, task in enumerate(tasks):
        own = [example for example in examples if example.task == number]
        golds = [gold_options(task, example) for example in own]
        sizes = [_n_options(task, example) for example in own]
        if metric == AGREE:  # with the dense base, which may say anything
            total += sum(1 / size for size in sizes)
            continue
        uniform = sum(max(1, len(gold)) / size for gold, size in zip(golds, sizes, strict=True))
        constant = 0
        if len({tuple(task.doc_to_choice(example.doc)) for example in own}) == 1:
            constant = max(Counter(option for gold in golds for option in gold).values(), default=0)
        total += max(uniform, constant)
    return total / len(examples)


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
