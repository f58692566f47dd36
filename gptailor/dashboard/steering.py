"""Pause, resume, stop, extend: what a person may ask of a run's engine, and the switch that keeps a page live.

The engine is a process of its own: pausing leaves a request in the run's folder that it honours between batches, and
stopping asks first and insists later (gptailor.launch). Whether this person may ask is decided where it is done
(actions.py); the buttons only say so beforehand.
"""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from gptailor.dashboard import access, actions, readers
from gptailor.errors import UserError
from gptailor.launch import engine
from gptailor.launch.queue import waiting_behind
from gptailor.wording import safe

_PROBLEM = "steering.problem"


def show(run: readers.Run) -> bool:
    """The run's buttons, as far as they make sense in its state. Returns whether the page keeps itself up to date."""
    if problem := st.session_state.pop(_PROBLEM, None):
        st.error(safe(problem, 600), icon=":material/error:")
    if run.status == "lost":
        st.warning(
            "The run says that it is running, but its engine is gone: the process ended without saying why. Nothing "
            "that "
            "was scored is lost; Resume goes on from there.",
            icon=":material/help:",
        )
    if (run.is_active or run.status == "lost") and (trouble := run.folder.trouble()):
        st.warning(
            f"Nothing can be written for this run: {trouble}. What was scored is kept. An engine that waits for room "
            "goes on by itself once there is some.",
            icon=":material/hard_drive:",
        )
    if run.status == "queued":
        _queue(run)
    live, not_you = False, access.why_not()
    with st.container(horizontal=True, vertical_alignment="center"):
        if run.status == "running":
            _pause(run, not_you)
        elif run.status != "queued" and run.status != "finished" and not run.is_demo:
            st.button(
                "Resume",
                icon=":material/play_arrow:",
                type="primary",
                disabled=not_you is not None,
                help=not_you,
                on_click=_try,
                args=(actions.resume, run),
            )
        if run.status in ("finished", "stopped") and not run.is_demo:
            st.button(
                "Extend …",
                icon=":material/add:",
                disabled=not_you is not None,
                help=not_you or "More trials or more time.",
                on_click=_ask_for_more,
                args=(run,),
            )
        if run.is_active:
            st.button(
                "Stop …",
                icon=":material/stop:",
                disabled=not_you is not None,
                help=not_you,
                on_click=_confirm_stop,
                args=(run,),
            )
            live = st.toggle("Live", value=True, key="live", help="Keep this page up to date by itself.")
    return live


def _pause(run: readers.Run, not_you: str | None) -> None:
    asked = engine.asked(run.folder, "pause")
    st.button(
        "Pausing …" if asked else "Pause",
        icon=":material/pause:",
        disabled=asked or not_you is not None,
        help=not_you or "The engine finishes the current batch, then waits.",
        on_click=_try,
        args=(actions.pause, run),
    )


def _queue(run: readers.Run) -> None:
    ahead = waiting_behind(run.folder.root, run.run_id)
    if ahead:
        names = {other.run_id: other.name for other in readers.runs()}
        words = ", ".join(safe(names.get(run_id, run_id)) for run_id in ahead)
        st.info(f"Waits for its device behind: {words}.", icon=":material/hourglass_top:")


def _try(act: Callable[[readers.Run], object], run: readers.Run) -> None:
    try:
        act(run)
    except UserError as error:
        st.session_state[_PROBLEM] = str(error)


@st.dialog("Extend this run")
def _ask_for_more(run: readers.Run) -> None:
    before = max(run.summary.n_asked, 1)
    trials = st.number_input("Trials in all", before, 100_000, before)
    walltime = st.text_input("Time limit in all", placeholder="as it is", help="Such as 90m or 2h30m.", max_chars=40)
    st.caption("The search goes on where it ended, with what it has learned.")
    if st.button("Go on", icon=":material/play_arrow:", type="primary"):
        _try(lambda run: actions.extend(run, int(trials), walltime.strip() or None), run)
        st.rerun()


@st.dialog("Stop this run?")
def _confirm_stop(run: readers.Run) -> None:
    st.write("The trial at hand is given up; everything that was scored stays. A stopped run can be resumed.")
    if st.button("Stop the run", icon=":material/stop:", type="primary"):
        with st.spinner("Stopping …"):
            _try(actions.stop, run)
        st.rerun()
