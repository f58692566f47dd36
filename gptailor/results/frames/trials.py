"""Trials as one wide table: a row a trial, a column an objective. Every page starts from it.

Columns: trial_id, config_id, budget, status, origin, start_hours and hours (since the run started, to the trial's end),
seconds (its own duration), suggest_seconds, stitch_seconds, evaluate_seconds, error, worker (who scored it, where there
are several), examples (really scored, over all objectives), kept_layers, parameters; then for each objective its score,
`NAME ±` (standard error) and `NAME kept` (retention); average and `average ±`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gptailor.results import scores
from gptailor.results.frames.facts import KEPT_LAYERS, Average, Facts
from gptailor.store.queries import RunTables
from gptailor.trial import Subject, averaged_together

AVERAGE, AVERAGE_ERROR = "average", "average ±"


def trial_table(tables: RunTables, facts: Facts) -> pd.DataFrame:
    """In the order of trial_id."""
    table = tables.trials.drop(
        columns=["run_id", "configuration", "seed", "asked_after", "told_as"], errors="ignore"
    ).sort_values("trial_id")
    start = facts.started_at or table["started_at"].min()
    if len(table):
        table["start_hours"] = (table["started_at"] - start).dt.total_seconds() / 3600
        table["hours"] = (table["ended_at"] - start).dt.total_seconds() / 3600
        table["seconds"] = (table["ended_at"] - table["started_at"]).dt.total_seconds()
        waited = table["worker"].notna()  # until a worker was free for it
        table.loc[waited, "seconds"] = (
            table.loc[waited, ["stitch_seconds", "evaluate_seconds"]].astype(float).sum(axis=1)
        )
        table.loc[waited, "start_hours"] = table["hours"] - table["seconds"] / 3600
    else:
        table = table.assign(start_hours=0.0, hours=0.0, seconds=0.0)
    table = table.merge(_objective_columns(tables, facts), on="trial_id", how="left")
    table = table.merge(_plan_columns(tables), on="config_id", how="left")
    return _with_average(table, facts).reset_index(drop=True)


def _objective_columns(tables: RunTables, facts: Facts) -> pd.DataFrame:
    mine = tables.scores.assign(name=tables.scores["benchmark"].astype(str) + "/" + tables.scores["metric"].astype(str))
    mine = mine[mine["name"].isin(facts.names)].drop_duplicates(["trial_id", "name"], keep="last")
    mine = mine.assign(kept=scores.kept(mine, tables))
    wide = mine.set_index(["trial_id", "name"])[["score", "stderr", "kept"]].astype(float).unstack("name")
    columns = [(kind, o.name) for o in facts.objectives for kind in ("score", "stderr", "kept")]
    wide = wide.reindex(columns=pd.MultiIndex.from_tuples(columns) if columns else wide.columns)
    wide.columns = pd.Index([name for o in facts.objectives for name in (o.name, o.error, o.kept)])
    examples = mine.groupby("trial_id")["n_samples"].sum().rename("examples")
    return pd.concat([examples, wide], axis=1).rename_axis("trial_id").reset_index()


def _plan_columns(tables: RunTables) -> pd.DataFrame:
    kept = tables.layers[tables.layers["operation"] != "removed"].groupby("config_id").size().rename("kept_layers")
    weights = tables.plans.drop_duplicates("config_id").set_index("config_id")["n_parameters"].rename("parameters")
    both = pd.concat([kept, weights], axis=1)
    both.index.name = "config_id"
    return both.reset_index()


def gains(table: pd.DataFrame, facts: Facts) -> NDArray[np.float64]:
    """Rows x facts.criteria.

    Scores turned so that higher is better and 0 is the worst (1 / score where lower is better); of size, the share of
    the layers that is gone.
    """
    columns = []
    for o in facts.objectives:
        score = table[o.name].to_numpy(float)
        with np.errstate(divide="ignore"):
            columns.append(score if o.higher_is_better else np.where(score > 0, 1 / score, np.nan))
    if facts.has_range:
        columns.append(1.0 - table[KEPT_LAYERS].to_numpy(float) / facts.n_layers)
    return np.column_stack(columns) if columns else np.empty((len(table), 0))


def maximised(table: pd.DataFrame, facts: Facts) -> NDArray[np.float64]:
    """Rows x facts.criteria: scores turned so that higher is better, and fewer layers too."""
    signs = [1.0 if o.higher_is_better else -1.0 for o in facts.objectives] + [-1.0] * facts.has_range
    return table[facts.criteria].to_numpy(float) * signs


def _with_average(table: pd.DataFrame, facts: Facts) -> pd.DataFrame:
    """Add the average over the objectives (NaN unless all are there) and its standard error.

    Errors are taken as independent. Those are averaged whose scores are shares of examples, as in results.scores.
    """
    if not facts.objectives:
        return table.assign(**{AVERAGE: np.nan, AVERAGE_ERROR: np.nan})
    points = table[facts.names].to_numpy(float)
    errors = table[[o.error for o in facts.objectives]].to_numpy(float)
    kept = table[[o.kept for o in facts.objectives]].to_numpy(float)
    values = kept if facts.average is Average.RETENTION else gains(table, facts)[:, : len(facts.objectives)]
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = errors * np.abs(values / points)
    asked = [(o.metric, o.higher_is_better) for o in facts.objectives]
    taken = averaged_together(asked)
    average = np.where(np.isfinite(values).all(axis=1), values[:, taken].mean(axis=1), np.nan)
    spread = np.sqrt((errors[:, taken] ** 2).sum(axis=1)) / len(taken)
    return table.assign(**{AVERAGE: average, AVERAGE_ERROR: spread})


def on_objectives(tables: RunTables, facts: Facts, subject: Subject) -> pd.Series | None:
    """What a plan that no trial was about (a repaired one) scores on the objectives, in the columns of a trial's row.

    None where it was not scored on all of them.
    """
    own = scores.on_objectives(tables, subject)
    own = own.assign(kept=scores.kept(own, tables)).set_index("name")
    if not set(facts.names) <= set(own.index):
        return None
    row = {KEPT_LAYERS: tables.kept_layers.get(subject.config_id, np.nan)}
    for o in facts.objectives:
        row |= {o.name: own["score"][o.name], o.error: own["stderr"][o.name], o.kept: own["kept"][o.name]}
    return _with_average(pd.DataFrame([row], dtype=float), facts).iloc[0]


def successes(table: pd.DataFrame, budget: int) -> pd.DataFrame:
    """The last successful trial of each configuration at one budget, with a finite average, in the order they ended."""
    mine = table[(table["status"] == "success") & (table["budget"] == budget) & np.isfinite(table[AVERAGE])]
    return mine.sort_values("ended_at").drop_duplicates("config_id", keep="last")


def top_budget(table: pd.DataFrame, facts: Facts) -> int:
    """The highest budget at which any plan succeeded: where "best" is judged. The full budget while there is none."""
    scored = table.loc[(table["status"] == "success") & np.isfinite(table[AVERAGE]), "budget"]
    return int(scored.max()) if len(scored) else facts.full_budget


def judged(table: pd.DataFrame, facts: Facts) -> pd.DataFrame:
    """One row a plan: its success at the top budget, best average first, of equal ones the earlier plan."""
    plans = successes(table, top_budget(table, facts)).sort_values("config_id")
    return plans.sort_values(AVERAGE, ascending=False, kind="stable")
