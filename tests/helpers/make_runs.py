"""Believable runs for tests and measurements, written through RunWriter as the engine writes them.

Scores follow the plans: every benchmark has layers it needs (the first and the last most) and a candidate that helps
it, so that fronts, importances and rung correlations show something. `python
tests/helpers/make_runs.py FOLDER [HOW_MANY]` fills a runs folder.
"""

from __future__ import annotations

import json
import math
import random
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gptailor.plan import BASE, Edit, LayerChoice, LayerShares, StitchPlan
from gptailor.results.summary import summarise
from gptailor.spec.files import build_spec
from gptailor.spec.run import RunSpec
from gptailor.store import queries
from gptailor.store.folder import RunFolder, new_run_id
from gptailor.store.writer import RunWriter
from gptailor.trial import (
    DENSE,
    Evaluation,
    Origin,
    Outcome,
    RunRecord,
    RunStatus,
    Score,
    Subject,
    Trial,
    TrialStatus,
)

PERPLEXITY = "word_perplexity"
"""A metric of which less is better: benchmarks called `NAME/word_perplexity` get such scores."""
START = datetime(2026, 11, 1, 8, 0, tzinfo=UTC)
_SIZES = (1000, 1221, 2376, 1838, 500, 1267)
LAYER_PARAMETERS, OTHER_PARAMETERS = 3_540_000, 28_300_000


@dataclass
class _Truth:
    """What a benchmark is made of: chance, the dense score, what each layer is worth, and who helps."""

    name: str
    metric: str
    chance: float
    dense: float
    n_examples: int
    worth: list[float]
    helper: str
    scorer: random.Random = field(repr=False)

    def score(self, plan: StitchPlan, n: int) -> Score:
        lost = sum(self.worth[layer] for layer in plan.removed)
        help_ = sum(0.006 for choice in plan.kept if self.helper in choice.sources)
        hurt = sum(0.002 for choice in plan.kept if choice.sources and self.helper not in choice.sources)
        share = min(1.1, math.exp(-lost) + help_ - hurt)
        n = min(n, self.n_examples)
        if self.metric == PERPLEXITY:
            value = self.dense / max(share, 0.05) * (1 + self.scorer.gauss(0, 0.5 / math.sqrt(n)))
            return Score(self.name, self.metric, value, None, n, higher_is_better=False)
        p = min(0.99, self.chance + (self.dense - self.chance) * share)
        spread = math.sqrt(p * (1 - p) / n)
        value = min(1.0, max(0.0, round((p + self.scorer.gauss(0, spread)) * n) / n))
        return Score(self.name, self.metric, value, spread, n, higher_is_better=True)


