"""Benchmarks opened for a run: which examples, in which order, with which metric.

Budgets are nested: every example has a fixed place in one seeded order, a budget of n is its first n. The order is
spread over a group's tasks in proportion to their sizes, so MMLU at 100 is 100 examples, not 57 times 100.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gptailor.errors import UserError
from gptailor.evaluate.examples import Encoder, Example, build_examples, chat_renderer
from gptailor.evaluate.metrics import ANSWER_PERPLEXITY, NEED_ANSWERS, OUR_METRICS, RELATIVE, chance_of, gold_options
from gptailor.evaluate.tasks import find_tasks, load_tasks
from gptailor.spec import Benchmark, Reading

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from transformers import PreTrainedTokenizerBase


Order = tuple[tuple[str, int], ...]
"""(task name, index in the split) of each example, in nested order."""


@dataclass(frozen=True, eq=False)
class OpenBenchmark:
    """One benchmark with its documents, prompts and tokens, ready to be scored many times."""

    spec: Benchmark
    metric: str  # without the filter
    filter: str  # the task's filter whose answers are scored
    higher_is_better: bool
    tasks: tuple[Task, ...]
    weight_by_size: bool  # how a group joins its tasks' scores
    order: Order
    examples: tuple[Example, ...]  # in nested order
    chance: float | None  # score of guessing, where the metric is a kind of accuracy

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def is_relative(self) -> bool:
        """Whether the metric compares a plan's answers with the dense base's."""
        return self.metric in RELATIVE

    @property
    def n_examples(self) -> int:
        """Examples there really are, up to max_examples: a small benchmark saturates below the budget."""
        return len(self.examples)


def open_benchmarks(
    benchmarks: Sequence[Benchmark],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_examples: int | None,
    seed: int,
    include_path: Sequence[str] = (),
    chat_template: bool = False,
    chat_template_args: Mapping[str, Any] | None = None,
) -> list[OpenBenchmark]:
    """Load benchmarks through lm-eval and tokenise their first `max_examples` examples (None: all).

    `max_length` is the model's window in tokens. Equal seeds give equal orders everywhere. Raises UserError for names,
    splits, metrics and files that do not exist or are refused.
    """
    if not benchmarks:
        return []
    manager = find_tasks([spec.benchmark for spec in benchmarks], include_path)
    encoder = Encoder(tokenizer, max_length)
    render = chat_renderer(tokenizer, chat_template_args) if chat_template else None
    loaded: dict[Reading, tuple[list[Task], Group | None]] = {}
    read: dict[Reading, tuple[Order, tuple[Example, ...]]] = {}  # once for all metrics of it
    opened = []
    with _quiet():
        for spec in benchmarks:
            key = spec.reading
            if key not in loaded:
                loaded[key] = load_tasks(manager, spec)
            tasks, group = loaded[key]
            metric = _metric(spec, tasks, group)  # a wrong name is told before anything is read
            if key not in read:
                read[key] = _read(spec, tasks, encoder, render, max_examples, seed)
            opened.append(_open(spec, tasks, group, metric, *read[key]))
    return opened


def reordered(benchmarks: Sequence[OpenBenchmark], orders: Mapping[Reading, Sequence[int]]) -> list[OpenBenchmark]:
    """The benchmarks with their first examples in other orders: places in the present one.

    Metrics of the same examples go on sharing them. Raises UserError for an order that is not one of the examples there
    are.
    """
    read: dict[Reading, tuple[Order, tuple[Example, ...]]] = {}
    found = []
    for benchmark in benchmarks:
        places = orders.get(benchmark.spec.reading)
        if places is None:
            found.append(benchmark)
            continue
        if benchmark.spec.reading not in read:
            if sorted(places) != list(range(len(places))) or len(places) > benchmark.n_examples:
                raise UserError(
                    f"{benchmark.name}: its stored order of {len(places)} examples does not fit the "
                    f"{benchmark.n_examples} there are now; start a new run"
                )
            whole = [*places, *range(len(places), benchmark.n_examples)]
            read[benchmark.spec.reading] = (
                tuple(benchmark.order[place] for place in whole),
                tuple(benchmark.examples[place] for place in whole),
            )
        order, examples = read[benchmark.spec.reading]
        found.append(replace(benchmark, order=order, examples=examples))
    return found


def calibration_batches(benchmarks: Sequence[OpenBenchmark], n: int) -> list[list[int]]:
    """Token ids of `n` texts (prompt and right answer), taken in turn from the benchmarks' nested orders."""
    queues = [list(benchmark.examples) for benchmark in benchmarks]
    texts: list[list[int]] = []
    for place in range(max((len(queue) for queue in queues), default=0)):
        for benchmark, queue in zip(benchmarks, queues, strict=True):
            if place < len(queue) and len(texts) < n:
                tokens = _right_text(benchmark, queue[place])
                if tokens:
                    texts.append(tokens)
    return texts


def _right_text(benchmark: OpenBenchmark, example: Example) -> list[int]:
    if not example.windows:
        return []
    gold = gold_options(benchmark.tasks[example.task], example) or [0]
    return list(example.windows[gold[0] if gold[0] < len(example.windows) else 0].tokens)


