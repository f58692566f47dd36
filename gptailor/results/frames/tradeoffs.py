"""What costs what? Plans as points, the front among them, and the plan that a reader's weights choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from gptailor.measures import hypervolume, knee, pareto_front
from gptailor.results import scores, worth
from gptailor.results.frames.facts import KEPT_LAYERS, Facts
from gptailor.results.frames.trials import AVERAGE, AVERAGE_ERROR, gains, judged, maximised
from gptailor.results.scores import of_kind
from gptailor.store.queries import RunTables
from gptailor.trial import Subject, SubjectKind
from gptailor.wording import size, value

POINTS = 1500
"""Most points that a chart draws; the best by average stay."""


@dataclass(frozen=True)
class Axis:
    """Something that plans can be compared by. `column` is in the plan table; `percent`: shown as a share."""

    column: str
    label: str
    maximise: bool = True
    error: str | None = None
    percent: bool = False


def label(criterion: str) -> str:
    """What a criterion is called on the screen."""
    return "Layers kept" if criterion == KEPT_LAYERS else criterion


def plan_table(tables: RunTables, table: pd.DataFrame, facts: Facts) -> pd.DataFrame:
    """One row a plan judged at the top budget, best average first.

    The trial table's columns, latency, and one for each further measurement of that plan (`benchmark/metric (split)`,
    with ` ±`), such as held-out scores, as far as taken.
    """
    plans = judged(table, facts)
    plans = plans.assign(latency=_latency(table, plans))
    plans = plans.merge(worth.ratios(tables), left_on="config_id", right_index=True, how="left")
    mine = of_kind(tables.evaluations, SubjectKind.CONFIG)
    if mine.empty:
        return plans.reset_index(drop=True)
    mine = mine.sort_values("n_samples").assign(name=_measurement_names(mine))
    wide = mine.pivot_table(index="config_id", columns="name", values="score", aggfunc="last")
    errors = mine.pivot_table(index="config_id", columns="name", values="stderr", aggfunc="last")
    wide = wide.join(errors.rename(columns=lambda name: f"{name} ±"))
    fresh = [name for name in wide.columns if name not in plans.columns]
    return plans.merge(wide[fresh].reset_index(), on="config_id", how="left")


def _latency(table: pd.DataFrame, plans: pd.DataFrame) -> pd.Series:
    """Milliseconds that an example took when each plan was scored.

    The seconds of all its successes (a rung computes only what the rung below has not) by the examples of the highest
    one. NaN for a plan whose answers the references had given before its trials.
    """
    done = table[table["status"] == "success"]
    known = set(done.loc[done["stitch_seconds"] == 0, "config_id"])
    spent = done[~done["config_id"].isin(known)].groupby("config_id")["evaluate_seconds"].sum()
    return 1000 * plans["config_id"].map(spent) / plans["examples"]


def _measurement_names(evaluations: pd.DataFrame) -> pd.Series:
    names = evaluations["benchmark"].astype(str) + "/" + evaluations["metric"].astype(str)
    return names + " (" + evaluations["split"].fillna("").astype(str) + ")"


def axes(tables: RunTables, plans: pd.DataFrame, facts: Facts) -> list[Axis]:
    """What the run's plans can be compared by, the average first; only what at least one plan has a value of."""
    found = (
        [Axis(AVERAGE, facts.average_label, True, AVERAGE_ERROR, facts.average_is_share)]
        if len(facts.objectives) != 1
        else []
    )
    found += [Axis(o.name, o.name, o.higher_is_better, o.error) for o in facts.objectives]
    found += [Axis(KEPT_LAYERS, label(KEPT_LAYERS), False), Axis("parameters", "Parameters", False)]
    found.append(Axis("latency", "Latency, ms an example", False))
    for name, quantity in worth.axes(tables):
        found.append(Axis(name, name, quantity in worth.MORE_IS_BETTER, f"{name} ±"))
    mine = of_kind(tables.evaluations, SubjectKind.CONFIG)
    for name, higher in dict(zip(_measurement_names(mine), mine["higher_is_better"], strict=True)).items():
        found.append(Axis(str(name), str(name), bool(higher), f"{name} ±"))
    return [axis for axis in found if axis.column in plans and np.isfinite(plans[axis.column].astype(float)).any()]


