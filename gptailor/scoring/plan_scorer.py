"""A family and its benchmarks, opened once: plans in, scores out, and nothing is scored twice.

Everything that scores plans (the search, held-out evaluation, baselines) does it here, so that all are scored alike.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gptailor.baselines.block_influence import block_influence, removal_order
from gptailor.errors import UserError
from gptailor.evaluate.benchmarks import OpenBenchmark, calibration_batches, open_benchmarks, reordered
from gptailor.evaluate.calibration import TextReader
from gptailor.evaluate.evaluator import Evaluator, Stopped
from gptailor.evaluate.scoring import try_metric
from gptailor.family.models import Family, Reader, open_family
from gptailor.plan import BASE, StitchPlan, Texts
from gptailor.scoring.item_cache import Gap, ItemCache, Items, PlanScores
from gptailor.scoring.shared import Shared
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Benchmark, Reading, Repair
from gptailor.stitch.edits.case import Between, padded
from gptailor.stitch.edits.healed import HealedFolders
from gptailor.stitch.edits.registry import repair_edit
from gptailor.stitch.stitcher import Stitcher
from gptailor.store.folder import RunFolder

log = logging.getLogger(__name__)

CALIBRATION_TEXTS = 64
"""Texts that Block Influence looks at: prompts with their right answers, from the objectives' own examples."""

OBJECTIVES, SELECTION = "objectives", "selection"
"""Keys of a run file that name benchmarks which a search scores plans on."""
SELECTION_EXAMPLES = 1000
"""Examples of a selection split, at most."""