def _read(
    spec: Benchmark, tasks: list[Task], encoder: Encoder, render: Any, max_examples: int | None, seed: int
) -> tuple[Order, tuple[Example, ...]]:
    sizes = [len(task.eval_docs) for task in tasks]
    order = nested_order([task.task_name for task in tasks], sizes, seed)[slice(*spec.part)][:max_examples]
    if not order:
        raise UserError(f"benchmark {spec.benchmark}: {spec.split} is empty: the split has {sum(sizes)} examples")
    try:
        examples = _build(tasks, order, encoder, render)
    except UserError as error:
        raise UserError(f"benchmark {spec.benchmark}: {error}") from error
    return tuple((tasks[task].task_name, document) for task, document in order), tuple(examples)


def _open(
    spec: Benchmark,
    tasks: list[Task],
    group: Group | None,
    named: tuple[str, str],
    order: Order,
    examples: tuple[Example, ...],
) -> OpenBenchmark:
    metric, filter_name = named
    if metric in NEED_ANSWERS and not gold_options(tasks[0], examples[0]):
        raise UserError(
            f"benchmark {spec.benchmark}: metric {metric} needs a right option that the task file names (doc_to_target)"
        )
    return OpenBenchmark(
        spec=spec,
        metric=metric,
        filter=filter_name,
        higher_is_better=_direction(spec, tasks, metric),
        tasks=tuple(tasks),
        weight_by_size=_weight_by_size(group, metric),
        order=order,
        examples=examples,
        chance=chance_of(metric, tasks, examples),
    )


def nested_order(names: Sequence[str], sizes: Sequence[int], seed: int) -> list[tuple[int, int]]:
    """All (task, document) pairs so that every beginning is a random sample, spread over the tasks by their sizes."""
    keyed = []
    for task, (name, size) in enumerate(zip(names, sizes, strict=True)):
        rng = random.Random(f"{seed}/{name}")
        documents = list(range(size))
        rng.shuffle(documents)
        offset = rng.random()
        keyed += [((rank + offset) / size, task, document) for rank, document in enumerate(documents)]
    return [(task, document) for _, task, document in sorted(keyed)]


def _build(tasks: list[Task], order: list[tuple[int, int]], encoder: Encoder, render: Any) -> list[Example]:
    """lm-eval's own requests for the chosen documents, few-shot prompts included, in nested order."""
    requests: dict[tuple[int, int], list[Instance]] = {}
    for index, task in enumerate(tasks):
        chosen = sorted(document for where, document in order if where == index)
        if not chosen:
            continue
        task.build_all_requests(
            samples=set(chosen),
            apply_chat_template=render is not None,
            fewshot_as_multiturn=render is not None,
            chat_template=render,
        )
        for instance in task.instances:  # doc_id counts within the sample
            requests.setdefault((index, chosen[instance.doc_id]), []).append(instance)
        task._instances = None
    for instances in requests.values():
        instances.sort(key=lambda instance: instance.idx)
    return build_examples([(place[0], requests[place]) for place in order], encoder)


def _metric(spec: Benchmark, tasks: list[Task], group: Group | None) -> tuple[str, str]:
    """The metric's and the filter's name. Raises UserError listing what exists."""
    asked, _, asked_filter = spec.metric.partition(",")
    filters = [ensemble.name for ensemble in tasks[0]._filters]
    known = sorted(set.intersection(*(set(task.aggregation()) for task in tasks)))
    if group is not None:
        listed = {config.metric for config in group.aggregate_metric_list or []}
        if not listed:
            raise UserError(
                f"benchmark {spec.benchmark}: is a group without a score of its own; name one of its tasks: "
                + ", ".join(task.task_name for task in tasks[:8])
            )
        known = [metric for metric in known if metric in listed]
    if all(task.OUTPUT_TYPE == "multiple_choice" for task in tasks):
        known = [*known, *OUR_METRICS]
    elif asked in OUR_METRICS and asked not in known:
        raise UserError(
            f"benchmark {spec.benchmark}: metric {asked} is read of a question's options, and this is no "
            f"multiple-choice task; it has {', '.join(known)}"
        )
    if asked not in known:
        close = difflib.get_close_matches(asked, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"benchmark {spec.benchmark}: has no metric {asked!r}; it has {', '.join(known)}{hint}")
    if not asked_filter and len(filters) > 1:
        raise UserError(
            f"benchmark {spec.benchmark}: metric {asked} is read through one of several filters; name it: "
            + " or ".join(f"{asked},{name}" for name in filters)
        )
    if asked_filter and asked_filter not in filters:
        raise UserError(f"benchmark {spec.benchmark}: has no filter {asked_filter!r}; it has {', '.join(filters)}")
    return asked, asked_filter or filters[0]


def _direction(spec: Benchmark, tasks: list[Task], metric: str) -> bool:
    if metric in OUR_METRICS:
        return metric != ANSWER_PERPLEXITY
    directions = {bool(task.higher_is_better().get(metric, True)) for task in tasks}
    if len(directions) > 1:
        raise UserError(f"benchmark {spec.benchmark}: its tasks disagree on whether a higher {metric} is better")
    return directions.pop()


def _weight_by_size(group: Group | None, metric: str) -> bool:
    for config in (group.aggregate_metric_list or []) if group is not None else []:
        if config.metric == metric:
            return bool(config.weight_by_size)
    return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's and datasets' progress bars: the run has its own."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