def make_run(
    root: str | Path,
    name: str = "smollm2-27pct",
    n_trials: int = 60,
    n_layers: int = 30,
    n_removed: int = 8,
    benchmarks: Sequence[str] = ("piqa_local", "commonsenseqa_local"),
    held_out: Sequence[str] = ("arc_easy_local", "winogrande_local"),
    candidates: Sequence[str] = ("language", "math", "code"),
    seed: int = 0,
    status: RunStatus = RunStatus.FINISHED,
    failures: float = 0.03,
    rungs: tuple[int, ...] = (111, 333, 1000),
    baselines: Sequence[str] = ("block_influence", "random"),
    output_scale: bool = False,
    started: datetime | None = None,
    run_id: str | None = None,
    base_model: str = "models/base",
    selection: Sequence[str] = (),
    fewest_removed: int | None = None,
) -> RunFolder:
    """One run with trials, evaluations, and (for a finished run) its best plan's held-out results.

    `n_trials` trials in Hyperband-like brackets; dense, candidates' and baselines' evaluations. The same arguments give
    the same run, but for its id.

    benchmarks: names, or `name/metric` (`acc_norm` unless said). failures: share of crashed trials, 1.0 = all of them.
    selection: benchmarks by which a finished run chose the plan that is second by the search's own scores; it and the
    first were then judged on all of what is held out, as the dense model was.
    fewest_removed: with it plans leave out from so many layers to n_removed, and the run asks for that range.
    A running or paused run has one unfinished trial. started: by default a fixed day; a live run ends now.
    """
    chance = random.Random(f"{seed}-{name}")
    remove = n_removed if fewest_removed is None else {"from": fewest_removed, "to": n_removed}
    spec = _spec(name, base_model, benchmarks, held_out, candidates, remove, rungs, n_trials, seed, output_scale)
    if selection:
        choosers = [{"benchmark": name, "metric": "acc_norm"} for name in selection]
        spec = build_spec(spec.model_dump(mode="json") | {"selection": choosers})
    truths = {
        b.name: _truth(b.benchmark, b.metric, n_layers, candidates, seed) for b in (*spec.objectives, *spec.held_out)
    }
    objectives = [truths[b.name] for b in spec.objectives]
    live = status in (RunStatus.RUNNING, RunStatus.PAUSED)
    asked, clock = n_trials, _Clock(started or START + timedelta(hours=seed % 100))
    if live:
        n_trials = max(1, n_trials * 2 // 3)
    if status is RunStatus.QUEUED:
        n_trials = 0

    folder = RunFolder.of(root, run_id or new_run_id(name))
    versions = {"gptailor": "0.1.0", "smac": "2.4.1", "torch": "2.13.0", "device": "cpu"}
    record = RunRecord(
        folder.run_id, name, spec.model_dump(mode="json"), spec.base_model, n_layers, n_removed, seed, clock(), versions
    )
    writer = RunWriter.create(folder, record, spec.to_yaml(), clock, summarise)
    dense: dict[str, float] = {}
    with writer.batch():
        if status is not RunStatus.QUEUED:
            clock.tick(3)
            writer.set_status(RunStatus.RUNNING)
            for subject, plan in _subjects(n_layers, n_removed, candidates, baselines, chance):
                for benchmark in (*spec.objectives, *spec.held_out):
                    clock.tick(20)
                    score = truths[benchmark.name].score(plan, rungs[-1])
                    if subject == DENSE:
                        dense[score.name] = score.score
                    writer.record_evaluation(Evaluation(subject, None, benchmark.split, score, clock()))
        best: tuple[float, int, StitchPlan] | None = None
        full: dict[int, StitchPlan] = {}  # judged at the highest rung
        kept: dict[int, float] = {}  # their mean retention
        for trial_id, (config_id, rung, plan, previous) in enumerate(
            _brackets(n_trials, rungs, spec, n_layers, chance)
        ):
            origin = (
                Origin.INITIAL if config_id < asked // 6 else chance.choice((Origin.MODEL, Origin.MODEL, Origin.RANDOM))
            )
            suggest = 0.05 + chance.expovariate(4)
            clock.tick(suggest)
            configuration: dict[str, Any] = {f"removed_{i}": layer for i, layer in enumerate(plan.removed)}
            writer.start_trial(Trial(trial_id, config_id, rungs[rung], seed, origin, configuration, clock(), suggest))
            writer.record_plan(config_id, plan, OTHER_PARAMETERS + LAYER_PARAMETERS * len(plan.kept))
            if live and trial_id == n_trials - 1:
                break
            scores = tuple(truth.score(plan, rungs[rung]) for truth in objectives)
            evaluate = sum(score.n_samples for score in scores) * 0.01 * chance.uniform(0.9, 1.2)
            crashed = chance.random() < failures
            clock.tick(0.1 + evaluate * (chance.random() if crashed else 1))
            if crashed:
                writer.finish_trial(
                    trial_id, Outcome(TrialStatus.CRASHED, clock(), (), 0.1, 0.0, chance.choice(_CAUSES))
                )
                continue
            writer.finish_trial(trial_id, Outcome(TrialStatus.SUCCESS, clock(), scores, 0.1, evaluate))
            fitness = sum(s.score if s.higher_is_better else 1 / s.score for s in scores)
            previous[config_id] = fitness
            if rung == len(rungs) - 1:
                full[config_id] = plan
                shares = [(s, dense[s.name]) for s in scores]
                ratios = [s.score / d if s.higher_is_better else d / s.score for s, d in shares]
                kept[config_id] = sum(ratios) / len(ratios)
            if rung == len(rungs) - 1 and (best is None or fitness > best[0]):
                best = (fitness, config_id, plan)
        if status is RunStatus.FINISHED and selection:
            _choose(writer, spec, truths, full, sorted(kept, key=lambda config: -kept[config]))
        elif status is RunStatus.FINISHED and best is not None:
            for benchmark in spec.held_out:
                score = truths[benchmark.name].score(best[2], truths[benchmark.name].n_examples)
                writer.record_evaluation(Evaluation(Subject.config(best[1]), best[1], benchmark.split, score, clock()))
        if status not in (RunStatus.RUNNING, RunStatus.QUEUED):
            writer.set_status(status, "three trials in a row ran out of memory" if status is RunStatus.FAILED else None)
    return folder


def _choose(
    writer: RunWriter,
    spec: RunSpec,
    truths: Mapping[str, _Truth],
    plans: Mapping[int, StitchPlan],
    ranked: Sequence[int],
) -> None:
    """The selection split prefers the second of the search's plans; both are judged on what is held out."""
    first, second, third = ranked[:3]
    scored = {DENSE: 0.6, Subject.config(first): 0.45, Subject.config(second): 0.54, Subject.config(third): 0.42}
    for subject, value in scored.items():
        config_id = subject.config_id
        for chooser in spec.selection:
            score = Score(chooser.benchmark, chooser.metric, value, 0.02, 500, higher_is_better=True)
            writer.record_evaluation(Evaluation(subject, config_id, chooser.split, score, START))
        for judge in spec.held_out if config_id != third else ():
            plan = StitchPlan.dense(plans[first].n_layers) if config_id is None else plans[config_id]
            score = truths[judge.name].score(plan, truths[judge.name].n_examples)
            writer.record_evaluation(Evaluation(subject, config_id, judge.split, score, START))


_CAUSES = (
    "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    "NonFiniteLogits: layer 7 gave NaN on example 3 of piqa_local",
)


def _spec(
    name: str,
    base_model: str,
    benchmarks: Sequence[str],
    held_out: Sequence[str],
    candidates: Sequence[str],
    remove: object,
    rungs: tuple[int, ...],
    n_trials: int,
    seed: int,
    output_scale: bool,
) -> RunSpec:
    def parts(text: str) -> dict[str, str]:
        benchmark, _, metric = text.partition("/")
        return {"benchmark": benchmark, "metric": metric or "acc_norm"}

    operations = ["remove", *(["select"] if candidates else []), *(["merge"] if len(candidates) > 1 else [])]
    data = {
        "name": name,
        "base_model": base_model,
        "candidates": {candidate: f"models/{candidate}" for candidate in candidates},
        "remove": remove,
        "operations": operations,
        "objectives": [parts(text) for text in benchmarks],
        "held_out": [parts(text) for text in held_out],
        "budget": {"min": rungs[0], "max": rungs[-1], "eta": max(2, round(rungs[-1] / rungs[-2])) if rungs[1:] else 3},
        "trials": max(1, n_trials),
        "seed": seed,
        "device": "cpu",
        "output_scale": [0.8, 1.2] if output_scale else None,
    }
    return build_spec(data)


def _truth(name: str, metric: str, n_layers: int, candidates: Sequence[str], seed: int) -> _Truth:
    draw = random.Random(f"{name}-{n_layers}")  # the same benchmark needs the same layers in every run
    ends = [math.exp(-layer / 1.5) + math.exp(-(n_layers - 1 - layer) / 1.5) for layer in range(n_layers)]
    worth = [(0.02 + 0.06 * draw.random() + 0.8 * end) * 20 / n_layers for end in ends]
    dense = draw.uniform(12, 30) if metric == PERPLEXITY else draw.uniform(0.55, 0.8)
    size = _SIZES[zlib.crc32(name.encode()) % len(_SIZES)]
    helper = draw.choice(list(candidates)) if candidates else BASE
    chance = draw.choice((0.2, 0.25, 0.5))
    return _Truth(name, metric, chance, dense, size, worth, helper, random.Random(f"{seed}-{name}"))


def _plan(spec: RunSpec, n_layers: int, draw: random.Random) -> StitchPlan:
    names = tuple(spec.candidates)
    numbers = spec.removals(n_layers)
    removed = set(draw.sample(range(n_layers), draw.choice(numbers) if len(numbers) > 1 else numbers[0]))
    kept = []
    for layer in range(n_layers):
        if layer in removed:
            continue
        kind = draw.random()
        scale = round(draw.uniform(*spec.output_scale), 3) if spec.output_scale and kind < 0.2 else 1.0
        if len(names) > 1 and kind > 0.75:
            chosen = set(draw.sample(names, draw.randint(2, len(names))))
            sources = tuple(name for name in names if name in chosen)
            kept.append(LayerChoice(layer, sources, "task_arithmetic", round(draw.random(), 3), (), scale))
        elif names and kind > 0.4:
            kept.append(LayerChoice(layer, (draw.choice(names),), output_scale=scale))
        else:
            kept.append(LayerChoice(layer, output_scale=scale))
    return StitchPlan(n_layers, tuple(kept))


def _brackets(
    n_trials: int, rungs: tuple[int, ...], spec: RunSpec, n_layers: int, draw: random.Random
) -> Iterator[tuple[int, int, StitchPlan, dict[int, float]]]:
    """(config_id, rung, plan, where the caller notes how good it was) of successive halving, bracket after bracket."""
    eta, config_id, made, start = spec.budget.eta, 0, 0, 0
    while made < n_trials:
        size = eta ** (len(rungs) - 1 - start)
        fitness: dict[int, float] = {}
        plans = {config_id + i: _plan(spec, n_layers, draw) for i in range(size)}
        config_id += size
        survivors = list(plans)
        for rung in range(start, len(rungs)):
            for config in survivors:
                if made == n_trials:
                    return
                yield config, rung, plans[config], fitness
                made += 1
            alive = [config for config in survivors if config in fitness]
            survivors = sorted(alive, key=lambda config: -fitness[config])[: max(1, len(survivors) // eta)]
        start = (start + 1) % len(rungs)


def _subjects(
    n_layers: int, n_removed: int, candidates: Sequence[str], baselines: Sequence[str], draw: random.Random
) -> Iterator[tuple[Subject, StitchPlan]]:
    yield DENSE, StitchPlan.dense(n_layers)
    for name in candidates:
        yield Subject.candidate(name), StitchPlan.dense(n_layers, name)
    for index, name in enumerate(baselines):
        if index:
            removed = draw.sample(range(n_layers), n_removed)
        else:  # a block in the upper half, as one-shot methods pick it
            first = max(0, n_layers - n_removed - 3)
            removed = list(range(first, first + n_removed))
        yield Subject.baseline(name), StitchPlan.without(removed, n_layers)


class _Clock:
    def __init__(self, start: datetime) -> None:
        self.now = start

    def __call__(self) -> datetime:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def leave_out(folder: RunFolder, config_id: int, *shares: LayerShares) -> None:
    """Let edits have left these shares of a plan's first layers, and all of the others."""
    plans = queries.read_run(folder).plans.set_index("config_id")
    plan = StitchPlan.from_json(json.loads(plans.plan[config_id])).edited(Edit("besa"))
    rest = [LayerShares(1.0, 1.0, 1.0)] * (len(plan.kept) - len(shares))
    writer = RunWriter.open(folder)
    writer.record_plan(config_id, plan, int(plans.n_parameters[config_id]), [*shares, *rest])
    writer.flush()


if __name__ == "__main__":
    names = [
        "piqa",
        "csqa",
        "arc_easy",
        "winogrande",
        "boolq",
        "openbookqa",
        "mmlu",
        "hellaswag",
        "sciq",
        "copa",
        "rte",
    ]
    for index in range(int(sys.argv[2]) if sys.argv[2:] else 100):
        made = make_run(
            sys.argv[1],
            f"large-{index}",
            n_trials=500,
            n_layers=40,
            n_removed=10,
            benchmarks=(*names, "wsc", "cb", f"wikitext/{PERPLEXITY}"),
            seed=index,
        )
        print(made.run_id, flush=True)
