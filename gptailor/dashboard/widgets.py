"""What every page shares: its head and navigation, the reader's choices, and the frame around each chart.

A choice (which run, which configuration) has one home, the URL, so that a link sent to a colleague opens the same view; session
state only remembers it between pages. All keys of session state and of the URL are written here. Values from the URL are
hostile until they are found among the runs or configurations that exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from gptailor.dashboard import export
from gptailor.dashboard.text import plain
from gptailor.dashboard.text import safe as text_safe

ROOT = Path(__file__).resolve().parents[2]


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
        "pages/3_Fidelity.py", "Fidelity", ":material/stairs:", "Where did the budget go, and can the cheap rungs be trusted?"
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
ACTIVE = ("queued", "running", "paused")


# --- the head of a page -------------------------------------------------------------------------------------------------


def open_page(title: str) -> None:
    """The page's head: browser title, navigation, heading, and the question that the page answers."""
    page = next(page for page in PAGES if page.title == title)
    st.set_page_config(page_title=f"{page.title} · gptailor", page_icon=page.icon, layout="wide")
    with st.sidebar:
        st.markdown("### :material/content_cut: gptailor", width="stretch")
        _links("All runs", [page for page in PAGES if page.title in _ALL_RUNS])
        _links("This run", [page for page in PAGES if page.title not in _ALL_RUNS])
    st.title(page.title, anchor=False)
    st.caption(page.question)


def _links(heading: str, pages: list[Page]) -> None:
    st.caption(heading)
    carried = {name: value for name in ("run", "config", "runs") if (value := chosen(name))}
    for page in pages:
        if (ROOT / page.file).is_file():
            st.page_link(page.file, label=page.title, icon=page.icon, query_params=carried, width="stretch")


def status_badge(status: str) -> None:
    colour, icon, help_text = STATUS_LOOK.get(status, ("gray", ":material/help:", ""))
    st.badge(status.capitalize(), icon=icon, color=colour, help=help_text or None)  # type: ignore[arg-type]


def empty(message: str, icon: str = ":material/inbox:") -> None:
    """A calm note where there is nothing to draw yet: says why, and what to do."""
    st.info(message, icon=icon)


# --- choices --------------------------------------------------------------------------------------------------------------


def chosen(name: str) -> str | None:
    """The reader's choice as text: from the URL, else as remembered. Not checked: match it against what exists."""
    return st.query_params.get(name) or st.session_state.get(f"choice.{name}")


def choose(name: str, value: str | int | None) -> None:
    """Keep a choice in the URL and for the pages to come; None forgets it."""
    if value is None:
        st.session_state.pop(f"choice.{name}", None)
        st.query_params.pop(name, None)
        return
    st.session_state[f"choice.{name}"] = str(value)
    if st.query_params.get(name) != str(value):
        st.query_params[name] = str(value)


def _adopt(name: str, key: str) -> None:
    choose(name, st.session_state[key])


def select(
    name: str, label: str, options: Sequence[Any], shown: Callable[[Any], str], default: Any, help: str | None = None
) -> Any:
    """A select box whose value lives in the URL under `name`. Options are told apart by their text form in the URL."""
    by_text = {str(option): option for option in options}
    current = by_text.get(chosen(name) or "", default)
    key = f"select.{name}"
    st.session_state[key] = current
    st.selectbox(label, options, format_func=shown, key=key, on_change=_adopt, args=(name, key), help=help)
    choose(name, current)
    return current


# --- charts ---------------------------------------------------------------------------------------------------------------


def show_chart(
    chart: export.Chart,
    frame: pd.DataFrame,
    *,
    title: str,
    note: str,
    alt: str,
    key: str,
    select: bool = False,
    columns: dict[str, Any] | None = None,
) -> Any:
    """A chart in its frame: title, note (n shown, budget, how to read it), alt text, and its data one click away.

    title and note are our own words; other people's go in through `plain`. Returns the selection where `select` is set.
    """
    st.markdown(f"**{text_safe(title, 160)}**")
    if note:
        st.caption(text_safe(note, 600))
    event = None
    if select:
        event = st.altair_chart(chart, width="stretch", key=f"chart.{key}", on_select="rerun", alt=alt)
    else:
        st.altair_chart(chart, width="stretch", key=f"chart.{key}", alt=alt)
    _data_below(chart, frame, title, note, key, columns)
    return event


@st.fragment
def _data_below(
    chart: export.Chart, frame: pd.DataFrame, title: str, note: str, key: str, columns: dict[str, Any] | None
) -> None:
    box = st.expander("Data and downloads", key=f"data.{key}", on_change="rerun", type="compact")
    if not box.open:
        return
    with box:
        st.dataframe(frame, hide_index=True, height=min(38 + 35 * max(len(frame), 1), 320), column_config=columns, alt=f"Data of: {title}")
        name = "-".join(plain(title).lower().split())
        with st.container(horizontal=True):
            for label, suffix, mime, make in (
                ("CSV", "csv", "text/csv", partial(export.csv_bytes, frame)),
                ("PNG", "png", "image/png", partial(export.png_bytes, chart, title, note)),
                ("SVG", "svg", "image/svg+xml", partial(export.svg_bytes, chart, title, note)),
            ):
                st.download_button(
                    label, make, f"{name}.{suffix}", mime, key=f"{suffix}.{key}", on_click="ignore", icon=":material/download:"
                )
