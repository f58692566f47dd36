"""Everything that a browser can change or take away, and the one door it goes through.

The door asks who it is, refuses whoever has not the role, and leaves a line in the audit log either way. Nothing else
in the dashboard may start, stop, write or delete (a test says so): what a page shows or hides decides nothing.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from gptailor.dashboard import access, audit, checking, readers
from gptailor.dashboard.access import Role
from gptailor.dashboard.checking import Answer
from gptailor.dashboard.readers import Run
from gptailor.errors import UserError
from gptailor.launch import engine, warm
from gptailor.launch.engine import StopResult, delete_run, request
from gptailor.launch.extend import extend as more_for
from gptailor.launch.jobs import Job, JobStatus, job_state, list_jobs, start_job, stop_job
from gptailor.results.redundancy import shared_file
from gptailor.spec.run import RunSpec
from gptailor.store.folder import RUN_ID, RunFolder, write_atomically
from gptailor.store.imports import import_run
from gptailor.store.notes import Notes, write_notes
from gptailor.store.sharing import copy_run

T = TypeVar("T")
TRIES, KEPT_ANSWERS = 1000, 20
DEMO_STAYS = "The shipped example stays as it is."


class Refused(UserError):
    """This visitor may not do that. The text says why."""


def _door(action: str, run_id: str, act: Callable[[], T], role: Role = Role.OPERATOR, stop: str | None = None) -> T:
    """Do it, if this visitor has the role and there is no `stop` (a reason why nobody may). Raises Refused."""
    who, root = access.visitor(), readers.runs_root()
    if problem := who.why if who.role < role else stop:
        audit.record(root, who.name, action, run_id, f"refused: {problem}")
        raise Refused(problem)
    try:
        result = act()
    except Exception as error:
        audit.record(root, who.name, action, run_id, f"failed: {error}")
        raise
    outcome = result.run_id if isinstance(result, RunFolder) else str(result) if isinstance(result, StopResult) else ""
    audit.record(root, who.name, action, run_id, f"done: {outcome}" if outcome else "done")
    return result


def _of(run: Run) -> str | None:
    return DEMO_STAYS if run.is_demo else None


def notice_link(run_id: str) -> None:
    """Leave a line where a link names what no run can be called: somebody tries something."""
    if not RUN_ID.fullmatch(run_id):
        audit.record(readers.runs_root(), access.visitor().name, "open", run_id, "refused: no run has such a name")


# --- a run's engine ---------------------------------------------------------------------------------------------------


def check(spec: RunSpec, again: bool = False) -> Future[Answer]:
    """Ask whether a search can run: it opens folders that the visitor names, so a viewer may not.

    Leaves no line, as every keystroke asks. Raises Refused.
    """
    if problem := access.why_not():
        raise Refused(problem)
    return checking.desk().ask(spec, readers.runs_root(), again)


def start(spec: RunSpec) -> RunFolder:
    """The active run that asks for exactly this, started now if there is none: whoever asks gets the same one.

    Raises UserError where no run can be made or started.
    """
    return _door("launch", "", lambda: _launched_once(spec))


def _launched_once(spec: RunSpec) -> RunFolder:
    text = spec.to_yaml()
    for attempt in range(TRIES):  # an attempt that has ended makes room for the next
        token = hashlib.sha256(f"{attempt}\n{text}".encode()).hexdigest()
        folder, is_new = engine.launch(readers.runs_root(), spec, token, warm.shared().spawn)
        if is_new or any(run.run_id == folder.run_id and run.is_active for run in readers.runs()):
            return folder
    raise UserError(f"this very search was run {TRIES} times; change its name or seed")


def pause(run: Run) -> None:
    _door("pause", run.run_id, lambda: request(run.folder, "pause"), stop=_of(run))


def resume(run: Run) -> None:
    _door("resume", run.run_id, lambda: _resumed(run), stop=_of(run))


def _resumed(run: Run) -> None:
    if engine.resume(run.folder, warm.shared().spawn) is None and not run.is_active:
        raise UserError(
            f"run {run.run_id}: something else (an evaluation, a measurement) is at work on it; "
            "resume it when that has ended"
        )


def stop(run: Run) -> StopResult:
    return _door("stop", run.run_id, lambda: engine.stop(run.folder), stop=_of(run))


def extend(run: Run, trials: int, walltime: str | None) -> str:
    """Give a run that has ended this many trials, and this much time if any is said, in all; its engine goes on."""
    return _door("extend", run.run_id, lambda: more_for(run.folder, trials, walltime), stop=_of(run))


# --- a run's files ----------------------------------------------------------------------------------------------------


def delete(run: Run, work: Path) -> None:
    """Remove a run, and where its jobs are (`work`). Raises UserError while it or one of them is at work."""
    _door("delete", run.run_id, lambda: _deleted(run, work), stop=_of(run))


def _deleted(run: Run, work: Path) -> None:
    if any(job_state(job).status is JobStatus.RUNNING for job in list_jobs(work)):
        raise UserError(f"run {run.run_id}: a job (an export, say) is at work on it; stop that first")
    delete_run(run.folder)
    shutil.rmtree(work, ignore_errors=True)


def describe(run: Run, notes: Notes) -> None:
    """Give it a name, a note, tags."""
    _door("describe", run.run_id, lambda: write_notes(run.folder, notes), stop=_of(run))


def bring_in(archive: memoryview) -> RunFolder:
    """Import a run from the bytes of a zip."""

    def act() -> RunFolder:
        with tempfile.TemporaryDirectory(prefix="gptailor-upload-") as scratch:
            path = Path(scratch) / "upload.zip"
            path.write_bytes(archive)
            return import_run(path, readers.runs_root())

    return _door("import", "", act)


def take(run: Run) -> bytes:
    """The run as a zip. It changes nothing, so a viewer may."""

    def act() -> bytes:
        with tempfile.TemporaryDirectory(prefix="gptailor-download-") as scratch:
            return copy_run(run.folder, Path(scratch) / "run.zip").read_bytes()

    return _door("download", run.run_id, act, Role.VIEWER)


def report(run: Run, write: Callable[[], bytes]) -> bytes:
    """The run as a page. It changes nothing, so a viewer may."""
    return _door("report", run.run_id, write, Role.VIEWER)


# --- model work -------------------------------------------------------------------------------------------------------


def begin(run: Run, place: Path, arguments: Sequence[str], name: str) -> Job:
    """Start `python -m gptailor ARGUMENTS` on the run's folder: an export, an evaluation, an answer."""

    def act() -> Job:
        if arguments[0] == "generate":
            _forget_old(place, "generate-")
        return start_job(place, [*arguments, "--runs", str(run.folder.root.resolve())], name)

    return _door(arguments[0], run.run_id, act)


