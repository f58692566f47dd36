"""The frame around every chart and table: its title and note, alt text, and its data one click away."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from gptailor.dashboard.polling import apart
from gptailor.results.charts import files
from gptailor.wording import plain
from gptailor.wording import safe as text_safe

if TYPE_CHECKING:  # brings altair, which a page without charts opens sooner without
    from gptailor.results.charts.common import Chart, Drawing


def show_chart(
    chart: Chart | Drawing,
    frame: pd.DataFrame,
    *,
    title: str,
    note: str,
    alt: str,
    key: str,
    select: bool = False,
    percent: bool = False,
) -> Any:
    """A chart in its frame: title, note (n shown, budget, how to read it), alt text, and its data one click away.

    percent: averages in the data are shares. Returns the selection where `select` is set.
    """
    from gptailor.results.charts.common import Drawing, draw

    drawing = chart if isinstance(chart, Drawing) else draw(chart)
    st.markdown(f"**{text_safe(title, 160)}**")
    if note:
        st.caption(text_safe(note, 600))
    event = None
    if select:
        event = st.vega_lite_chart(drawing.spec, width="stretch", key=f"chart.{key}", on_select="rerun", alt=alt)
    else:
        st.vega_lite_chart(drawing.spec, width="stretch", key=f"chart.{key}", alt=alt)
    _data_below(drawing.chart, frame, title, note, key, percent)
    return event


@apart
def _data_below(chart: Chart, frame: pd.DataFrame, title: str, note: str, key: str, percent: bool) -> None:
    box = st.expander("Data and downloads", key=f"data.{key}", on_change="rerun", type="compact")
    if not box.open:
        return
    with box:
        show_table(frame, alt=f"Data of: {title}", percent=percent)
        name = "-".join(plain(title).lower().split())
        with st.container(horizontal=True):
            for label, suffix, mime, make in (
                ("CSV", "csv", "text/csv", partial(files.csv_bytes, frame)),
                ("PNG", "png", "image/png", partial(files.png_bytes, chart, title, note)),
                ("SVG", "svg", "image/svg+xml", partial(files.svg_bytes, chart, title, note)),
            ):
                st.download_button(
                    label,
                    make,
                    f"{name}.{suffix}",
                    mime,
                    key=f"{suffix}.{key}",
                    on_click="ignore",
                    icon=":material/download:",
                )


def show_table(frame: pd.DataFrame, alt: str, percent: bool = False, height: int = 320, **options: Any) -> Any:
    """A table with headings, units and formats; grows with its rows up to `height`.

    People can download it, so it is inert.
    """
    frame = files.inert(frame).round(dict.fromkeys(_SHARES, 3))  # a percent's digits: Streamlit's format has no number
    tall = min(38 + 35 * max(len(frame), 1), height)
    return st.dataframe(frame, hide_index=True, height=tall, column_config=columns(frame, percent), alt=alt, **options)


_SHARES = {
    "share",
    "trial_share",
    "example_share",
    "time_share",
    "retention",
    "flips",
    "above_chance",
    "gap",
    "kept",
    "kept ±",
    "distance",
}
_AVERAGES = {"average", "average ±", "best", "error", "worth", "low", "high"}
_SCORES = {"This plan", "±", "Dense", "Dense ±"}
_HEADINGS = {
    "config_id": "Plan",
    "trial_id": "Trial",
    "trials": "Trials",
    "budget": "Rung (examples)",
    "average": "Average",
    "average ±": "Average ±",
    "best": "Best so far",
    "is_best": "New best",
    "hypervolume": "Hypervolume",
    "status": "Status",
    "hours": "Hours (h)",
    "start_hours": "Start (h)",
    "end_hours": "End (h)",
    "seconds": "Seconds (s)",
    "error": "± (standard error)",
    "cause": "Cause",
    "failed": "Failed",
    "plans": "Plans",
    "of": "Of",
    "examples": "Examples",
    "share": "Share",
    "trial_share": "Share of trials",
    "example_share": "Share of examples",
    "time_share": "Share of time",
    "top": "Highest rung",
    "objective": "Objective",
    "low": "Lower",
    "high": "Higher",
    "n": "Plans on both",
    "spearman": "Spearman ρ",
    "spearman_low": "ρ, 95 % from",
    "spearman_high": "ρ, 95 % to",
    "kendall": "Kendall τ",
    "flips": "Pairs that change order",
    "rank": "Rank",
    "moved": "Places gained",
    "kind": "Move",
    "worker": "Worker",
    "host": "Machine",
    "device": "Device",
    "doing": "Doing",
    "for_seconds": "For (s)",
    "gigabytes": "Memory (GB)",
    "x": "Across",
    "y": "Up",
    "x_low": "Across, low",
    "x_high": "Across, high",
    "y_low": "Up, low",
    "y_high": "Up, high",
    "on_front": "On the front",
    "knee": "Knee",
    "position": "Position",
    "score": "Score",
    "selected": "Looked at",
    "order": "Order",
    "retention": "Retention",
    "plan": "Plan",
    "layer": "Layer",
    "factor": "Merge factor",
    "output_scale": "Output scale",
    "source": "Source",
    "code": "Code",
    "made_of": "Made of",
    "choice": "Choice",
    "deviates": "Deviates",
    "lane": "Row",
    "text": "Text",
    "worth": "Worth",
    "n_same": "Plans that do the same",
    "n_base": "Plans that keep the base's",
    "importance": "Explained variance lost",
    "model": "Model",
    "kept": "Kept without it",
    "kept ±": "Kept ±",
    "influence": "Block Influence",
    "distance": "Distance from the base",
    "cheap": "Looks cheap",
    "copy_of": "Copy of layer",
    "angular": "Angular distance",
    "pair": "Candidates",
    "cosine": "Cosine",
    "relation": "They are",
    "row": "Before layer",
    "column": "Before layer, other",
    "similarity": "Similarity",
    "run": "Run",
    "one": "Run",
    "other": "Other run",
    "both": "Removed by both",
    "either": "Removed by either",
    "jaccard": "Jaccard overlap",
    "setting": "Setting",
    "measure": "Measure",
    "above_chance": "Retention above chance",
    "gap": "Calibration less held out",
}


def columns(frame: pd.DataFrame, percent: bool = False) -> dict[str, Any]:
    """Headings with units and number formats of a data table. percent: averages are shares, shown as such."""
    config: dict[str, Any] = {}
    averages = _AVERAGES if "average" in frame or "worth" in frame else set()
    for name in map(str, frame.columns):
        heading = _HEADINGS.get(name) or plain(name)
        kind = frame.get(name, None)
        if kind is None or not pd.api.types.is_float_dtype(kind):
            config[name] = st.column_config.Column(heading)
        elif name in _SCORES:
            config[name] = st.column_config.NumberColumn(heading, format="%.4f")
        elif name in _SHARES or (percent and name in averages):
            config[name] = st.column_config.NumberColumn(heading, format="percent")
        else:
            config[name] = st.column_config.NumberColumn(
                heading, format="%.2f" if name.endswith(("hours", "seconds")) else "%.4g"
            )
    return config
