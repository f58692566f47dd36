"""What readers ask of a run: each answer is one open, one snapshot, closed again (see connection.py)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

import duckdb
import pandas as pd

from gptailor.store.connection import (
    READER_PATIENCE,
    known_version,
    newer_notice,
    open_reader,
    schema_version,
)
from gptailor.store.folder import RunFolder
from gptailor.store.naming import names_now, objective_names_now, renamed
from gptailor.store.stored_spec import StoredSpec, read_stored_spec, read_versions
from gptailor.store.tables import known_tables
from gptailor.trial import BenchmarkKey, Digests, ItemKey, Subject, now

ResampleKey = tuple[str, str, str, str, int]
"""plan_hash, benchmark, metric, split, number of examples."""
DIGESTS_SINCE = 7
"""The store's version that brought digests and resamples."""


@dataclass(frozen=True, kw_only=True)
class ScoreTables:
    """What a run's scores are worked out from: columns as in the migrations, times in UTC.

    A column of whole numbers with gaps (`config_id` of evaluations) is one of pandas' nullable integers.
    """

    runs: pd.DataFrame
    trials: pd.DataFrame
    scores: pd.DataFrame
    plans: pd.DataFrame
    evaluations: pd.DataFrame
    sizes: pd.DataFrame = field(default_factory=lambda: pd.DataFrame({"config_id": [], "kept_layers": []}, dtype=int))

    @cached_property
    def kept_layers(self) -> pd.Series:
        """How many layers each configuration keeps, by config_id."""
        return self.sizes.set_index("config_id")["kept_layers"].astype(int)

    @cached_property
    def spec(self) -> StoredSpec:
        """What the run asked."""
        return read_stored_spec(self._of_run("spec"))

    @cached_property
    def versions(self) -> dict[str, str]:
        """What the run was made with: package -> version, and the `device`."""
        return read_versions(self._of_run("versions"))

    @property
    def n_asked(self) -> int:
        """How many trials the run is to have: of baselines, one a cut."""
        made = self._of_run("n_trials")
        return self.spec.trials if pd.isna(made) else int(made)

    def _of_run(self, column: str) -> Any:
        return self.runs.iloc[0].get(column) if len(self.runs) else None


@dataclass(frozen=True, kw_only=True)
class RunTables(ScoreTables):
    """One run's tables as they were at `as_of`.

    `layers.sources` holds arrays of candidate names (empty: the base's own layer). version: RunFolder.version() before
    the read. notice: a sentence for the reader where the file is not quite what this version expects, else None.
    """

    run_id: str
    as_of: datetime
    version: tuple[int, ...]
    notice: str | None
    layers: pd.DataFrame
    measurements: pd.DataFrame
    seconds: pd.DataFrame


@dataclass(frozen=True)
class Answers:
    """What examples gave for some plans, in nested order.

    resamples: where a score is not the mean of its items, the score over resamples of the examples, the same draws for
    every plan (None: no score on that draw).
    """

    items: Mapping[ItemKey, Sequence[Any]] = field(default_factory=dict)
    resamples: Mapping[ResampleKey, Sequence[float | None]] = field(default_factory=dict)


_ORDER = {
    "runs": "run_id",
    "trials": "trial_id",
    "scores": "trial_id, benchmark, metric",
    "plans": "config_id",
    "layers": "config_id, layer",
    "evaluations": "subject, benchmark, metric, split, n_samples",
    "measurements": "device, subject, quantity, batch",
    "seconds": "began_at, part",
}
_OF_SCORES = {
    "trials": "trial_id, config_id, budget, status, ended_at, suggest_seconds, stitch_seconds, evaluate_seconds",
    "plans": "config_id, plan_hash",
}
"""Columns that scores are worked out from, of the tables with long ones."""
_SIZES = "SELECT config_id, count(*) AS kept_layers FROM layers WHERE operation <> 'removed' GROUP BY ALL ORDER BY ALL"


def read_run(folder: RunFolder, patience: float = READER_PATIENCE) -> RunTables:
    """Everything but the examples. Raises StoreMissing, StoreBusy (show the last answer), StoreDamaged."""
    version = folder.version()
    with open_reader(folder, patience) as con:
        as_of = now()
        found = schema_version(con)
        frames = {table: _frame(con, table, order) for table, order in _ORDER.items()}
        frames["sizes"] = con.execute(_SIZES).df()
    frames |= _told_as_today(frames)
    notice = newer_notice(found) if found > known_version() else None
    return RunTables(run_id=folder.run_id, as_of=as_of, version=version, notice=notice, **frames)


