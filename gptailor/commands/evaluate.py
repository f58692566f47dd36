"""Held-out evaluation: dense base, candidates, one-shot cuts, best plan and front on benchmarks that no search saw.

Each score is written as soon as it is there, so an evaluation that is stopped goes on where it was: what is stored is
not computed again. It runs on the engine's own parts, thus with the engine's very scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from gptailor.commands.subjects import find_subjects, plans_of
from gptailor.errors import UserError
from gptailor.launch.engine import EngineLock
from gptailor.launch.events import Event, Say
from gptailor.launch.process import began
from gptailor.results.summary import summarise
from gptailor.scoring.item_cache import evaluation_of
from gptailor.scoring.plan_scorer import PlanScorer
from gptailor.scoring.provenance import Provenance, without
from gptailor.scoring.shared import Shared
from gptailor.spec import HeldOut, RunSpec
from gptailor.stopwatch import Part, Stopwatch
from gptailor.store import queries
from gptailor.store.asked import spec_of
from gptailor.store.folder import RunFolder
from gptailor.store.writer import RunWriter
from gptailor.wording import now_and_then

DEFAULT_SUBJECTS = ("dense", "candidates", "baselines", "best", "front")
"""The best is not always of the front: the selection split may choose another."""


def evaluate(
    folder: RunFolder,
    say: Say,
    subjects: Sequence[str] = DEFAULT_SUBJECTS,
    benchmarks: Sequence[str] = (),
    examples: int | None = None,
) -> None:
    """Score subjects on the run file's held-out benchmarks (or those of them that are named), on `examples` or all.

    Raises UserError: no such subject or benchmark, other models than the run's, or its engine is at work (a run has one
    writer at a time).
    """
    spec = spec_of(folder)
    if examples is not None and examples < 1:
        raise UserError(f"--examples {examples}: give 1 or more, or leave it out for all")
    chosen = _chosen(spec, benchmarks)
    asked = find_subjects(folder, subjects)
    with EngineLock(folder):
        writer = RunWriter.open(folder, summarise=summarise)
        writer.watch = Stopwatch(began(), Part.START)
        provenance = Provenance(folder, spec, writer, lambda text: say(Event(text)))
        with writer.watch.of(Part.LOADING):
            provenance.models()
            plan_scorer = PlanScorer.open(spec, chosen, max_examples=examples, folder=folder)
            plan_scorer.told = now_and_then(lambda text: say(Event(text)))
            plan_scorer.shared = Shared(folder, provenance.known)
            plan_scorer.known = without(queries.load_examples(folder), provenance.judges(plan_scorer.benchmarks))
        writer.watch.turn_to(Part.HELD_OUT)
        done, total = 0, len(asked) * len(plan_scorer.benchmarks)
        for one, plan in plans_of(asked, plan_scorer, spec):
            plan_scorer.stitcher.check(plan)
            for benchmark in plan_scorer.benchmarks:
                result = plan_scorer.score(plan, examples or benchmark.n_examples, None, [benchmark], share=True)
                with writer.batch():
                    for key, first, items in result.fresh:
                        writer.record_examples(*key, first, items)
                    score = result.scores[0]
                    known = plan_scorer.known
                    writer.record_evaluation(evaluation_of(one.subject, one.config_id, plan, benchmark, score, known))
                error = f" ±{score.stderr:.4f}" if score.stderr is not None else ""
                found = f"{score.benchmark} {score.metric} {score.score:.4f}{error} (n {score.n_samples})"
                done += 1
                told = {"subject": str(one.subject), "split": benchmark.spec.split, **asdict(score)}
                say(Event(f"{one.subject}  {found}", done / total, told))
            writer.record_seconds()
        provenance.models()
        plan_scorer.shared.publish()


def _chosen(spec: RunSpec, names: Sequence[str]) -> list[HeldOut]:
    known = {name for judge in spec.held_out for name in (judge.benchmark, judge.key)}
    if not known:
        raise UserError("held_out: the run file names no benchmark to judge by; add some under held_out")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(
            f"--benchmarks {', '.join(unknown)}: not held out in this run; it has {', '.join(sorted(known))}"
        )
    return [judge for judge in spec.held_out if not names or {judge.benchmark, judge.key} & set(names)]
