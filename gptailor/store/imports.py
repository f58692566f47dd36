"""A run from a stranger's zip.

Nothing of it is used as it is: only files with the names we know are unpacked, its database is read by another process
with nothing in reach (untrusted.py), and the rows it held are written into a new run.
"""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from datetime import datetime
from pathlib import Path, PurePosixPath

from gptailor.errors import UserError
from gptailor.plan import StitchPlan
from gptailor.spec.files import build_spec
from gptailor.spec.run import RunSpec
from gptailor.store.folder import RUN_ID, RunFolder, new_run_id
from gptailor.store.journal import Event
from gptailor.store.notes import read_notes, write_notes
from gptailor.store.untrusted import read_untrusted
from gptailor.store.writer import RunWriter
from gptailor.trial import Origin, RunStatus, TrialStatus, now
from gptailor.wording import gigabytes

MAX_ZIP = 256 * 1024**2
MAX_LAYERS = 10_000
_TAKEN = {"run.duckdb": 1024**3, "notes.json": 1024**2, "engine.log": 64 * 1024**2}
"""Files that are read, and how large each may be unpacked."""


def import_run(archive: str | Path, root: str | Path) -> RunFolder:
    """A new run under `root` from a zip that anybody may have made, with its own id unless that is taken.

    Remote code is switched off in its run file. Raises UserError, with nothing left behind, for all that is no run.
    """
    archive, root = Path(archive), Path(root)
    if archive.stat().st_size > MAX_ZIP:
        raise UserError(f"{archive.name}: {gigabytes(archive.stat().st_size)}; at most {gigabytes(MAX_ZIP)}")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".import-") as scratch:
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        _unpack(archive, unpacked)
        try:
            run_id, events = read_untrusted(unpacked / "run.duckdb")
            spec, seen = _checked(events)
            if not RUN_ID.fullmatch(run_id) or (root / run_id).exists():
                run_id = new_run_id(spec.name)
            made = RunFolder(Path(scratch) / run_id)
            writer = RunWriter.restore(made, events, spec.to_yaml(), clock=lambda: seen)
        except UserError as error:
            raise UserError(f"{archive.name}: is not a run that can be imported: {error}") from error
        except RecursionError as error:
            raise UserError(
                f"{archive.name}: is not a run that can be imported: a value is nested too deeply"
            ) from error
        if writer.behind:
            raise UserError(f"{archive.name}: the new run's database cannot be written; is the disk full?")
        if (unpacked / "notes.json").exists():
            write_notes(made, read_notes(RunFolder(unpacked)))
        if (unpacked / "engine.log").exists():
            shutil.move(unpacked / "engine.log", made.log)
        folder = RunFolder.of(root, run_id)
        os.rename(made.path, folder.path)
    return folder


def _unpack(archive: Path, into: Path) -> None:
    """The files we take, and no others, with names of our own. Raises UserError."""

    def refuse(why: str) -> UserError:
        return UserError(f"{archive.name}: is not a run that can be imported: {why}")

    try:
        with zipfile.ZipFile(archive) as opened:
            entries = opened.infolist()
            if len(entries) > 2000:
                raise refuse(f"it holds {len(entries)} files")
            folders = {PurePosixPath(entry.filename).parts[:1] for entry in entries if entry.filename.count("/")}
            inside = folders.pop()[0] if len(folders) == 1 and "run.duckdb" not in opened.namelist() else ""
            for entry in entries:
                path = PurePosixPath(entry.filename)
                shown = ascii(entry.filename)[:80]
                if path.is_absolute() or ".." in path.parts or any(c in entry.filename for c in "\\:\x00"):
                    raise refuse(f"the name {shown} leads out of its folder")
                if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise refuse(f"{shown} is a link or a device")
                if entry.is_dir():
                    continue
                parts = path.parts[1:] if inside else path.parts
                name = "/".join(parts)
                if name not in _TAKEN:  # journals, locks, summaries: a new run makes its own
                    continue
                if (into / name).exists():
                    raise refuse(f"{shown} is in it twice")
                _extract(opened, entry, into / name, _TAKEN[name], refuse(f"{shown} is too large"))
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, EOFError, OSError) as error:
        # RuntimeError is zipfile's word for an encrypted entry, and for a compression that it does not know
        raise refuse(f"the zip cannot be read ({error})") from error
    if not (into / "run.duckdb").exists():
        raise refuse("there is no run.duckdb in it")


def _extract(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, limit: int, too_large: UserError) -> None:
    if entry.file_size > limit:
        raise too_large
    written = 0
    with opened.open(entry) as source, open(target, "xb") as file:
        while chunk := source.read(1024**2):  # the size in the header is a claim, not a fact
            written += len(chunk)
            if written > limit:
                raise too_large
            file.write(chunk)


def _checked(events: list[Event]) -> tuple[RunSpec, datetime]:
    """(what was asked, last sign of life), after a look at all values that our own code relies on. Raises UserError."""
    spec, seen = None, now()
    for event in events:
        table = event["table"]
        for row in event["rows"]:
            try:
                for column, value in row.items():
                    if column.endswith("_at") and value is not None:
                        datetime.fromisoformat(value)
                if table == "runs":
                    spec = build_spec({**row["spec"], "trust_remote_code": False}, "its run file")
                    row |= {"name": spec.name, "spec": spec.model_dump(mode="json"), "status": RunStatus(row["status"])}
                    seen = datetime.fromisoformat(row["heartbeat_at"]) if row["heartbeat_at"] else seen
                    _in_range("n_layers", row["n_layers"])
                elif table == "trials":
                    TrialStatus(row["status"])
                    Origin(row["origin"])
                elif table == "layers":
                    _in_range("layer", row["layer"])
                elif table == "plans":
                    plan = StitchPlan.from_json(row["plan"])
                    _in_range("n_layers", plan.n_layers)
                    if plan.hash != row["plan_hash"]:
                        raise ValueError(f"the plan of configuration {row['config_id']} is not what its hash says")
            except (ValueError, TypeError, KeyError, AttributeError) as error:  # UserError is a ValueError
                raise UserError(f"its table {table} holds what no run has: {error}") from error
    if spec is None:
        raise UserError("its database holds no run")
    return spec, seen


def _in_range(what: str, value: int | None) -> None:
    if value is not None and not 0 <= value <= MAX_LAYERS:
        raise ValueError(f"{what} = {value}")
