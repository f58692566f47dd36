"""Shorter plans of a finished run, repaired: found again where they are stored, else made, under names that tell how.

Nothing of a search is changed by it. What is made gets its weights when it is stitched, as every edited plan does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from gptailor.commands.subjects import Asked
from gptailor.plan import StitchPlan, Texts
from gptailor.results.subjects import stored_plans, stored_subjects
from gptailor.scoring.plan_scorer import PlanScorer
from gptailor.spec.sections import Repair
from gptailor.stitch.edits.registry import refuse_repair, repair_edit
from gptailor.store.queries import RunTables
from gptailor.trial import Subject

LONGEST_SOURCE = 24
"""Characters of a source in a name."""


@dataclass
class Repairs:
    """One repair, of several plans of a run."""

    repair: Repair
    scorer: PlanScorer
    tables: RunTables

    def of(self, one: Asked, plan: StitchPlan) -> tuple[Asked, StitchPlan]:
        """Who the plan is when it is repaired, and the plan that it is then. Raises UserError."""
        refuse_repair(plan, str(one.subject), self.repair.method)
        made = plan.edited(repair_edit(self.repair, self.texts, self.scorer.family.spec.seed))
        for config_id, subject in self._subjects.items():
            if subject.before == one.subject and self._plans[config_id] == made:
                return Asked(subject, made, config_id), made
        return Asked(Subject.repaired(one.subject, self._name(one.subject)), made), made

    @cached_property
    def texts(self) -> Texts:
        """Read or written now. Those that come from the run itself cannot change: what a stored plan names stands."""
        n_tokens = self.repair.tokens_for(self.scorer.family.inner_size)
        edits = [edit for plan in self._plans.values() for edit in plan.edits]
        known = [edit.texts for edit in edits if edit.texts is not None and edit.texts.n_tokens == n_tokens]
        is_from_outside = any(":" in source for source in self.repair.texts.split("+"))
        same = next((texts for texts in known if texts.source == self.repair.texts and not is_from_outside), None)
        return same or self.scorer.repair_texts(self.repair)

    @cached_property
    def _plans(self) -> dict[int, StitchPlan]:
        return stored_plans(self.tables)

    @cached_property
    def _subjects(self) -> dict[int, Subject]:
        return stored_subjects(self.tables)

    def _name(self, before: Subject) -> str:
        """A name that no other repair of this subject has: `refit`, `refit-base`, `refit-base-2` on other texts."""
        taken = {subject.name for subject in self._subjects.values() if subject.before == before}
        name = repair_name(self.repair)
        return next(one for one in (name, *(f"{name}-{n}" for n in range(2, len(taken) + 3))) if one not in taken)


def repair_name(repair: Repair) -> str:
    """The method, and its texts where they are not the objectives': `refit`, `rcpu-base`, `refit-base+wiki.jsonl`."""
    if repair.texts == "objectives":
        return str(repair.method)
    return f"{repair.method}-{'+'.join(map(_short, repair.texts.split('+')))}"


def _short(source: str) -> str:
    """`base`; of a file or a data set its own name alone, in characters that a subject's text has room for."""
    kind, _, place = source.partition(":")
    return re.sub(r"[^\w.]+", "-", place.rstrip("/").rpartition("/")[2])[-LONGEST_SOURCE:].strip("-") or kind
