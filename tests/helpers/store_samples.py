"""One small run's records, for the store's tests and for the processes they start (quick to import).

`python tests/helpers/store_samples.py` writes a database of every version of the store that has none in
tests/fixtures yet; do it when you add a migration, and keep what is there: those files are what older versions left
on people's disks.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import duckdb

from gptailor.plan import LayerChoice, StitchPlan
from gptailor.results.summary import summarise
from gptailor.store.connection import known_version, migrations
from gptailor.store.folder import RunFolder, new_run_id
from gptailor.store.writer import RunWriter
from gptailor.trial import Origin, Outcome, RunRecord, Score, Trial, TrialStatus

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
NOON = datetime(2026, 11, 1, 12, 0, 0, 123456, tzinfo=UTC)
SPEC = {
    "objectives": [
        {"benchmark": "piqa", "metric": "acc", "split": "validation"},
        {"benchmark": "wikitext", "metric": "word_perplexity", "split": "validation"},
    ],
    "budget": {"min": 10, "max": 90, "eta": 3},
    "trials": 20,
    "device": "cpu",
}
PLAN = StitchPlan(
    5,
    (
        LayerChoice(0),
        LayerChoice(1, ("math",)),
        LayerChoice(3, ("math", "code"), "task_arithmetic", 0.5, (), 1.25),
        LayerChoice(4),
    ),
)


def new_writer(root: Path, name: str = "test", **changes) -> RunWriter:
    folder = RunFolder.of(root, new_run_id(name))
    record = replace(RunRecord(folder.run_id, name, SPEC, "models/base", 5, 1, 7, NOON), **changes)
    return RunWriter.create(folder, record, "name: test\n", summarise=summarise)


def a_trial(trial_id: int = 0, config_id: int = 0, budget: int = 90) -> Trial:
    return Trial(trial_id, config_id, budget, 7, Origin.MODEL, {"removed_0": 2}, NOON, 0.25)


def scores(accuracy: float = 0.5, perplexity: float = 20.0, n: int = 90) -> tuple[Score, ...]:
    return (
        Score("piqa", "acc", accuracy, 0.05, n, higher_is_better=True),
        Score("wikitext", "word_perplexity", perplexity, None, min(n, 62), higher_is_better=False),
    )


def success(*given: Score) -> Outcome:
    return Outcome(TrialStatus.SUCCESS, NOON + timedelta(seconds=9), given or scores(), 0.5, 8.0)


def write_database(file: Path, version: int) -> None:
    """A database as that version made it, with one run and one trial."""
    with duckdb.connect(str(file)) as con:
        con.execute("CREATE TABLE schema_version (version INTEGER PRIMARY KEY, applied_at TIMESTAMPTZ)")
        for number, sql in migrations()[:version]:
            con.execute(sql)
            con.execute("INSERT INTO schema_version VALUES (?, now())", [number])
        con.execute("INSERT INTO runs (run_id, name, status, spec) VALUES ('old', 'old', 'stopped', '{\"trials\": 5}')")
        con.execute("INSERT INTO trials (run_id, trial_id, config_id, status) VALUES ('old', 0, 0, 'success')")


if __name__ == "__main__":
    for version in range(1, known_version() + 1):
        fixture = FIXTURES / f"store-v{version}.zip"
        if not fixture.exists():
            FIXTURES.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(fixture, "w", zipfile.ZIP_DEFLATED) as made:
                write_database(Path(scratch) / "run.duckdb", version)
                made.write(Path(scratch) / "run.duckdb", "run.duckdb")
