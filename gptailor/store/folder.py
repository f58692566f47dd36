"""A run's folder: where its files are, and which names may reach it.

Every path that starts with a name from a browser or an archive goes through `RunFolder.of`, so nothing outside the runs
folder is ever opened: ids are a small alphabet, and neither the folder nor a file in it may be a link or a device.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import tempfile
import unicodedata
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gptailor.errors import UserError
from gptailor.trial import now

RUN_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,95}")
STARTED_IN = "started_in"
"""The file that holds it."""
ROOM = 256 * 1024
"""Bytes without which not even a trial can be recorded."""


def runs_root() -> Path:
    """Where runs are saved, for the dashboard and for the command line.

    The environment's GPTAILOR_RUNS, else data/runs.
    """
    return Path(os.environ.get("GPTAILOR_RUNS") or "data/runs")


@dataclass(frozen=True, order=True)
class RunFolder:
    """`path` is the run's own folder; its name is the run id. Use `of` for a name that comes from outside."""

    path: Path

    @classmethod
    def of(cls, root: str | Path, run_id: str) -> RunFolder:
        """The folder of `run_id` under `root`; it need not exist. Raises UserError for every other kind of name."""
        if not isinstance(run_id, str) or not RUN_ID.fullmatch(run_id):
            shown = str(run_id).encode("unicode_escape").decode()[:60]
            raise UserError(f"run id '{shown}': must be 1-96 lower-case letters, digits or '-', not starting with '-'")
        folder = cls(Path(root) / run_id)
        folder.refuse_links()
        return folder

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def root(self) -> Path:
        return self.path.parent

    @property
    def spec(self) -> Path:
        return self.path / "run.yaml"

    @property
    def database(self) -> Path:
        return self.path / "run.duckdb"

    @property
    def wal(self) -> Path:
        """DuckDB's write-ahead log; there only while a write is under way or after a kill."""
        return self.path / "run.duckdb.wal"

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "engine.log"

    @property
    def lock(self) -> Path:
        return self.path / "engine.lock"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def workers(self) -> Path:
        """What the workers of a running engine do just now."""
        return self.path / "workers.json"

    @property
    def notes(self) -> Path:
        return self.path / "notes.json"

    @property
    def control(self) -> Path:
        """Folder of requests to the engine: files named `stop` and `pause`."""
        return self.path / "control"

    @property
    def smac(self) -> Path:
        return self.path / "smac"

    @property
    def started_in(self) -> Path | None:
        """The folder that the run file's relative paths start from; None where that is not known, or not here."""
        try:
            folder = Path((self.path / STARTED_IN).read_text(encoding="utf-8"))
            return folder if folder.is_absolute() and folder.is_dir() else None
        except (OSError, ValueError):  # of an older version, copied from elsewhere, or no path at all
            return None

    def exists(self) -> bool:
        """Whether an engine has begun it: RunWriter.open, not create. A prepared run has its run file only."""
        return self.database.exists() or self.journal.exists()

    def version(self) -> tuple[int, ...]:
        """Changes when the database does, without opening it: mtime (ns) and size of it and its write-ahead log."""
        parts: list[int] = []
        for file in (self.database, self.wal):
            try:
                found = file.stat()
                parts += [found.st_mtime_ns, found.st_size]
            except OSError:
                parts += [0, 0]
        return tuple(parts)

    def size(self) -> int:
        """Bytes of the run's own files (without SMAC's). Raises FileNotFoundError where the run is gone."""
        found = 0
        with os.scandir(self.path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # one that its engine has just put in another's place
                    found += entry.stat(follow_symlinks=False).st_size if entry.is_file() else 0
        return found

    def trouble(self) -> str | None:
        """Why nothing can be written here just now, as far as can be told without writing; None where it can."""
        try:
            disk = os.statvfs(self.path)
        except OSError:
            return "its folder is gone"
        if disk.f_flag & os.ST_RDONLY:
            return "its disk is read-only"
        if disk.f_bavail * disk.f_frsize < ROOM:
            return "its disk is full"
        return None

    def refuse_links(self) -> None:
        """Raise UserError if the folder or anything in it is a link, a device or a pipe."""
        try:
            here = self.path.lstat()
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(here.st_mode):
            raise UserError(f"run {self.run_id}: is not a folder of its own (links, files and devices are refused)")
        with os.scandir(self.path) as entries:
            for entry in entries:
                if not (entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)):
                    raise UserError(f"run {self.run_id}: {entry.name} is a link or a device, which is refused")


def run_folders(root: str | Path) -> list[RunFolder]:
    """Every run under `root`, in order of their ids (oldest first). Anything that is no run is passed over."""
    folders = []
    try:
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        return []
    for name in names:
        try:
            folder = RunFolder.of(root, name)
        except UserError:
            continue
        if folder.exists() or folder.spec.exists():
            folders.append(folder)
    return folders


def new_run_id(name: str, suffix: str | None = None) -> str:
    """A fresh id: UTC time, the name in plain letters, and four random hex digits (or `suffix`)."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].strip("-") or "run"
    return f"{now():%Y%m%d-%H%M%S}-{slug}-{suffix or secrets.token_hex(2)}"


def write_atomically(path: Path, text: str, durable: bool = True) -> None:
    """Replace a small file whole: a reader sees the old or the new text, never half of it. Raises OSError.

    durable=False leaves out the wait for the disk, for what can be computed again after a power cut.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
