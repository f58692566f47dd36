"""A family and its benchmarks, opened once: plans in, scores out, and nothing is scored twice.

Everything that scores plans (the search, held-out evaluation, baselines) does it here, so that all are scored alike.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gptailor.baselines.block_influence import block_influence, removal_order
from gptailor.errors import UserError
from gptailor.evaluate import Evaluator, OpenBenchmark, calibration_batches, item_beside, open_benchmarks
from gptailor.evaluate.evaluator import Span
from gptailor.family import Family, open_family
from gptailor.plan import BASE, StitchPlan
from gptailor.spec import Benchmark, RunSpec
from gptailor.stitch import Stitcher
from gptailor.trial import Score

log = logging.getLogger(__name__)

CALIBRATION_TEXTS = 64
"""Texts that Block Influence looks at: prompts with their right answers, from the objectives' own examples."""

OPTIONS = "options"
"""In a metric's place: the dense base's log-likelihoods of the options, which metrics that compare with it need."""

Key = tuple[str, str, str, str]
"""Plan hash, benchmark, metric, split."""
Items = dict[Key, list[Any]]
"""What each example gave, in nested order."""
Fresh = tuple[Key, int, list[Any]]
"""Where new items belong, the first's place in the nested order, and the items."""


@dataclass(frozen=True)
class PlanScores:
    """Scores of one plan at one budget and the seconds they took.

    fresh: what was not known before.
    """

    scores: tuple[Score, ...]
    stitch_seconds: float
    evaluate_seconds: float
    fresh: tuple[Fresh, ...]


