"""The search space: what SMAC may choose, and how its choice becomes a stitch plan.

For every layer of the base there are up to four hyperparameters, all always active and without forbidden clauses, so
that every point of the space is a legal plan:

- `removal_i` in [0, 1]: the layers with the highest values are removed, exactly as many as asked. A fixed-size subset
  thus needs no constraint, and moving one value past another swaps two layers. Where a range is asked for, one further
  hyperparameter, `removed`, is how many.
- `source_i`: which set of candidates lends the layer (none: the base; one: selection; several: a merge).
- `factor_i`: the factor of the merge, decoded to two decimals within its range: finer differences are far below the
  noise of a benchmark and would only defeat the cache of merged layers.
- `scale_i`: the output scale, likewise, when the run file asks for one.
- `fold_i` in [-1, 1], when folding is asked for: if the layer is removed and this is above 0, it is the factor by which
  the layer is folded into the nearest kept layer before it (the first kept one, where there is none before).

Several points describe one plan (a removed layer's source does not matter, say); what is compared, stored and scored
is the plan. The published code encodes removal as ordered integers with a thousand forbidden clauses and r!
equivalent encodings instead (auto-merge-llm, strategies/prune.py:264-338).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any

import numpy as np
from ConfigSpace import (
    CategoricalHyperparameter,
    Configuration,
    ConfigurationSpace,
    UniformFloatHyperparameter,
    UniformIntegerHyperparameter,
)
from numpy.typing import NDArray

from gptailor.errors import UserError
from gptailor.plan import BASE, LayerChoice, StitchPlan, evenly, merge_sets
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import SpaceOperation

DECIMALS = 2
"""Resolution of factors and scales."""

SOURCE_WEIGHT = 0.2
"""What a single layer's source is taken to matter to a score, beside its removal: plans that differ in a few sources
score alike to the third decimal on SmolLM2, and with equal weights a search there found fewer and worse cuts
(docs/lab-notes.md)."""

FOLDS = (0.1, 0.3)
"""Factors of folding to start from."""

NUMBER = "removed"
"""The hyperparameter that says how many layers go."""
SIZES = 5
"""Numbers of layers that the initial design cuts at, of a range."""

SourceSet = tuple[str, ...]


class PlanConfiguration(Configuration):
    """ConfigSpace's, known by its text, which is written once.

    SMAC looks for configurations in lists of them, and ConfigSpace would make two dictionaries to compare two.
    """

    @cached_property
    def text(self) -> str:
        return super().__str__()

    def __str__(self) -> str:
        return self.text

    def __eq__(self, other: object) -> bool:
        return self.text == other.text if isinstance(other, PlanConfiguration) else NotImplemented

    __hash__ = Configuration.__hash__


class PlanConfigurationSpace(ConfigurationSpace):
    """ConfigSpace's, of such configurations."""

    def sample_configuration(self, size: int | None = None) -> Any:
        drawn = super().sample_configuration(size)
        if isinstance(drawn, list):
            return [PlanConfiguration(self, vector=one.get_array()) for one in drawn]
        return PlanConfiguration(self, vector=drawn.get_array())


