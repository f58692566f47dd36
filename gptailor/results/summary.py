"""The table of runs: a run's summary, worked out of its scores, or as its engine kept it beside the database.

pandas takes a third of a second to import, and a table of kept summaries needs none of it: it is imported where scores
are worked out.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptailor.store.connection import READER_PATIENCE, StoreError, StoreMissing
from gptailor.store.folder import RunFolder, run_folders
from gptailor.store.summary import RunSummary, read_summary, summary_of_run_file
from gptailor.trial import RunStatus, Subject, TrialStatus

if TYPE_CHECKING:
    from pandas import DataFrame

    from gptailor.results.scores import Searched
    from gptailor.store.queries import ScoreTables
    from gptailor.store.stored_spec import StoredSpec


def summarise(tables: ScoreTables, folder: RunFolder) -> RunSummary:
    """The summary of a run's tables."""
    from pandas import isna

    from gptailor.results import scores

    if tables.runs.empty:
        return summary_of_run_file(folder)
    run = {str(k): None if isna(v) else v for k, v in tables.runs.iloc[0].items()}
    spec = tables.spec
    found = scores.searched(tables)
    named = scores.best(tables, found)
    best = None if named is None else named.config_id
    best_scores, average = _best_scores(tables, found, named)
    ended = scores.ended(tables.trials)
    return RunSummary(
        run_id=folder.run_id,
        name=run["name"] or folder.run_id,
        status=RunStatus(run["status"] or RunStatus.STOPPED),  # None: a journal that lost its first line
        base_model=run["base_model"] or "",
        device=tables.versions.get("device") or spec.device,
        seed=int(run["seed"] or 0),
        n_asked=tables.n_asked,
        n_done=len(ended),
        n_failed=int((ended["status"] == TrialStatus.CRASHED).sum()),
        n_layers=_whole(run["n_layers"]),
        n_removed=_whole(run["n_removed"]),
        fewest_removed=_fewest(run, spec),
        budget_max=spec.budget.max,
        objectives=tuple(found.scores.columns),
        best_config=best,
        best_scores=best_scores,
        retention=average if found.is_share else None,
        held_out=None if named is None else _held_out(tables, named),
        hypervolume=found.hypervolume,
        created_at=_moment(run["created_at"]),
        started_at=_moment(run["started_at"]),
        ended_at=_moment(run["ended_at"]),
        last_activity=_moment(run["heartbeat_at"]),
        worked=_worked(tables.trials),
        error=run["error"],
        size=folder.size(),
    )


def _worked(trials: DataFrame) -> float:
    """Seconds; where trials overlap, they count once."""
    from gptailor.measures import covered
    from gptailor.results.scores import ended as ended_of

    ended = ended_of(trials).dropna(subset="ended_at")
    if ended.empty:
        return 0.0
    end = (ended["ended_at"] - ended["ended_at"].min()).dt.total_seconds().to_numpy(float)
    took = ended[["suggest_seconds", "stitch_seconds", "evaluate_seconds"]].astype(float).fillna(0.0).sum(axis=1)
    return covered(end - took.to_numpy(float), end)


def _best_scores(tables: ScoreTables, found: Searched, named: Subject | None) -> tuple[dict[str, float], float | None]:
    """The best plan's scores on the objectives, and what plans are ranked by; of a repaired one outside any trial."""
    from gptailor.results import scores

    if named is None:
        return {}, None
    if named.config_id in found.scores.index:
        return found.scores.loc[named.config_id].to_dict(), float(found.average[named.config_id])
    own = scores.on_objectives(tables, named).set_index("name")["score"].to_dict()
    shown = {name: float(own[name]) for name in found.scores.columns if name in own}
    return shown, scores.calibration(tables, found).get(named)


def _fewest(run: Mapping[str, Any], spec: StoredSpec) -> int | None:
    known = run["n_layers"] is not None and run["n_removed"] is not None
    return spec.fewest_removed(int(run["n_layers"]), int(run["n_removed"])) if known else None


def _held_out(tables: ScoreTables, best: Subject) -> float | None:
    """The best plan's mean retention on what is held out, where it was scored on all of it and the dense base too."""
    from gptailor.results import scores

    if not tables.spec.held_out:
        return None
    table = scores.averages(scores.judged(tables))
    own = table.loc[table["subject"] == str(best), "retention"].dropna()
    return None if own.empty else float(own.iloc[0])


def run_summary(folder: RunFolder, patience: float = READER_PATIENCE) -> RunSummary:
    """The run's row for the table of runs; `problem` says why it is old or poor. Never raises for a broken run."""
    kept = read_summary(folder)
    if kept is not None and _is_fresh(folder):
        return kept
    from gptailor.store.queries import read_scores

    try:
        return summarise(read_scores(folder, patience), folder)
    except StoreMissing:
        return summary_of_run_file(folder)
    except (StoreError, ValueError) as error:  # ValueError: a status or a specification that is none
        return replace(kept, problem=str(error)) if kept else summary_of_run_file(folder, str(error))


def list_runs(root: str | Path) -> list[RunSummary]:
    """Every run under `root`, newest first."""
    found = []
    for folder in reversed(run_folders(root)):
        with suppress(FileNotFoundError):  # deleted since
            found.append(run_summary(folder))
    return found


def _is_fresh(folder: RunFolder) -> bool:
    database, _, wal, _ = folder.version()
    try:
        return folder.summary.stat().st_mtime_ns >= max(database, wal)
    except OSError:
        return False


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _moment(value: Any) -> datetime | None:
    return None if value is None else value.to_pydatetime()
