"""Recreate a run's database from its journal: what `python -m gptailor repair` does."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass

from gptailor.errors import UserError
from gptailor.spec.files import load_spec
from gptailor.spec.sections import Removal
from gptailor.store.connection import StoreDamaged, open_reader
from gptailor.store.folder import RunFolder
from gptailor.store.journal import read_journal
from gptailor.store.writer import RunWriter
from gptailor.trial import RunStatus


@dataclass(frozen=True)
class Rebuilt:
    """events: applied; damaged: numbers of the journal's lines that are lost; n_trials: now stored."""

    events: int
    damaged: tuple[int, ...]
    n_trials: int


def rebuild(folder: RunFolder) -> Rebuilt:
    """Put the database aside (`run.duckdb.damaged`) and make it anew. Hold the run's EngineLock while you do.

    Raises StoreMissing (no journal: nothing is touched), StoreDamaged, StoreNewer, StoreUnwritable.
    """
    contents = read_journal(folder.journal)
    if not contents.events:
        raise StoreDamaged(f"run {folder.run_id}: no line of its journal can be read, there is nothing to rebuild from")
    with suppress(FileNotFoundError):
        os.replace(folder.database, folder.database.with_name("run.duckdb.damaged"))
    folder.wal.unlink(missing_ok=True)
    writer = RunWriter.open(folder)
    if writer.behind:
        raise StoreDamaged(f"run {folder.run_id}: the new database could not be written; see the log, then try again")
    with open_reader(folder) as con:
        known, status, n_trials, n_layers = con.execute(
            "SELECT any_value(spec) IS NOT NULL, any_value(status), (SELECT count(*) FROM trials), "
            "(SELECT max(layer) + 1 FROM layers) FROM runs"
        ).fetchone() or (False, None, 0, None)
    if not known:
        writer.record_run({"status": status or RunStatus.STOPPED} | _asked(folder, n_layers))
    return Rebuilt(len(contents.events), tuple(contents.damaged), n_trials)


def _asked(folder: RunFolder, n_layers: int | None) -> dict[str, object]:
    """What the run was, from its run file: the journal's first line is lost."""
    row: dict[str, object] = {"name": folder.run_id, "n_layers": n_layers}
    with suppress(UserError):  # without its run file, a run is still its trials
        spec = load_spec(folder.spec)
        row |= {"name": spec.name, "spec": spec.model_dump(mode="json"), "base_model": spec.base_model}
        known = n_layers if spec.has_range or not isinstance(spec.remove, Removal) else None
        row |= {"seed": spec.seed, "n_removed": spec.n_removed(known) if known else None}
    return row
