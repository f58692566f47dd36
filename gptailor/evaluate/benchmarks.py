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
from gptailor.evaluate.shots import drawn_as_for_all
from gptailor.evaluate.tasks import cause_of, find_tasks, load_tasks
from gptailor.spec.sections import Benchmark, Reading

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
    filters: tuple[str, ...]  # of each task, the filter whose answers are scored
    higher_is_better: bool
    tasks: tuple[Task, ...]
    weight_by_size: bool  # how a group joins its tasks' scores
    order: Order
    examples: tuple[Example, ...]  # in nested order
    chance: float | None  # score of guessing, where the metric is a kind of accuracy
    n_cut: int = 0  # examples whose text is longer than the model's window, and is cut on the left

    @property
    def cut_note(self) -> str | None:
        """What to say of examples that the model cannot read whole."""
        if not self.n_cut:
            return None
        place, counted = f"{self.spec.benchmark} on its {self.spec.split} split", f"{self.n_cut} of {self.n_examples}"
        return f"{place}: {counted} examples are longer than the model's window, and are cut on the left"

    @property
    def filter(self) -> str:
        """The first task's filter, which is every task's but in groups whose members differ."""
        return self.filters[0]

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
    read: dict[tuple[Reading, tuple[str, ...]], tuple[Order, tuple[Example, ...]]] = {}  # once for all metrics of it
    opened = []
    with _quiet():
        for spec in benchmarks:
            if spec.reading not in loaded:
                loaded[spec.reading] = load_tasks(manager, spec)
            tasks, group = loaded[spec.reading]
            metric, filters = _metric(spec, tasks, group)  # a wrong name is told before anything is read
            tasks = [task for task in tasks if task.task_name in filters]
            key = (spec.reading, tuple(filters))
            if key not in read:
                read[key] = _read(spec, tasks, encoder, render, max_examples, seed)
            opened.append(_open(spec, tasks, group, metric, tuple(filters.values()), *read[key], encoder))
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


def calibration_batches(
    benchmarks: Sequence[OpenBenchmark], n: int, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[list[int]]:
    """Token ids of `n` texts (prompt and right answer), taken in turn from the benchmarks' nested orders.

    Texts that are written and not chosen are cut on the left to `max_length` tokens.
    """
    queues = [list(benchmark.examples) for benchmark in benchmarks]
    texts: list[list[int]] = []
    for place in range(max((len(queue) for queue in queues), default=0)):
        for benchmark, queue in zip(benchmarks, queues, strict=True):
            if place < len(queue) and len(texts) < n:
                example = queue[place]
                tokens = _right_text(benchmark, example) or _written(benchmark, example, tokenizer)[-max_length:]
                if tokens:
                    texts.append(tokens)
    return texts


def _right_text(benchmark: OpenBenchmark, example: Example) -> list[int]:
    if not example.windows:
        return []
    gold = gold_options(benchmark.tasks[example.task], example) or [0]
    return list(example.windows[gold[0] if gold[0] < len(example.windows) else 0].tokens)


def _written(benchmark: OpenBenchmark, example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt with the answer that a task has the model write."""
    if not example.prompts:
        return []
    task = benchmark.tasks[example.task]
    target = task.doc_to_target(example.doc)
    answer = target[0] if isinstance(target, list) and target else target
    text = f"{example.prompts[0].text}{task.config.target_delimiter}{answer}"
    return list(tokenizer(text)["input_ids"])


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
    except Exception as error:  # a task file's templates and functions may fail in any way on a row
        raise UserError(f"benchmark {spec.benchmark}: {_where(tasks, order)}{cause_of(error)}") from error
    return tuple((tasks[task].task_name, document) for task, document in order), tuple(examples)


def _open(
    spec: Benchmark,
    tasks: list[Task],
    group: Group | None,
    metric: str,
    filters: tuple[str, ...],
    order: Order,
    examples: tuple[Example, ...],
    encoder: Encoder,
) -> OpenBenchmark:
    if metric in NEED_ANSWERS and not gold_options(tasks[0], examples[0]):
        raise UserError(
            f"benchmark {spec.benchmark}: metric {metric} needs a right option that the task file names (doc_to_target)"
        )
    return OpenBenchmark(
        spec=spec,
        metric=metric,
        filters=filters,
        higher_is_better=_direction(spec, tasks, metric),
        tasks=tuple(tasks),
        weight_by_size=_weight_by_size(group, metric),
        order=order,
        examples=examples,
        chance=chance_of(metric, tasks, examples),
        n_cut=sum(encoder.cuts(example) for example in examples),
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
        with drawn_as_for_all(task, chosen):
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
    try:
        return build_examples([(place[0], requests[place]) for place in order], encoder)
    except UserError:
        for task, document in order:  # once more, one by one, to name the row
            try:
                build_examples([(task, requests[task, document])], encoder)
            except UserError as error:
                raise UserError(f"row {document} of {tasks[task].task_name}: {error}") from error
        raise


def _where(tasks: list[Task], order: list[tuple[int, int]]) -> str:
    """The first row that the task file cannot make a prompt and an answer of; nothing where that is not the fault."""
    for task, document in sorted(order):
        try:
            doc = tasks[task].eval_docs[document]
            tasks[task].doc_to_text(doc)
            tasks[task].doc_to_target(doc)
            if tasks[task].config.doc_to_choice:
                tasks[task].doc_to_choice(doc)
        except Exception:  # whatever it is, it is this row's
            return f"row {document} of {tasks[task].task_name}: "
    return ""


def _metric(spec: Benchmark, tasks: list[Task], group: Group | None) -> tuple[str, dict[str, str]]:
    """The metric's name, and the filter's of each task that has a part in it. Raises UserError listing what exists."""
    asked, _, asked_filter = spec.metric.partition(",")
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
    return asked, _filters(spec, tasks, asked, asked_filter)


def _filters(spec: Benchmark, tasks: list[Task], metric: str, asked: str) -> dict[str, str]:
    """By task: the filter that is asked for, as lm-eval does without tasks that lack it; or its only one."""
    there = {task.task_name: [ensemble.name for ensemble in task._filters] for task in tasks}
    names = list(dict.fromkeys(name for filters in there.values() for name in filters))
    if asked and asked not in names:
        raise UserError(f"benchmark {spec.benchmark}: has no filter {asked!r}; it has {', '.join(names)}")
    if not asked and any(len(filters) > 1 for filters in there.values()):
        raise UserError(
            f"benchmark {spec.benchmark}: metric {metric} is read through one of several filters; name it: "
            + " or ".join(f"{metric},{name}" for name in names)
        )
    return {task: asked or filters[0] for task, filters in there.items() if not asked or asked in filters}


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