@dataclass
class PlanScorer:
    """What one process that scores plans holds.

    told: of an edit's progress, while a plan is stitched. shared: what other runs of the family computed, if that is
    used.
    """

    family: Family
    stitcher: Stitcher
    benchmarks: Sequence[OpenBenchmark]
    evaluator: Evaluator
    cache: ItemCache
    texts: TextReader
    told: Between = lambda _what, _share: None
    shared: Shared | None = None
    others: dict[str, list[OpenBenchmark]] = field(default_factory=dict)
    orders: Mapping[Reading, list[int]] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        spec: RunSpec,
        benchmarks: Sequence[Benchmark],
        max_examples: int | None,
        folder: RunFolder | None = None,
    ) -> PlanScorer:
        """Load the family of `spec` and up to `max_examples` examples of each benchmark.

        folder: of the run, which keeps the texts of edits. Raises UserError.
        """
        return cls.of(open_family(spec), benchmarks, max_examples, folder)

    @classmethod
    def of(
        cls,
        family: Family,
        benchmarks: Sequence[Benchmark],
        max_examples: int | None,
        folder: RunFolder | None = None,
    ) -> PlanScorer:
        """The same for a family that is open. Raises UserError."""
        spec = family.spec
        opened = cls.open_benchmarks(family, spec, benchmarks, max_examples)
        evaluator = Evaluator(
            opened,
            family.tokenizer,
            rungs=spec.budget.rungs,
            device=family.device,
            max_length=_window(family.reader),
            batch_tokens=spec.batch_tokens,
        )
        texts = run_texts(family.reader, spec, folder)
        stitcher = Stitcher(family, texts=texts, healed=HealedFolders(None if folder is None else folder.path))
        return cls(family, stitcher, opened, evaluator, ItemCache(family.n_layers), texts)

    @property
    def known(self) -> Items:
        """What each example gave; it grows with every plan that is scored."""
        return self.cache.known

    @known.setter
    def known(self, items: Items) -> None:
        self.cache.known = items

    @staticmethod
    def open_benchmarks(
        family: Family, spec: RunSpec, benchmarks: Sequence[Benchmark], max_examples: int | None
    ) -> list[OpenBenchmark]:
        """Benchmarks for the family's tokenizer and window. Raises UserError."""
        return open_run_benchmarks(family.reader, spec, benchmarks, max_examples)

    def reorder(self, orders: Mapping[Reading, list[int]]) -> None:
        """Read the objectives' examples in these orders, places in the seeded one (search/example_order.py)."""
        if orders != self.orders:  # the evaluator keeps the seeded ones
            self.benchmarks, self.orders = reordered(self.evaluator.benchmarks, orders), orders

    def opened(self, on: str) -> Sequence[OpenBenchmark]:
        """The benchmarks of this key of the run file; others than the objectives are loaded now. Raises UserError."""
        if on == OBJECTIVES:
            return self.benchmarks
        if on not in self.others:
            spec = self.family.spec
            self.others[on] = self.open_benchmarks(self.family, spec, getattr(spec, on), SELECTION_EXAMPLES)
        return self.others[on]

    def score(
        self,
        plan: StitchPlan,
        budget: int,
        should_stop: Callable[[], bool] | None = None,
        benchmarks: Sequence[OpenBenchmark] | None = None,
        share: bool = False,
    ) -> PlanScores:
        """Score a plan on the first `budget` examples of each benchmark; only examples not yet known are computed.

        For metrics that compare with the dense base, those include its answers, where it was not scored before. share:
        take what other runs computed of it, and let them have it: of plans that other runs will ask for too. Raises
        NonFinite for a model that yields NaN or infinity, Stopped when should_stop() says so.
        """
        started = time.monotonic()
        chosen = self.benchmarks if benchmarks is None else benchmarks
        gaps = self.cache.gaps(plan, budget, chosen)
        answers, stitch_seconds = self.answers(gaps, should_stop, share)
        fresh = self.cache.enter(plan, budget, chosen, list(zip(gaps, answers, strict=True)))
        scores = self.cache.scores(plan, budget, chosen)
        return PlanScores(scores, stitch_seconds, time.monotonic() - started - stitch_seconds, tuple(fresh))

    def answers(
        self, gaps: Sequence[Gap], should_stop: Callable[[], bool] | None = None, share: bool = False
    ) -> tuple[list[list[Any]], float]:
        """What is asked for, in its order, and the seconds that stitching took. Raises NonFinite, Stopped."""
        seconds = 0.0
        found: dict[int, list[Any]] = {}
        for plan in {gap.plan.hash: gap.plan for gap in gaps}.values():
            if share and self.shared is not None:
                found |= self._take(self.shared, plan, gaps)
            places = [p for p, gap in enumerate(gaps) if gap.plan.hash == plan.hash and p not in found]
            if not places:
                continue
            started = time.monotonic()
            model = self.stitcher.stitch(plan, self.between(should_stop))
            seconds += time.monotonic() - started
            spans = [(gaps[place].benchmark, gaps[place].first, gaps[place].end) for place in places]
            is_first = self.evaluator.path is None
            computed = dict(zip(places, self.evaluator.items_of(model, spans, should_stop), strict=True))
            if share and self.shared is not None:
                self._offer(self.shared, [(gaps[place], items) for place, items in computed.items()], is_first)
            found |= computed
        return [found[place] for place in range(len(gaps))], seconds

    def _take(self, shared: Shared, plan: StitchPlan, gaps: Sequence[Gap]) -> dict[int, list[Any]]:
        """By their places, the gaps of this plan that another run has answered.

        The way of scoring is settled by the first model; where that was this one, as it was then.
        """
        if self.evaluator.path is None and (path := shared.take(self._path_key(shared, plan))) is not None:
            self.evaluator.settle(path)
        own = {place: gap for place, gap in enumerate(gaps) if gap.plan.hash == plan.hash}
        known = {
            place: shared.take(self._key(shared, gap))
            for place, gap in own.items()
            if self.evaluator.path is not None or not gap.has_windows
        }
        return {place: items for place, items in known.items() if items is not None}

    def _offer(self, shared: Shared, answers: Sequence[tuple[Gap, list[Any]]], is_first: bool) -> None:
        """Let other runs have a plan's answers, and the way of scoring where its model settled that."""
        if is_first and self.evaluator.path is not None:
            shared.offer(self._path_key(shared, answers[0][0].plan), self.evaluator.path)
        for gap, items in answers:
            shared.offer(self._key(shared, gap), items)

    def _key(self, shared: Shared, gap: Gap) -> str:
        """The name of a gap's answers: with all examples that are computed together with it, and how."""
        chunks = self.evaluator.chunks(gap.benchmark, gap.first, gap.end)
        together = shared.examples(gap.benchmark, chunks[0][0], chunks[-1][1])
        path = self.evaluator.path if gap.has_windows else None
        return shared.key("answers", gap.plan, [together, chunks, gap.first, gap.end, path, self._pack_limit()])

    def _path_key(self, shared: Shared, plan: StitchPlan) -> str:
        read = [shared.examples(benchmark, 0, benchmark.n_examples) for benchmark in self.evaluator.benchmarks]
        return shared.key("way of scoring", plan, read)

    def _pack_limit(self) -> int:
        return self.evaluator.pack_limit(self.stitcher.stitch(StitchPlan.dense(self.family.n_layers)))

    def between(self, should_stop: Callable[[], bool] | None) -> Between:
        """What is called while edits are computed: it tells how far they are, and raises Stopped when it is to stop."""

        def between(what: str, share: float) -> None:
            if should_stop is not None and should_stop():
                raise Stopped
            self.told(what, share)

        return between

    def repaired(self, plan: StitchPlan) -> StitchPlan:
        """The plan with the repair that the run file asks for. Raises UserError where its texts cannot be read."""
        repair = self.family.spec.repairs
        assert repair is not None
        return plan.edited(repair_edit(repair, self.repair_texts(), self.family.spec.seed))

    def repair_texts(self, repair: Repair | None = None) -> Texts:
        """The texts of a repair, or of the run's own, read or written now. Raises UserError."""
        repair, dense = repair or self.family.spec.repairs, StitchPlan.dense(self.family.n_layers)
        assert repair is not None
        return self.texts.named(
            repair.texts, repair.tokens_for(self.family.inner_size), lambda: self.stitcher.stitch(dense)
        )

    def baseline_texts(self, n_tokens: int) -> Texts:
        """So many tokens of what baselines that edit weights read. Raises UserError."""
        dense = StitchPlan.dense(self.family.n_layers)
        return self.texts.named(self.family.spec.baselines_texts, n_tokens, lambda: self.stitcher.stitch(dense))

    def free(self) -> None:
        """Give back what a trial that failed held: tensors of its frames, memory that the device's allocator keeps."""
        gc.collect()
        if self.family.device.type == "cuda":
            torch.cuda.empty_cache()

    def calibration(self, benchmarks: Sequence[OpenBenchmark] | None = None) -> list[dict[str, torch.Tensor]]:
        """The texts that pruning methods look at, in padded batches: of the run's benchmarks, or of others."""
        chosen = self.evaluator.benchmarks if benchmarks is None else benchmarks  # in the seed's order, always
        tokenizer, window = self.family.tokenizer, _window(self.family.reader)
        texts = calibration_batches(chosen, CALIBRATION_TEXTS, tokenizer, window)
        return _batches([text[-window:] for text in texts], self.family.device)

    def influence_orders(self, benchmarks: Sequence[OpenBenchmark] | None = None) -> list[tuple[str, list[int]]]:
        """Layers by rising Block Influence (the order in which to remove those that may be), of base and candidates.

        A candidate that yields no numbers has none. Raises UserError where the base yields none.
        """
        batches = self.calibration(benchmarks)
        orders = []
        for name in (BASE, *self.family.names):
            try:
                order = self._influence_order(name, batches)
                orders.append((name, [layer for layer in order if layer not in self.family.renumbering.fixed]))
            except UserError as problem:
                if name == BASE:
                    raise
                log.warning("%s: %s; the search starts without its order", name, problem)
        return orders

    def _influence_order(self, name: str, batches: Sequence[dict[str, torch.Tensor]]) -> list[int]:
        """All layers of a dense model by rising Block Influence on these texts. Raises UserError for no numbers."""
        model, key = StitchPlan.dense(self.family.n_layers, name), ""
        if self.shared is not None:
            texts = [[batch["input_ids"].tolist(), batch["attention_mask"].sum(1).tolist()] for batch in batches]
            key = self.shared.key("block influence", model, texts)
            if (known := self.shared.take(key)) is not None:
                return list(known)
        order = removal_order(block_influence(self.stitcher.stitch(model), batches))
        if self.shared is not None:
            self.shared.offer(key, order)
        return order


