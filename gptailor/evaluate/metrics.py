"""Our own metrics of multiple choice, which options are right, and what guessing would score.

An item of a metric of RELATIVE is made in two steps, for it needs the dense base's answer too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lm_eval.api.task import Task

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


OUR_METRICS = (CHOICE_PROB, ANSWER_PERPLEXITY, *RELATIVE)


NEED_ANSWERS = (CHOICE_PROB, ANSWER_PERPLEXITY)
"""Metrics that cannot be read where the task does not say which option is right."""


_ACCURACIES = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", CHOICE_PROB, AGREE}


def item_beside(metric: str, plan: Sequence[float], dense: Sequence[float]) -> float:
    """One example's item for a metric of RELATIVE from both models' log-likelihoods per byte of its options."""
    if metric == AGREE:
        return float(np.argmax(plan) == np.argmax(dense))
    shares = np.stack([_shares(np.asarray(plan)), _shares(np.asarray(dense))])
    middle = shares.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.where(shares > 0, shares * np.log2(shares / middle), 0.0)
    return 1.0 - math.sqrt(min(1.0, max(0.0, float(parts.sum()) / 2)))


def choice_prob(task: Task, example: Example, precise: Sequence[float]) -> float:
    shares = _shares(levels(task, example, precise))
    return float(shares[gold_options(task, example)].sum())


def levels(task: Task, example: Example, precise: Sequence[float]) -> np.ndarray:
    """Each option's log-likelihood per byte, as acc_norm compares them, times the root of the options' mean length.

    Differences between sums over n bytes grow with sqrt(n). Times the length itself, nearly all long options come out
    as 0 or 1, and the probability sees little more than right or wrong; per byte alone, all are about equally likely.
    """
    n_options = _n_options(task, example)
    sizes = bytes_of(example)[:n_options]
    return np.asarray(precise[:n_options], dtype=np.float64) / np.asarray(sizes) * math.sqrt(np.mean(sizes))


def bytes_of(example: Example) -> list[int]:
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
