"""Pause, resume, stop: what a person may ask of a run's engine, and the switch that keeps a page live.

The engine is a process of its own; a button only leaves a request in the run's folder, which the engine honours between batches.
"""

from __future__ import annotations

import streamlit as st

from gptailor import launch
from gptailor.dashboard import readers, text
from gptailor.errors import UserError


def show(run: readers.Run) -> bool:
    """The buttons that fit the run's state. Returns whether the page should keep itself up to date."""
    if run.status == "lost":
        st.warning(
            "The run says it is running, but no engine holds it: its process ended without saying why. Nothing that was scored is "
            "lost. Resume goes on where it stopped.",
            icon=":material/help:",
        )
    live = False
    with st.container(horizontal=True, vertical_alignment="center"):
        if run.status in ("running", "queued"):
            if _is_asked(run, "stop"):
                st.caption("Stop was asked for; the engine ends after its current batch.")
            else:
                st.button(
                    "Pause",
                    icon=":material/pause:",
                    on_click=_ask,
                    args=(run, "pause"),
                    disabled=_is_asked(run, "pause") or run.status == "queued",
                    help="Finish the current trial, then wait.",
                )
                st.button("Stop …", icon=":material/stop:", on_click=_confirm_stop, args=(run,))
        elif run.status == "paused":
            st.button("Resume", icon=":material/play_arrow:", type="primary", on_click=_go_on, args=(run,))
            st.button("Stop …", icon=":material/stop:", on_click=_confirm_stop, args=(run,))
        elif run.status in ("lost", "stopped", "failed") and not run.is_demo:
            st.button(
                "Resume",
                icon=":material/play_arrow:",
                type="primary",
                on_click=_start_again,
                args=(run,),
                help="Start an engine that goes on where the run stopped.",
            )
        if run.is_active:
            live = st.toggle("Live", value=True, key="live", help="Keep this page up to date.")
    if problem := st.session_state.pop("control.problem", None):
        st.error(text.safe(problem, 600), icon=":material/error:")
    return live


def _is_asked(run: readers.Run, what: str) -> bool:
    return launch.asked(run.folder, what)


def _ask(run: readers.Run, what: str) -> None:
    _try(lambda: launch.request(run.folder, what), "Asked. The engine answers between two batches.")


def _go_on(run: readers.Run) -> None:
    _try(lambda: launch.withdraw(run.folder, "pause"), "The run goes on.")


def _start_again(run: readers.Run) -> None:
    _try(lambda: launch.start(run.folder), "An engine was started.")


def _try(action, done: str) -> None:  # type: ignore[no-untyped-def]
    try:
        action()
    except (UserError, OSError) as error:
        st.session_state["control.problem"] = str(error)
    else:
        st.toast(done, icon=":material/check:")


@st.dialog("Stop this run?")
def _confirm_stop(run: readers.Run) -> None:
    st.write("The trial at hand is given up; everything that was scored stays. A stopped run can be resumed.")
    with st.container(horizontal=True):
        if st.button("Stop the run", icon=":material/stop:", type="primary"):
            _try(lambda: launch.stop(run.folder), "Stop was asked for.")
            st.rerun()
        if st.button("Keep it running"):
            st.rerun()
