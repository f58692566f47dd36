"""Which run is better, and why? Several runs read by one measure: the objectives that all of them share.

Runs may differ in anything: base, layers, candidates, rungs. What cannot be set side by side is left out and said,
never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, product
from typing import Any

import numpy as np
import pandas as pd

from gptailor.results import scores
from gptailor.results.frames import layers, progress, tradeoffs, trials
from gptailor.results.frames.facts import KEPT_LAYERS, Average, Facts
from gptailor.results.frames.view import View
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.trial import Subject, asked_key
from gptailor.wording import plain, plural, value

CLEAR = 1.96
"""Standard errors of a difference beyond which it is called clear."""


@dataclass(frozen=True)
class Entry:
    """One run of a comparison, seen through the shared objectives.

    Its facts, trials and plans are restricted to them.
    """

    label: str
    view: View
    facts: Facts
    trials: pd.DataFrame
    plans: pd.DataFrame
    name: str
    """What the label was made of, however long."""

    @property
    def best(self) -> int | None:
        """config_id of the plan that the run calls its best, by all of its objectives."""
        return None if self.best_row is None else int(self.best_row["config_id"])

    @property
    def best_subject(self) -> Subject | None:
        """See View.best_subject; None where the run has no best plan."""
        return None if self.best is None else self.view.best_subject

    @cached_property
    def best_row(self) -> pd.Series | None:
        """The best plan's row of `plans`, see View.best_row."""
        own = self.plans[self.plans["config_id"] == self.view.best]
        if len(own):
            return self.view.as_chosen(own.iloc[0], self.facts)
        return self.plans.iloc[0] if len(self.plans) else None

    @cached_property
    def top_budget(self) -> int:
        return trials.top_budget(self.trials, self.facts)


def entries(named: Sequence[tuple[str, View]]) -> list[Entry]:
    """The runs under labels that differ, by the objectives they all share.

    All objectives of each where they share none.
    """
    everywhere = (
        [o for o in named[0][1].facts.objectives if all(o in view.facts.objectives for _, view in named)]
        if named
        else []
    )
    measured = all(o.name in view.facts.dense for _, view in named for o in everywhere)
    found = []
    for label, (name, view) in zip(_labels([name for name, _ in named]), named, strict=True):
        kind = Average.RETENTION if measured else Average.SCORE
        facts = replace(view.facts, objectives=tuple(everywhere), average=kind) if everywhere else view.facts
        if facts == view.facts:
            found.append(Entry(label, view, facts, view.trials, view.plans, name))
            continue
        table = trials.trial_table(view.tables, facts)
        found.append(Entry(label, view, facts, table, tradeoffs.plan_table(view.tables, table, facts), name))
    return found


def answers_of(runs: Sequence[Entry], folders: Sequence[RunFolder]) -> dict[str, queries.Answers]:
    """By run, what the examples gave all its plans that were judged outside the search."""
    found = {}
    for entry, folder in zip(runs, folders, strict=True):
        judged = entry.view.held_out
        found[entry.label] = queries.answers_of(folder, set(judged["plan_hash"].dropna().astype(str)))
    return found


_COLUMNS = {"measure", "setting", tradeoffs.label(KEPT_LAYERS)}
"""Columns of tables that have one a run beside them."""


def _labels(names: Sequence[str]) -> list[str]:
    """A label a run, each another, and none that a table here has as a column of its own."""
    short = [plain(name, 32) for name in names]
    single = {name for name in short if short.count(name) == 1} - _COLUMNS
    found: list[str] = []
    for place, name in enumerate(short, start=1):
        numbered = (f"{name} ({number})" for number in count(place))
        found.append(name if name in single else next(one for one in numbered if one not in {*single, *found}))
    return found


def meaning(runs: Sequence[Entry]) -> str:
    """What the best plan of each run is, and what its scores are of, as a note for people."""
    n = len(runs[0].facts.objectives)
    alike = all(entry.facts.objectives == entry.view.facts.objectives for entry in runs)
    rest = "" if alike else ", which alone these scores and averages are of"
    return (
        "The best plan of each run is the one that the run itself calls so: chosen by its selection split, else by all "
        f"of its objectives at its highest rung. The runs share {plural(n, 'objective')}{rest}. ± is one standard "
        "error. ★ is better than every other run by more than chance explains, ☆ is ahead by no more than chance."
    )