def front(plans: pd.DataFrame, x: Axis, y: Axis) -> pd.DataFrame:
    """The plans as points.

    Columns: config_id, x, y, x_low, x_high, y_low, y_high (one standard error), average, on_front, knee.
    """
    frame = pd.DataFrame({"config_id": plans["config_id"], "average": plans[AVERAGE]})
    for name, axis in (("x", x), ("y", y)):
        value = plans[axis.column].astype(float)
        error = plans[axis.error].astype(float) if axis.error in plans else pd.Series(np.nan, index=plans.index)
        frame = frame.assign(**{name: value, f"{name}_low": value - error, f"{name}_high": value + error})
    frame = frame[np.isfinite(frame["x"]) & np.isfinite(frame["y"])].reset_index(drop=True)
    points = frame[["x", "y"]].to_numpy(float) * [1 if x.maximise else -1, 1 if y.maximise else -1]
    on_front, bend = pareto_front(points), knee(points)
    frame = frame.assign(on_front=on_front, knee=np.arange(len(frame)) == (-1 if bend is None else bend))
    return frame[frame["on_front"] | (frame.index < POINTS)].reset_index(drop=True)


def front_of_all(plans: pd.DataFrame, facts: Facts) -> pd.Series:
    """Which plans no other dominates in all objectives at once."""
    return pd.Series(pareto_front(maximised(plans, facts)) if facts.objectives else False, index=plans.index)


def knee_of_all(plans: pd.DataFrame, facts: Facts) -> int | None:
    """config_id of the front's knee over all objectives."""
    bend = knee(maximised(plans, facts)) if len(plans) and facts.objectives else None
    return None if bend is None else int(plans["config_id"].iloc[bend])


def hypervolume_of_all(plans: pd.DataFrame, facts: Facts) -> float | None:
    """Of the plans' scores, from the corner 0 (1 / score where lower is better); None with too many objectives.

    Of size, where that is an objective, the share of the layers that is gone.
    """
    return hypervolume(gains(plans, facts), np.zeros(len(facts.criteria))) if len(plans) and facts.objectives else 0.0


def scaled(plans: pd.DataFrame, facts: Facts) -> pd.DataFrame:
    """facts.criteria scaled to 0 (worst of these plans) .. 1 (best), indexed like plans; 0.5 where all are equal."""
    points = maximised(plans, facts)
    low, high = np.nanmin(points, axis=0, initial=np.inf), np.nanmax(points, axis=0, initial=-np.inf)
    span = np.where(high > low, high - low, 1.0)
    values = np.where(high > low, (points - low) / span, 0.5)
    return pd.DataFrame(values, columns=facts.criteria, index=plans.index)


def parallel(plans: pd.DataFrame, facts: Facts, selected: int | None, limit: int = 120) -> pd.DataFrame:
    """Long rows for parallel coordinates.

    Columns: config_id, objective, order, position (0..1), score, average, on_front, selected.

    The front, the selected plan, and the best others up to `limit` plans.
    """
    on_front = front_of_all(plans, facts)
    first = on_front | (plans["config_id"] == selected)
    kept = pd.concat([plans[first], plans[~first]]).head(max(limit, 1))
    places = scaled(plans, facts).loc[kept.index]
    pieces = []
    for order, name in enumerate(facts.criteria):
        pieces.append(
            pd.DataFrame(
                {
                    "config_id": kept["config_id"],
                    "objective": label(name),
                    "order": order,
                    "position": places[name],
                    "score": kept[name].astype(float),
                    "average": kept[AVERAGE],
                    "on_front": on_front[kept.index],
                    "selected": kept["config_id"] == selected,
                }
            )
        )
    return pd.concat(pieces, ignore_index=True) if pieces else pd.DataFrame()


