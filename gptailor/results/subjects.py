"""Who the stored plans of a run are: configurations, baselines' cuts, what was repaired or healed."""

from __future__ import annotations

from gptailor.results.story import stored_plans
from gptailor.stitch.edits.registry import healed_subject
from gptailor.store.queries import RunTables
from gptailor.trial import Subject, SubjectKind


def stored_subjects(tables: RunTables) -> dict[int, Subject]:
    """Every stored plan's subject, by its number: who it was judged as, else what its plan says of itself."""
    found = {
        config_id: healed_subject(plan) or Subject.config(config_id) for config_id, plan in stored_plans(tables).items()
    }
    judged = tables.evaluations.dropna(subset="config_id").drop_duplicates("subject")
    for subject, config_id in zip(map(str, judged["subject"]), judged["config_id"], strict=True):
        if (who := Subject.parse(subject)).kind is not SubjectKind.CONFIG:
            found[int(config_id)] = who
    return found