def share_objectives(runs: Sequence[Entry]) -> bool:
    return len({entry.facts.objectives for entry in runs}) == 1 and bool(runs[0].facts.objectives)


def settings(runs: Sequence[Entry], only_different: bool = True) -> pd.DataFrame:
    """setting, and a column of text for each run; settings are dotted paths into the run files."""
    flat = [_flatten(entry.view.facts.spec) for entry in runs]
    for one, entry in zip(flat, runs, strict=True):
        one["(layers of the base)"] = str(entry.view.facts.n_layers)
        one.pop("name", None)
    keys = list(dict.fromkeys(key for one in flat for key in one))
    rows = [[key, *(one.get(key, "–") for one in flat)] for key in keys]
    frame = pd.DataFrame(rows, columns=["setting", *(entry.label for entry in runs)])
    if only_different:
        frame = frame[frame.iloc[:, 1:].nunique(axis=1) > 1]
    return frame.reset_index(drop=True)


def _flatten(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        return {
            k: v
            for key, inner in value.items()
            for k, v in _flatten(inner, f"{path}.{key}" if path else str(key)).items()
        }
    if isinstance(value, (list, tuple)) and value and all(isinstance(inner, Mapping) for inner in value):
        return {path: ", ".join("{}/{} ({})".format(*asked_key(i)) for i in value)}
    if isinstance(value, (list, tuple)):
        return {path: ", ".join(map(str, value)) or "–"}
    return {path: "–" if value is None or value == {} else str(value)}


def curves(runs: Sequence[Entry]) -> pd.DataFrame:
    """frames.progress.best_so_far of every run, with `run`."""
    pieces = [progress.best_so_far(entry.trials, entry.facts).assign(run=entry.label) for entry in runs]
    return pd.concat(pieces, ignore_index=True)


def fronts(runs: Sequence[Entry], x: tradeoffs.Axis, y: tradeoffs.Axis) -> pd.DataFrame:
    """frames.tradeoffs.front of every run, with `run`."""
    return pd.concat(
        [tradeoffs.front(e.plans, x, y).assign(run=e.label) for e in runs if len(e.plans)], ignore_index=True
    )


def shared_axes(runs: Sequence[Entry]) -> list[tradeoffs.Axis]:
    """What the plans of every run that has plans can be compared by."""
    sets = [tradeoffs.axes(entry.view.tables, entry.plans, entry.facts) for entry in runs if len(entry.plans)]
    return [axis for axis in sets[0] if all(axis in others for others in sets)] if sets else []


def first_axes(runs: Sequence[Entry]) -> tuple[tradeoffs.Axis, tradeoffs.Axis] | None:
    """What is drawn first of several runs, across and up; None where they share no two such things.

    Size and the average where any run's plans differ in size, or where the runs' do: each has its own then; else two
    objectives.
    """
    shared = shared_axes(runs)
    sizes = {number for e in runs for number in (e.facts.fewest_removed, e.facts.n_removed)}
    if len(sizes) > 1 and len({e.view.facts.n_layers for e in runs}) == 1 and shared:
        return next(axis for axis in shared if axis.column == KEPT_LAYERS), shared[0]
    scored = [axis for axis in shared if axis.column in runs[0].facts.names]
    return (scored[0], scored[1]) if len(scored) > 1 else None


def of_sizes(runs: Sequence[Entry]) -> pd.DataFrame:
    """The average of each run's best plan of each size, for people; empty where no run asks for a range of sizes.

    Columns: Layers kept (the most first), and one a run. A run of one size has its best plan there.
    """
    if not any(entry.facts.has_range for entry in runs):
        return pd.DataFrame()
    cells: dict[int, dict[str, str]] = {}
    for entry in runs:
        chosen = [] if entry.best_row is None else [entry.best_row]
        if entry.facts.has_range:
            found = scores.best_of_sizes(entry.view.tables)
            chosen = [plan for _, plan in entry.plans[entry.plans["config_id"].isin(found["config_id"])].iterrows()]
            for size in found[~found["config_id"].isin(entry.plans["config_id"])].itertuples():  # repaired: no trial
                shown = value(size.average, np.nan, percent=entry.facts.average_is_share)
                cells.setdefault(size.kept_layers, {})[entry.label] = shown
        for plan in chosen:
            average, error = plan[trials.AVERAGE], plan[trials.AVERAGE_ERROR]
            shown = value(average, error, percent=entry.facts.average_is_share)
            cells.setdefault(int(plan[KEPT_LAYERS]), {})[entry.label] = shown
    rows = [
        {tradeoffs.label(KEPT_LAYERS): kept} | {entry.label: cells[kept].get(entry.label, "–") for entry in runs}
        for kept in sorted(cells, reverse=True)
    ]
    return pd.DataFrame(rows)


def best_scores(runs: Sequence[Entry]) -> pd.DataFrame:
    """Each run's best plan on each shared objective.

    Columns: measure, run, config_id, n, score, error, retention, higher_is_better.
    """
    rows = []
    for entry in runs:
        plan = entry.best_row
        if plan is None:
            continue
        place = (entry.label, entry.best, entry.top_budget)
        rows += [
            (o.name, *place, plan[o.name], plan[o.error], plan[o.kept], o.higher_is_better)
            for o in entry.facts.objectives
        ]
    return pd.DataFrame(rows, columns=_SCORE_COLUMNS)


_SCORE_COLUMNS = ["measure", "run", "config_id", "n", "score", "error", "retention", "higher_is_better"]


def held_out_scores(runs: Sequence[Entry]) -> pd.DataFrame:
    """Like best_scores, for what each run's file holds out (scores.judged)."""
    pieces = []
    for entry in runs:
        frame = scores.judged(entry.view.tables)
        own = frame[frame["subject"] == str(entry.best_subject)]
        measure = own["benchmark"] + "/" + own["metric"] + " (" + own["split"] + ")"
        named = own.rename(columns={"stderr": "error", "higher": "higher_is_better"})
        pieces.append(
            named.assign(
                measure=measure, run=entry.label, config_id=entry.best_subject and entry.best_subject.config_id
            )[_SCORE_COLUMNS]
        )
    return pd.concat(pieces, ignore_index=True) if pieces else pd.DataFrame(columns=_SCORE_COLUMNS)


def marked(found: pd.DataFrame) -> pd.DataFrame:
    """Add `lead` to each row: whether it is the best of its measure, and clearly so.

    "clear" where it is ahead of every other run by more than chance explains, "ahead" where it is the best but not
    clearly so, else "". Errors are taken as independent, which is careful: runs that were scored on the same examples
    differ by less chance than that.
    """
    lead = pd.Series("", index=found.index)
    for _, rows in found.groupby("measure", sort=False):
        known = rows[np.isfinite(rows["score"].astype(float))]
        if len(known) < 2:
            continue
        sign = 1.0 if known["higher_is_better"].iloc[0] else -1.0
        order = (sign * known["score"].astype(float)).sort_values(ascending=False)
        first, second = order.index[0], order.index[1]
        if order[first] == order[second]:
            continue
        errors = known["error"].astype(float)
        gap = order[first] - order.iloc[1:]
        noise = np.sqrt(errors[first] ** 2 + errors[order.index[1:]] ** 2)
        lead[first] = "clear" if bool((gap > CLEAR * noise).all()) else "ahead"
    return found.assign(lead=lead)


def score_table(found: pd.DataFrame, runs: Sequence[str], retention: bool = False) -> pd.DataFrame:
    """A row a measure, a column a run: `★ 0.612 ± 0.015` (clear lead), `☆ ...` (ahead within chance).

    retention: shares of each run's own dense score, in percent; they may lead elsewhere than the scores.
    """
    signs = {"clear": "★ ", "ahead": "☆ ", "": ""}
    if retention:
        error = (found["error"] * found["retention"] / found["score"]).abs()
        found = found.assign(score=found["retention"], error=error, higher_is_better=True)
    cells = [
        (r.measure, r.run, signs[r.lead] + value(r.score, r.error, percent=retention))
        for r in marked(found).itertuples()
    ]
    frame = pd.DataFrame(cells, columns=["measure", "run", "cell"])
    wide = frame.drop_duplicates(["measure", "run"]).pivot(index="measure", columns="run", values="cell")
    wide = wide.reindex(index=list(dict.fromkeys(frame["measure"])), columns=list(runs)).astype(object).fillna("–")
    return wide.rename_axis(columns=None).reset_index()


def ranked(runs: Sequence[Entry]) -> list[Entry]:
    """The runs that have scored a plan, the one with the best average first."""
    scored = [(entry.best_row[trials.AVERAGE], entry) for entry in runs if entry.best_row is not None]
    return [entry for _, entry in sorted(scored, key=lambda pair: -pair[0])]


def verdict(runs: Sequence[Entry]) -> str:
    """One plain sentence: whose best plan has the highest average, and whether by more than chance explains."""
    scored = ranked(runs)
    if len(scored) < 2:
        return (
            "Only one of these runs has scored a plan so far."
            if scored
            else "None of these runs has scored a plan yet."
        )
    (first, a, a_error), (second, b, b_error) = (
        (entry, float(entry.best_row[trials.AVERAGE]), float(entry.best_row[trials.AVERAGE_ERROR]))
        for entry in scored[:2]
        if entry.best_row is not None
    )
    percent = first.facts.average_is_share
    noise = np.sqrt(a_error**2 + b_error**2)
    chance = "more than chance explains" if a - b > CLEAR * noise else "no more than chance explains"
    if not np.isfinite(noise):
        chance = "an amount that cannot be told from chance, for want of standard errors"
    budgets = "" if first.top_budget == second.top_budget else " They are judged at different budgets."
    return (
        f"{first.label} is ahead of {second.label}: {first.facts.average_label.lower()} "
        f"{value(a, a_error, percent=percent)} against {value(b, b_error, percent=percent)}, by {chance}.{budgets}"
    )


def removed_overlap(runs: Sequence[Entry]) -> pd.DataFrame:
    """Removed layers of the best plans, every run against every run.

    Columns: one, other, both (the layers), either (how many), jaccard.

    jaccard: |both| / |either|; NaN where the bases differ in their number of layers, or there is no plan.
    """
    removed: dict[str, set[int] | None] = {}
    for entry in runs:
        one = layers.strip(entry.view.layers, entry.best) if entry.best is not None else None
        removed[entry.label] = None if one is None else set(one.loc[one["source"] == "removed", "layer"])
    sizes = {entry.label: entry.view.facts.n_layers for entry in runs}
    rows = []
    for a, b in product(removed, removed):
        mine, theirs = removed[a], removed[b]
        if mine is None or theirs is None or sizes[a] != sizes[b]:
            rows.append((a, b, "", np.nan, np.nan))
        else:
            both, either = mine & theirs, mine | theirs
            rows.append(
                (a, b, " ".join(map(str, sorted(both))), len(either), len(both) / len(either) if either else 1.0)
            )
    return pd.DataFrame(rows, columns=["one", "other", "both", "either", "jaccard"])


def best_origins(runs: Sequence[Entry]) -> tuple[pd.DataFrame, Facts]:
    """The best plans' layers as rows of an origin heatmap, and facts with everybody's candidates.

    Rows are named after their runs.
    """
    everybody = tuple(dict.fromkeys(name for entry in runs for name in entry.view.facts.candidates))
    facts = replace(runs[0].facts, candidates=everybody, n_layers=max(entry.view.facts.n_layers for entry in runs))
    pieces = []
    for entry in runs:
        if entry.best is not None:
            stored = entry.view.tables.layers
            labelled = layers.label_layers(stored[stored["config_id"] == entry.best], facts)
            best = entry.plans[entry.plans["config_id"] == entry.best]
            pieces.append(layers.origin_grid(labelled, best, facts).assign(plan=entry.label))
    return (pd.concat(pieces, ignore_index=True) if pieces else pd.DataFrame()), facts


def averages_of_runs(runs: Sequence[Entry]) -> pd.DataFrame:
    """`averages` of every run with any, with `run` (its label) and the run in each subject's label."""
    pieces = [entry.view.held_out.assign(run=entry.label) for entry in runs]
    pieces = [piece for piece in pieces if len(piece)]
    if not pieces:
        return pd.DataFrame()
    table = pd.concat(pieces, ignore_index=True)
    table["label"] = table["label"] + " · " + table["run"]
    return table.sort_values("average", ascending=False, kind="stable").reset_index(drop=True)