def family_job(spec: RunSpec) -> Job:
    """The measuring of a family's redundancy, whether it was ever started or not."""
    return Job(_families() / "jobs" / f"redundancy-{shared_file(readers.runs_root(), spec).stem}")


def measure_family(spec: RunSpec) -> Job:
    """Start `python -m gptailor redundancy` for what a search is asked for, before there is a run."""

    def act() -> Job:
        work, root = family_job(spec), readers.runs_root().resolve()
        file = _families() / f"{work.name}.yaml"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, spec.to_yaml())
        except OSError as error:
            raise UserError(f"job {work.name}: cannot be started: {error}") from error
        return start_job(_families(), ["redundancy", str(file), "--json", "--runs", str(root)], work.name)

    return _door("redundancy", "", act)


def _families() -> Path:
    """Where work on families is kept that no run asks for: beside the exports."""
    return readers.runs_root().resolve().parent / "exports" / ".work" / "families"


def _forget_old(place: Path, prefix: str) -> None:
    """Remove the oldest ended jobs of a kind, so that a curious visitor does not fill the disk."""
    ours = [work for work in list_jobs(place) if work.name.startswith(prefix)]
    for work in sorted(ours, key=lambda work: work.asked.stat().st_mtime)[:-KEPT_ANSWERS]:
        if job_state(work).status is not JobStatus.RUNNING:
            shutil.rmtree(work.path, ignore_errors=True)


def cancel(work: Job) -> None:
    _door("cancel", work.path.parents[1].name, lambda: stop_job(work))