def ends(plans: pd.DataFrame, facts: Facts) -> pd.DataFrame:
    """What the top and the bottom of each parallel axis stand for: objective, order, best, worst (text)."""
    rows = []
    rises = {o.name: o.higher_is_better for o in facts.objectives}
    for order, name in enumerate(facts.criteria):
        values = plans[name].astype(float)
        best, worst = (values.max(), values.min()) if rises.get(name, False) else (values.min(), values.max())
        rows.append((label(name), order, f"{best:.3g}", f"{worst:.3g}"))
    return pd.DataFrame(rows, columns=["objective", "order", "best", "worst"])


def pick_by_weights(plans: pd.DataFrame, facts: Facts, weights: Mapping[str, float]) -> int | None:
    """config_id of the plan with the best weighted mean of scaled criteria; None without plans or weight."""
    total = sum(weights.get(name, 0.0) for name in facts.criteria)
    if plans.empty or total <= 0:
        return None
    fitness = sum(
        (weights.get(name, 0.0) / total * scaled(plans, facts)[name] for name in facts.criteria),
        start=0.0 * plans[AVERAGE],
    )
    return int(plans.loc[fitness.idxmax(), "config_id"])


def scores_of(table: pd.DataFrame, facts: Facts, config_id: int) -> pd.DataFrame:
    """A plan's scores at every rung it reached: budget, objective, score, error, retention."""
    mine = table[(table["config_id"] == config_id) & (table["status"] == "success")]
    mine = mine.sort_values("ended_at").drop_duplicates("budget", keep="last").sort_values("budget")
    rows = []
    for _, trial in mine.iterrows():
        budget = int(trial["budget"])
        rows += [(budget, o.name, trial[o.name], trial[o.error], trial[o.kept]) for o in facts.objectives]
    return pd.DataFrame(rows, columns=["budget", "objective", "score", "error", "retention"])


def first_axes(axes: Sequence[Axis], facts: Facts) -> tuple[Axis, Axis]:
    """What is drawn first, across and up: size and the average where plans differ in size, else two objectives.

    The layers kept and the average where there is one objective.
    """
    scored = [axis for axis in axes if axis.column in facts.names]
    if len(scored) > 1 and not facts.has_range:
        return scored[0], scored[1]
    return next(axis for axis in axes if axis.column == KEPT_LAYERS), axes[0]


def of_sizes(tables: RunTables, plans: pd.DataFrame, facts: Facts) -> pd.DataFrame:
    """The best plan of each size (scores.best_of_sizes), for people; empty without a range of sizes.

    Columns: Layers kept, Plan, the average's label, Parameters, Selection (where it was used).
    """
    best = scores.best_of_sizes(tables)
    weights = tables.plans.drop_duplicates("config_id").set_index("config_id")["n_parameters"]
    errors = plans.set_index("config_id")["average ±"].astype(float)
    shown = pd.DataFrame(
        {
            label(KEPT_LAYERS): best["kept_layers"],
            "Plan": [Subject.config(config_id).label for config_id in best["config_id"]],
            facts.average_label: [
                value(row.average, errors.get(row.config_id), percent=facts.average_is_share)
                for row in best.itertuples()
            ],
            "Parameters": [size(weights[config_id]) for config_id in best["config_id"]],
        }
    )
    if best["selection"].notna().any():
        shown["Selection"] = [value(kept, percent=True) for kept in best["selection"]]
    return shown


@dataclass(frozen=True)
class Place:
    """A plan's place in the search.

    rank: by average among the `of` plans judged, None where it was not. trials: spent on it. seconds: from the run's
    start to its first trial. origin: where it came from.
    """

    rank: int | None
    of: int
    trials: int
    seconds: float | None
    origin: str


def place_of(table: pd.DataFrame, plans: pd.DataFrame, config_id: int) -> Place:
    mine = table[table["config_id"] == config_id]
    order = plans["config_id"].tolist()
    return Place(
        rank=order.index(config_id) + 1 if config_id in order else None,
        of=len(order),
        trials=len(mine),
        seconds=3600 * float(mine["start_hours"].min()) if len(mine) else None,
        origin=str(mine["origin"].iloc[0]) if len(mine) else "–",
    )
