"""A run's tables written by hand, small enough that a test can say what every number must be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime, timedelta
from typing import Any

import pandas as pd

from gptailor.plan import StitchPlan
from gptailor.store.queries import RunTables
from gptailor.trial import Measurement, Subject

START = datetime(2026, 11, 1, 8, 0, tzinfo=UTC)
SPEC: dict[str, Any] = {
    "name": "by hand",
    "base_model": "models/base",
    "candidates": {"math": "models/math", "code": "models/code"},
    "remove": 1,
    "objectives": [
        {"benchmark": "piqa", "metric": "acc", "split": "validation"},
        {"benchmark": "wiki", "metric": "ppl", "split": "validation"},
    ],
    "budget": {"min": 100, "max": 900, "eta": 3},
    "trials": 20,
}
LOWER_IS_BETTER = ("ppl",)


_OF_WORKERS = ("started_at", "ended_at", "stitch_seconds", "evaluate_seconds", "worker")


def run_tables(
    trials: Sequence[Mapping[str, Any]] = (),
    plans: Mapping[int, StitchPlan] | None = None,
    evaluations: Sequence[Mapping[str, Any]] = (),
    spec: Mapping[str, Any] = SPEC,
    status: str = "finished",
    n_layers: int = 4,
    n_removed: int = 1,
    measurements: Sequence[Measurement] = (),
    seconds: Sequence[tuple[datetime, str, float]] = (),
) -> RunTables:
    """Tables of a run, as they are read from its store.

    trials: config_id, budget and, for a success, scores {"piqa/acc": 0.5, or (0.5, stderr), or (0.5, stderr, n)};
    status and error otherwise. A trial takes 60 s and starts when the one before it ends. evaluations: subject, name
    ("piqa/acc"), score, n_samples and optionally split, stderr. plans: by config_id.
    """
    rows, scores = [], []
    for trial_id, trial in enumerate(trials):
        begin = START + timedelta(seconds=60 * trial_id)
        state = trial.get("status", "success")
        rows.append(
            {
                "run_id": "hand",
                "trial_id": trial_id,
                "config_id": trial["config_id"],
                "budget": trial["budget"],
                "seed": 0,
                "status": state,
                "origin": trial.get("origin", "model"),
                "started_at": begin,
                "ended_at": None if state == "running" else begin + timedelta(seconds=60),
                "suggest_seconds": 0.0,
                "stitch_seconds": 0.1,
                "evaluate_seconds": 59.0,
                "error": trial.get("error"),
                "configuration": "{}",
            }
            | {name: trial[name] for name in _OF_WORKERS if name in trial}
        )
        for name, score in trial.get("scores", {}).items():
            value, stderr, n = (
                (*score, trial["budget"])[:3] if isinstance(score, tuple) else (score, 0.01, trial["budget"])
            )
            benchmark, metric = name.split("/")
            scores.append((trial_id, benchmark, metric, value, stderr, n, True, metric not in LOWER_IS_BETTER))
    columns = ["trial_id", "benchmark", "metric", "score", "stderr", "n_samples", "is_objective", "higher_is_better"]
    run = {
        "run_id": "hand",
        "name": spec.get("name", "by hand"),
        "status": status,
        "spec": json.dumps(spec),
        "base_model": "models/base",
        "n_layers": n_layers,
        "n_removed": n_removed,
        "seed": 0,
        "created_at": START,
        "started_at": START,
        "ended_at": None if status == "running" else START + timedelta(seconds=60 * len(rows)),
        "heartbeat_at": START + timedelta(seconds=60 * len(rows)),
        "error": None,
    }
    return RunTables(
        run_id="hand",
        as_of=START + timedelta(hours=1),
        version=(1,),
        notice=None,
        runs=pd.DataFrame([run]),
        trials=_trial_frame(rows),
        scores=pd.DataFrame(scores, columns=columns).astype({"score": float, "stderr": float}),
        plans=pd.DataFrame(
            [(c, p.hash, "{}", 1000 + 100 * len(p.kept)) for c, p in (plans or {}).items()],
            columns=["config_id", "plan_hash", "plan", "n_parameters"],
        ),
        layers=_layer_frame(plans or {}, n_layers),
        evaluations=_evaluation_frame(evaluations),
        measurements=pd.DataFrame(
            [asdict(one) | {"subject": str(one.subject)} for one in measurements],
            columns=[field.name for field in fields(Measurement)],
        ),
        seconds=pd.DataFrame(seconds, columns=["began_at", "part", "seconds"]),
    )


def _trial_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    columns = [
        "run_id",
        "trial_id",
        "config_id",
        "budget",
        "seed",
        "status",
        "origin",
        "started_at",
        "ended_at",
        "suggest_seconds",
        "stitch_seconds",
        "evaluate_seconds",
        "error",
        "configuration",
        "asked_after",
        "told_as",
        "worker",
    ]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.assign(
        started_at=pd.to_datetime(frame["started_at"], utc=True), ended_at=pd.to_datetime(frame["ended_at"], utc=True)
    )


def _layer_frame(plans: Mapping[int, StitchPlan], n_layers: int) -> pd.DataFrame:
    rows = []
    for config_id, plan in plans.items():
        kept = {choice.layer: (position, choice) for position, choice in enumerate(plan.kept)}
        for layer in range(n_layers):
            if layer in kept:
                position, c = kept[layer]
                rows.append((config_id, layer, position, c.operation.value, list(c.sources), c.method, c.factor, 1.0))
            else:
                rows.append((config_id, layer, None, "removed", [], None, None, None))  # type: ignore[arg-type]
    columns = ["config_id", "layer", "position", "operation", "sources", "method", "factor", "output_scale"]
    left = dict.fromkeys(("heads", "channels", "weights"), float("nan"))
    return pd.DataFrame(rows, columns=columns).astype({"factor": float}).assign(**left)


def _evaluation_frame(evaluations: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    rows = []
    for e in evaluations:
        benchmark, metric = e["name"].split("/")
        subject, config = e["subject"], Subject.parse(e["subject"]).config_id
        split, error = e.get("split", "validation"), e.get("stderr", 0.01)
        known = (e.get("plan_hash"), e.get("chance"), e.get("aggregation"))
        rows.append(
            (subject, config, benchmark, metric, split, e["score"], error, e["n_samples"], metric != "ppl", *known)
        )
    columns = ["subject", "config_id", "benchmark", "metric", "split", "score", "stderr", "n_samples"]
    columns += ["higher_is_better", "plan_hash", "chance", "aggregation"]
    return pd.DataFrame(rows, columns=columns).astype({"score": float, "stderr": float, "chance": float})
