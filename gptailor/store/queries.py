"""What readers ask of a run: each answer is one open, one snapshot, closed again (see connection.py)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd

from gptailor.store.connection import (
    READER_PATIENCE,
    StoreBusy,
    StoreError,
    StoreMissing,
    known_version,
    newer_notice,
    open_reader,
    schema_version,
)
from gptailor.store.folder import RunFolder, run_folders
from gptailor.store.stored_spec import StoredSpec, read_stored_spec, read_versions
from gptailor.store.summary import RunSummary, read_summary, summarise, summary_of_run_file
from gptailor.store.tables import known_tables
from gptailor.trial import ItemKey, Subject


@dataclass(frozen=True)
class RunTables:
    """One run's tables as they were at `as_of`, columns as in the migrations, times in UTC.

    `layers.sources` holds arrays of candidate names (empty: the base's own layer). A column of whole numbers with gaps
    (`position`, `config_id` of evaluations) is one of pandas' nullable integers. version: RunFolder.version() before
    the read. notice: a sentence for the reader where the file is not quite what this version expects, else None.
    """

    run_id: str
    as_of: datetime
    version: tuple[int, ...]
    notice: str | None
    runs: pd.DataFrame
    trials: pd.DataFrame
    scores: pd.DataFrame
    plans: pd.DataFrame
    layers: pd.DataFrame
    evaluations: pd.DataFrame

    @cached_property
    def spec(self) -> StoredSpec:
        """What the run asked."""
        return read_stored_spec(self._of_run("spec"))

    @cached_property
    def versions(self) -> dict[str, str]:
        """What the run was made with: package -> version, and the `device`."""
        return read_versions(self._of_run("versions"))

    def _of_run(self, column: str) -> object:
        return self.runs.iloc[0].get(column) if len(self.runs) else None


_ORDER = {
    "runs": "run_id",
    "trials": "trial_id",
    "scores": "trial_id, benchmark, metric",
    "plans": "config_id",
    "layers": "config_id, layer",
    "evaluations": "subject, benchmark, metric, split, n_samples",
}


def read_run(folder: RunFolder, patience: float = READER_PATIENCE) -> RunTables:
    """Everything but the examples. Raises StoreMissing, StoreBusy (show the last answer), StoreDamaged."""
    version = folder.version()
    with open_reader(folder, patience) as con:
        as_of = datetime.now(UTC)
        found = schema_version(con)
        frames = {table: _frame(con, table, order) for table, order in _ORDER.items()}
    frames["evaluations"] = _of_known_subjects(frames["evaluations"])
    notice = newer_notice(found) if found > known_version() else None
    return RunTables(folder.run_id, as_of, version, notice, **frames)


def load_examples(folder: RunFolder) -> dict[ItemKey, list[Any]]:
    """All items of the run, in each benchmark's nested order from example 0: nothing scored is scored again."""
    return dict(_examples(folder, None))


def items_of(folder: RunFolder, plan_hashes: Iterable[str]) -> dict[ItemKey, list[Any]]:
    """Like load_examples, for some plans."""
    return dict(_examples(folder, sorted(set(plan_hashes))))


def run_summary(folder: RunFolder, patience: float = READER_PATIENCE) -> RunSummary:
    """The run's row for the table of runs; `problem` says why it is old or poor. Never raises for a broken run."""
    kept = read_summary(folder)
    if kept is not None and _is_fresh(folder):
        return kept
    try:
        with open_reader(folder, patience) as con:
            return summarise(con, folder)
    except StoreMissing:
        return summary_of_run_file(folder)
    except StoreBusy as error:
        return replace(kept, problem=str(error)) if kept else summary_of_run_file(folder, str(error))
    except (StoreError, ValueError) as error:  # ValueError: a status or a specification that is none
        return replace(kept, problem=str(error)) if kept else summary_of_run_file(folder, str(error))


def list_runs(root: str | Path) -> list[RunSummary]:
    """Every run under `root`, newest first."""
    return [run_summary(folder) for folder in reversed(run_folders(root))]


def _is_fresh(folder: RunFolder) -> bool:
    database, _, wal, _ = folder.version()
    try:
        return folder.summary.stat().st_mtime_ns >= max(database, wal)
    except OSError:
        return False


def _frame(con: duckdb.DuckDBPyConnection, table: str, order: str) -> pd.DataFrame:
    columns = known_tables()[table].columns
    frame = con.execute(f"SELECT * FROM {table} ORDER BY {order}").df()
    for column in columns:
        if column not in frame:  # written before the column was added
            frame[column] = None
    for column, kind in columns.items():
        if kind == "TIMESTAMP WITH TIME ZONE":
            frame[column] = pd.to_datetime(frame[column], utc=True)
    return frame


def _of_known_subjects(evaluations: pd.DataFrame) -> pd.DataFrame:
    """Without those of kinds that a newer version brought."""
    known = evaluations["subject"].map(lambda text: Subject.find(str(text)) is not None).astype(bool)
    return evaluations[known].reset_index(drop=True)


def _examples(folder: RunFolder, plan_hashes: list[str] | None) -> Iterator[tuple[ItemKey, list[Any]]]:
    with open_reader(folder, patience=30.0) as con:
        rows = con.execute(
            "SELECT plan_hash, benchmark, metric, split, first, items FROM examples "
            "WHERE coalesce(list_contains(?::VARCHAR[], plan_hash), true) "
            "ORDER BY plan_hash, benchmark, metric, split, first",
            [plan_hashes],
        ).fetchall()
    items: dict[ItemKey, list[Any]] = {}
    for *key, first, text in rows:
        known = items.setdefault(ItemKey(*key), [])
        if first <= len(known):  # behind a gap nothing can be used: a budget is always the first n examples
            new = json.loads(text)
            known[first : first + len(new)] = new
    yield from items.items()