@dataclass(frozen=True)
class PlanSpace:
    """The space of plans of one run.

    removals: the numbers of layers that a plan may leave out. `source_sets[0]` is the base; the order of the rest is
    the run file's. fixed: layers that stay in every plan.
    """

    n_layers: int
    removals: range
    source_sets: tuple[SourceSet, ...]
    method: str
    parameters: tuple[tuple[str, float], ...]
    factor_range: tuple[float, float] | None  # None: no merges in this space
    scale_range: tuple[float, float] | None
    seed: int
    folds: bool = False
    fixed: frozenset[int] = frozenset()

    @property
    def n_removed(self) -> int:
        """Layers that go, at most."""
        return self.removals[-1]

    @property
    def has_range(self) -> bool:
        """Whether plans differ in how many layers go."""
        return len(self.removals) > 1

    @cached_property
    def configspace(self) -> ConfigurationSpace:
        """ConfigSpace's view. Hyperparameters are added layer by layer; `columns` says where each kind sits."""
        space = PlanConfigurationSpace(name="stitch plans", seed=self.seed)
        hyperparameters: list[Any] = []
        for i in range(self.n_layers):
            if self.n_removed:
                hyperparameters.append(UniformFloatHyperparameter(f"removal_{i}", 0.0, 1.0))
            if len(self.source_sets) > 1:
                names = [set_name(sources) for sources in self.source_sets]
                hyperparameters.append(CategoricalHyperparameter(f"source_{i}", names, default_value=names[0]))
            if self.factor_range is not None and self.factor_range[0] < self.factor_range[1]:
                hyperparameters.append(UniformFloatHyperparameter(f"factor_{i}", *self.factor_range))
            if self.scale_range is not None and self.scale_range[0] < self.scale_range[1]:
                hyperparameters.append(UniformFloatHyperparameter(f"scale_{i}", *self.scale_range))
            if self.folds:
                hyperparameters.append(UniformFloatHyperparameter(f"fold_{i}", -1.0, 1.0))
        if self.has_range:
            hyperparameters.append(UniformIntegerHyperparameter(NUMBER, self.removals[0], self.removals[-1]))
        space.add(*hyperparameters)
        return space

    @cached_property
    def columns(self) -> dict[str, NDArray[np.intp]]:
        """Where in a configuration's vector each kind of hyperparameter sits, by layer; absent kinds are left out."""
        index = self.configspace.index_of
        kinds = {name.rsplit("_", 1)[0] for name in self.configspace if name != NUMBER}
        return {kind: np.array([index[f"{kind}_{i}"] for i in range(self.n_layers)]) for kind in sorted(kinds)}

    def decode(self, configuration: Mapping[str, Any]) -> StitchPlan:
        """The plan that a configuration (a mapping of hyperparameter to value) describes."""
        configuration = dict(configuration)  # ConfigSpace checks every single look-up otherwise: 10 ms a plan
        wishes = [float(configuration.get(f"removal_{i}", 0.0)) for i in range(self.n_layers)]
        gone = self._removed(wishes, int(configuration.get(NUMBER, self.n_removed)))
        kept = []
        for i in range(self.n_layers):
            if i not in gone:
                sources = parse_set(str(configuration.get(f"source_{i}", BASE)))
                factor = configuration.get(f"factor_{i}", self.factor_range[0] if self.factor_range else None)
                kept.append(self.choice(i, sources, factor, configuration.get(f"scale_{i}", self._fixed_scale)))
        return folded(
            StitchPlan(self.n_layers, tuple(kept)), {i: float(configuration.get(f"fold_{i}", 0.0)) for i in gone}
        )

    def encode(self, plan: StitchPlan) -> PlanConfiguration:
        """The plan's own configuration: `decode(encode(plan)) == plan`. UserError if the space lacks the plan."""
        self._check_within(plan)
        kept = {choice.layer: choice for choice in plan.kept}
        values: dict[str, Any] = {}
        for name, hyperparameter in self.configspace.items():
            if name == NUMBER:
                values[name] = len(plan.removed)
                continue
            kind, _, index = name.rpartition("_")
            choice = kept.get(int(index))
            if kind == "removal":
                values[name] = 0.25 if choice else 0.75
            elif kind == "fold":
                values[name] = plan.folded.get(int(index), (0, -0.5))[1]
            elif choice is None:
                values[name] = hyperparameter.default_value
            elif kind == "source":
                values[name] = set_name(choice.sources)
            elif kind == "factor":
                values[name] = (
                    hyperparameter.default_value if choice.factor is None else _within(hyperparameter, choice.factor)
                )
            else:
                values[name] = _within(hyperparameter, choice.output_scale)
        return PlanConfiguration(self.configspace, values=values)

    def choice(self, layer: int, sources: SourceSet, factor: float | None, scale: float = 1.0) -> LayerChoice:
        """One kept layer of this space, its factor and scale at the space's resolution."""
        scale = _rounded(scale, self.scale_range or (1.0, 1.0))
        if len(sources) < 2:
            return LayerChoice(layer, sources, output_scale=scale)
        assert factor is not None and self.factor_range is not None, "a merge needs a factor"
        return LayerChoice(layer, sources, self.method, _rounded(factor, self.factor_range), self.parameters, scale)

    def features(self, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the surrogate sees of configurations (n x d, ConfigSpace's unit-scaled vectors): the decoded plans.

        Per layer: removed or not, which candidates lend it, the factor where it is merged, the scale where there is
        one, the factor by which it is folded; then how many layers each candidate lends, how long the longest gap is
        and, where plans differ in it, how many layers go. Equal plans have equal features, which raw vectors have not.
        Sources of single layers are weighed less, which a linear model with one prior for all takes for smaller
        effects.
        """
        vectors = np.atleast_2d(vectors)
        removed = self.removed_mask(vectors)
        blocks = [removed.astype(float)]
        kept = ~removed
        if "source" in self.columns:
            chosen = vectors[:, self.columns["source"]].astype(int)
            lends = self._membership[chosen] & kept[:, :, None]  # n x layers x candidates
            blocks += [SOURCE_WEIGHT * lends[:, :, k] for k in range(lends.shape[2])]
            blocks.append(lends.sum(axis=1).astype(float))
            merged = lends.sum(axis=2) > 1
            if "factor" in self.columns and self.factor_range is not None:
                factors = _all_rounded(vectors[:, self.columns["factor"]], self.factor_range)
                blocks.append(SOURCE_WEIGHT * np.where(merged, factors, 0.0))
        if "scale" in self.columns and self.scale_range is not None:
            scales = _all_rounded(vectors[:, self.columns["scale"]], self.scale_range)
            blocks.append(np.where(kept, scales, 0.0))
        if "fold" in self.columns:
            folds = np.clip(2 * vectors[:, self.columns["fold"]] - 1, 0.0, 1.0)
            blocks.append(np.where(removed, np.round(folds, DECIMALS), 0.0))
        blocks.append(_longest_run(removed)[:, None])
        if self.has_range:
            blocks.append(removed.sum(axis=1, keepdims=True) / self.n_layers)
        return np.concatenate(blocks, axis=1)

    def removed_mask(self, vectors: NDArray[np.float64]) -> NDArray[np.bool_]:
        """n x layers: which layers each configuration vector removes."""
        mask = np.zeros((len(vectors), self.n_layers), dtype=bool)
        if self.n_removed:
            wishes = vectors[:, self.columns["removal"]].copy()
            wishes[:, sorted(self.fixed)] = -1.0
            order = np.argsort(-wishes, axis=1, kind="stable")
            np.put_along_axis(mask, order, np.arange(self.n_layers) < self.numbers(vectors)[:, None], axis=1)
        return mask

    def numbers(self, vectors: NDArray[np.float64]) -> NDArray[np.intp]:
        """How many layers each configuration vector removes."""
        if not self.has_range:
            return np.full(len(vectors), self.n_removed)
        return np.asarray(self.configspace[NUMBER].to_value(vectors[:, self.number_column])).astype(np.intp)

    def set_numbers(self, vectors: NDArray[np.float64], rows: NDArray[np.intp], numbers: NDArray[np.intp]) -> None:
        """Let these rows of configuration vectors remove so many layers, in place."""
        vectors[rows, self.number_column] = self.configspace[NUMBER].to_vector(numbers)

    @cached_property
    def number_column(self) -> int:
        """Where in a vector the number of layers is that go."""
        return int(self.configspace.index_of[NUMBER])

    @property
    def _fixed_scale(self) -> float:
        return self.scale_range[0] if self.scale_range else 1.0

    @cached_property
    def _membership(self) -> NDArray[np.bool_]:
        """source sets x candidates."""
        names = sorted({name for sources in self.source_sets for name in sources})
        return np.array([[name in sources for name in names] for sources in self.source_sets])

    def _removed(self, values: Sequence[float], number: int) -> set[int]:
        order = sorted(set(range(self.n_layers)) - self.fixed, key=lambda i: (-values[i], i))
        return set(order[:number])

    def _check_within(self, plan: StitchPlan) -> None:
        if plan.n_layers != self.n_layers or len(plan.removed) not in self.removals:
            asked = f"{self.removals[0]} to {self.n_removed}" if self.has_range else f"{self.n_removed}"
            raise UserError(
                f"plan removes {len(plan.removed)} of {plan.n_layers} layers; this run removes {asked} of "
                f"{self.n_layers}"
            )
        if plan.edits:
            raise UserError("the plan edits weights, which a search does once it has chosen")
        if gone := self.fixed.intersection(plan.removed):
            raise UserError(f"layers {sorted(gone)} stay in every plan of this base")
        for choice in plan.kept:
            if choice.sources not in self.source_sets:
                raise UserError(f"layer {choice.layer}: {set_name(choice.sources)} is not among this run's sources")
            plain = replace(choice, folds=())
            if plain != self.choice(choice.layer, choice.sources, choice.factor, choice.output_scale):
                raise UserError(f"layer {choice.layer}: {choice} is not at this run's method or resolution")
        factors = {layer: factor for layer, (_, factor) in plan.folded.items()}
        plain_plan = StitchPlan(plan.n_layers, tuple(replace(choice, folds=()) for choice in plan.kept))
        if factors and (not self.folds or folded(plain_plan, factors) != plan):
            raise UserError("the plan folds layers in a way that this run does not")


def build_space(
    spec: RunSpec,
    n_layers: int,
    merge_counts: tuple[int, int | None] = (2, None),
    fixed: frozenset[int] = frozenset(),
) -> PlanSpace:
    """The space of a run over a base of `n_layers`.

    merge_counts: how few and how many candidates the method merges. fixed: layers that no model of this architecture
    can do without.
    """
    names, operations = tuple(spec.candidates), set(spec.operations)
    sets: list[SourceSet] = [()]
    if SpaceOperation.SELECT in operations:
        sets += [(name,) for name in names]
    if SpaceOperation.MERGE in operations:
        sets += [s for s in merge_sets(names) if merge_counts[0] <= len(s) <= (merge_counts[1] or len(s))]
    merges = any(len(sources) > 1 for sources in sets)
    return PlanSpace(
        n_layers=n_layers,
        removals=spec.removals(n_layers),
        source_sets=tuple(sets),
        method=spec.merge.method,
        parameters=tuple(sorted((key, float(value)) for key, value in spec.merge.parameters.items())),
        factor_range=spec.merge.factor if merges else None,
        scale_range=spec.output_scale,
        seed=spec.seed,
        folds=SpaceOperation.FOLD in operations,
        fixed=fixed,
    )


def folded(plan: StitchPlan, factors: Mapping[int, float]) -> StitchPlan:
    """The plan with removed layers folded into the kept layers before them; factors of 0 or less leave them out."""
    into: dict[int, list[tuple[int, float]]] = {}
    kept = [choice.layer for choice in plan.kept]
    for layer, value in sorted(factors.items()):
        factor = _rounded(min(value, 1.0), (0.0, 1.0)) if value > 0 else 0.0
        if factor > 0:
            into.setdefault(max((k for k in kept if k < layer), default=kept[0]), []).append((layer, factor))
    if not into:
        return plan
    return StitchPlan(plan.n_layers, tuple(replace(c, folds=tuple(into.get(c.layer, ()))) for c in plan.kept))


def initial_design(space: PlanSpace, influence_orders: Sequence[tuple[str, Sequence[int]]]) -> list[StitchPlan]:
    """Plans to start from, the most promising first, without repeats.

    influence_orders: for the base and for each candidate, its name and its layers by rising Block Influence (the
    one-shot order of removal). First each model less its own pick, then less the picks of the others: SmolLM2's
    language candidate keeps 0.464 held-out less the base's pick, and 0.453 less its own. Then merges, as in the
    published start of the search (removal orders x candidate sets x factors, for 3 candidates and middle layers only:
    auto-merge-llm, strategies/prune.py:360-470), for any number.

    Of a range of sizes, the design begins with the base's own pick at the middle one, the fewest and the most, then
    goes on with all models at each of SIZES of them, in turns.
    """
    by_size = [_design_at(space, number, influence_orders) for number in sizes(space)]
    firsts = [plans[0] for plans in by_size[:3]]
    in_turns = [plan for plans in zip_longest(*by_size) for plan in plans if plan is not None]
    return list(_distinct([*firsts, *in_turns]))


def sizes(space: PlanSpace) -> list[int]:
    """Numbers of layers that the initial design cuts at: the middle of the range, its ends, then those between."""
    found = evenly(space.removals, SIZES)
    middle = found[len(found) // 2]
    return list(dict.fromkeys([middle, found[0], found[-1], *found]))


def _design_at(
    space: PlanSpace, number: int, influence_orders: Sequence[tuple[str, Sequence[int]]]
) -> list[StitchPlan]:
    """The design's plans less so many layers, the most promising first."""
    plans = _one_shot_plans(space, number, influence_orders)
    if space.folds:
        plans += [folded(cut, dict.fromkeys(cut.removed, factor)) for factor in FOLDS for cut in tuple(plans)]
    single = [sources for sources in space.source_sets if len(sources) < 2]
    merged = [sources for sources in reversed(space.source_sets) if len(sources) > 1]
    picks = [tuple(order[:number]) for _, order in influence_orders]
    for cuts in (picks, _block_orders(space, number)):
        plans += [_uniform_plan(space, removed, sources, None) for removed in cuts for sources in single]
        for factor in _factors(space.factor_range):
            plans += [_uniform_plan(space, removed, sources, factor) for sources in merged for removed in cuts]
    return plans


def set_name(sources: SourceSet) -> str:
    return "+".join(sources) or BASE


def parse_set(name: str) -> SourceSet:
    return () if name == BASE else tuple(name.split("+"))


def _one_shot_plans(space: PlanSpace, number: int, orders: Sequence[tuple[str, Sequence[int]]]) -> list[StitchPlan]:
    """Block Influence's picks on the base and on each candidate, each with its own layers."""
    plans = []
    for name, order in orders:
        sources = () if name == BASE else (name,)
        if sources in space.source_sets:
            plans.append(_uniform_plan(space, order[:number], sources, None))
    return plans


def _uniform_plan(space: PlanSpace, removed: Iterable[int], sources: SourceSet, factor: float | None) -> StitchPlan:
    """Every kept layer from the same sources, unscaled, or scaled as little as the space allows."""
    gone = set(removed)
    return StitchPlan(
        space.n_layers, tuple(space.choice(i, sources, factor) for i in range(space.n_layers) if i not in gone)
    )


def _block_orders(space: PlanSpace, n_removed: int) -> list[tuple[int, ...]]:
    """Contiguous blocks: up to the last layer but one, up to the last, and centred on the third quarter's start.

    Published plans remove middle-to-late layers (auto-merge-llm, search_config); the last one is usually worth keeping.
    """
    free = sorted(set(range(space.n_layers)) - space.fixed)
    starts = [len(free) - 1 - n_removed, len(free) - n_removed, round(0.625 * len(free) - n_removed / 2)]
    legal = [min(max(start, 0), len(free) - n_removed) for start in starts]
    return [tuple(free[start : start + n_removed]) for start in dict.fromkeys(legal)]


def _factors(interval: tuple[float, float] | None) -> list[float]:
    """Factors to start from, those inside only: the published plans' 0.4-0.7 first, then towards the range's ends."""
    if interval is None:
        return []
    low, high = interval
    inside = [factor for factor in (0.5, 0.7, 0.3, 0.9, 0.1) if low <= factor <= high]
    return inside or [round((low + high) / 2, DECIMALS)]


def _rounded(value: float, interval: tuple[float, float]) -> float:
    """To the space's resolution, and not out of the range: its ends may be finer. Rounding twice changes nothing."""
    low, high = interval
    return min(max(round(min(max(float(value), low), high), DECIMALS), low), high)


def _all_rounded(units: NDArray[np.float64], interval: tuple[float, float]) -> NDArray[np.float64]:
    """Shares of an interval, each that of the value which it comes to at the space's resolution."""
    low, high = interval
    if high == low:
        return np.zeros_like(units)
    values = np.clip(np.round(low + units * (high - low), DECIMALS), low, high)
    found: NDArray[np.float64] = (values - low) / (high - low)
    return found


def _within(hyperparameter: Any, value: float) -> float:
    """The value, not beyond the ends that ConfigSpace keeps: it rounds them to 13 decimals."""
    return min(max(value, hyperparameter.lower), hyperparameter.upper)


def _distinct(plans: Iterable[StitchPlan]) -> Iterator[StitchPlan]:
    seen: set[str] = set()
    for plan in plans:
        if plan.hash not in seen:
            seen.add(plan.hash)
            yield plan


def _longest_run(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Longest run of removed neighbours in each row."""
    longest = np.zeros(len(mask))
    current = np.zeros(len(mask))
    for column in mask.T:
        current = np.where(column, current + 1, 0)
        longest = np.maximum(longest, current)
    return longest
