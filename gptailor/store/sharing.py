"""Runs that leave: tables for other tools, and a run as one zip.

The live file is never copied: a copy is read through DuckDB and written anew.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Literal

import duckdb

from gptailor.errors import UserError
from gptailor.store.connection import migrate, open_reader, open_writer
from gptailor.store.folder import RunFolder
from gptailor.store.journal import FORMAT, Event
from gptailor.store.tables import DATA_TABLES, apply, known_tables, snapshot
from gptailor.trial import now
from gptailor.versions import VERSION

MAX_LOG = 5 * 1024**2
_FORMULA = r"^[=+\-@\t\r]"


def export_tables(folder: RunFolder, out: str | Path, format: Literal["parquet", "csv"] = "parquet") -> Path:
    """Every table as a file under `out`, and manifest.json with rows and sha256 of each. Returns the manifest's path.

    In CSV, text that a spreadsheet would run as a formula is preceded by an apostrophe. Raises StoreError, UserError.
    """
    out = Path(out)
    with open_reader(folder, patience=10.0) as live:
        events = list(snapshot(live))
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = _write_tables(events, folder.run_id, out, format)
        manifest = {"run_id": folder.run_id, "gptailor": VERSION, "exported_at": now().isoformat()}
        path = out / "manifest.json"
        path.write_text(json.dumps(manifest | {"files": files}, indent=1), encoding="utf-8")
    except (OSError, duckdb.IOException) as error:
        raise UserError(f"{out}: the tables cannot be written: {error}") from error
    return path


def _write_tables(events: list[Event], run_id: str, out: Path, format: str) -> dict[str, dict[str, Any]]:
    files = {}
    with duckdb.connect(":memory:", config={"python_enable_replacements": "false"}) as con:
        con.execute("SET TimeZone = 'UTC'")
        _fill(con, run_id, events)
        for table in DATA_TABLES:
            file = out / f"{table}.{format}"
            columns = known_tables()[table].columns
            wanted = ", ".join(_inert(column, kind) if format == "csv" else column for column, kind in columns.items())
            target = str(file).replace("'", "''")
            options = "FORMAT csv, HEADER" if format == "csv" else "FORMAT parquet, COMPRESSION zstd"
            con.execute(f"COPY (SELECT {wanted} FROM {table} ORDER BY ALL) TO '{target}' ({options})")
            count = con.execute(f"SELECT count(*) FROM {table}").fetchone()
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            files[file.name] = {"rows": count[0] if count else 0, "bytes": file.stat().st_size, "sha256": digest}
    return files


def _inert(column: str, kind: str) -> str:
    if kind == "VARCHAR[]":
        text = f"array_to_string({column}, '+')"
    elif kind in ("VARCHAR", "JSON"):
        text = f"{column}::VARCHAR"
    else:
        return column
    return f"CASE WHEN regexp_matches({text}, '{_FORMULA}') THEN '''' || {text} ELSE {text} END AS {column}"


def _fill(con: duckdb.DuckDBPyConnection, run_id: str, events: list[Event]) -> None:
    migrate(con)
    at = next((e["rows"][0]["heartbeat_at"] for e in events if e["table"] == "runs"), None)  # as it was, not now
    apply(con, run_id, [{"v": FORMAT, "n": n, "at": at, **event} for n, event in enumerate(events, start=1)])


def copy_run(folder: RunFolder, target: str | Path) -> Path:
    """A consistent copy of a run, also of one that is running, as one zip that `import_run` takes.

    Raises StoreError where the database cannot be read, UserError where the zip cannot be written.
    """
    target = Path(target)
    with open_reader(folder, patience=10.0) as live:
        events = list(snapshot(live))
    with tempfile.TemporaryDirectory(prefix="gptailor-copy-") as scratch:
        copy = RunFolder(Path(scratch))
        with open_writer(copy) as con:
            _fill(con, folder.run_id, events)
        parts = {"run.duckdb": copy.database, "run.yaml": folder.spec, "notes.json": folder.notes}
        try:
            with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, file in parts.items():
                    if file.is_file():
                        archive.write(file, f"{folder.run_id}/{name}")
                if folder.log.is_file():
                    archive.writestr(f"{folder.run_id}/engine.log", _tail(folder.log))
        except OSError as error:
            raise UserError(f"{target}: the copy cannot be written: {error.strerror}") from error
    return target


def _tail(log: Path) -> bytes:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - MAX_LOG))
        return file.read(MAX_LOG)
