"""The redundancy of a family, measured before any search: which layers look cheap, and where candidates disagree.

Per model: one pass over the calibration texts (redundancy/states.py), and the objectives' scores without each layer in
turn on a few examples, which takes nearly all of the time. Of the candidates: their weights beside the base's
(redundancy/differences.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gptailor.baselines.case import Batch
from gptailor.errors import UserError
from gptailor.evaluate.benchmarks import OpenBenchmark
from gptailor.evaluate.calibration import digest_of
from gptailor.evaluate.metrics import CHOICE_PROB, gold_options
from gptailor.evaluate.resampling import MEAN, aggregation_name
from gptailor.evaluate.scoring import NonFinite
from gptailor.family.models import open_family
from gptailor.launch.events import Event, Say
from gptailor.plan import BASE, StitchPlan
from gptailor.redundancy.differences import Differences, copies, differences
from gptailor.redundancy.states import n_bytes, n_sampled, states_of
from gptailor.results import redundancy as kept
from gptailor.results.frames import redundancy as frames
from gptailor.results.outlook import outlook
from gptailor.results.redundancy import Agreement, ModelFound, Redundancy, Scored, Without
from gptailor.scoring.item_cache import items_key
from gptailor.scoring.plan_scorer import CALIBRATION_TEXTS, PlanScorer, open_run_benchmarks
from gptailor.scoring.provenance import digests_of, refuse_other_models
from gptailor.scoring.removal_speed import counted_here
from gptailor.spec.files import load_spec
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Benchmark
from gptailor.store.folder import RunFolder
from gptailor.trial import now
from gptailor.wording import as_table, count, duration, gigabytes

EXAMPLES = 30
"""Of each objective, scored without each layer."""
OPTIONS_A_TEXT = 1.5
"""Tokens computed to score an example, in units of a calibration text's."""
WORTH_SAYING = 0.02
"""Share of the whole that is done between two words."""


def redundancy(
    spec: RunSpec, say: Say, runs: str | Path, examples: int = EXAMPLES, folder: RunFolder | None = None
) -> Redundancy:
    """Measure it, or find it where it was measured already; it is kept beside the runs, and in the run's `folder`.

    runs: the folder of saved runs. examples: of each objective; 0 leaves their scores out. Raises UserError for models
    or benchmarks that cannot be opened, and where nothing can be written.
    """
    if examples < 0:
        raise UserError(f"--examples {examples}: give 0 or more")
    if folder is not None and folder.exists():
        refuse_other_models(folder, spec)
    weights = kept.named(digests_of(spec).weights)
    say(Event("opening the models and the objectives", 0.0))
    family = open_family(spec)
    n_read = max(CALIBRATION_TEXTS, examples)
    as_asked = open_run_benchmarks(family.reader, spec, spec.objectives, n_read)
    scorer = PlanScorer.of(family, list(map(telling, as_asked)), n_read)
    batches = scorer.calibration()
    texts = digest_of([row[: int(n)].tolist() for b in batches for row, n in _rows(b)])
    file = kept.shared_file(runs, spec)
    found = kept.read(file)
    if found is None or (found.weights, found.texts) != (weights, texts) or found.examples < examples:
        found = _measured(scorer, batches, examples, say)
        found = replace(found, weights=weights, texts=texts)
    is_of_run = folder is not None and kept.shared_file(runs, load_spec(folder.spec)) == file  # not of changed keys
    try:
        for place in (file, *([kept.own_file(folder)] if folder is not None and is_of_run else [])):
            kept.write(found, place)
    except OSError as error:
        raise UserError(f"redundancy: {place} cannot be written: {error.strerror}") from error
    return found


def tell(found: Redundancy, spec: RunSpec, say: Say) -> None:
    """The verdict, what it rests on, and a table by layer; for programs, all that was found."""
    seen = outlook(found, counted_here(spec).n_removed(found.n_layers), spec.operations)
    legend = (
        "kept: what the objectives keep, above guessing, without the layer; BI: Block Influence; far: distance from "
        "the base's layer, of its norm; a~b: cosine between what two candidates changed"
    )
    said = {"verdict": str(seen.verdict), "headline": seen.headline, "reasons": list(seen.reasons)}
    text = "\n".join([seen.text, "", as_table(frames.text(found)), legend])
    say(Event(text, result=said | {"found": kept.to_json(found)}))


def _measured(scorer: PlanScorer, batches: Sequence[Batch], examples: int, say: Say) -> Redundancy:
    family = scorer.family
    names, n_layers = (BASE, *family.names), family.n_layers
    n_texts = sum(len(batch["input_ids"]) for batch in batches)
    n_tokens, sampled = sum(int(batch["attention_mask"].sum()) for batch in batches), n_sampled(batches)
    hidden = family.preflight.hidden_size
    held = n_bytes(n_layers, hidden, n_tokens)
    say(
        Event(
            f"{n_texts} texts of the objectives, {count(n_tokens)} tokens; states of {count(sampled)} of them are "
            f"compared; beside the models about {gigabytes(held)} are held",
            0.0,
        )
    )
    clock = _Clock(say, len(names) * _passes(n_layers, examples, len(scorer.benchmarks)) + len(family.names))
    began = time.monotonic()
    models = {name: _model(scorer, name, batches, examples, clock) for name in names}
    apart = differences(family, lambda layer: clock.done(f"weights of layer {layer}", len(family.names) / n_layers))
    for name, distance in apart.distance.items():
        models[name] = replace(models[name], distance=distance)
    return Redundancy(
        models,
        _agreement(apart),
        weights={},
        texts="",
        n_texts=n_texts,
        n_tokens=n_tokens,
        n_sampled=sampled,
        examples=examples,
        seconds=time.monotonic() - began,
        made_at=now().isoformat(),
    )


