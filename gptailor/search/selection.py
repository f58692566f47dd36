"""The selection split: before a plan is called best, the front's best are scored on examples the search never used.

The best of many plans, by a few hundred right-or-wrong answers, is in part the luckiest. A run file's `selection`
names splits that neither the search nor the held-out results use; at the end of the search its most promising plans
and the dense base are scored there, once, and the best of these is the run's choice. What the search's own scores
promised beyond it is the optimism that this removes, and is shown (gptailor/results/scores.py, `choice`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from gptailor.plan import StitchPlan
from gptailor.results import scores
from gptailor.results.story import stored_plans
from gptailor.scoring.plan_scorer import SELECTION, SELECTION_EXAMPLES
from gptailor.scoring.scorer import Scorer
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.writer import RunWriter
from gptailor.trial import DENSE, Evaluation, Subject, now
from gptailor.wording import duration

FINALISTS = 10
"""Plans that are scored again. More would let luck back in, fewer would leave the choice to the search's scores."""


def select(folder: RunFolder, scorer: Scorer, writer: RunWriter, say: Callable[[str], None]) -> None:
    """Score the finalists on the selection splits and say which is chosen. Raises Stopped; what is scored is kept."""
    plans = finalists(folder)
    opened = scorer.opened(SELECTION)
    subjects = {DENSE: StitchPlan.dense(scorer.n_layers)}
    subjects |= {Subject.config(config_id): plan for config_id, plan in plans.items()}
    n_examples, began = sum(benchmark.n_examples for benchmark in opened), time.monotonic()
    say(f"selection: {len(plans)} plans and the dense base, on {n_examples} examples each that the search did not read")
    for done, (subject, plan) in enumerate(subjects.items()):
        if done:
            left = duration((time.monotonic() - began) / done * (len(subjects) - done))
            say(f"selection: {done} of {len(subjects)} scored, about {left} left")
        result = scorer.score(plan, SELECTION_EXAMPLES, SELECTION)
        with writer.batch():
            for key, first, items in result.fresh:
                writer.record_examples(*key, first, items)
            for benchmark, score in zip(opened, result.scores, strict=True):
                split, at = benchmark.spec.split, now()
                evaluation = Evaluation(subject, subject.config_id, split, score, at, plan.hash, benchmark.chance)
                writer.record_evaluation(evaluation)
    if chosen := scores.choice(queries.read_run(folder)):
        say(scores.choice_text(chosen))


def finalists(folder: RunFolder) -> dict[int, StitchPlan]:
    """Up to FINALISTS plans: the front's by mean retention, then the next best off it.

    Of plans that remove the same layers the best alone, as long as there are others.

    Plans of one cut that differ in a few layers' sources score alike, on SmolLM2 to the third decimal: ten of them are
    one finalist, and the choice among them is chance.
    """
    tables = queries.read_run(folder)
    order = scores.searched(tables).front
    believed = scores.calibration(tables)
    ranked = sorted(believed, key=lambda subject: -believed[subject])
    order += [subject.config_id for subject in ranked if subject.config_id is not None]
    plans = stored_plans(tables)
    firsts: dict[frozenset[int], int] = {}
    for config_id in order:
        firsts.setdefault(frozenset(plans[config_id].removed), config_id)
    return {config_id: plans[config_id] for config_id in list(dict.fromkeys([*firsts.values(), *order]))[:FINALISTS]}
