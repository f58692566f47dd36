"""Model work that a page asks for, in processes of its own: they outlive the page, and whoever opens it finds them.

What is written goes beside the runs folder; the browser never names a path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import streamlit as st

from gptailor import wording
from gptailor.dashboard import access, actions, readers
from gptailor.dashboard.polling import poll
from gptailor.dashboard.readers import Run
from gptailor.errors import UserError
from gptailor.launch.jobs import Job, JobState, JobStatus, job_state

POLL_SECONDS = 1.0


def exports_root() -> Path:
    """Where exported models are written: beside the runs folder."""
    return readers.runs_root().resolve().parent / "exports"


def export_folder(run: Run, config_id: int) -> Path:
    return exports_root() / f"{run.run_id}-{config_id}"


def job(run: Run, name: str) -> Job:
    """The run's job of that name, whether it was ever started or not.

    Jobs are not kept in the run's own folder, which may be somebody else's or read-only.
    """
    return Job(place(run) / "jobs" / name)


def state(work: Job) -> JobState | None:
    """None where it was never started."""
    try:
        return job_state(work)
    except UserError:
        return None


def is_running(found: JobState | None) -> bool:
    return found is not None and found.status is JobStatus.RUNNING


def begin(run: Run, work: Job, arguments: Sequence[str]) -> None:
    """Start `python -m gptailor ARGUMENTS` on the run's folder; what hinders it is shown by show_problem."""
    _try(lambda: actions.begin(run, place(run), arguments, work.name))


def _try(start: Callable[[], object]) -> None:
    try:
        start()
    except UserError as error:
        st.session_state["jobs.problem"] = str(error)


def last_words(found: JobState, before: str) -> tuple[str, float]:
    """What a job says that it does, and its share that is done. before: what to say until it says something."""
    said = found.events
    shares = [event.share for event in said if event.share is not None]
    text = wording.safe(said[-1].text, 200) if said else before
    return text, min(max(shares[-1], 0.0), 1.0) if shares else 0.0


def show_problem() -> None:
    if problem := st.session_state.pop("jobs.problem", None):
        st.error(wording.safe(problem, 600), icon=":material/error:")


def follow(work: Job, show: Callable[[JobState], None]) -> None:
    """Show how a job goes on, until it has ended."""

    @poll(POLL_SECONDS)
    def look() -> None:
        found = state(work)
        if found is None or not is_running(found):
            st.rerun()
            return
        show(found)
        not_you = access.why_not()
        if st.button("Cancel", key=f"jobs.cancel.{work.name}", disabled=not_you is not None, help=not_you):
            try:
                actions.cancel(work)
            except UserError as error:
                st.session_state["jobs.problem"] = str(error)
            st.rerun()

    look()


def offer(
    run: Run, name: str, arguments: Sequence[str], *, doing: str, label: str, icon: str, help: str, wanted: bool = True
) -> None:
    """A button that starts a command about the run; or how the command goes on, or why it failed.

    doing: what is said while it works. wanted: whether there is anything to do. Runs at work, and the example that
    comes with the code, are left alone.
    """

    command = [arguments[0], run.run_id, "--json", *arguments[1:]]
    offer_work(
        job(run, name),
        lambda: actions.begin(run, place(run), command, name),
        doing=doing,
        label=label,
        icon=icon,
        help=help,
        wanted=wanted,
        may_start=not (run.is_active or run.is_demo),
    )


def offer_work(
    work: Job,
    start: Callable[[], object],
    *,
    doing: str,
    label: str,
    icon: str,
    help: str,
    wanted: bool = True,
    may_start: bool = True,
) -> None:
    """The same for work that need not be about a run. start: begins it; may raise UserError."""

    def show(now: JobState) -> None:
        text, share = last_words(now, "opening the models …")
        st.progress(share, text=f"{doing}: {text}")

    found = state(work)
    if is_running(found):
        follow(work, show)
        return
    if not wanted:
        return
    if found is not None and found.status is not JobStatus.DONE:
        say_failure(found, doing)
    if not may_start:
        return
    not_you = access.why_not()
    st.button(
        label,
        key=f"jobs.start.{work.name}",
        icon=icon,
        on_click=_try,
        args=(start,),
        disabled=not_you is not None,
        help=not_you or help,
    )


def say_failure(found: JobState, what: str) -> None:
    """Why a job ended: the command's own words, else the last line of the log."""
    if found.status is JobStatus.LOST:
        st.warning(f"{what} was cancelled or killed.", icon=":material/cancel:")
        return
    told = [event.error for event in found.events if event.error]
    lines = told[-1].splitlines() if told else found.output.strip().splitlines()[-1:]
    st.error(
        "  \n".join([f"{what} failed.", *(wording.safe(line, 600) for line in lines[:20])]), icon=":material/error:"
    )


def place(run: Run) -> Path:
    """Where jobs of this run are."""
    return exports_root() / ".work" / run.run_id
