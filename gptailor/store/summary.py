"""What the table of runs shows of one run, small enough to be kept as a file beside the database.

The engine writes it after each trial, so that a hundred runs are listed without opening a hundred databases.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import duckdb

from gptailor.measures import gain, retention
from gptailor.store.folder import RunFolder, write_atomically
from gptailor.trial import RunStatus

FORMAT = 1
MAX_BYTES = 1024 * 1024
MAX_HYPERVOLUME = 5
"""Objectives up to which the hypervolume is computed: its cost is exponential in them (14 took 38 s for 82 points)."""


@dataclass(frozen=True)
class RunSummary:
    """One row of the table of runs. Times are timezone-aware, None where it has not happened.

    status: as the engine wrote it; launch.engine.state tells lost from running. n_done: trials that succeeded or
    crashed; n_failed: the crashed among them. objectives: `benchmark/metric`. best_config: the full-budget success with
    the highest mean retention (without a dense result: the highest mean gain, see `gain`); best_scores: its scores, by
    objective; retention: its mean of score / dense over the objectives, same split and number of examples, None without
    dense results. hypervolume: of the full-budget successes, gains over a reference of 0, None without any
    and with more than MAX_HYPERVOLUME objectives.
    problem: why the figures are missing or old, else None.
    """

    run_id: str
    name: str
    status: RunStatus = RunStatus.QUEUED
    base_model: str = ""
    device: str = ""
    seed: int = 0
    n_asked: int = 0
    n_done: int = 0
    n_failed: int = 0
    n_layers: int | None = None
    n_removed: int | None = None
    budget_max: int = 0
    objectives: tuple[str, ...] = ()
    best_config: int | None = None
    best_scores: dict[str, float] = field(default_factory=dict)
    retention: float | None = None
    hypervolume: float | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    last_activity: datetime | None = None
    error: str | None = None
    size: int = 0
    problem: str | None = None


def summarise(con: duckdb.DuckDBPyConnection, folder: RunFolder) -> RunSummary:
    """The summary from an open database. Raises duckdb.Error."""
    run = con.execute(
        "SELECT name, status, spec, base_model, n_layers, n_removed, seed, epoch_us(created_at), epoch_us(started_at), "
        "epoch_us(ended_at), epoch_us(heartbeat_at), versions, error FROM runs"
    ).fetchone()
    if run is None:
        return summary_of_run_file(folder)
    name, status, spec_json, base_model, n_layers, n_removed, seed, *times, versions, error = run
    spec = json.loads(spec_json or "{}")
    done, failed = con.execute(
        "SELECT count(*) FILTER (status IN ('success', 'crashed')), count(*) FILTER (status = 'crashed') FROM trials"
    ).fetchone() or (0, 0)
    objectives = [(o["benchmark"], o["metric"], o["split"]) for o in spec.get("objectives", ())]
    budget_max = (spec.get("budget") or {}).get("max", 0)
    best = _Best.of(con, objectives, budget_max)
    created, started, ended, heartbeat = (None if t is None else datetime.fromtimestamp(t / 1e6, UTC) for t in times)
    return RunSummary(
        run_id=folder.run_id,
        name=name or folder.run_id,
        status=RunStatus(status or RunStatus.STOPPED),  # None: a journal that lost its first line
        base_model=base_model or "",
        device=json.loads(versions or "{}").get("device") or spec.get("device", ""),
        seed=seed or 0,
        n_asked=spec.get("trials", 0),
        n_done=done,
        n_failed=failed,
        n_layers=n_layers,
        n_removed=n_removed,
        budget_max=budget_max,
        objectives=tuple(f"{benchmark}/{metric}" for benchmark, metric, _ in objectives),
        best_config=best.config,
        best_scores=best.scores,
        retention=best.retention,
        hypervolume=best.hypervolume,
        created_at=created,
        started_at=started,
        ended_at=ended,
        last_activity=heartbeat,
        error=error,
        size=folder.size(),
    )


def summary_of_run_file(folder: RunFolder, problem: str | None = None) -> RunSummary:
    """What is known of a run before its engine has written anything, or when its database cannot be read."""
    from gptailor.spec import parse_spec  # brings pydantic (0.3 s), which small processes that read a store do without

    try:
        spec = parse_spec(folder.spec.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # a run whose run file is gone or broken is still listed, by its id
        why = problem or f"its run file cannot be read: {error}"
        return RunSummary(folder.run_id, folder.run_id, size=folder.size(), problem=why)
    return RunSummary(
        run_id=folder.run_id,
        name=spec.name,
        base_model=spec.base_model,
        device=spec.device,
        seed=spec.seed,
        n_asked=spec.trials,
        budget_max=spec.budget.max,
        objectives=tuple(objective.name for objective in spec.objectives),
        created_at=datetime.fromtimestamp(folder.spec.stat().st_mtime, UTC),
        size=folder.size(),
        problem=problem,
    )


@dataclass(frozen=True)
class _Best:
    config: int | None = None
    scores: dict[str, float] = field(default_factory=dict)
    retention: float | None = None
    hypervolume: float | None = None

    @classmethod
    def of(cls, con: duckdb.DuckDBPyConnection, objectives: list[tuple[str, str, str]], budget: int) -> _Best:
        rows = con.execute(
            "SELECT t.config_id, s.benchmark, s.metric, s.score, s.n_samples, s.higher_is_better "
            "FROM trials t JOIN scores s USING (run_id, trial_id) "
            "WHERE t.status = 'success' AND t.budget = ? AND s.is_objective ORDER BY t.trial_id",
            [budget],
        ).fetchall()
        dense = {
            tuple(key): score
            for *key, score in con.execute(
                "SELECT benchmark, metric, split, n_samples, score FROM evaluations WHERE subject = 'dense'"
            ).fetchall()
        }
        splits = {(benchmark, metric): split for benchmark, metric, split in objectives}
        plans: dict[int, dict[str, Any]] = {}
        for config, benchmark, metric, score, n_samples, higher in rows:
            if (benchmark, metric) not in splits:
                continue
            whole = dense.get((benchmark, metric, splits[benchmark, metric], n_samples))
            kept = None if whole is None else retention(score, whole, higher)
            plans.setdefault(config, {})[f"{benchmark}/{metric}"] = (score, gain(score, higher), kept)
        whole_plans = {config: found for config, found in plans.items() if len(found) == len(splits)}
        if not whole_plans:
            return cls()
        measured = all(kept is not None for found in whole_plans.values() for _, _, kept in found.values())

        def fitness(config: int) -> float:
            values = [kept if measured else won for _, won, kept in whole_plans[config].values()]
            return sum(values) / len(values)

        best = max(whole_plans, key=fitness)
        from gptailor.measures import hypervolume  # brings moocore (0.4 s), which listing kept summaries does not need

        names = [f"{benchmark}/{metric}" for benchmark, metric in splits]
        points = [[found[name][1] for name in names] for found in whole_plans.values()]
        return cls(
            config=best,
            scores={name: whole_plans[best][name][0] for name in names},
            retention=fitness(best) if measured else None,
            hypervolume=hypervolume(points, [0.0] * len(names)) if len(names) <= MAX_HYPERVOLUME else None,
        )


def write_summary(folder: RunFolder, summary: RunSummary) -> None:
    """Keep it beside the database. Raises OSError."""
    data = {"format": FORMAT, **dataclasses.asdict(summary)}
    write_atomically(folder.summary, json.dumps(data, default=_iso), durable=False)


def read_summary(folder: RunFolder) -> RunSummary | None:
    """The kept summary, None where there is none that this version can read."""
    try:
        if folder.summary.stat().st_size > MAX_BYTES:
            return None
        data = json.loads(folder.summary.read_text(encoding="utf-8"))
        if data.pop("format") != FORMAT:
            return None
        for key in ("created_at", "started_at", "ended_at", "last_activity"):
            data[key] = data[key] and datetime.fromisoformat(data[key])
        changes = {
            "run_id": folder.run_id,
            "objectives": tuple(data["objectives"]),
            "status": RunStatus(data["status"]),
        }
        return RunSummary(**data | changes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent, torn, or another version's
        return None


def _iso(value: datetime) -> str:
    return value.isoformat()