def _model(scorer: PlanScorer, name: str, batches: Sequence[Batch], examples: int, clock: _Clock) -> ModelFound:
    dense = StitchPlan.dense(scorer.family.n_layers, name)
    states = states_of(scorer.stitcher.stitch(dense), batches, name)
    clock.done(f"{name}: states of all layers", 1)
    return ModelFound(
        states.influence,
        states.angular,
        states.cosine,
        states.cka,
        _scores(scorer, name, examples, clock) if examples else {},
        copies(scorer.family, name),
    )


def _scores(scorer: PlanScorer, name: str, examples: int, clock: _Clock) -> dict[str, Scored]:
    """By objective: the dense model, and less each layer that can go, where that gives numbers."""
    n_layers, fixed = scorer.family.n_layers, scorer.family.renumbering.fixed
    share = _scoring(1, examples, len(scorer.benchmarks))
    base, whole = StitchPlan.dense(n_layers), StitchPlan.dense(n_layers, name)
    dense = scorer.score(whole, examples).scores
    clock.done(f"{name}: scores of the dense model", share)
    without: list[list[Without | None]] = [[] for _ in dense]
    for layer in range(n_layers):
        scores: list[Without | None] = [None] * len(dense)
        if layer not in fixed and n_layers > 1:
            plan = StitchPlan.without({layer}, n_layers, name)
            with suppress(NonFinite):
                found = scorer.score(plan, examples).scores
                scores = [
                    Without(score.score, _error(scorer, benchmark, plan, whole, examples))
                    for score, benchmark in zip(found, scorer.benchmarks, strict=True)
                ]
        for known, score in zip(without, scores, strict=True):
            known.append(score)
        clock.done(f"{name}: scores without layer {layer}", share)
    return {
        objective.name: Scored(
            score.metric,
            score.higher_is_better,
            benchmark.chance,
            score.score,
            score.stderr,
            _error(scorer, benchmark, whole, base, examples),
            its,
        )
        for objective, score, benchmark, its in zip(
            scorer.family.spec.objectives, dense, scorer.benchmarks, without, strict=True
        )
    }


def _error(
    scorer: PlanScorer, benchmark: OpenBenchmark, one: StitchPlan, other: StitchPlan, examples: int
) -> float | None:
    """Standard error of the difference between two plans' scores on the same examples; None where it is no mean."""
    items = [scorer.known[items_key(plan, benchmark)][:examples] for plan in (one, other)]
    n = len(items[0])
    if aggregation_name(benchmark) != MEAN or n < 2 or None in (*items[0], *items[1]):
        return None
    return float(np.subtract(*np.asarray(items, dtype=float)).std(ddof=1)) / math.sqrt(n)


def telling(benchmark: OpenBenchmark) -> Benchmark:
    """The benchmark by what a few examples tell most of: the right option's probability, where there are options."""
    is_choice = all(task.OUTPUT_TYPE == "multiple_choice" for task in benchmark.tasks)
    has_answers = is_choice and bool(gold_options(benchmark.tasks[0], benchmark.examples[0]))
    return benchmark.spec.model_copy(update={"metric": CHOICE_PROB}) if has_answers else benchmark.spec


def _agreement(apart: Differences) -> list[Agreement]:
    return [Agreement(one, other, cosine) for (one, other), cosine in apart.agreement.items()]


def n_texts_read(n_models: int, n_layers: int, n_objectives: int, examples: int = EXAMPLES) -> float:
    """What all of it takes, in texts that a model reads: for an estimate beforehand."""
    return n_models * _passes(n_layers, examples, n_objectives) * CALIBRATION_TEXTS


def _passes(n_layers: int, examples: int, n_objectives: int) -> float:
    """What one model takes, in passes over the texts."""
    return 1 + _scoring(n_layers + 1, examples, n_objectives)


def _scoring(n_plans: int, examples: int, n_objectives: int) -> float:
    return n_plans * examples * n_objectives * OPTIONS_A_TEXT / CALIBRATION_TEXTS


class _Clock:
    """Says what is done, the share of it, and the time that is left, every so often."""

    def __init__(self, say: Say, total: float) -> None:
        self._say, self._total, self._done = say, total, 0.0
        self._began = time.monotonic()
        self._said = 0.0

    def done(self, what: str, amount: float) -> None:
        self._done += amount
        share = min(1.0, self._done / self._total)
        if share - self._said >= WORTH_SAYING:
            self._said = share
            left = (time.monotonic() - self._began) * (1 - share) / share
            self._say(Event(f"{what}, about {duration(left)} left", share))


def _rows(batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(batch["input_ids"], batch["attention_mask"].sum(dim=1), strict=True)