def _batches(texts: list[list[int]], device: torch.device, rows: int = 16) -> list[dict[str, torch.Tensor]]:
    """Token ids as padded batches of `rows` texts of similar length, with their masks."""
    ordered = sorted(texts, key=len)
    return [padded(ordered[start : start + rows], device) for start in range(0, len(ordered), rows)]


def open_run_benchmarks(
    reader: Reader, spec: RunSpec, benchmarks: Sequence[Benchmark], max_examples: int | None
) -> list[OpenBenchmark]:
    """Benchmarks as a run reads them; no model is needed for that.

    Raises UserError, also for a metric that cannot be computed on them.
    """
    opened = open_benchmarks(
        benchmarks,
        reader.tokenizer,
        max_length=_window(reader),
        max_examples=max_examples,
        seed=spec.seed,
        include_path=spec.include_path,
        chat_template=spec.chat_template,
        chat_template_args=spec.chat_template_args,
    )
    for benchmark in opened:
        try_metric(benchmark)
    return opened


def run_texts(reader: Reader, spec: RunSpec, folder: RunFolder | None = None) -> TextReader:
    """Where the edits of a run's plans find their texts; the objectives are opened when they are asked for."""

    def objectives() -> list[OpenBenchmark]:
        return open_run_benchmarks(reader, spec, spec.objectives, spec.budget.max)

    kept_in = None if folder is None else folder.path
    return TextReader(reader.tokenizer, objectives, spec.seed, kept_in, window=_window(reader))


def _window(reader: Reader) -> int:
    """The model's window in tokens as lm-eval's HFLM takes it: the configuration's, else the tokenizer's, else 2048."""
    config = reader.config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    length = reader.tokenizer.model_max_length
    return length if length < 10**9 else 2048
