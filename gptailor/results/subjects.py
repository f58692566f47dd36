"""Who the stored plans of a run are: configurations, baselines' cuts, what was repaired or healed."""

from __future__ import annotations

import json

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


def stored_plan(tables: RunTables, config_id: int) -> StitchPlan:
    """One plan, by its number."""
    plans = tables.plans
    return StitchPlan.from_json(json.loads(str(plans.loc[plans["config_id"] == config_id, "plan"].iloc[0])))
