"""The selection split: before a plan is called best, the front's best are scored on examples the search never used.

The best of many plans, by a few hundred right-or-wrong answers, is in part the luckiest. A run file's `selection`
names splits that neither the search nor the held-out results use; at the end of the search its most promising plans
and the dense base are scored there, once, and the best of these is the run's choice. What the search's own scores
promised beyond it is the optimism that this removes, and is shown (gptailor/results/scores.py, `choice`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from gptailor.errors import UserError
from gptailor.evaluate.scoring import NonFinite
from gptailor.plan import StitchPlan, evenly
from gptailor.results import scores, statistics
from gptailor.results.subjects import stored_plans
from gptailor.scoring.item_cache import evaluation_of
from gptailor.scoring.plan_scorer import OBJECTIVES, SELECTION, SELECTION_EXAMPLES
from gptailor.scoring.provenance import Provenance, without
from gptailor.scoring.scorer import Scorer
from gptailor.spec.run import RunSpec
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.writer import RunWriter
from gptailor.trial import DENSE, REPAIRED, Subject
from gptailor.wording import duration

REPAIRED_FINALISTS = 3
"""Of the finalists, how many are repaired as well: a repair takes longer than a score."""
FINALISTS = 10
"""Plans that are scored again. More would let luck back in, fewer would leave the choice to the search's scores."""


def select(
    folder: RunFolder,
    spec: RunSpec,
    scorer: Scorer,
    writer: RunWriter,
    provenance: Provenance,
    say: Callable[[str], None],
) -> None:
    """Score the finalists on the selection splits and say which is chosen.

    Raises Stopped (what is scored is kept), and UserError where the models are not those that the search began with.
    """
    provenance.models()
    plans = finalists(folder)
    opened = scorer.opened(SELECTION)
    scorer.cache.known = without(scorer.cache.known, provenance.judges(opened))
    subjects = {DENSE: StitchPlan.dense(scorer.n_layers)}
    subjects |= {Subject.config(config_id): plan for config_id, plan in plans.items()}
    n_examples, began = sum(benchmark.n_examples for benchmark in opened), time.monotonic()
    say(f"selection: {len(plans)} plans and the dense base, on {n_examples} examples each that the search did not read")
    for done, (subject, plan) in enumerate(subjects.items()):
        if done:
            left = duration((time.monotonic() - began) / done * (len(subjects) - done))
            say(f"selection: {done} of {len(subjects)} scored, about {left} left")
        try:
            result = scorer.score(plan, SELECTION_EXAMPLES, SELECTION)
        except (NonFinite, UserError) as problem:
            if subject == DENSE:
                raise
            say(f"selection: {subject} is left out: {problem}")
            continue
        with writer.batch():
            for key, first, items in result.fresh:
                writer.record_examples(*key, first, items)
            for benchmark, score in zip(opened, result.scores, strict=True):
                known = scorer.cache.known
                writer.record_evaluation(evaluation_of(subject, subject.config_id, plan, benchmark, score, known))
    if spec.repairs is not None:
        repair_finalists(folder, spec, scorer, writer, say)
    if chosen := scores.choice(queries.read_run(folder)):
        say(scores.choice_text(chosen))


def repair_finalists(
    folder: RunFolder, spec: RunSpec, scorer: Scorer, writer: RunWriter, say: Callable[[str], None]
) -> None:
    """Repair the best of the finalists, and judge each on the selection splits beside itself unrepaired.

    Only a repaired plan that is better there by more than noise is scored on the objectives too, without which it is
    never the run's choice. Raises Stopped.
    """
    tables = queries.read_run(folder)
    plans = stored_plans(tables)
    for config_id in _to_repair(tables):
        try:
            repaired = scorer.repaired(plans[config_id])
            say(f"selection: plan {config_id} is repaired ({repaired.edits[-1].describe()})")
            with writer.batch():
                writer.record_plan(REPAIRED + config_id, repaired, scorer.n_parameters(repaired))
            _record(writer, scorer, REPAIRED + config_id, repaired, SELECTION, SELECTION_EXAMPLES)
        except (NonFinite, UserError) as problem:
            say(f"selection: plan {config_id} cannot be repaired: {problem}")
            continue
        answers = queries.answers_of(folder, [plans[config_id].hash, repaired.hash])
        test = statistics.repaired(scores.judged(queries.read_run(folder), SELECTION), answers, config_id)
        if test is not None:
            say(f"selection: {test.text}")
            if test.is_better:
                try:
                    _record(writer, scorer, REPAIRED + config_id, repaired, OBJECTIVES, spec.budget.max)
                except (NonFinite, UserError) as problem:
                    say(f"selection: plan {config_id}, repaired, cannot be chosen: {problem}")


def _to_repair(tables: queries.RunTables) -> list[int]:
    """The best finalists by the selection splits; of a range of sizes, the best of sizes that are far apart."""
    ranked = scores.averages(scores.judged(tables, SELECTION)).sort_values("retention", ascending=False)
    configs = [int(config) for config in ranked["config_id"].dropna() if config < REPAIRED]
    of_sizes = [int(config) for config in scores.best_of_sizes(tables)["config_id"] if config in configs]
    far_apart = [of_sizes[place] for place in evenly(range(len(of_sizes)), REPAIRED_FINALISTS)] if of_sizes else []
    return list(dict.fromkeys([*far_apart, *configs]))[:REPAIRED_FINALISTS]


def _record(writer: RunWriter, scorer: Scorer, config_id: int, plan: StitchPlan, on: str, budget: int) -> None:
    """Score a plan on the benchmarks of this key, as an evaluation. Raises Stopped, NonFinite, UserError."""
    result, opened = scorer.score(plan, budget, on), scorer.opened(on)
    with writer.batch():
        for key, first, items in result.fresh:
            writer.record_examples(*key, first, items)
        for benchmark, score in zip(opened, result.scores, strict=True):
            subject, known = Subject.config(config_id), scorer.cache.known
            writer.record_evaluation(evaluation_of(subject, config_id, plan, benchmark, score, known))


def finalists(folder: RunFolder) -> dict[int, StitchPlan]:
    """Up to FINALISTS plans: the front's by mean retention, then the next best off it.

    Of plans that remove the same layers the best alone, as long as there are others. Where the run asks for a range of
    sizes, the best of each size are among them, however many those are.

    Plans of one cut that differ in a few layers' sources score alike, on SmolLM2 to the third decimal: ten of them are
    one finalist, and the choice among them is chance.
    """
    tables = queries.read_run(folder)
    found = scores.searched(tables)
    of_sizes = [int(config) for config in scores.best_of_sizes(tables, found)["config_id"] if config < REPAIRED]
    order = [*of_sizes, *found.front]
    believed = scores.calibration(tables)
    ranked = sorted(believed, key=lambda subject: -believed[subject])
    order += [one.config_id for one in ranked if one.config_id is not None and one.config_id < REPAIRED]
    plans = stored_plans(tables)
    firsts: dict[frozenset[int], int] = {}
    for config_id in order:
        firsts.setdefault(frozenset(plans[config_id].removed), config_id)
    chosen = list(dict.fromkeys([*of_sizes, *firsts.values(), *order]))[: max(FINALISTS, len(of_sizes))]
    return {config_id: plans[config_id] for config_id in chosen}
