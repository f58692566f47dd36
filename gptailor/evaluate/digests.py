"""Digests of examples: what the model reads, what is right, and how its answer becomes an item.

Two examples of equal digests give the same item for the same model. Rows that were corrected, another prompt, other
few-shot examples, another tokenizer or chat template, a filter or a metric that was changed: each gives other digests.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from array import array
from typing import Any

from gptailor.evaluate.benchmarks import OpenBenchmark
from gptailor.evaluate.examples import Example, Prompt


def example_digests(benchmark: OpenBenchmark) -> list[str]:
    """One an example, in the order of the examples."""
    how = [json.dumps(_reading_of(benchmark, place), sort_keys=True).encode() for place in range(len(benchmark.tasks))]
    return [_digest(benchmark, example, how[example.task]) for example in benchmark.examples]


def _reading_of(benchmark: OpenBenchmark, place: int) -> dict[str, Any]:
    """How a task's answers are read for the metric."""
    task = benchmark.tasks[place]
    config = task.config
    metrics = [one for one in config.metric_list or () if one.get("metric") == benchmark.metric]
    filters = [one for one in config.filter_list or () if one.get("name") == benchmark.filters[place]]
    return {
        "task": task.task_name,
        "kind": task.OUTPUT_TYPE,
        "metric": [benchmark.metric, _stable(metrics)],
        "filter": [benchmark.filters[place], _stable(filters)],
        "process_results": _stable(config.process_results),
        "weight_by_size": benchmark.weight_by_size,
    }


def _digest(benchmark: OpenBenchmark, example: Example, how: bytes) -> str:
    made = hashlib.blake2b(how, digest_size=8)
    made.update(json.dumps(example.doc, sort_keys=True, default=str).encode())
    target = benchmark.tasks[example.task].doc_to_target(example.doc)
    made.update(json.dumps(target, default=str).encode())
    for request in example.requests:
        if isinstance(request, Prompt):
            made.update(json.dumps([request.text, request.until, request.max_new_tokens, request.settings]).encode())
            continue
        for window in request:
            made.update(array("q", (window.n_scored, *window.tokens)).tobytes())
    return made.hexdigest()


def _stable(value: Any) -> Any:
    """A part of a task's configuration as text that is the same in every process; functions as their source."""
    if isinstance(value, dict):
        return {str(key): _stable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_stable(item) for item in value]
    if callable(value):
        try:
            return inspect.getsource(value)
        except (OSError, TypeError):
            return getattr(value, "__qualname__", type(value).__qualname__)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
