"""Who is judged or healed, by the names that people type: subjects and their plans, stored or yet to be made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptailor.baselines.case import Case
from gptailor.baselines.registry import METHODS, cuts
from gptailor.errors import UserError
from gptailor.plan import StitchPlan
from gptailor.results import scores
from gptailor.results.subjects import stored_plans, stored_subjects
from gptailor.scoring.plan_scorer import CALIBRATION_TEXTS, PlanScorer
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Baseline
from gptailor.store import queries
from gptailor.store.asked import spec_of
from gptailor.store.folder import RunFolder
from gptailor.trial import DENSE, Subject, SubjectKind, is_repaired

DEFAULT = Baseline.BLOCK_INFLUENCE
"""What `baselines` stands for in a search's run; in a run of baselines, it stands for all of them."""


@dataclass(frozen=True)
class Asked:
    """A subject to judge: its plan (None: a baseline whose plan is yet to be made), and its number among the stored."""

    subject: Subject
    plan: StitchPlan | None
    config_id: int | None = None


def find_subjects(folder: RunFolder, names: Sequence[str]) -> list[Asked]:
    """The subjects asked for, each once; one-shot cuts have no plan yet."""
    tables = queries.read_run(folder)
    n_layers = int(tables.runs.iloc[0].n_layers)
    spec = spec_of(folder)
    plans = stored_plans(tables)
    subjects = stored_subjects(tables)
    stored = {subject: config_id for config_id, subject in subjects.items()}
    one_shot = {cut.subject for cut in cuts(spec, METHODS, n_layers)}
    found: dict[Subject, Asked] = {}

    def add(subject: Subject, plan: StitchPlan | None = None, config_id: int | None = None) -> None:
        found.setdefault(subject, Asked(subject, plan, config_id))

    def add_stored(subject: Subject, config_id: int) -> None:
        add(subject, plans[config_id], config_id)

    def add_kinds(kind: SubjectKind) -> None:
        for one, config_id in stored.items():
            if one.kind is kind or (kind is SubjectKind.REPAIRED and is_repaired(config_id)):
                add_stored(one, config_id)

    for name in names:
        subject = Subject.find(name)
        if subject == DENSE:
            add(DENSE, StitchPlan.dense(n_layers))
        elif name == "candidates":
            for candidate in spec.candidates:
                add(Subject.candidate(candidate), StitchPlan.dense(n_layers, candidate))
        elif name == "baselines":
            add_kinds(SubjectKind.BASELINE)
            for cut in cuts(spec, [DEFAULT], n_layers) if not spec.baselines else ():
                add(cut.subject)
        elif name == "best":
            if (best := scores.best(tables)) and best.config_id is not None:
                add_stored(best, best.config_id)
        elif name == "sizes":
            for config_id in scores.best_of_sizes(tables)["config_id"]:
                add_stored(Subject.config(config_id), int(config_id))
        elif name == "front":
            for config_id in scores.searched(tables).front:
                add_stored(Subject.config(config_id), config_id)
        elif name in ("repaired", "healed"):
            add_kinds(SubjectKind(name))
        elif subject in stored:
            add_stored(subject, stored[subject])
        elif subject in one_shot:
            add(subject)
        elif subject and subject.config_id in plans:
            add_stored(subjects[subject.config_id], subject.config_id)
        elif subject and subject.kind is SubjectKind.CANDIDATE and subject.name in spec.candidates:
            add(subject, StitchPlan.dense(n_layers, subject.name))
        else:
            raise UserError(
                f"--subjects {name}: expected dense, candidates, baselines, best, sizes, front, repaired, healed, "
                "config:ID of this run, candidate:NAME, baseline:NAME or baseline:NAME@CANDIDATE (block_influence, "
                "sleb, random-1, ...), repaired:SUBJECT/NAME or healed:SUBJECT/NAME"
            )
    return list(found.values())


def plans_of(asked: Sequence[Asked], plan_scorer: PlanScorer, spec: RunSpec) -> list[tuple[Asked, StitchPlan]]:
    """Everybody's plan; one-shot cuts are made on the objectives' examples as a run of baselines makes them."""
    if all(one.plan is not None for one in asked):
        return [(one, one.plan) for one in asked if one.plan is not None]
    n_texts = min(CALIBRATION_TEXTS, spec.budget.max)
    batches = plan_scorer.calibration(
        PlanScorer.open_benchmarks(plan_scorer.family, spec, spec.objectives, max_examples=n_texts)
    )
    made = {cut.subject: cut for cut in cuts(spec, METHODS, plan_scorer.family.n_layers)}

    def plan_of(subject: Subject) -> StitchPlan:
        cut = made[subject]

        def no_scores(_plan: StitchPlan, _n: int) -> float:
            raise UserError(
                f"{subject}: scores plans on its way; run `python -m gptailor baseline {cut.baseline}` first"
            )

        case = Case(plan_scorer.stitcher, cut.source, cut.n_removed, batches, no_scores, spec.budget.rungs, 1, cut.seed)
        case.texts = plan_scorer.baseline_texts
        plan = METHODS[cut.baseline].load()(case)
        return plan_scorer.repaired(plan) if cut.is_repaired else plan

    return [(one, one.plan or plan_of(one.subject)) for one in asked]
