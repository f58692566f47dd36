"""The stored plans of a run, and who they are: configurations, baselines' cuts, what was repaired or healed."""

from __future__ import annotations

import json

from gptailor.errors import UserError
from gptailor.plan import StitchPlan
from gptailor.stitch.edits.registry import healed_subject
from gptailor.store.queries import RunTables
from gptailor.trial import Subject, SubjectKind, is_healed


def stored_subjects(tables: RunTables) -> dict[int, Subject]:
    """Every stored plan's subject, by its number: who it was judged as, else what its plan says of itself."""
    found = {int(config_id): Subject.config(int(config_id)) for config_id in tables.plans["config_id"]}
    for config_id in filter(is_healed, found):
        found[config_id] = healed_subject(stored_plan(tables, config_id)) or found[config_id]
    judged = tables.evaluations.dropna(subset="config_id").drop_duplicates("subject")
    for subject, config_id in zip(map(str, judged["subject"]), judged["config_id"], strict=True):
        if (who := Subject.parse(subject)).kind is not SubjectKind.CONFIG:
            found[int(config_id)] = who
    return found


def stored_plans(tables: RunTables) -> dict[int, StitchPlan]:
    """Every plan, by its number."""
    return {int(row.config_id): StitchPlan.from_json(json.loads(str(row.plan))) for row in tables.plans.itertuples()}


def stored_plan(tables: RunTables, config_id: int) -> StitchPlan:
    """One plan, by its number. Raises UserError for a configuration that the run has not."""
    plans = tables.plans
    found = plans[plans.config_id == config_id]
    if found.empty:
        best = ", ".join(map(str, plans.config_id.head(8))) or "none yet"
        more = " …" if len(plans) > 8 else ""
        raise UserError(f"configuration {config_id}: run {tables.run_id} has none of this number; it has {best}{more}")
    return StitchPlan.from_json(json.loads(str(found.plan.iloc[0])))
