"""What is true of a whole run: its objectives, rungs and the dense model's scores.

Everything else is read against these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import pandas as pd

from gptailor import wording
from gptailor.results import scores
from gptailor.spec.sections import Budget
from gptailor.spec.values import parse_duration
from gptailor.store.queries import RunTables
from gptailor.trial import asked_key, averaged_together

KEPT_LAYERS = "kept_layers"


class Average(StrEnum):
    """The one number that a plan is judged by; results.scores judges by the same."""

    RETENTION = "retention"  # share of the dense model's score on the same examples, averaged over such objectives
    SCORE = "score"  # not every dense score is known: the scores' mean (of 1 / score where lower is better)


@dataclass(frozen=True)
class Objective:
    """One benchmark that the search optimises. `name` (benchmark/metric) is also its column in every frame."""

    benchmark: str
    metric: str
    higher_is_better: bool = True

    @property
    def name(self) -> str:
        return f"{self.benchmark}/{self.metric}"

    @property
    def error(self) -> str:
        """Column of its standard error."""
        return f"{self.name} ±"

    @property
    def kept(self) -> str:
        """Column of its retention: the share of the dense model's score, 1 is as good in both directions."""
        return f"{self.name} kept"


@dataclass(frozen=True)
class Facts:
    """What every frame of a run needs to know of it.

    n_removed: layers that a plan leaves out, at most; fewest_removed: at least, which is less where the run asks for a
    range of sizes. `rungs`: budgets (examples per benchmark), ascending. `dense`: the dense model's score by objective,
    over the most examples it was scored on, where known.
    """

    run_id: str
    name: str
    status: str
    base_model: str
    n_layers: int
    n_removed: int
    fewest_removed: int
    candidates: tuple[str, ...]
    objectives: tuple[Objective, ...]
    rungs: tuple[int, ...]
    trials_asked: int
    walltime: float | None
    started_at: datetime | None
    ended_at: datetime | None
    last_activity: datetime | None
    error: str | None
    average: Average
    dense: Mapping[str, float]
    spec: Mapping[str, Any]

    @property
    def has_range(self) -> bool:
        """Whether plans differ in how many layers they leave out, so that size is an objective."""
        return self.fewest_removed < self.n_removed

    @property
    def criteria(self) -> list[str]:
        """Columns of what plans are compared by: the objectives, and the layers kept where plans differ in them."""
        return [*self.names, *([KEPT_LAYERS] if self.has_range else [])]

    @property
    def removed_text(self) -> str:
        """`8 of 30 layers`, `4 to 12 of 30 layers`."""
        return f"{wording.span(self.fewest_removed, self.n_removed)} of {self.n_layers} layers"

    @property
    def full_budget(self) -> int:
        return self.rungs[-1]

    @property
    def names(self) -> list[str]:
        """Names of the objectives: their columns."""
        return [objective.name for objective in self.objectives]

    @property
    def average_label(self) -> str:
        kind = "retention" if self.average_is_share else "score"
        n = len(averaged_together([(o.metric, o.higher_is_better) for o in self.objectives]))
        return f"Mean {kind}" if n > 1 else kind.capitalize()

    @property
    def average_is_share(self) -> bool:
        """Whether the average is read in percent."""
        return self.average is Average.RETENTION


def facts(tables: RunTables) -> Facts:
    """Raises ValueError where the run's own row is missing."""
    if tables.runs.empty:
        raise ValueError("the run has no row of its own")
    row = tables.runs.iloc[0]
    spec = as_dict(row.get("spec"))
    objectives = _objectives(tables.scores, spec)
    dense = {
        name: float(rows["score"].iloc[-1]) for name, rows in scores.dense_scores(tables).groupby("name", sort=False)
    }
    measured = not objectives or dense.keys() >= {o.name for o in objectives}
    walltime = spec.get("walltime")
    return Facts(
        run_id=str(row["run_id"]),
        name=str(row["name"]),
        status=str(row["status"]),
        base_model=str(row["base_model"]),
        n_layers=int(row["n_layers"] or 0),
        n_removed=(n_removed := int(row["n_removed"] or 0)),
        fewest_removed=tables.spec.fewest_removed(int(row["n_layers"] or 0), n_removed),
        candidates=_candidates(spec, tables.layers),
        objectives=objectives,
        rungs=_rungs(tables.trials, spec),
        trials_asked=tables.n_asked or len(tables.trials),
        walltime=parse_duration(walltime) if walltime else None,
        started_at=_moment(row.get("started_at")),
        ended_at=_moment(row.get("ended_at")),
        last_activity=_moment(row.get("heartbeat_at")),
        error=row["error"] if isinstance(row.get("error"), str) else None,
        average=Average.RETENTION if measured else Average.SCORE,
        dense=dense,
        spec=spec,
    )


def as_dict(value: Any) -> dict[str, Any]:
    """A JSON column's object, however the reader handed it over."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {}
    return dict(value) if isinstance(value, Mapping) else {}


def _objectives(found: pd.DataFrame, spec: dict[str, Any]) -> tuple[Objective, ...]:
    """Those that were scored, in the run file's order; before the first score, those that were asked for."""
    found = found.loc[found["is_objective"].astype(bool), ["benchmark", "metric", "higher_is_better"]]
    seen = {(b, m): Objective(b, m, bool(h)) for b, m, h in found.drop_duplicates(["benchmark", "metric"]).to_numpy()}
    asked = [asked_key(o)[:2] for o in spec.get("objectives", []) if isinstance(o, Mapping)]
    if not seen:
        return tuple(Objective(*names) for names in asked)
    order = {key: index for index, key in enumerate(asked)}
    return tuple(seen[key] for key in sorted(seen, key=lambda key: (order.get(key, len(order)), key)))


def _candidates(spec: dict[str, Any], layers: pd.DataFrame) -> tuple[str, ...]:
    """In the family's order; names found only among the layers come last."""
    asked = [str(name) for name in (spec.get("candidates") or {})]
    lent = {str(name) for sources in layers["sources"] if sources is not None for name in sources}
    return (*asked, *sorted(lent - set(asked)))


def _rungs(trials: pd.DataFrame, spec: dict[str, Any]) -> tuple[int, ...]:
    """The run file's, or, where other budgets were visited, those and the full one."""
    seen = {int(budget) for budget in trials["budget"].dropna().unique()}
    asked = Budget(**as_dict(spec.get("budget"))).rungs
    return asked if seen <= set(asked) else tuple(sorted({*seen, asked[-1]}))


def _moment(value: Any) -> datetime | None:
    return None if value is None or pd.isna(value) else pd.Timestamp(value).to_pydatetime()