def score_tables(con: duckdb.DuckDBPyConnection) -> ScoreTables:
    """What the open database's scores are worked out from, without what takes long to read. Raises duckdb.Error."""
    tables = ("runs", "trials", "scores", "plans", "evaluations")
    frames = {table: _frame(con, table, _ORDER[table], _OF_SCORES.get(table, "*")) for table in tables}
    frames["sizes"] = con.execute(_SIZES).df()
    return ScoreTables(**frames | _told_as_today(frames))


def read_scores(folder: RunFolder, patience: float = READER_PATIENCE) -> ScoreTables:
    """What the run's scores are worked out from. Raises like read_run."""
    with open_reader(folder, patience) as con:
        return score_tables(con)


def load_examples(folder: RunFolder) -> dict[ItemKey, list[Any]]:
    """All items of the run, in each benchmark's nested order from example 0: nothing scored is scored again."""
    with open_reader(folder, patience=30.0) as con:
        return dict(_examples(con, None))


def load_digests(folder: RunFolder) -> Digests:
    """What the run's numbers were computed from; empty of runs that were made before that was kept."""
    with open_reader(folder, patience=30.0) as con:
        if schema_version(con) < DIGESTS_SINCE:
            return Digests()
        rows = con.execute("SELECT kind, name, part, digest FROM digests").fetchall()
        pieces = con.execute(
            "SELECT benchmark, metric, split, first, digests FROM example_digests ORDER BY ALL"
        ).fetchall()
    examples: dict[BenchmarkKey, list[str]] = {}
    for benchmark, metric, split, first, text in pieces:
        examples.setdefault(BenchmarkKey(benchmark, metric, split), [])[first:] = json.loads(text)
    return Digests(
        {(name, part): digest for kind, name, part, digest in rows if kind == "weights"},
        {name: value for kind, name, _, value in rows if kind == "setting"},
        examples,
        {name: value for kind, name, _, value in rows if kind == "revision"},
    )


def answers_of(folder: RunFolder, plan_hashes: Iterable[str]) -> Answers:
    """What paired tests between these plans need."""
    hashes = sorted(set(plan_hashes))
    with open_reader(folder, patience=30.0) as con:
        return Answers(dict(_examples(con, hashes)), _resamples(con, hashes))


def _resamples(con: duckdb.DuckDBPyConnection, hashes: list[str]) -> dict[ResampleKey, list[float | None]]:
    if schema_version(con) < DIGESTS_SINCE:
        return {}
    rows = con.execute(
        "SELECT plan_hash, benchmark, metric, split, n_samples, scores FROM resamples "
        "WHERE list_contains(?::VARCHAR[], plan_hash)",
        [hashes],
    ).fetchall()
    return {(*key, n): json.loads(text) for *key, n, text in rows}


def _frame(con: duckdb.DuckDBPyConnection, table: str, order: str, asked: str = "*") -> pd.DataFrame:
    columns = known_tables()[table].columns
    if asked != "*":
        columns = {column: columns[column] for column in asked.split(", ")}
    if con.execute("SELECT count(*) FROM duckdb_tables() WHERE table_name = ?", [table]).fetchone() == (0,):
        frame = pd.DataFrame(columns=list(columns))  # written before the table was added
    else:
        frame = con.execute(f"SELECT {asked} FROM {table} ORDER BY {order}").df()
    for column in columns:
        if column not in frame:  # written before the column was added
            frame[column] = None
    for column, kind in columns.items():
        if kind == "TIMESTAMP WITH TIME ZONE":
            frame[column] = pd.to_datetime(frame[column], utc=True)
    return frame


def _told_as_today(frames: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Scores and evaluations under this version's names of benchmarks, without kinds of subjects it does not know."""
    spec = read_stored_spec(frames["runs"]["spec"].iloc[0] if len(frames["runs"]) else None)
    known = _of_known_subjects(frames["evaluations"])
    return {
        "scores": renamed(frames["scores"], objective_names_now(spec), ["benchmark", "metric"]),
        "evaluations": renamed(known, names_now(spec), ["benchmark", "metric", "split"]),
    }


def _of_known_subjects(evaluations: pd.DataFrame) -> pd.DataFrame:
    """Without those of kinds that a newer version brought."""
    known = evaluations["subject"].map(lambda text: Subject.find(str(text)) is not None).astype(bool)
    return evaluations[known].reset_index(drop=True)


def _examples(con: duckdb.DuckDBPyConnection, plan_hashes: list[str] | None) -> Iterator[tuple[ItemKey, list[Any]]]:
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
