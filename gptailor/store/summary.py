"""What the table of runs shows of one run, small enough to be kept as a file beside the database.

The engine writes it after each trial, so that a hundred runs are listed without opening a hundred databases. What it
says is worked out in gptailor/results/summary.py.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime

from gptailor.store.folder import RunFolder, write_atomically
from gptailor.trial import RunStatus

FORMAT = 2
MAX_BYTES = 1024 * 1024


@dataclass(frozen=True)
class RunSummary:
    """One row of the table of runs. Times are timezone-aware, None where it has not happened.

    status: as the engine wrote it; launch.engine.state tells lost from running. n_done: trials that succeeded or
    crashed; n_failed: the crashed among them. n_removed: layers that a plan leaves out, at most; fewest_removed: at
    least. objectives: `benchmark/metric`. best_config: the plan that the run calls
    its best (results.scores.best); best_scores: its scores on the objectives at the full budget; retention: its mean
    there, None without dense results. held_out: its mean retention on the held-out benchmarks, where they were all
    scored. hypervolume: of the plans scored there, None without any and with too many
    objectives (measures.MAX_HYPERVOLUME).
    worked: seconds in which trials that have ended were asked for or at work, without pauses and nights between.
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
    fewest_removed: int | None = None
    budget_max: int = 0
    objectives: tuple[str, ...] = ()
    best_config: int | None = None
    best_scores: dict[str, float] = field(default_factory=dict)
    retention: float | None = None
    held_out: float | None = None
    hypervolume: float | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    last_activity: datetime | None = None
    worked: float | None = None
    error: str | None = None
    size: int = 0
    problem: str | None = None


def summary_of_run_file(folder: RunFolder, problem: str | None = None) -> RunSummary:
    """What is known of a run before its engine has written anything, or when its database cannot be read."""
    from gptailor.spec.files import (
        parse_spec,  # brings pydantic (0.3 s), which small processes that read a store do without
    )

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
