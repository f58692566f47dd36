"""What every page shares: its head and navigation, calm notes, and (from figures.py) the frame around each chart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from gptailor.dashboard import access, readers
from gptailor.dashboard.figures import show_chart, show_table
from gptailor.dashboard.url import chosen
from gptailor.wording import safe as text_safe

__all__ = ["show_chart", "show_table", "text_safe"]  # what pages reach through here, besides what is defined here

ACTIVE = readers.ACTIVE
ICON = Path(__file__).with_name("icon.svg")
"""A file of ours: a named icon as the browser's tab icon is fetched from somebody else's server."""
SIDEBAR = 210
"""Pixels."""
TIGHT = '<style>[data-testid="stMainBlockContainer"] {padding: 3rem 2.5rem 4rem}</style>'
"""Streamlit's own margins take a sixth of a laptop's window."""


@dataclass(frozen=True)
class Page:
    file: str
    title: str
    icon: str
    question: str


PAGES = (
    Page("streamlit_app.py", "Home", ":material/home:", "Which runs are there?"),
    Page("pages/1_Launch.py", "Launch", ":material/rocket_launch:", "What should be searched, and what will it take?"),
    Page("pages/6_Compare.py", "Compare", ":material/balance:", "Which run is better, and why?"),
    Page("pages/2_Progress.py", "Progress", ":material/timeline:", "Is it going well?"),
    Page(
        "pages/3_Fidelity.py",
        "Fidelity",
        ":material/stairs:",
        "Where did the budget go, and can the cheap rungs be trusted?",
    ),
    Page("pages/4_Trade-offs.py", "Trade-offs", ":material/scatter_plot:", "What costs what?"),
    Page("pages/5_Layers.py", "Layers", ":material/view_column:", "Who made this model?"),
    Page("pages/7_Models.py", "Models", ":material/deployed_code:", "How do I take a model home?"),
)
_ALL_RUNS = ("Home", "Launch", "Compare")

STATUS_LOOK = {
    "queued": ("gray", ":material/hourglass_empty:", "Waits for its device."),
    "running": ("blue", ":material/play_circle:", "Its engine is at work."),
    "paused": ("yellow", ":material/pause_circle:", "Its engine is alive and waits."),
    "finished": ("green", ":material/check_circle:", "All trials are done."),
    "stopped": ("gray", ":material/stop_circle:", "Ended early by a person; it can be resumed."),
    "failed": ("red", ":material/error:", "Ended by an error; see Progress."),
    "lost": ("orange", ":material/help:", "Says it is running, but no engine holds it; it can be resumed."),
}


def open_page(title: str) -> None:
    """The page's head: browser title, navigation, heading, and the question that the page answers."""
    page = next(page for page in PAGES if page.title == title)
    st.set_page_config(
        page_title=f"{page.title} · gptailor", page_icon=str(ICON), layout="wide", initial_sidebar_state=SIDEBAR
    )
    st.html(TIGHT)
    access.enter()
    with st.sidebar:
        st.markdown("### :material/content_cut: gptailor", width="stretch")
        _links("All runs", [page for page in PAGES if page.title in _ALL_RUNS])
        _links("This run", [page for page in PAGES if page.title not in _ALL_RUNS])
        access.badge()
    st.title(page.title, anchor=False)
    st.caption(page.question)


def _links(heading: str, pages: list[Page]) -> None:
    st.caption(heading)
    carried = {name: value for name in ("run", "config", "runs") if (value := chosen(name))}
    for page in pages:
        st.page_link(page.file, label=page.title, icon=page.icon, query_params=carried, width="stretch")


def status_badge(status: str) -> None:
    colour, icon, help_text = STATUS_LOOK.get(status, ("gray", ":material/help:", ""))
    st.badge(status.capitalize(), icon=icon, color=colour, help=help_text or None)  # type: ignore[arg-type]


def empty(message: str, icon: str = ":material/inbox:") -> None:
    """A calm note where there is nothing to draw yet: says why, and what to do."""
    st.info(message, icon=icon)
