"""Held-out evaluation: dense base, candidates, one-shot cuts, best plan and front on benchmarks that no search saw.

Each score is written as soon as it is there, so an evaluation that is stopped goes on where it was: what is stored is
not computed again. It runs on the engine's own parts, thus with the engine's very scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from gptailor.baselines.case import Case
from gptailor.baselines.registry import METHODS, cuts
from gptailor.errors import UserError
from gptailor.launch.engine import EngineLock
from gptailor.launch.events import Event, Say
from gptailor.plan import StitchPlan
from gptailor.results import scores
from gptailor.results.story import stored_plans
from gptailor.results.summary import summarise
from gptailor.scoring.plan_scorer import CALIBRATION_TEXTS, PlanScorer
from gptailor.spec import Baseline, HeldOut, RunSpec, load_spec
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.writer import RunWriter
from gptailor.trial import DENSE, Evaluation, Subject, SubjectKind, now
from gptailor.wording import now_and_then

DEFAULT = Baseline.BLOCK_INFLUENCE
"""What `baselines` stands for in a search's run; in a run of baselines, it stands for all of them."""
DEFAULT_SUBJECTS = ("dense", "candidates", "baselines", "best", "front")
"""The best is not always of the front: the selection split may choose another."""


@dataclass(frozen=True)
class Asked:
    """A subject to judge: its plan (None: a baseline whose plan is yet to be made), and its number among the stored."""

    subject: Subject
    plan: StitchPlan | None
    config_id: int | None = None


def evaluate(
    folder: RunFolder,
    say: Say,
    subjects: Sequence[str] = DEFAULT_SUBJECTS,
    benchmarks: Sequence[str] = (),
    examples: int | None = None,
) -> None:
    """Score subjects on the run file's held-out benchmarks (or those of them that are named), on `examples` or all.

    Raises UserError: no such subject or benchmark, or the run's engine is at work (a run has one writer at a time).
    """
    spec = load_spec(folder.spec)
    if examples is not None and examples < 1:
        raise UserError(f"--examples {examples}: give 1 or more, or leave it out for all")
    chosen = _chosen(spec, benchmarks)
    asked = _subjects(folder, subjects)
    with EngineLock(folder):
        writer = RunWriter.open(folder, summarise=summarise)
        plan_scorer = PlanScorer.open(spec, chosen, max_examples=examples, folder=folder)
        plan_scorer.told = now_and_then(lambda text: say(Event(text)))
        plan_scorer.known = queries.load_examples(folder)
        done, total = 0, len(asked) * len(plan_scorer.benchmarks)
        for one, plan in _plans(asked, plan_scorer, spec):
            plan_scorer.stitcher.check(plan)
            for benchmark in plan_scorer.benchmarks:
                result = plan_scorer.score(plan, examples or benchmark.n_examples, benchmarks=[benchmark])
                with writer.batch():
                    for key, first, items in result.fresh:
                        writer.record_examples(*key, first, items)
                    score = result.scores[0]
                    writer.record_evaluation(
                        Evaluation(
                            one.subject,
                            one.config_id,
                            benchmark.spec.split,
                            score,
                            now(),
                            plan.hash,
                            benchmark.chance,
                        )
                    )
                error = f" ±{score.stderr:.4f}" if score.stderr is not None else ""
                found = f"{score.benchmark} {score.metric} {score.score:.4f}{error} (n {score.n_samples})"
                done += 1
                told = {"subject": str(one.subject), "split": benchmark.spec.split, **asdict(score)}
                say(Event(f"{one.subject}  {found}", done / total, told))


def _chosen(spec: RunSpec, names: Sequence[str]) -> list[HeldOut]:
    known = {judge.benchmark for judge in spec.held_out}
    if not known:
        raise UserError("held_out: the run file names no benchmark to judge by; add some under held_out")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(
            f"--benchmarks {', '.join(unknown)}: not held out in this run; it has {', '.join(sorted(known))}"
        )
    return [judge for judge in spec.held_out if not names or judge.benchmark in names]


