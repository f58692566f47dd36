"""Held-out averages as dots with their errors: the search's plans between the dense models and the one-shot cuts."""

from __future__ import annotations

import altair as alt
import pandas as pd

from gptailor.results.charts import theme
from gptailor.results.charts.common import NUMBER, Chart, height, row_axis, tight, tooltips, value_axis
from gptailor.results.frames.held_out import KINDS
from gptailor.trial import CHANGED

ROW = 22
_COLOURS = (theme.MUTED, "#56B4E9", "#D55E00", theme.MAIN, "#CC79A7", "#009E73")
_SHAPES = ("diamond", "square", "triangle-up", "circle", "triangle-down", "cross")
_LOOKS = dict(zip(KINDS.values(), zip(_COLOURS, _SHAPES, strict=True), strict=True))
"""Colour and shape by kind of subject."""


def averages(frame: pd.DataFrame, selected: str | None = None) -> Chart:
    """A row a subject, the best on top; colour and shape say what it is, a ring marks the selected one.

    Bars are one standard error. `frame`: frames.held_out.averages.
    """
    order = frame["label"].tolist()
    y = alt.Y("label:N", sort=order, axis=row_axis(280))
    later = {KINDS[kind] for kind in CHANGED}
    kinds = [kind for kind in KINDS.values() if kind not in later or (frame["kind"] == kind).any()]
    colours, shapes = (list(looks) for looks in zip(*map(_LOOKS.__getitem__, kinds), strict=True))
    legend = alt.Legend(title=None, orient="top", columns=len(kinds), symbolOpacity=1)
    base = alt.Chart(frame).encode(
        y=y,
        tooltip=tooltips(
            ("label", "Subject"),
            ("average", "Held-out average", NUMBER),
            ("stderr", "± (standard error)", NUMBER),
            ("retention", "Retention", ".1%"),
            ("benchmarks", "Benchmarks", "d"),
        ),
    )
    x = alt.X("average:Q", scale=tight(), axis=value_axis("Held-out average (higher is better)", False))
    colour = alt.Color("kind:N", scale=alt.Scale(domain=kinds, range=colours), legend=legend)
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", scale=tight()), x2="high:Q", color=colour)
    dots = base.mark_point(filled=True, size=90, opacity=1).encode(
        x=x,
        color=colour,
        shape=alt.Shape("kind:N", scale=alt.Scale(domain=kinds, range=shapes), legend=legend),
    )
    ring = (
        alt.Chart(frame[frame["subject"] == selected])
        .mark_point(filled=False, size=300, strokeWidth=3, color=theme.ACCENT, opacity=1)
        .encode(x="average:Q", y=y)
    )
    return alt.layer(bars, dots, ring).properties(height=height(ROW * len(order), legend=True))
