"""One run as the pages see it: its tables, and what several pages derive from them, each derived once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar, cast

import pandas as pd

from gptailor.results import scores
from gptailor.results.frames import facts, held_out, layers, tradeoffs, trials
from gptailor.results.frames.facts import Facts
from gptailor.results.subjects import stored_plan, stored_subjects
from gptailor.stitch.edits.registry import fitted_layers
from gptailor.store.queries import RunTables
from gptailor.trial import REPAIRED, Subject, SubjectKind, is_repaired

Made = TypeVar("Made")


@dataclass(frozen=True)
class View:
    """Shared by all readers of one version of a run: look, do not change."""

    tables: RunTables
    _made: dict[Hashable, object] = field(default_factory=dict, repr=False, compare=False)

    def once(self, name: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, made for the first who asks under this name: many browsers poll the same version."""
        if name not in self._made:
            self._made[name] = make()
        return cast(Made, self._made[name])

    @cached_property
    def facts(self) -> facts.Facts:
        return facts.facts(self.tables)

    @cached_property
    def trials(self) -> pd.DataFrame:
        """See frames.trials: a row a trial."""
        return trials.trial_table(self.tables, self.facts)

    @cached_property
    def plans(self) -> pd.DataFrame:
        """See frames.tradeoffs.plan_table: a row a plan judged at the top budget, best average first."""
        return tradeoffs.plan_table(self.tables, self.trials, self.facts)

    @cached_property
    def best(self) -> int | None:
        """config_id of the plan that the run calls its best (results.scores.best).

        Before one was scored at the full budget, the best so far.
        """
        judged = [int(config_id) for config_id in self.plans["config_id"]]
        named = scores.best(self.tables)
        number = named.config_id if named else None
        if number is not None and is_repaired(number):
            number -= REPAIRED  # which has no trial: the plan that it was
        return number if number in judged else next(iter(judged), None)

    @cached_property
    def best_subject(self) -> Subject | None:
        """Who the run's best plan is where it is judged: `best`, or what the selection chose as repaired."""
        found = scores.best(self.tables)
        return found if found is not None or self.best is None else Subject.config(self.best)

    @cached_property
    def best_row(self) -> pd.Series | None:
        """The best plan's row of `plans`; of one chosen as repaired, with the scores that it has repaired."""
        if self.best is None:
            return None
        return self.as_chosen(self.plans[self.plans["config_id"] == self.best].iloc[0], self.facts)

    def as_chosen(self, row: pd.Series, whole: Facts) -> pd.Series:
        """The row of the plan that `best` names, with its own scores on the objectives of `whole` if it is repaired."""
        subject = self.best_subject
        if subject is None or subject == Subject.config(int(row["config_id"])):
            return row
        own = trials.on_objectives(self.tables, whole, subject)
        return row if own is None else pd.Series({**row, **own})

    @cached_property
    def choice(self) -> scores.Choice | None:
        """What the selection split chose, if it was used."""
        return scores.choice(self.tables)

    @cached_property
    def best_of_sizes(self) -> pd.DataFrame:
        """See results.scores.best_of_sizes: a row a size, where the run asks for a range of them."""
        return scores.best_of_sizes(self.tables)

    @cached_property
    def layers(self) -> pd.DataFrame:
        """See frames.layers.label_layers: a row a configuration and layer."""
        return layers.label_layers(self.tables.layers, self.facts)

    @cached_property
    def subjects(self) -> dict[int, Subject]:
        """See results.subjects.stored_subjects: who every stored plan is, by its number."""
        return stored_subjects(self.tables)

    @cached_property
    def kept(self) -> dict[int, Subject]:
        """Stored plans that no trial was about, by their numbers: repaired ones, then healed ones, then cuts."""
        tried = {int(config_id) for config_id in self.tables.trials["config_id"]}
        order = (SubjectKind.CONFIG, SubjectKind.REPAIRED, SubjectKind.HEALED, SubjectKind.BASELINE)
        found = [(one, config_id) for config_id, one in self.subjects.items() if config_id not in tried]
        return {config_id: one for one, config_id in sorted(found, key=lambda own: (order.index(own[0].kind), own[1]))}

    def name(self, config_id: int) -> str:
        """A plan's name within a sentence: `plan 12`, `plan 12, repaired (refit)`, `sleb on math`."""
        label = self.subjects[config_id].label
        return f"p{label[1:]}" if label.startswith("Plan ") else label

    def strip(self, config_id: int) -> pd.DataFrame:
        """See frames.layers.strip, with `fitted`: how a layer's weights were repaired or healed, empty if not."""
        fitted = fitted_layers(stored_plan(self.tables, config_id))
        one = layers.strip(self.layers, config_id)
        return one.assign(fitted=[fitted.get(layer, "") for layer in one["layer"]])

    @cached_property
    def held_out(self) -> pd.DataFrame:
        """See frames.held_out.averages: a row a subject that was judged outside the search."""
        return held_out.averages(self.tables)

    @cached_property
    def top_budget(self) -> int:
        """Examples per benchmark at which "best" is judged."""
        return trials.top_budget(self.trials, self.facts)

    @property
    def judged_in_full(self) -> bool:
        return self.top_budget == self.facts.full_budget and len(self.plans) > 0
