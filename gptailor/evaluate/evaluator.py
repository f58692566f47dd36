"""Score stitched models: items of examples in nested order, the same for the same example whenever it is scored."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gptailor.evaluate.benchmarks import OpenBenchmark
from gptailor.evaluate.direct import is_plain
from gptailor.evaluate.examples import Encoder, Example, Prompt
from gptailor.evaluate.forward import Scored, begin_direct, position_switch, score_direct, score_rows, score_tree
from gptailor.evaluate.generation import batches_of, run_batches
from gptailor.evaluate.packing import Pack, build_pack, pack_examples
from gptailor.evaluate.scoring import NonFinite, item_of, needs_greedy, score_of
from gptailor.family.spread import devices_of
from gptailor.heap import keep_freed_memory
from gptailor.threads import side_by_side
from gptailor.trial import Score

log = logging.getLogger(__name__)

CPU_TOKENS = 1024  # tokens of a pack; more does not make a CPU's products faster, and leaves its caches
BYTES_PER_TOKEN = 2**20  # device memory put aside for one token of a pack, logits apart
PROBE_TOKENS = 256  # of padded rows whose whole logits are in memory while the ways of scoring are compared
KEPT_ON_DEVICE = 2**28  # bytes of packs: their tokens and who sees whom, some 100 bytes a token
LOGITS = 2**26  # of one pack
KEPT_BYTES = 2**29  # of freed memory, on a CPU
LOGIT_BYTES = 6  # a scored position's logit in half precision and, in chunks, in single

Span = tuple[OpenBenchmark, int, int]
"""Examples [first, last) of a benchmark."""


class Stopped(Exception):
    """should_stop said so between two packs; nothing of the asked items is returned."""


class Evaluator:
    """Scores models of one architecture on opened benchmarks.

    `rungs` (the run's budgets) cut every benchmark's nested order into fixed chunks, and chunks into fixed packs: which
    examples are computed together never depends on what else is asked, so neither does the rounding of their scores.
    """

    def __init__(
        self,
        benchmarks: Sequence[OpenBenchmark],
        tokenizer: PreTrainedTokenizerBase,
        *,
        rungs: Sequence[int],
        device: torch.device | str,
        max_length: int,
        batch_tokens: int | str = "auto",
    ):
        self.benchmarks = tuple(benchmarks)
        self.device = torch.device(device)
        self.encoder = Encoder(tokenizer, max_length)
        self.rungs = tuple(sorted(set(rungs)))
        self._max_tokens: int | None = None if batch_tokens == "auto" else int(batch_tokens)
        self._packs: dict[tuple[Hashable, int, int], _Packed] = {}
        self._moved: dict[tuple[Hashable, tuple[int, ...]], tuple[tuple[Example, ...], Pack]] = {}
        self._moved_bytes = 0
        self._was_halved = False
        self.path: str | None = None  # "direct", "tree" or "rows", once the first model has been looked at

    def items(
        self,
        model: PreTrainedModel,
        benchmark: OpenBenchmark,
        first: int,
        last: int,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Any]:
        """What scoring.item_of says of examples [first, last) in nested order.

        Raises NonFinite, and Stopped when should_stop() is true.
        """
        return self.items_of(model, [(benchmark, first, last)], should_stop)[0]

    def items_of(
        self, model: PreTrainedModel, asked: Sequence[Span], should_stop: Callable[[], bool] | None = None
    ) -> list[list[Any]]:
        """The same for several benchmarks at once, which leaves no processor waiting for another between them."""
        for benchmark, first, last in asked:
            if not 0 <= first <= last <= benchmark.n_examples:
                raise ValueError(f"{benchmark.name}: has examples 0 to {benchmark.n_examples}, not {first} to {last}")

        def between() -> None:
            if should_stop is not None and should_stop():
                raise Stopped

        try:
            return self._items(model, asked, between)
        except (MemoryError, RuntimeError) as error:
            if self._was_halved or not is_out_of_memory(error):
                raise
            self._was_halved = True
            self._max_tokens = max(1, self.pack_limit(model) // 2)
            self._packs.clear()
            self._moved.clear()
            self._moved_bytes = 0
            log.warning("out of memory: packs are halved to %d tokens", self._max_tokens)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self._items(model, asked, between)

    def settle(self, path: str) -> None:
        """Score in this way ("direct", "tree" or "rows") from now on: the first model's, which was looked at."""
        self.path = path
        if self.device.type == "cpu":
            keep_freed_memory(KEPT_BYTES)  # from now on: the whole logits of the comparison are not to be kept

    def score(self, benchmark: OpenBenchmark, items: Sequence[Any]) -> Score:
        """lm-eval's aggregation of the items of examples 0, 1, ... with our standard error."""
        return score_of(benchmark, items)

    def _items(self, model: PreTrainedModel, asked: Sequence[Span], between: Callable[[], None]) -> list[list[Any]]:
        readings = [_reading(benchmark) for benchmark, _, _ in asked]
        spans: dict[Hashable, Span] = {}  # what is read, once for all metrics of it
        for key, (benchmark, first, last) in zip(readings, asked, strict=True):
            same, start, stop = spans.get(key, (benchmark, first, last))
            spans[key] = (same, min(start, first), max(stop, last))
        windows = dict(zip(spans, self._windows(model, list(spans.values()), between), strict=True))
        written: dict[Hashable, dict[int, list[str]]] = {key: {} for key in spans}
        for key, (benchmark, first, last) in spans.items():
            for start, stop in self.chunks(benchmark, first, last):
                written[key] |= self._texts(model, benchmark, start, stop, between)
        items: list[list[Any]] = []
        for key, (benchmark, first, last) in zip(readings, asked, strict=True):
            found, texts = windows[key], written[key]
            own = []
            for place in range(first, last):
                example = benchmark.examples[place]
                answers, precise = _answers(example, found.get(place, []), texts.get(place, []))
                own.append(item_of(benchmark, example, answers, precise))
            items.append(own)
        return items

    def chunks(self, benchmark: OpenBenchmark, first: int, last: int) -> list[tuple[int, int]]:
        """The fixed chunks of the nested order that hold [first, last)."""
        cuts = sorted({0, benchmark.n_examples, *(rung for rung in self.rungs if rung < benchmark.n_examples)})
        pairs = itertools.pairwise(cuts)
        return [(start, stop) for start, stop in pairs if start < last and stop > first]

    def _windows(
        self, model: PreTrainedModel, asked: Sequence[Span], between: Callable[[], None]
    ) -> list[dict[int, list[Scored]]]:
        """For each that is asked, log-likelihoods by example, from the packs that hold a wanted example."""
        jobs = [
            (number, pack)
            for number, (benchmark, first, last) in enumerate(asked)
            for start, stop in self.chunks(benchmark, first, last)
            for pack in self._packs_of(model, benchmark, start, stop)
            if any(first <= member < last for member in pack.members)
        ]
        if jobs and self.path is None:
            read = [example for benchmark in self.benchmarks for example in benchmark.examples if example.windows]
            read = read or [e for benchmark, _, _ in asked for e in benchmark.examples if e.windows]
            self.settle(self._choose_path(model, read))

        def score(job: tuple[int, Pack]) -> list[Scored]:
            between()
            return self._score(model, asked[job[0]][0], job[1])

        if self.path == "direct" and self.device.type == "cpu":
            scored = side_by_side(score, jobs, [len(pack.tokens) for _, pack in jobs])
        elif self.path == "direct":
            scored = self._one_behind(model, asked, jobs, between)
        else:
            scored = [score(job) for job in jobs]
        found: list[dict[int, list[Scored]]] = [{} for _ in asked]
        for (number, pack), values in zip(jobs, scored, strict=True):
            left = iter(values)
            for member in pack.members:
                found[number][member] = [next(left) for _ in asked[number][0].examples[member].windows]
        return found

    def _one_behind(
        self,
        model: PreTrainedModel,
        asked: Sequence[Span],
        jobs: Sequence[tuple[int, Pack]],
        between: Callable[[], None],
    ) -> list[list[Scored]]:
        """The packs' windows on an accelerator: each pack is read once the next one's work is on its way."""
        scored: list[list[Scored]] = []
        end: Callable[[], list[Scored]] | None = None
        for number, pack in jobs:
            between()
            begun = begin_direct(model, self._there(asked[number][0], pack))
            if end is not None:
                scored.append(end())
            end = begun
        return [*scored, end()] if end is not None else scored

    def _there(self, benchmark: OpenBenchmark, pack: Pack) -> Pack:
        """The pack on the device: moved once, as long as there is room for what is kept."""
        key = (_reading(benchmark), pack.members)
        if key not in self._moved:
            moved = pack.to(self.device)
            if self._moved_bytes + moved.n_bytes > KEPT_ON_DEVICE:
                return moved
            self._moved[key] = (benchmark.examples, moved)
            self._moved_bytes += moved.n_bytes
        return self._moved[key][1]

    def _score(self, model: PreTrainedModel, benchmark: OpenBenchmark, pack: Pack) -> list[Scored]:
        if self.path == "direct":
            return score_direct(model, pack.to(self.device))
        if self.path == "tree":
            return score_tree(model, pack.to(self.device))
        windows = [window for member in pack.members for window in benchmark.examples[member].windows]
        return score_rows(model, windows, self.pack_limit(model))

    def _texts(
        self, model: PreTrainedModel, benchmark: OpenBenchmark, start: int, stop: int, between: Callable[[], None]
    ) -> dict[int, list[str]]:
        """Continuations by example of a chunk; none for benchmarks that generate nothing."""
        owners = [(p, prompt) for p in range(start, stop) for prompt in benchmark.examples[p].prompts]
        if not owners:
            return {}
        prompts: list[Prompt] = [prompt for _, prompt in owners]
        batches = batches_of(prompts, self.encoder, self.pack_limit(model))
        written = run_batches(model, prompts, batches, self.encoder, between)
        texts: dict[int, list[str]] = {}
        for (place, _), text in zip(owners, written, strict=True):
            texts.setdefault(place, []).append(text)
        return texts

    def _packs_of(self, model: PreTrainedModel, benchmark: OpenBenchmark, start: int, stop: int) -> list[Pack]:
        key = (_reading(benchmark), start, stop)
        if key not in self._packs:
            limit = self.pack_limit(model)
            scored = max(256, LOGITS // model.config.get_text_config().vocab_size)
            packs = pack_examples(
                benchmark.examples,
                start,
                stop,
                max_tokens=limit,
                max_scored=scored,
                needs_greedy=needs_greedy(benchmark),
            )
            self._packs[key] = _Packed(benchmark.examples, packs)
        return self._packs[key].packs

    def pack_limit(self, model: PreTrainedModel) -> int:
        """Tokens of a pack: as asked, else fixed on a CPU, and on a GPU by its free memory.

        What a quarter of it holds (of several, where least is free), down to a power of two, so that GPUs of one kind
        compute the same examples together.
        """
        if self._max_tokens is None:
            self._max_tokens = CPU_TOKENS
            if self.device.type == "cuda":
                free = min(torch.cuda.mem_get_info(device)[0] for device in devices_of(model))
                each = BYTES_PER_TOKEN + LOGIT_BYTES * model.config.get_text_config().vocab_size
                self._max_tokens = 2 ** (int(min(65536, max(2048, free // 4 // each))).bit_length() - 1)
        return self._max_tokens

    def _choose_path(self, model: PreTrainedModel, read: Sequence[Example]) -> str:
        """Score a few examples in every way; the first that says what plain rows say is used. Raises NonFinite."""
        ways: dict[str, Callable[[PreTrainedModel, Pack], list[Scored]]] = {}
        reason = _cannot_drive(model) or _is_switched(model, read)
        if reason is None:
            ways = {"direct": score_direct} if is_plain(model) else {}
            ways["tree"] = score_tree
            examples = _probe(read)
            pack = build_pack(examples, range(len(examples))).to(self.device)
            windows = [window for example in examples for window in example.windows]
            plain = score_rows(model, windows, PROBE_TOKENS)
        for path, way in ways.items():
            reason = _difference(way, model, pack, plain)
            if reason is None:
                log.info("%s is scored as packed trees (%s)", type(model).__name__, path)
                return path
            log.info("%s cannot be scored as packed trees (%s): %s", type(model).__name__, path, reason)
        log.warning("%s is scored as padded rows, the slower way: %s", type(model).__name__, reason)
        return "rows"


@dataclass(frozen=True)
class _Packed:
    """Packs, and the examples that their key names by identity: held, so that no others can get the same one."""

    examples: tuple[Example, ...]
    packs: list[Pack]


def _reading(benchmark: OpenBenchmark) -> Hashable:
    """What the model reads for a benchmark, and how: equal for metrics of the same examples, as long as these live."""
    return id(benchmark.examples), needs_greedy(benchmark)


def is_out_of_memory(error: BaseException) -> bool:
    """Of a device (torch.OutOfMemoryError), of the machine (Python's and torch's allocators), or of an Apple GPU."""
    texts = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def _difference(
    way: Callable[[PreTrainedModel, Pack], list[Scored]], model: PreTrainedModel, pack: Pack, plain: Sequence[Scored]
) -> str | None:
    """What is wrong with the pack's log-likelihoods beside those of plain rows, or None. Raises NonFinite."""
    try:
        tree = way(model, pack)
    except NonFinite:
        raise
    except Exception as error:  # whatever a model's code makes of our attention, the plain way still works
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}"
    apart = sum(abs(a.precise - b.precise) for a, b in zip(tree, plain, strict=True)) / len(pack.targets)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    return None if apart <= tolerance else f"log-probabilities differ by {apart:.3g} a token from plain rows"


def _is_switched(model: PreTrainedModel, read: Sequence[Example]) -> str | None:
    """Why texts of different lengths cannot share a pass, though the model's attention can be driven."""
    switch = position_switch(model)
    sides = {len(window.inputs) > (switch or 0) for example in read for window in example.windows}
    if switch is None or len(sides) < 2:
        return None
    return f"it encodes positions otherwise beyond {switch} tokens, and texts lie on both sides"


def _probe(read: Sequence[Example]) -> list[Example]:
    """The longest example, for sliding windows, and three others."""
    longest = max(read, key=lambda example: max(len(window.tokens) for window in example.windows))
    return [longest, *[example for example in read[:4] if example is not longest][:3]]


def _cannot_drive(model: PreTrainedModel) -> str | None:
    """Why the model's attention cannot be replaced, as far as its class and configuration say."""
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention does not go through transformers' AttentionInterface"
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    strange = kinds - {"full_attention", "sliding_attention"}
    return f"it has {', '.join(sorted(strange))} layers" if strange else None


def _answers(example: Example, scored: Sequence[Scored], texts: Sequence[str]) -> tuple[list[Any], list[float]]:
    """The model's answers in lm-eval's format, one per request, and their log-likelihoods in full precision."""
    answers: list[Any] = []
    precise: list[float] = []
    windows, written = iter(scored), iter(texts)
    for instance, request in zip(example.instances, example.requests, strict=True):
        if isinstance(request, Prompt):
            answers.append(next(written))
            continue
        parts = [next(windows) for _ in request]
        precise.append(sum(part.precise for part in parts))
        if instance.request_type == "loglikelihood":
            answers.append((parts[0].rounded, parts[0].is_greedy))
        else:
            answers.append(sum(part.rounded for part in parts))
    return answers, precise
