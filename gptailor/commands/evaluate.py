"""Held-out evaluation: dense base, candidates, one-shot cuts, best plan and front on benchmarks that no search saw.

Each score is written as soon as it is there, so an evaluation that is stopped goes on where it was: what is stored is
not computed again. It runs on the engine's own parts, thus with the engine's very scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from gptailor.commands.repaired import Repairs
from gptailor.commands.subjects import Asked, find_subjects, plans_of
from gptailor.errors import UserError
from gptailor.evaluate.scoring import NonFinite
from gptailor.launch.engine import EngineLock
from gptailor.launch.events import Event, Say
from gptailor.launch.process import began
from gptailor.plan import StitchPlan
from gptailor.results import scores
from gptailor.results.frames import held_out
from gptailor.results.subjects import stored_subjects
from gptailor.results.summary import summarise
from gptailor.scoring.item_cache import evaluation_of
from gptailor.scoring.plan_scorer import PlanScorer
from gptailor.scoring.provenance import Provenance, without
from gptailor.scoring.shared import Shared
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import HeldOut, Repair
from gptailor.stitch.edits.registry import refuse_repair
from gptailor.stitch.stitcher import Stitcher
from gptailor.stopwatch import Part, Stopwatch
from gptailor.store import queries
from gptailor.store.asked import spec_of
from gptailor.store.folder import RunFolder
from gptailor.store.writer import RunWriter
from gptailor.trial import KEPT, Subject, SubjectKind, next_number
from gptailor.wording import now_and_then

REPAIRED_SUBJECTS = ("best",)
DEFAULT_SUBJECTS = ("dense", "candidates", "baselines", "best", "front")
"""The best is not always of the front: the selection split may choose another."""


def evaluate(
    folder: RunFolder,
    say: Say,
    subjects: Sequence[str] = (),
    benchmarks: Sequence[str] = (),
    examples: int | None = None,
    repair: Repair | None = None,
) -> None:
    """Score subjects on the run file's held-out benchmarks (or those of them that are named), on `examples` or all.

    subjects: none: DEFAULT_SUBJECTS, or the best plan where there is a repair. repair: subjects are shorter plans; each
    is repaired, kept as a subject of its own, and judged beside what it was. Raises UserError: no such subject or
    benchmark, a plan that cannot be repaired, other models than the run's, or its engine is at work (a run has one
    writer at a time).
    """
    spec = spec_of(folder)
    if examples is not None and examples < 1:
        raise UserError(f"--examples {examples}: give 1 or more, or leave it out for all")
    chosen = _chosen(spec, benchmarks)
    asked = find_subjects(folder, subjects or (DEFAULT_SUBJECTS if repair is None else REPAIRED_SUBJECTS))
    if repair is not None:
        for one, plan in ((one, one.plan) for one in asked if one.plan is not None):
            refuse_repair(plan, str(one.subject), repair.method)
    with EngineLock(folder):
        writer = RunWriter.open(folder, summarise=summarise)
        writer.watch = Stopwatch(began(), Part.START)
        provenance = Provenance(folder, spec, writer, lambda text: say(Event(text)))
        with writer.watch.of(Part.LOADING):
            provenance.models()
            plan_scorer = PlanScorer.open(spec, chosen, max_examples=examples, folder=folder)
            plan_scorer.told = plan_scorer.texts.told = now_and_then(lambda text: say(Event(text)))
            plan_scorer.shared = Shared(folder, provenance.known, plan_scorer.family.device)
            plan_scorer.known = without(queries.load_examples(folder), provenance.judges(plan_scorer.benchmarks))
        writer.watch.turn_to(Part.HELD_OUT)
        judged = plans_of(asked, plan_scorer, spec)
        if repair is not None:
            repairs = Repairs(repair, plan_scorer, queries.read_run(folder))
            judged = [one for pair in judged for one in (pair, repairs.of(*pair))]
        keeper = Keeper(writer, plan_scorer.stitcher, list(queries.read_run(folder).plans["config_id"]))
        done, total = 0, len(judged) * len(plan_scorer.benchmarks)
        for one, plan in judged:
            plan_scorer.stitcher.check(plan)
            for benchmark in plan_scorer.benchmarks:
                try:
                    result = plan_scorer.score(plan, examples or benchmark.n_examples, None, [benchmark], share=True)
                except NonFinite as problem:  # the others are judged
                    done += 1
                    say(Event(f"{one.subject}  {benchmark.spec.name}: {problem}", done / total))
                    continue
                with writer.batch():
                    config_id = keeper.number(one, plan)
                    for key, first, items in result.fresh:
                        writer.record_examples(*key, first, items)
                    score = result.scores[0]
                    known = plan_scorer.known
                    writer.record_evaluation(evaluation_of(one.subject, config_id, plan, benchmark, score, known))
                error = f" ±{score.stderr:.4f}" if score.stderr is not None else ""
                found = f"{score.benchmark} {score.metric} {score.score:.4f}{error} (n {score.n_samples})"
                done += 1
                told = {"subject": str(one.subject), "split": benchmark.spec.split, **asdict(score)}
                say(Event(f"{one.subject}  {found}", done / total, told))
            writer.record_seconds()
        provenance.models()
        plan_scorer.shared.publish()
    if repair is not None:
        _say_what_came_of_it(folder, [one.subject for one, _ in judged], say)


@dataclass
class Keeper:
    """Sees to it that repaired plans and one-shot cuts are stored with their first score, so that all can use them.

    numbers: those of the plans that are stored.
    """

    writer: RunWriter
    stitcher: Stitcher
    numbers: list[int]
    kept: dict[Subject, int] = field(default_factory=dict)

    def number(self, one: Asked, plan: StitchPlan) -> int | None:
        """Its number among the stored plans; None for dense models."""
        if one.config_id is not None or one.subject.kind not in (SubjectKind.BASELINE, SubjectKind.REPAIRED):
            return one.config_id
        if one.subject not in self.kept:
            self.kept[one.subject] = next_number(KEPT, [*self.numbers, *self.kept.values()])
            shares, n_parameters = self.stitcher.shares(plan), self.stitcher.n_parameters(plan)
            self.writer.record_plan(self.kept[one.subject], plan, n_parameters, shares)
        return self.kept[one.subject]


def _say_what_came_of_it(folder: RunFolder, subjects: Sequence[Subject], say: Say) -> None:
    """Of every plan that was repaired: how it does beside what it was, on the same examples, and its number."""
    tables = queries.read_run(folder)
    numbers = {subject: config_id for config_id, subject in stored_subjects(tables).items()}
    answers = queries.answers_of(folder, scores.judged(tables)["plan_hash"].dropna())
    for subject in subjects:
        if subject.before in subjects and subject in numbers:  # without a finite answer it is not kept
            say(Event(f"{held_out.beside_before(tables, answers, subject)} It is plan {numbers[subject]}."))


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
