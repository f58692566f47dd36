"""Read a database that anybody may have made.

It is opened by a process of its own, with limits on time and memory, without a file, an extension or a setting in
reach: a file that makes DuckDB run long, grow or crash costs that process alone. What it holds must be ours, table by
table and column by column; views, macros, defaults and the like are refused before a row is read.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import duckdb

from gptailor.errors import UserError
from gptailor.store.connection import known_version, newer_notice
from gptailor.store.journal import Event
from gptailor.store.tables import known_tables, snapshot, sources
from gptailor.wording import gigabytes

MAX_SECONDS = 120
MAX_MEMORY = 8 * 1024**3
"""Of address space, of which DuckDB reserves much more than it uses."""
MAX_JSON = 512 * 1024**2
"""Bytes of all rows of one table, as text."""


def read_untrusted(path: Path) -> tuple[str, list[Event]]:
    """(run id, all its rows as events). Raises UserError with the reason for everything that is no run's database."""
    with tempfile.TemporaryDirectory(prefix="gptailor-import-") as scratch:
        rows = Path(scratch) / "rows.jsonl"
        command = [sys.executable, "-m", __spec__.name, str(path.resolve()), str(rows)]
        root = Path(__file__).resolve().parents[2]
        try:
            ended = subprocess.run(
                command, cwd=root, env={}, stdin=subprocess.DEVNULL, capture_output=True, timeout=MAX_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"its database could not be read in {MAX_SECONDS} s") from error
        if ended.returncode == 2:
            raise UserError(ended.stderr.decode("utf-8", "replace").strip())
        if ended.returncode:
            raise UserError(f"reading its database made the reader fail (exit code {ended.returncode})")
        with open(rows, encoding="utf-8") as file:
            run_id, *events = map(json.loads, file)
    return run_id, events


def _main(path: str, rows: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    config: dict[str, Any] = {
        "python_enable_replacements": "false",
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "memory_limit": "2GB",
        "threads": 1,
    }
    try:
        # Attached, not opened: its own macros are then out of the way when we name a function.
        with duckdb.connect(":memory:", config=config) as con:
            target = path.replace("'", "''")
            con.execute(f"ATTACH '{target}' AS imported (READ_ONLY)")
            con.execute("SET enable_external_access = false")
            con.execute("SET lock_configuration = true")
            _check_schema(con)
            _write_rows(con, Path(rows))
    except duckdb.Error as error:
        raise UserError(f"its database cannot be read: {str(error).splitlines()[0]}") from error


def _check_schema(con: duckdb.DuckDBPyConnection) -> None:
    for what, query in (
        ("view", "SELECT view_name FROM duckdb_views() WHERE database_name = 'imported' AND NOT internal"),
        ("macro", "SELECT function_name FROM duckdb_functions() WHERE database_name = 'imported' AND NOT internal"),
        ("sequence", "SELECT sequence_name FROM duckdb_sequences() WHERE database_name = 'imported'"),
        ("type", "SELECT type_name FROM duckdb_types() WHERE database_name = 'imported' AND NOT internal"),
        ("schema", "SELECT schema_name FROM duckdb_schemas() WHERE database_name = 'imported' "
         "AND schema_name <> 'main'"),
        ("index", "SELECT index_name FROM duckdb_indexes() WHERE database_name = 'imported'"),
        ("trigger or default", "SELECT column_name FROM duckdb_columns() WHERE database_name = 'imported' "
         "AND NOT internal AND schema_name = 'main' AND column_default IS NOT NULL"),
    ):  # fmt: skip
        found = con.execute(query).fetchall()
        if found:
            raise UserError(f"its database holds a {what} ({ascii(found[0][0])[:60]}), which no run has")
    version = con.execute("SELECT max(version) FROM imported.main.schema_version").fetchone()
    if version is None or not isinstance(version[0], int) or version[0] < 1:
        raise UserError("its database does not say its version")
    if version[0] > known_version():
        raise UserError(newer_notice(version[0]))
    known = known_tables()
    for table, column, kind in con.execute(
        "SELECT table_name, column_name, data_type FROM duckdb_columns() "
        "WHERE database_name = 'imported' AND NOT internal"
    ).fetchall():
        if table not in known or known[table].columns.get(column) != kind:
            name = ascii(f"{table}.{column}")[:80]
            raise UserError(f"its database has a column {name} of type {kind[:40]}, which no run has")


def _write_rows(con: duckdb.DuckDBPyConnection, rows: Path) -> None:
    ids = con.execute("SELECT DISTINCT run_id FROM imported.main.runs").fetchall()
    if len(ids) != 1 or not isinstance(ids[0][0], str):
        raise UserError(f"its database holds {len(ids)} runs; a run's database holds one")
    with open(rows, "w", encoding="utf-8") as file:
        file.write(json.dumps(ids[0][0]) + "\n")
        for table, source in sources(con, "imported"):
            size = con.execute(f"SELECT coalesce(sum(strlen(to_json(t)::VARCHAR)), 0) FROM ({source}) AS t").fetchone()
            if size is None or size[0] > MAX_JSON:
                raise UserError(f"its table {table} is larger than {gigabytes(MAX_JSON)}")
        for event in snapshot(con, "imported"):
            file.write(json.dumps(event) + "\n")


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except UserError as problem:
        print(problem, file=sys.stderr)
        sys.exit(2)