@dataclass
class Workbench:
    """What one engine process holds. `known` grows with every plan that is scored."""

    family: Family
    stitcher: Stitcher
    benchmarks: Sequence[OpenBenchmark]
    evaluator: Evaluator
    known: Items = field(default_factory=dict)

    @classmethod
    def open(cls, spec: RunSpec, benchmarks: Sequence[Benchmark], max_examples: int | None) -> Workbench:
        """Load the family of `spec` and up to `max_examples` examples of each benchmark. Raises UserError."""
        family = open_family(spec)
        opened = cls.open_benchmarks(family, spec, benchmarks, max_examples)
        evaluator = Evaluator(
            opened,
            family.tokenizer,
            rungs=spec.budget.rungs,
            device=family.device,
            max_length=_window(family),
            batch_tokens=spec.batch_tokens,
        )
        return cls(family, Stitcher(family), opened, evaluator)

    @staticmethod
    def open_benchmarks(
        family: Family, spec: RunSpec, benchmarks: Sequence[Benchmark], max_examples: int | None
    ) -> list[OpenBenchmark]:
        """Benchmarks for the family's tokenizer and window. Raises UserError."""
        return open_benchmarks(
            benchmarks,
            family.tokenizer,
            max_length=_window(family),
            max_examples=max_examples,
            seed=spec.seed,
            include_path=spec.include_path,
            chat_template=spec.chat_template,
        )

    def score(
        self,
        plan: StitchPlan,
        budget: int,
        should_stop: Callable[[], bool] | None = None,
        benchmarks: Sequence[OpenBenchmark] | None = None,
    ) -> PlanScores:
        """Score a plan on the first `budget` examples of each benchmark; only examples not yet known are computed.

        For metrics that compare with the dense base, those include its answers, where it was not scored before. Raises
        NonFinite for a model that yields NaN or infinity, Stopped when should_stop() says so.
        """
        started = time.monotonic()
        chosen = self.benchmarks if benchmarks is None else benchmarks
        known = [self.known.get(self._key(plan, benchmark), []) for benchmark in chosen]
        ends = [min(budget, benchmark.n_examples) for benchmark in chosen]
        asked = [(b, len(items), end) for b, items, end in zip(chosen, known, ends, strict=True) if len(items) < end]
        fresh = self._dense_options(asked, should_stop)
        is_dense = plan.hash == self._dense.hash
        unknown = [span for span in asked if not (is_dense and span[0].is_relative)]
        answers, stitch_seconds = self._answers(plan, unknown, should_stop)
        left = iter(answers)
        for benchmark, first, end in asked:
            if benchmark.is_relative:
                dense = self.known[self._options_key(benchmark)][first:end]
                own = dense if is_dense else next(left)
                items = [item_beside(benchmark.metric, *pair) for pair in zip(own, dense, strict=True)]
            else:
                items = next(left)
            fresh.append(self._remember(self._key(plan, benchmark), first, items))
        scores = tuple(
            self.evaluator.score(benchmark, self.known[self._key(plan, benchmark)][:end])
            for benchmark, end in zip(chosen, ends, strict=True)
        )
        return PlanScores(scores, stitch_seconds, time.monotonic() - started - stitch_seconds, tuple(fresh))

    def _dense_options(self, asked: Sequence[Span], should_stop: Callable[[], bool] | None) -> list[Fresh]:
        """Make known what the dense base says of the options of what is asked, for metrics that compare with it."""
        missing: dict[Key, Span] = {}
        for benchmark, _, end in asked:
            key = self._options_key(benchmark)
            first = len(self.known.get(key, []))
            if benchmark.is_relative and first < end:
                missing[key] = (benchmark, first, end)
        answers, _ = self._answers(self._dense, list(missing.values()), should_stop)
        return [self._remember(key, missing[key][1], items) for key, items in zip(missing, answers, strict=True)]

    def _answers(
        self, plan: StitchPlan, asked: Sequence[Span], should_stop: Callable[[], bool] | None
    ) -> tuple[list[list[Any]], float]:
        """What a plan's model gives for each that is asked, and the seconds that stitching took."""
        if not asked:
            return [], 0.0
        started = time.monotonic()
        model = self.stitcher.stitch(plan)
        seconds = time.monotonic() - started
        return self.evaluator.items_of(model, asked, should_stop), seconds

    def _remember(self, key: Key, first: int, items: list[Any]) -> Fresh:
        self.known[key] = self.known.get(key, [])[:first] + items
        return key, first, items

    def free(self) -> None:
        """Give back what a trial that failed held: tensors of its frames, memory that the device's allocator keeps."""
        gc.collect()
        if self.family.device.type == "cuda":
            torch.cuda.empty_cache()

    def calibration(self, benchmarks: Sequence[OpenBenchmark] | None = None) -> list[dict[str, torch.Tensor]]:
        """The texts that pruning methods look at, in padded batches: of the run's benchmarks, or of others."""
        texts = calibration_batches(self.benchmarks if benchmarks is None else benchmarks, CALIBRATION_TEXTS)
        return _padded(texts, self.family.device)

    def influence_orders(self, benchmarks: Sequence[OpenBenchmark] | None = None) -> list[tuple[str, list[int]]]:
        """Layers by rising Block Influence (the order in which to remove them), of the base and of each candidate.

        A candidate that yields no numbers has none. Raises UserError where the base yields none.
        """
        batches = self.calibration(benchmarks)
        orders = []
        for name in (BASE, *self.family.names):
            model = self.stitcher.stitch(StitchPlan.dense(self.family.n_layers, name))
            try:
                orders.append((name, removal_order(block_influence(model, batches))))
            except UserError as problem:
                if name == BASE:
                    raise
                log.warning("%s: %s; the search starts without its order", name, problem)
        return orders

    @property
    def _dense(self) -> StitchPlan:
        return StitchPlan.dense(self.family.n_layers)

    def _options_key(self, benchmark: OpenBenchmark) -> Key:
        of = benchmark.spec
        shots = "" if of.num_fewshot is None else f"@{of.num_fewshot}"
        return (self._dense.hash, of.benchmark, OPTIONS + shots, of.split)

    @staticmethod
    def _key(plan: StitchPlan, benchmark: OpenBenchmark) -> Key:
        return (plan.hash, benchmark.spec.benchmark, benchmark.spec.metric, benchmark.spec.split)


def _padded(texts: list[list[int]], device: torch.device, rows: int = 16) -> list[dict[str, torch.Tensor]]:
    """Token ids as padded batches of `rows` texts of similar length, with their masks."""
    ordered = sorted(texts, key=len)
    batches = []
    for start in range(0, len(ordered), rows):
        some = [torch.tensor(tokens) for tokens in ordered[start : start + rows]]
        ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
        lengths = torch.tensor([len(tokens) for tokens in some])
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        batches.append({"input_ids": ids.to(device), "attention_mask": mask.long().to(device)})
    return batches


def _window(family: Family) -> int:
    """The model's window in tokens as lm-eval's HFLM takes it: the configuration's, else the tokenizer's, else 2048."""
    config = family.model.config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    length = family.tokenizer.model_max_length
    return length if length < 10**9 else 2048