def _subjects(folder: RunFolder, names: Sequence[str]) -> list[Asked]:
    """The subjects asked for, each once; one-shot cuts have no plan yet."""
    tables = queries.read_run(folder)
    n_layers = int(tables.runs.iloc[0].n_layers)
    spec = load_spec(folder.spec)
    plans = stored_plans(tables)
    rows = scores.of_kind(tables.evaluations, SubjectKind.BASELINE).dropna(subset="config_id")
    stored = {Subject.parse(str(row.subject)): int(row.config_id) for row in rows.itertuples()}
    one_shot = {cut.subject for cut in cuts(spec, METHODS)}
    found: dict[Subject, Asked] = {}

    def add(subject: Subject, plan: StitchPlan | None = None, config_id: int | None = None) -> None:
        found.setdefault(subject, Asked(subject, plan, config_id))

    def add_stored(subject: Subject, config_id: int) -> None:
        add(subject, plans[config_id], config_id)

    for name in names:
        subject = Subject.find(name)
        if subject == DENSE:
            add(DENSE, StitchPlan.dense(n_layers))
        elif name == "candidates":
            for candidate in spec.candidates:
                add(Subject.candidate(candidate), StitchPlan.dense(n_layers, candidate))
        elif name == "baselines":
            for baseline, config_id in stored.items():
                add_stored(baseline, config_id)
            for cut in cuts(spec, [DEFAULT]) if not stored else ():
                add(cut.subject)
        elif name == "best":
            if (best := scores.best(tables)) and best.config_id is not None:
                add_stored(best, best.config_id)
        elif name == "front":
            for config_id in scores.searched(tables).front:
                add_stored(Subject.config(config_id), config_id)
        elif subject in stored:
            add_stored(subject, stored[subject])
        elif subject in one_shot:
            add(subject)
        elif subject and subject.config_id in plans:
            add_stored(subject, subject.config_id)
        elif subject and subject.kind is SubjectKind.CANDIDATE and subject.name in spec.candidates:
            add(subject, StitchPlan.dense(n_layers, subject.name))
        else:
            raise UserError(
                f"--subjects {name}: expected dense, candidates, baselines, best, front, config:ID of this run, "
                "candidate:NAME, baseline:NAME or baseline:NAME@CANDIDATE (block_influence, sleb, random-1, ...)"
            )
    return list(found.values())


def _plans(asked: Sequence[Asked], plan_scorer: PlanScorer, spec: RunSpec) -> list[tuple[Asked, StitchPlan]]:
    """Everybody's plan; one-shot cuts are made on the objectives' examples as a run of baselines makes them."""
    if all(one.plan is not None for one in asked):
        return [(one, one.plan) for one in asked if one.plan is not None]
    n_texts = min(CALIBRATION_TEXTS, spec.budget.max)
    batches = plan_scorer.calibration(
        PlanScorer.open_benchmarks(plan_scorer.family, spec, spec.objectives, max_examples=n_texts)
    )
    made = {cut.subject: cut for cut in cuts(spec, METHODS)}

    def plan_of(subject: Subject) -> StitchPlan:
        cut = made[subject]

        def no_scores(_plan: StitchPlan, _n: int) -> float:
            raise UserError(
                f"{subject}: scores plans on its way; run `python -m gptailor baseline {cut.baseline}` first"
            )

        n_removed = spec.n_removed(plan_scorer.family.n_layers)
        case = Case(plan_scorer.stitcher, cut.source, n_removed, batches, no_scores, spec.budget.rungs, 1, cut.seed)
        case.texts = plan_scorer.baseline_texts
        plan = METHODS[cut.baseline].load()(case)
        return plan_scorer.repaired(plan) if cut.is_repaired else plan

    return [(one, one.plan or plan_of(one.subject)) for one in asked]
