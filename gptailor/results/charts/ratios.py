"""Held-out quality against the share of layers removed, between the dense base and guessing."""

from __future__ import annotations

import altair as alt
import pandas as pd

from gptailor.results.charts import theme
from gptailor.results.charts.common import NUMBER, Chart, height, tight, tooltips, value_axis
from gptailor.results.charts.progress import run_colour, run_dash, run_legend


def by_ratio(frame: pd.DataFrame) -> Chart:
    """A line a series with its 95 % intervals; a ring where it meets guessing. `frame`: frames.ratios.curve.

    Series beyond those that a chart can tell apart are left out.
    """
    names = list(dict.fromkeys(frame["series"]))[: len(theme.RUN_COLOURS)]
    shown = frame[frame["series"].isin(names)].rename(columns={"series": "run"})
    x = alt.X("ratio:Q", axis=alt.Axis(title="Share of the layers removed", format=".0%"), scale=alt.Scale(padding=12))
    base = alt.Chart(shown).encode(
        x=x,
        tooltip=tooltips(
            ("run", "Series"),
            ("removed", "Layers removed", "d"),
            ("average", "Held-out average", NUMBER),
            ("error", "± (standard error)", NUMBER),
            ("retention", "Of the dense base", ".1%"),
            ("runs", "Runs", "d"),
        ),
    )
    y = alt.Y("average:Q", axis=value_axis("Held-out average (higher is better)", False), scale=tight())
    lines = base.mark_line(strokeWidth=2.5).encode(y=y, color=run_colour(names), strokeDash=run_dash(names))
    bars = base.mark_rule(strokeWidth=1.5, opacity=0.7).encode(
        y=alt.Y("low:Q", scale=tight()), y2="high:Q", color=run_colour(names)
    )
    shapes = alt.Scale(domain=names, range=list(theme.RUN_SHAPES[: len(names)]))
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(
        y=y, color=run_colour(names), shape=alt.Shape("run:N", scale=shapes, legend=run_legend())
    )
    rings = base.transform_filter("datum.limit").mark_point(filled=False, size=330, strokeWidth=3, color=theme.ACCENT)
    return alt.layer(*_levels(shown), lines, bars, dots, rings.encode(y=y)).properties(height=height(300, legend=True))


def _levels(shown: pd.DataFrame) -> list[alt.Chart]:
    """The dense base and guessing, as lines across with their names."""
    levels = pd.DataFrame({"level": ["dense base", "guessing"], "at": [shown["dense"].mean(), shown["chance"].mean()]})
    levels = levels.dropna().assign(ratio=shown["ratio"].max())
    across = alt.Chart(levels).encode(y=alt.Y("at:Q", scale=tight()))
    words = across.mark_text(align="right", baseline="bottom", dy=-3, color=theme.MUTED)
    return [
        across.mark_rule(strokeDash=[5, 4], strokeWidth=1.5, color=theme.MUTED),
        words.encode(x="ratio:Q", text="level:N"),
    ]
