"""What a plan is worth in use, on pages: measured speed and memory beside the dense base, and the button that measures.

Several plans are compared as axes of the Trade-offs page.
"""

from __future__ import annotations

import streamlit as st

from gptailor.dashboard import access, jobs, widgets
from gptailor.dashboard.readers import Run
from gptailor.launch.jobs import JobState, JobStatus
from gptailor.results import worth
from gptailor.results.frames.view import View
from gptailor.trial import Subject


def show_of_plan(view: View, run: Run, config_id: int) -> None:
    """The plan's measurements, or how to take them."""
    st.markdown("**What it is worth in use**")
    found = worth.of_plan(view.tables, config_id)
    if len(found):
        st.caption(
            "Measured on the exported model in plain transformers, in turns with the dense base. ± is half the width "
            "of the middle half of the rounds. Speeds above 1 and memory below 1 are better than dense."
        )
        widgets.show_table(found, alt=f"Speed and memory of plan {config_id} beside the dense base")
    else:
        st.caption("Tokens a second, time to the first token, memory and bytes on disk were not measured yet.")
    measure(run, config_id)


def measure(run: Run, config_id: int) -> None:
    """Measure the plan beside the dense base, in a process of its own."""
    work = jobs.job(run, f"measure-{config_id}")
    state = jobs.state(work)
    if jobs.is_running(state):
        jobs.follow(work, _steps)
        return
    if state is not None and state.status is not JobStatus.DONE:
        jobs.say_failure(state, "Measuring")
    if run.is_active or run.is_demo:
        return
    not_you = access.why_not()
    st.button(
        "Measure speed and memory",
        icon=":material/speed:",
        on_click=jobs.begin,
        args=(run, work, ["measure", run.run_id, "--json", "--subjects", str(Subject.config(config_id))]),
        disabled=not_you is not None,
        help=not_you or "Minutes, on the run's device. Other work on the machine makes the figures worth less.",
    )


def _steps(state: JobState) -> None:
    text, share = jobs.last_words(state, "opening the models …")
    st.progress(share, text=f"Measuring: {text}")
