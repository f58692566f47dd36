"""Charts of the Fidelity page."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd

from gptailor.results.charts import theme
from gptailor.results.charts.common import Chart, format_of, height, row_axis, rung_scale, tight, tooltips, value_axis
from gptailor.results.frames.trials import AVERAGE


def shares(frame: pd.DataFrame, rungs: Sequence[int]) -> Chart:
    """Three bars of 100 %: trials, examples and time, each cut by rung. `frame`: see frames.fidelity.share_rows."""
    inks = {rung: theme.ink_on(colour) for rung, colour in theme.rung_colours(rungs).items()}
    base = alt.Chart(frame.assign(ink=frame["budget"].map(inks))).encode(
        y=alt.Y("of:N", sort=["Trials", "Examples", "Time"], axis=row_axis(labelFontSize=13)),
        order=alt.Order("budget:Q"),
        tooltip=tooltips(("of", "Of"), ("budget", "Rung (examples)"), ("amount", "Amount"), ("share", "Share", ".1%")),
    )
    x = alt.X("share:Q", title="Share (%)", stack="zero", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1]))
    bars = base.mark_bar(height=alt.RelativeBandSize(0.8)).encode(
        x=x,
        color=alt.Color("budget:O", scale=rung_scale(rungs), legend=alt.Legend(title="Rung (examples)", orient="top")),
    )
    words = (
        base.transform_filter("datum.share >= 0.09")
        .transform_calculate(label="datum.budget + ': ' + format(datum.share, '.0%')")
        .mark_text(align="right", dx=-8, fontWeight="bold", fontSize=12)
        .encode(x=x, text="label:N", color=alt.Color("ink:N", scale=None, legend=None))
    )
    return alt.layer(bars, words).resolve_scale(color="independent").properties(height=height(130, legend=True))


def ladder(frame: pd.DataFrame, rungs: Sequence[int], title: str, percent: bool) -> Chart:
    """Averages over rungs, a line a plan; a line ends where the plan was not promoted.

    `frame`: config_id, top, budget, average.
    """
    base = alt.Chart(frame).encode(
        x=alt.X(
            "budget:O",
            title="Rung (examples)",
            axis=alt.Axis(labelAngle=0),
            scale=alt.Scale(domain=list(rungs), padding=0.3),
        ),
        y=alt.Y("average:Q", axis=value_axis(title, percent), scale=tight()),
        detail="config_id:N",
        color=alt.Color(
            "top:O", scale=rung_scale(rungs), legend=alt.Legend(title="Highest rung reached", orient="top")
        ),
        tooltip=tooltips(
            ("config_id", "Plan"),
            ("budget", "Examples"),
            ("average", title, format_of(percent)),
            ("top", "Highest rung"),
        ),
    )
    return alt.layer(base.mark_line(opacity=0.6, strokeWidth=1.5), base.mark_circle(size=30, opacity=0.7)).properties(
        height=320
    )


def agreement(frame: pd.DataFrame, order: Sequence[str], average_label: str) -> Chart:
    """Spearman's correlation of each objective between every two rungs, as colour and as number with n."""
    pairs = frame.assign(
        pair=frame["low"].astype(str) + " and " + frame["high"].astype(str),
        name=frame["objective"].where(frame["objective"] != AVERAGE, average_label),
    )
    names = [average_label, *order]
    base = alt.Chart(pairs).encode(
        x=alt.X(
            "pair:N",
            title="Rungs compared (examples)",
            sort=None,
            axis=alt.Axis(labelAngle=0, orient="top", ticks=False, domain=False),
        ),
        y=alt.Y("name:N", sort=names, axis=row_axis(220)),
        tooltip=tooltips(
            ("name", "Objective"),
            ("pair", "Rungs"),
            ("n", "Plans scored on both", "d"),
            ("spearman", "Spearman ρ", ".2f"),
            ("spearman_low", "95 % from", ".2f"),
            ("spearman_high", "95 % to", ".2f"),
            ("kendall", "Kendall τ", ".2f"),
            ("flips", "Pairs that change order", ".0%"),
        ),
    )
    cells = base.mark_rect(cornerRadius=3, stroke="#7F889655", strokeWidth=1).encode(
        color=alt.Color(
            "spearman:Q",
            scale=alt.Scale(scheme=theme.SCORES, domain=[-0.2, 1], clamp=True),
            legend=None,
        )
    )
    words = base.transform_calculate(
        label="isValid(datum.spearman) ? format(datum.spearman, '.2f') + '  (n ' + datum.n + ')' : 'too few (n ' + "
        "datum.n + ')'"
    ).mark_text(fontSize=12)
    known = "isValid(datum.spearman)"
    ink = (
        alt.when(f"{known} && datum.spearman > 0.45")
        .then(alt.value(theme.DARK_INK))
        .when(known)
        .then(alt.value(theme.LIGHT_INK))
        .otherwise(alt.value(theme.MUTED))
    )
    return alt.layer(cells, words.encode(text="label:N", color=ink)).properties(height=height(30 * len(names)))


def rank_moves(frame: pd.DataFrame, low: int, high: int) -> Chart:
    """Ranks at two rungs joined by a line: crossings are the flips. `frame`: see frames.fidelity.rank_moves."""
    kinds, colours = ["steady", "up", "down"], [theme.MUTED, "#009E73", "#D55E00"]
    last = int(frame["rank"].max()) if len(frame) else 1
    base = alt.Chart(frame).encode(
        x=alt.X(
            "budget:O",
            title="Rung (examples)",
            axis=alt.Axis(labelAngle=0),
            scale=alt.Scale(domain=[low, high], padding=0.35),
        ),
        y=alt.Y(
            "rank:Q",
            title="Rank (1 is best)",
            scale=alt.Scale(domain=[0.3, last + 0.7], reverse=True, nice=False),
            axis=alt.Axis(tickMinStep=1, grid=False),
        ),
        detail="config_id:N",
        tooltip=tooltips(
            ("config_id", "Plan"), ("budget", "Examples"), ("rank", "Rank", "d"), ("moved", "Places gained", "+d")
        ),
    )
    legend = alt.Legend(title="At the higher rung", orient="top")
    colour = alt.Color("kind:N", scale=alt.Scale(domain=kinds, range=colours), legend=legend)
    dash = alt.StrokeDash("kind:N", scale=alt.Scale(domain=kinds, range=[[1, 0], [1, 0], [5, 3]]), legend=legend)
    lines = base.mark_line(strokeWidth=2, opacity=0.85).encode(color=colour, strokeDash=dash)
    dots = base.mark_circle(size=60, opacity=1).encode(color=colour)
    names = (
        base.transform_filter(f"datum.budget == {high:d}")
        .mark_text(align="left", dx=9, fontSize=11, color=theme.MUTED)
        .encode(text=alt.Text("config_id:N"))
    )
    return alt.layer(lines, dots, names).properties(height=height(max(150, 16 * last), legend=True))
