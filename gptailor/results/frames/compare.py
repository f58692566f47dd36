"""Which run is better, and why? Several runs read by one measure: the objectives that all of them share.

Runs may differ in anything: base, layers, candidates, rungs. What cannot be set side by side is left out and said,
never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from gptailor.results.frames import layers, progress, tradeoffs, trials
from gptailor.results.frames.facts import Average, Facts
from gptailor.results.frames.view import View
from gptailor.trial import DENSE, Subject
from gptailor.wording import plain, value

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

    @property
    def best(self) -> int | None:
        """config_id of the best plan at the top budget."""
        return int(self.plans["config_id"].iloc[0]) if len(self.plans) else None

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
    for label, (_, view) in zip(_labels([name for name, _ in named]), named, strict=True):
        kind = Average.RETENTION if measured else Average.SCORE
        facts = replace(view.facts, objectives=tuple(everywhere), average=kind) if everywhere else view.facts
        if facts == view.facts:
            found.append(Entry(label, view, facts, view.trials, view.plans))
            continue
        table = trials.trial_table(view.tables, facts)
        found.append(Entry(label, view, facts, table, tradeoffs.plan_table(view.tables, table, facts)))
    return found


def _labels(names: Sequence[str]) -> list[str]:
    short = [plain(name, 32) for name in names]
    return [name if short.count(name) == 1 else f"{name} ({index + 1})" for index, name in enumerate(short)]


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
        return {path: ", ".join(f"{i.get('benchmark')}/{i.get('metric')} ({i.get('split')})" for i in value)}
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


def best_scores(runs: Sequence[Entry]) -> pd.DataFrame:
    """Each run's best plan on each shared objective.

    Columns: measure, run, config_id, n, score, error, retention, higher_is_better.
    """
    rows = []
    for entry in runs:
        if entry.best is None:
            continue
        plan = entry.plans.iloc[0]
        place = (entry.label, entry.best, entry.top_budget)
        rows += [
            (o.name, *place, plan[o.name], plan[o.error], plan[o.kept], o.higher_is_better)
            for o in entry.facts.objectives
        ]
    return pd.DataFrame(rows, columns=_SCORE_COLUMNS)


_SCORE_COLUMNS = ["measure", "run", "config_id", "n", "score", "error", "retention", "higher_is_better"]


def held_out_scores(runs: Sequence[Entry]) -> pd.DataFrame:
    """Like best_scores, for what was measured outside the search of each run's best plan."""
    rows = []
    for entry in runs:
        found = entry.view.tables.evaluations
        dense = found[found["subject"] == str(DENSE)].sort_values("n_samples")
        whole = {(r.benchmark, r.metric, r.split, r.n_samples): r.score for r in dense.itertuples()}
        whole_any = {key[:3]: score for key, score in whole.items()}
        best = None if entry.best is None else str(Subject.config(entry.best))
        for r in found[found["subject"] == best].itertuples():
            reference = whole.get(
                (r.benchmark, r.metric, r.split, r.n_samples), whole_any.get((r.benchmark, r.metric, r.split))
            )
            kept = np.nan
            if reference and r.score:
                kept = r.score / reference if r.higher_is_better else reference / r.score
            rows.append(
                (
                    f"{r.benchmark}/{r.metric} ({r.split})",
                    entry.label,
                    entry.best,
                    r.n_samples,
                    r.score,
                    r.stderr,
                    kept,
                    bool(r.higher_is_better),
                )
            )
    return pd.DataFrame(rows, columns=_SCORE_COLUMNS)


def marked(scores: pd.DataFrame) -> pd.DataFrame:
    """Add `lead` to each row: whether it is the best of its measure, and clearly so.

    "clear" where it is ahead of every other run by more than chance explains, "ahead" where it is the best but not
    clearly so, else "". Errors are taken as independent, which is careful: runs that were scored on the same examples
    differ by less chance than that.
    """
    lead = pd.Series("", index=scores.index)
    for _, rows in scores.groupby("measure", sort=False):
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
    return scores.assign(lead=lead)


def score_table(scores: pd.DataFrame, runs: Sequence[str], retention: bool = False) -> pd.DataFrame:
    """A row a measure, a column a run: `★ 0.612 ± 0.015` (clear lead), `☆ ...` (ahead within chance).

    retention: shares of each run's own dense score, in percent; they may lead elsewhere than the scores.
    """
    signs = {"clear": "★ ", "ahead": "☆ ", "": ""}
    if retention:
        error = (scores["error"] * scores["retention"] / scores["score"]).abs()
        scores = scores.assign(score=scores["retention"], error=error, higher_is_better=True)
    cells = [
        (r.measure, r.run, signs[r.lead] + value(r.score, r.error, percent=retention))
        for r in marked(scores).itertuples()
    ]
    frame = pd.DataFrame(cells, columns=["measure", "run", "cell"])
    wide = frame.drop_duplicates(["measure", "run"]).pivot(index="measure", columns="run", values="cell")
    wide = wide.reindex(index=list(dict.fromkeys(frame["measure"])), columns=list(runs)).fillna("–")
    return wide.rename_axis(columns=None).reset_index()


def ranked(runs: Sequence[Entry]) -> list[Entry]:
    """The runs that have scored a plan, the one with the best average first."""
    return sorted((entry for entry in runs if entry.best is not None), key=lambda e: -e.plans[trials.AVERAGE].iloc[0])


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
        (entry, float(entry.plans[trials.AVERAGE].iloc[0]), float(entry.plans[trials.AVERAGE_ERROR].iloc[0]))
        for entry in scored[:2]
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
            pieces.append(layers.origin_grid(labelled, entry.plans.head(1), facts).assign(plan=entry.label))
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
