"""Runs that leave and runs that come in: copies of a live run, tables without formulas, and strangers' zips."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import duckdb
import pandas as pd
import pytest
from helpers.make_runs import make_run
from helpers.store_children import WRITE_FOR_EVER, child, contents, kill
from helpers.store_samples import NOON, a_trial, new_writer, success

from gptailor.errors import UserError
from gptailor.results.summary import list_runs, run_summary
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.imports import import_run
from gptailor.store.notes import Notes, read_notes, write_notes
from gptailor.store.sharing import copy_run, export_tables
from gptailor.store.writer import RunWriter
from gptailor.trial import Outcome, TrialStatus


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = make_run(tmp_path_factory.mktemp("shared") / "runs", n_trials=12, n_layers=8, n_removed=2)
    folder.log.write_text("the log\n")
    write_notes(folder, Notes("named", "a note", ("tag",)))
    return folder


@pytest.fixture(scope="module")
def archive(run: RunFolder) -> Path:
    return copy_run(run, run.path.parent.parent / "copy.zip")


def test_a_copy_comes_back_whole(run: RunFolder, archive: Path, tmp_path: Path) -> None:
    first = import_run(archive, tmp_path / "runs")
    assert first.run_id == run.run_id and contents(first) == contents(run)
    assert read_notes(first) == Notes("named", "a note", ("tag",)) and first.log.read_text() == "the log\n"
    second = import_run(archive, tmp_path / "runs")
    assert second.run_id != run.run_id and len(list_runs(tmp_path / "runs")) == 2
    kept, original = run_summary(second), run_summary(run)
    assert (kept.best_scores, kept.retention, kept.last_activity) == (
        original.best_scores,
        original.retention,
        original.last_activity,
    )
    writer = RunWriter.open(second)  # it can be gone on with
    writer.finish_trial(99, success())
    assert len(queries.read_run(second).trials) == 13
    assert not list((tmp_path / "runs").glob(".*")), "nothing is left behind"


def test_a_live_run_is_copied_whole(tmp_path: Path) -> None:
    folder = new_writer(tmp_path / "runs").folder
    folder.spec.write_text("name: test\n")
    process = child(WRITE_FOR_EVER, folder.path, 0)
    assert process.stdout is not None
    process.stdout.readline()
    with zipfile.ZipFile(copy_run(folder, tmp_path / "live.zip")) as opened:
        opened.extractall(tmp_path)
    kill(process)
    tables = queries.read_run(RunFolder(tmp_path / folder.run_id))
    assert len(tables.trials) >= 1 and len(tables.scores) == 2 * len(tables.trials)
    assert RunWriter.open(folder).behind == 0


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_tables_for_other_tools(run: RunFolder, tmp_path: Path, format: str) -> None:
    manifest = json.loads(export_tables(run, tmp_path / "out", format).read_text())  # type: ignore[arg-type]
    tables = queries.read_run(run)
    for name in ("trials", "scores", "layers", "evaluations", "examples", "plans", "runs"):
        file = tmp_path / "out" / f"{name}.{format}"
        assert manifest["files"][file.name]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    read = pd.read_csv if format == "csv" else pd.read_parquet
    scores = read(tmp_path / "out" / f"scores.{format}")
    assert len(scores) == manifest["files"][f"scores.{format}"]["rows"] == len(tables.scores)
    assert sorted(scores.score) == sorted(tables.scores.score)


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    writer = new_writer(tmp_path, name="=cmd|'/c calc'!A1")
    dangerous = ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "plain = 1", "-inf', x"]
    for trial_id, text in enumerate(dangerous):
        writer.start_trial(a_trial(trial_id))
        writer.finish_trial(trial_id, Outcome(TrialStatus.CRASHED, NOON, error=text))
    out = export_tables(writer.folder, tmp_path / "it's out", "csv").parent
    with open(out / "trials.csv", newline="", encoding="utf-8") as file:
        errors = [row["error"] for row in csv.DictReader(file)]
    assert errors == [text if text.startswith("plain") else "'" + text for text in dangerous]
    for file in out.glob("*.csv"):  # type: ignore[assignment]
        with open(file, newline="", encoding="utf-8") as opened:  # type: ignore[call-overload]
            for row in csv.reader(opened):
                assert not any(cell[:1] in "=+-@\t\r" for cell in row if cell and not _is_number(cell)), row


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


# Strangers


def unpacked_database(archive: Path, into: Path) -> Path:
    with zipfile.ZipFile(archive) as opened:
        name = next(name for name in opened.namelist() if name.endswith("run.duckdb"))
        (into / "run.duckdb").write_bytes(opened.read(name))
    return into / "run.duckdb"


def zipped(into: Path, files: dict[str, bytes | Path]) -> Path:
    with zipfile.ZipFile(into / "hostile.zip", "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in files.items():
            opened.writestr(name, data.read_bytes() if isinstance(data, Path) else data)
    return into / "hostile.zip"


DATABASES = {
    "view": ("CREATE VIEW v AS SELECT * FROM read_text('/etc/hostname')", "holds a view"),
    "view for a table": (
        "DROP TABLE evaluations; CREATE VIEW evaluations AS SELECT * FROM read_text('/etc/hostname')",
        "holds a view",
    ),
    "macro": ("CREATE MACRO to_json(x) AS (SELECT content FROM read_text('/etc/hostname'))", "holds a macro"),
    "table": ("CREATE TABLE more (a INTEGER)", "column 'more.a'"),
    "column": ("ALTER TABLE trials ADD COLUMN more INTEGER", "column 'trials.more'"),
    "type": ("ALTER TABLE trials ALTER COLUMN budget TYPE VARCHAR", "of type VARCHAR"),
    "default": ("ALTER TABLE trials ALTER COLUMN budget SET DEFAULT 3", "default"),
    "schema": ("CREATE SCHEMA other; CREATE TABLE other.runs (a INTEGER)", "holds a schema"),
    "two runs": ("INSERT INTO runs (run_id) VALUES ('another')", "holds 2 runs"),
    "no run": ("DELETE FROM runs", "holds 0 runs"),
    "newer": ("INSERT INTO schema_version VALUES (999, now())", "newer gptailor"),
    "status": ("UPDATE trials SET status = '<script>'", "not a valid TrialStatus"),
    "plan": ("UPDATE plans SET plan_hash = 'x'", "not what its hash says"),
    "time": ("UPDATE runs SET created_at = 'infinity'", "Invalid isoformat"),
    "size": ("UPDATE runs SET n_layers = 2000000000", "n_layers = 2000000000"),
    "spec": ("UPDATE runs SET spec = '{\"name\": 1}'", "its run file"),
    "nesting": (
        "UPDATE trials SET configuration = repeat('[', 900) || repeat(']', 900)",
        "nested too deeply|made the reader fail",
    ),
}


@pytest.mark.parametrize("case", DATABASES)
def test_a_hostile_database_is_refused(archive: Path, tmp_path: Path, case: str) -> None:
    sql, message = DATABASES[case]
    database = unpacked_database(archive, tmp_path)
    with duckdb.connect(str(database)) as con:
        con.execute(sql)
    with pytest.raises(UserError, match=message):
        import_run(zipped(tmp_path, {"run.duckdb": database}), tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == [], "nothing is left behind"


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


ZIPS: dict[str, tuple[Callable[[zipfile.ZipFile], None], str]] = {
    "parent": (lambda z: z.writestr("../../run.yaml", "x"), "leads out"),
    "absolute": (lambda z: z.writestr("/etc/cron.d/x", "x"), "leads out"),
    "windows": (lambda z: z.writestr("C:\\run.yaml", "x"), "leads out"),
    "link": (lambda z: z.writestr(link("engine.log"), "/etc/passwd"), "is a link"),
    "twice": (lambda z: [z.writestr("run.duckdb", "x"), z.writestr("run.duckdb", "y")], "twice"),  # type: ignore[dict-item, func-returns-value]
    "bomb": (lambda z: z.writestr("notes.json", b"0" * 20_000_000), "too large"),
    "many": (lambda z: [z.writestr(f"smac/{i}", b"") for i in range(2001)], "2001 files"),  # type: ignore[dict-item, func-returns-value]
    "no database": (lambda z: z.writestr("run.yaml", "name: x"), "no run.duckdb"),
    "rubbish": (lambda z: z.writestr("run.duckdb", b"x" * 9000), "not a valid DuckDB"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", ZIPS)
def test_a_hostile_zip_is_refused(tmp_path: Path, case: str) -> None:
    write, message = ZIPS[case]
    with zipfile.ZipFile(tmp_path / "hostile.zip", "w", zipfile.ZIP_DEFLATED) as opened:
        write(opened)
    with pytest.raises(UserError, match=message):
        import_run(tmp_path / "hostile.zip", tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == [] and sorted(os.listdir(tmp_path)) == ["hostile.zip", "runs"]


def test_a_zip_that_lies_about_its_sizes(tmp_path: Path) -> None:
    """The header says 9 bytes, the data unpacks to 20 million."""
    target = zipped(tmp_path, {"notes.json": b"0" * 20_000_000})
    data = target.read_bytes()
    real = (20_000_000).to_bytes(4, "little")
    assert data.count(real) == 2
    target.write_bytes(data.replace(real, (9).to_bytes(4, "little")))
    with pytest.raises(UserError, match=r"Bad CRC|too large"):
        import_run(target, tmp_path / "runs")


def test_broken_zips_are_refused_and_never_crash(archive: Path, tmp_path: Path) -> None:
    whole = archive.read_bytes()
    draw = random.Random(1)
    (tmp_path / "big.zip").touch()
    os.truncate(tmp_path / "big.zip", 300 * 1024**2)
    with pytest.raises(UserError, match="at most"):
        import_run(tmp_path / "big.zip", tmp_path / "runs")
    target = tmp_path / "broken.zip"
    for case in range(25):
        data = bytearray(whole[: draw.randrange(len(whole))] if case % 2 else whole)
        for _ in range(3):
            data[draw.randrange(max(1, len(data) - 200), len(data))] ^= 1 << draw.randrange(8)
        target.write_bytes(data)
        try:
            import_run(target, tmp_path / "runs")
        except UserError as error:
            assert "broken.zip" in str(error)


def test_what_is_imported_is_made_harmless(archive: Path, tmp_path: Path) -> None:
    database = unpacked_database(archive, tmp_path)
    spec = json.dumps(json.loads(stored_spec(database)) | {"trust_remote_code": True})
    with duckdb.connect(str(database)) as con:
        con.execute("UPDATE runs SET spec = ?, name = 'x' || chr(0) || 'y'", [spec])
        for table in ("trials", "scores", "plans", "layers", "evaluations", "runs"):
            con.execute(f"UPDATE {table} SET run_id = '../../etc'")
    files: dict[str, bytes | Path] = {
        "folder/run.duckdb": database,
        "folder/journal.jsonl": b'{"v":1}\n',
        "folder/summary.json": b'{"name": "a lie"}',
        "folder/engine.lock": b"x",
        "folder/smac/runhistory.json": b"{}",
    }
    folder = import_run(zipped(tmp_path, files), tmp_path / "runs")
    assert folder.path.parent == tmp_path / "runs" and folder.run_id.endswith("smollm2-27pct", 16, -5)
    assert json.loads(queries.read_run(folder).runs.spec[0])["trust_remote_code"] is False
    assert "trust_remote_code: false" in folder.spec.read_text()
    assert run_summary(folder).name == "smollm2-27pct" and not folder.lock.exists()


def stored_spec(database: Path) -> str:
    with duckdb.connect(str(database), read_only=True) as con:
        return str(con.execute("SELECT spec FROM runs").fetchall()[0][0])
