"""Scores outside the search read against the dense base's: what is kept, averages, and which plan is best.

Averages weigh every benchmark alike. `average*` leaves out the benchmarks that the search was calibrated on, whatever
the split: a plan may have learnt their form. Retention above chance counts from the score of guessing, because a
coin's half is no capability.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gptailor.measures import gain, retention
from gptailor.plan import BASE, StitchPlan
from gptailor.store.queries import RunTables
from gptailor.trial import DENSE, Subject, SubjectKind

BENCHMARK = ["benchmark", "metric", "split"]


def judged(tables: RunTables, asked: str = "held_out") -> pd.DataFrame:
    """A row a subject and benchmark of the run file's `asked` list, each at the most examples it was scored on.

    Columns: subject, config_id, plan_hash, benchmark, metric, split, n, score, stderr, higher, chance, calibrated (the
    search looked at this benchmark), dense (its score on as many examples), retention, above_chance (retention counted
    from the score of guessing; NaN where the dense model does not beat it by two standard errors).
    """
    spec = _spec(tables)
    wanted = {(o["benchmark"], o["metric"], o["split"]) for o in spec.get(asked) or ()}
    found = tables.evaluations
    benchmarks = zip(*(found[column] for column in BENCHMARK), strict=True)
    found = found[np.array([key in wanted for key in benchmarks], dtype=bool)]
    found = found.sort_values("n_samples").drop_duplicates(["subject", *BENCHMARK], keep="last")
    calibrated = {o["benchmark"] for o in spec.get("objectives") or ()}
    frame = pd.DataFrame(
        {
            "subject": found["subject"].astype(str),
            "config_id": found["config_id"],
            "plan_hash": [_hash(row, tables) for row in found.itertuples()],
            **{column: found[column].astype(str) for column in BENCHMARK},
            "n": found["n_samples"].astype(int),
            "score": found["score"].astype(float),
            "stderr": found["stderr"].astype(float),
            "higher": found["higher_is_better"].astype(bool),
            "chance": found["chance"].astype(float),
            "calibrated": found["benchmark"].isin(calibrated),
        }
    )
    dense, error = _dense(tables), _dense(tables, "stderr")
    keys = [tuple(key) for key in frame[[*BENCHMARK, "n"]].itertuples(index=False)]
    frame["dense"] = pd.Series([dense.get(key) for key in keys], index=frame.index, dtype=float)
    noise = pd.Series([error.get(key) for key in keys], index=frame.index, dtype=float).fillna(0.0)
    kept = [retention(s, d, h) for s, d, h in zip(frame["score"], frame["dense"], frame["higher"], strict=True)]
    frame["retention"] = pd.Series(kept, index=frame.index, dtype=float)
    beats = frame["dense"] - frame["chance"] > 2 * noise
    above = (frame["score"] - frame["chance"]) / (frame["dense"] - frame["chance"])
    frame["above_chance"] = above.where(beats & frame["higher"])
    kind = kinds(frame["subject"]).map(list(SubjectKind).index).astype(int)
    return (
        frame.assign(kind=kind).sort_values(["kind", "subject", *BENCHMARK]).drop(columns="kind").reset_index(drop=True)
    )


def averages(frame: pd.DataFrame, calibration: Mapping[Subject, float] | None = None) -> pd.DataFrame:
    """A row a subject that was scored on every benchmark of `frame` (see `judged`), in its order.

    Columns: subject, config_id, plan_hash, benchmarks, average (of scores; 1 / score where lower is better), stderr,
    without_calibration (the same without benchmarks that the search looked at; NaN if none is left), retention,
    above_chance, gap (calibration retention less held-out retention: what the search's own scores promise too much).
    calibration: subject -> mean retention over the objectives at the full budget.
    """
    columns = ["subject", "config_id", "plan_hash", "benchmarks", "average", "stderr", "without_calibration"]
    columns += ["retention", "above_chance", "gap"]
    n_benchmarks = len(frame[BENCHMARK].drop_duplicates())
    rows = []
    for subject, own in frame.groupby("subject", sort=False):
        if len(own) < n_benchmarks:
            continue
        points = pd.Series(
            [gain(s, h) for s, h in zip(own["score"], own["higher"], strict=True)], index=own.index, dtype=float
        )
        errors = own["stderr"].where(own["higher"], own["stderr"] / own["score"] ** 2)
        kept = own["retention"].mean() if own["retention"].notna().all() else np.nan
        rows.append(
            (
                subject,
                own["config_id"].iloc[0],
                own["plan_hash"].iloc[0],
                n_benchmarks,
                points.mean(),
                float(np.sqrt((errors**2).sum(skipna=False)) / len(own)),
                points[~own["calibrated"]].mean(),
                kept,
                own["above_chance"].mean(),
                (calibration or {}).get(Subject.parse(str(subject)), np.nan) - kept,
            )
        )
    return pd.DataFrame(rows, columns=columns)


def calibration(tables: RunTables) -> dict[Subject, float]:
    """Subject -> mean retention over the objectives at the full budget: what the search believed.

    Configurations from their trials, others from the reference scores.
    """
    spec = _spec(tables)
    objectives = [(o["benchmark"], o["metric"], o["split"]) for o in spec.get("objectives") or ()]
    dense = _dense(tables)
    budget = (spec.get("budget") or {}).get("max", 0)
    splits = {(benchmark, metric): split for benchmark, metric, split in objectives}
    kept: dict[Subject, dict[tuple[str, ...], float]] = {}

    def add(subject: Subject, key: tuple[str, str, str], n: int, score: float, higher: bool) -> None:
        whole = dense.get((*key, n))
        share = None if whole is None else retention(score, whole, higher)
        if share is not None:
            kept.setdefault(subject, {})[key] = share

    full = tables.trials[(tables.trials["status"] == "success") & (tables.trials["budget"] == budget)]
    for row in tables.scores.merge(full[["trial_id", "config_id"]], on="trial_id").itertuples():
        if (split := splits.get((row.benchmark, row.metric))) is not None:
            key = (row.benchmark, row.metric, split)
            add(Subject.config(row.config_id), key, row.n_samples, row.score, bool(row.higher_is_better))
    for row in tables.evaluations.sort_values("n_samples").itertuples():
        if (row.benchmark, row.metric, row.split) in objectives:
            key = (row.benchmark, row.metric, row.split)
            add(Subject.parse(row.subject), key, row.n_samples, row.score, bool(row.higher_is_better))
    return {subject: sum(own.values()) / len(own) for subject, own in kept.items() if len(own) == len(objectives)}


def best(tables: RunTables) -> Subject | None:
    """The subject that the run calls its best: the selection's choice, else the search's own.

    That is the plan of the highest mean retention by the search's scores. None before a plan was scored at the full
    budget.
    """
    if chosen := choice(tables):
        return chosen.subject
    believed = {who: kept for who, kept in calibration(tables).items() if who.kind is SubjectKind.CONFIG}
    return max(believed, key=lambda who: believed[who]) if believed else None


@dataclass(frozen=True)
class Choice:
    """The plan chosen by the selection split.

    retention: its mean there; promised: what the search's own scores said of it. by_search: the plan that those would
    have chosen, and its retention on the selection split. optimism: mean over the finalists of promised less kept: how
    much the search's scores flatter.
    """

    subject: Subject
    retention: float
    promised: float
    by_search: Subject
    by_search_retention: float
    optimism: float
    finalists: int


def choice(tables: RunTables) -> Choice | None:
    """What the selection split chose; None where it has not been used."""
    table = averages(judged(tables, "selection"), calibration(tables))
    plans = of_kind(table, SubjectKind.CONFIG).dropna(subset=["retention", "gap"])
    if plans.empty:
        return None
    promised = plans["retention"] + plans["gap"]
    best, believed = plans.loc[plans["retention"].idxmax()], plans.loc[promised.idxmax()]
    return Choice(
        subject=Subject.parse(str(best["subject"])),
        retention=float(best["retention"]),
        promised=float(best["retention"] + best["gap"]),
        by_search=Subject.parse(str(believed["subject"])),
        by_search_retention=float(believed["retention"]),
        optimism=float(plans["gap"].mean()),
        finalists=len(plans),
    )


def choice_text(chosen: Choice) -> str:
    """One sentence or two for people."""
    name = f"plan {chosen.subject.config_id}"
    text = (
        f"Of the {chosen.finalists} most promising plans, {name} is best on the selection split, which the search "
        f"never used: it keeps {chosen.retention:.1%} of the dense base there ({chosen.promised:.1%} by the search's "
        "own scores)."
    )
    if chosen.by_search != chosen.subject:
        other = f"plan {chosen.by_search.config_id}"
        text += f" The search's scores would have chosen {other}, which keeps {chosen.by_search_retention:.1%}."
    beside = "more" if chosen.optimism >= 0 else "less"
    return text + f" On average the search's scores promised {abs(chosen.optimism):.1%} {beside} than was kept."


def strongest(table: pd.DataFrame, kind: SubjectKind) -> Subject | None:
    """The subject of a kind with the highest average in `averages`."""
    own = of_kind(table, kind)
    return None if own.empty else Subject.parse(str(own.sort_values("average")["subject"].iloc[-1]))


def of_kind(table: pd.DataFrame, kind: SubjectKind) -> pd.DataFrame:
    """The rows of a table whose column `subject` is of a kind."""
    return table[kinds(table["subject"]) == kind]


def kinds(subjects: pd.Series) -> pd.Series:
    """Texts of subjects -> their SubjectKind."""
    return subjects.map(lambda text: Subject.parse(str(text)).kind).astype(object)


def _hash(row: Any, tables: RunTables) -> str | None:
    """The plan behind an evaluation; rows that older versions wrote do not name it."""
    if isinstance(row.plan_hash, str):
        return row.plan_hash
    n_layers = int(tables.runs["n_layers"].iloc[0])
    subject = Subject.parse(row.subject)
    match subject.kind:
        case SubjectKind.CONFIG:
            found = tables.plans.loc[tables.plans["config_id"] == subject.config_id, "plan_hash"]
            return None if found.empty else str(found.iloc[0])
        case SubjectKind.BASELINE:
            return None
        case _:
            return StitchPlan.dense(n_layers, subject.name or BASE).hash


def _dense(tables: RunTables, column: str = "score") -> dict[tuple[Any, ...], float]:
    """(benchmark, metric, split, examples) -> the dense model's score, or its standard error."""
    own = tables.evaluations[tables.evaluations["subject"] == str(DENSE)]
    return dict(zip(zip(*(own[c] for c in (*BENCHMARK, "n_samples")), strict=True), own[column], strict=True))


def _spec(tables: RunTables) -> dict[str, Any]:
    spec = tables.runs["spec"].iloc[0] if len(tables.runs) else "{}"
    return json.loads(spec) if isinstance(spec, str) else dict(spec or {})
