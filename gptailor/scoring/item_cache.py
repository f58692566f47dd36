"""What every example gave for every plan that was scored: what a score still lacks, and the score once that is there.

It knows benchmarks and no models: whoever computes what is lacking (this process, or workers elsewhere), the answers
are entered here, and a score is always made of the items of examples 0, 1, ... in nested order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gptailor.evaluate.benchmarks import OpenBenchmark
from gptailor.evaluate.metrics import item_beside
from gptailor.evaluate.resampling import aggregation_name, resampled
from gptailor.evaluate.scoring import score_of
from gptailor.plan import StitchPlan
from gptailor.trial import Evaluation, ItemKey, Score, Subject, now

OPTIONS = "options"
"""In a metric's place: the dense base's log-likelihoods of the options, which metrics that compare with it need."""

ORDER = "order"
"""In a metric's place too: the places, in the seeded order, of the examples as the run reads them."""

Items = dict[ItemKey, list[Any]]
"""What each example gave, in nested order."""
Fresh = tuple[ItemKey, int, list[Any]]
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


@dataclass(frozen=True)
class Gap:
    """Examples [first, end) of a benchmark that `plan`'s model has to answer. key: where the answers belong."""

    plan: StitchPlan
    benchmark: OpenBenchmark
    first: int
    end: int
    key: ItemKey

    @property
    def has_windows(self) -> bool:
        """Whether any of them is read by log-likelihoods; others are written."""
        return any(example.windows for example in self.benchmark.examples[self.first : self.end])


@dataclass
class ItemCache:
    """The items of a run. `known` grows with every plan that is scored. n_layers: of the base."""

    n_layers: int
    known: Items = field(default_factory=dict)

    def gaps(self, plan: StitchPlan, budget: int, benchmarks: Sequence[OpenBenchmark]) -> list[Gap]:
        """What has to be answered before the plan can be scored on the first `budget` examples of each benchmark.

        For metrics that compare with the dense base, first what is not known of its answers.
        """
        dense = StitchPlan.dense(self.n_layers)
        options: dict[ItemKey, Gap] = {}
        own: list[Gap] = []
        for benchmark, first, end in self._lacking(plan, budget, benchmarks):
            if benchmark.is_relative:
                key = reading_key(dense, benchmark, OPTIONS)
                known = len(self.known.get(key, []))
                if known < end:
                    options[key] = Gap(dense, benchmark, known, end, key)
            if not (benchmark.is_relative and plan.hash == dense.hash):
                own.append(Gap(plan, benchmark, first, end, items_key(plan, benchmark)))
        return [*options.values(), *own]

    def enter(
        self,
        plan: StitchPlan,
        budget: int,
        benchmarks: Sequence[OpenBenchmark],
        answers: Sequence[tuple[Gap, list[Any]]],
    ) -> list[Fresh]:
        """Take the answers to `gaps(plan, budget, benchmarks)`. Returns what was not known before."""
        dense = StitchPlan.dense(self.n_layers)
        fresh = [
            self._remember(gap.key, gap.first, items) for gap, items in answers if gap.key.metric.startswith(OPTIONS)
        ]
        own = {gap.key: (gap.first, items) for gap, items in answers}
        for benchmark, first, end in self._lacking(plan, budget, benchmarks):
            key = items_key(plan, benchmark)
            since, items = own.get(key, (first, []))
            items = items[first - since :]  # others may have answered the beginning meanwhile
            if benchmark.is_relative:
                theirs = self.known[reading_key(dense, benchmark, OPTIONS)][first:end]
                mine = theirs if plan.hash == dense.hash else items
                items = [item_beside(benchmark.metric, *pair) for pair in zip(mine, theirs, strict=True)]
            fresh.append(self._remember(key, first, items))
        return fresh

    def scores(self, plan: StitchPlan, budget: int, benchmarks: Sequence[OpenBenchmark]) -> tuple[Score, ...]:
        """One a benchmark, of items that are known."""
        return tuple(
            score_of(benchmark, self.known[items_key(plan, benchmark)][: min(budget, benchmark.n_examples)])
            for benchmark in benchmarks
        )

    def _lacking(
        self, plan: StitchPlan, budget: int, benchmarks: Sequence[OpenBenchmark]
    ) -> list[tuple[OpenBenchmark, int, int]]:
        known = [len(self.known.get(items_key(plan, benchmark), [])) for benchmark in benchmarks]
        ends = [min(budget, benchmark.n_examples) for benchmark in benchmarks]
        return [(b, first, end) for b, first, end in zip(benchmarks, known, ends, strict=True) if first < end]

    def _remember(self, key: ItemKey, first: int, items: list[Any]) -> Fresh:
        self.known[key] = self.known.get(key, [])[:first] + items
        return key, first, items


def evaluation_of(
    subject: Subject, config_id: int | None, plan: StitchPlan, benchmark: OpenBenchmark, score: Score, known: Items
) -> Evaluation:
    """A score outside the search as it is stored, with what paired tests need. known: the items behind it."""
    items = known[items_key(plan, benchmark)][: score.n_samples]
    return Evaluation(
        subject,
        config_id,
        benchmark.spec.split,
        score,
        now(),
        plan.hash,
        benchmark.chance,
        aggregation_name(benchmark),
        resampled(benchmark, items),
    )


def items_key(plan: StitchPlan, benchmark: OpenBenchmark) -> ItemKey:
    return ItemKey(plan.hash, benchmark.spec.key, benchmark.spec.metric, benchmark.spec.split)


def reading_key(dense: StitchPlan, benchmark: OpenBenchmark, what: str) -> ItemKey:
    """Where something is stored that metrics of the same examples share: OPTIONS, or their order."""
    of = benchmark.spec
    shots = "" if of.num_fewshot is None else f"@{of.num_fewshot}"
    return ItemKey(dense.hash, of.benchmark, what + shots, of.split)
