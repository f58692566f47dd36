"""What a plan is worth in use, on pages: measured speed and memory beside the dense base, and the button that measures.

Several plans are compared as axes of the Trade-offs page.
"""

from __future__ import annotations

import streamlit as st

from gptailor.dashboard import jobs, widgets
from gptailor.dashboard.readers import Run
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
        widgets.show_table(found, alt=f"Speed and memory of {view.name(config_id)} beside the dense base")
    else:
        st.caption("Tokens a second, time to the first token, memory and bytes on disk were not measured yet.")
    jobs.offer(
        run,
        f"measure-{config_id}",
        ["measure", "--subjects", str(Subject.config(config_id))],
        doing="Measuring",
        label="Measure speed and memory",
        icon=":material/speed:",
        help="Minutes, on the run's device. Other work on the machine makes the figures worth less.",
    )
