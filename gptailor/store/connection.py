"""Short visits to a run's database.

DuckDB locks the file between processes: an open writer shuts out readers and an open reader shuts out the writer. So
both sides open, do one transaction or one read, and close, and a refused lock is tried again with a bounded, jittered
wait. Nothing else may ever open the live file: closing a plain file handle on it drops the process's lock.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import duckdb

from gptailor.errors import UserError
from gptailor.store.folder import RunFolder

MIGRATIONS = Path(__file__).parent / "migrations"
WRITER_PATIENCE = 30.0
READER_PATIENCE = 1.0
# Files stay readable by the DuckDB release before this one, for colleagues' own scripts.
# A missing table must never be looked for among Python's variables.
_WRITER_CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "storage_compatibility_version": "v1.5.0",
    "threads": 1,  # starting a pool costs more than these small transactions gain by it
    "python_enable_replacements": "false",
}
_READER_CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "threads": 1,
    "python_enable_replacements": "false",
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "lock_configuration": "true",
}


class StoreError(UserError):
    """Something stands between us and a run's files. The text says what, and what can be done."""


class StoreBusy(StoreError):
    """Another process kept the database locked for as long as we were willing to wait."""


class StoreDamaged(StoreError):
    """The database cannot be read; the journal beside it can recreate it."""


class StoreNewer(StoreError):
    """The database was written by a newer version of gptailor: it can be read, not written."""


class StoreMissing(StoreError):
    """There is no database (yet)."""


class StoreUnwritable(StoreError):
    """The journal cannot be written: nothing more can be recorded until this is put right."""


class StoreFull(StoreUnwritable):
    """The disk (or quota) is full."""


@lru_cache
def migrations() -> tuple[tuple[int, str], ...]:
    """(version, SQL) of every migration, ascending. Shipped ones are never changed."""
    return tuple((int(p.name[:4]), p.read_text(encoding="utf-8")) for p in sorted(MIGRATIONS.glob("[0-9]*.sql")))


def known_version() -> int:
    return migrations()[-1][0]


def schema_version(con: duckdb.DuckDBPyConnection) -> int:
    """Version of an open database, 0 where nothing was applied yet."""
    try:
        row = con.execute("SELECT max(version) FROM schema_version").fetchone()
    except duckdb.CatalogException:
        return 0
    return int(row[0]) if row and row[0] is not None else 0


def migrate(con: duckdb.DuckDBPyConnection) -> None:
    """Bring an open database up to date, all or nothing. Raises StoreNewer."""
    version = schema_version(con)
    if version > known_version():
        raise StoreNewer(newer_notice(version))
    if version == known_version():
        return
    con.begin()
    try:
        con.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER PRIMARY KEY, applied_at TIMESTAMPTZ)")
        for number, sql in migrations():
            if number > version:
                con.execute(sql)
                con.execute("INSERT INTO schema_version VALUES (?, now())", [number])
        con.commit()
    except duckdb.Error:
        con.rollback()
        raise


def newer_notice(version: int) -> str:
    return (
        f"this run was written by a newer gptailor (store version {version}, this one knows up to {known_version()}): "
        "it is shown as far as it is understood and cannot be changed; update gptailor to go on with it"
    )


@contextmanager
def open_writer(folder: RunFolder, patience: float = WRITER_PATIENCE) -> Iterator[duckdb.DuckDBPyConnection]:
    """The database for one transaction, migrated. Raises any StoreError."""
    if not folder.path.is_dir():
        raise StoreMissing(f"run {folder.run_id}: its folder {folder.path} does not exist (any more)")
    with _classified(folder):
        con = _connect(folder.database, patience, read_only=False)
        try:
            migrate(con)
            yield con
        finally:
            con.close()


@contextmanager
def open_reader(folder: RunFolder, patience: float = READER_PATIENCE) -> Iterator[duckdb.DuckDBPyConnection]:
    """The database for one read: it can reach no file, load no extension and change no setting.

    Raises StoreMissing, StoreBusy, StoreDamaged. A newer file opens; compare schema_version with known_version.
    """
    if not folder.database.is_file():
        raise StoreMissing(f"run {folder.run_id}: it has no database yet")
    with _classified(folder):
        con = _connect(folder.database, patience, read_only=True)
        try:
            yield con
        finally:
            con.close()


def _connect(path: Path, patience: float, read_only: bool) -> duckdb.DuckDBPyConnection:
    config = _READER_CONFIG if read_only else _WRITER_CONFIG
    until = time.monotonic() + patience
    pause = 0.005
    while True:
        try:
            return duckdb.connect(str(path), read_only=read_only, config=config)
        except duckdb.Error as error:
            if not _is_lock(error) or time.monotonic() >= until:
                raise
        time.sleep(random.uniform(0.5, 1.0) * pause)
        pause = min(pause * 1.5, 0.1)


def _is_lock(error: duckdb.Error) -> bool:
    # The second text: another thread of this process has it open the other way.
    return "Could not set lock" in str(error) or "different configuration than existing" in str(error)


@contextmanager
def _classified(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except duckdb.Error as error:
        text = str(error)
        where = f"run {folder.run_id}: its database {folder.database}"
        if _is_lock(error):
            raise StoreBusy(f"{where} is in use: {text.splitlines()[0]}") from error
        if "No space left" in text or "Disk quota" in text or "File too large" in text:
            raise StoreFull(f"{where} cannot be written, the disk is full: {text.splitlines()[0]}") from error
        if "Read-only file system" in text or "Permission denied" in text or "Cannot open file" in text:
            raise StoreUnwritable(f"{where} cannot be opened: {text.splitlines()[0]}") from error
        raise StoreDamaged(
            f"{where} cannot be read ({text.splitlines()[0]}); "
            f"`python -m gptailor repair {folder.run_id}` recreates it from the journal"
        ) from error
