"""Charts of the Progress page; Compare draws the first two for several runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from gptailor.results.charts import theme
from gptailor.results.charts.common import NUMBER, Chart, format_of, height, row_axis, tight, tooltips, value_axis

TRIALS, HOURS = "trials", "hours"
CLOCKS = ((0.05, 3600, "Seconds since the start (s)"), (1.5, 60, "Minutes since the start (min)"))
"""Runs of fewer hours than these are read in units of which an hour has so many."""
STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30)
"""Seconds or minutes from tick to tick: round ones, which hours divided by ten are not."""
MOST_TICKS = 8


def _time(frame: pd.DataFrame, by: str) -> alt.X:
    if by != TRIALS:
        return alt.X(field=by, type="quantitative", **_clock(frame[by]))
    axis = alt.Axis(title="Trials ended", tickMinStep=1)
    return alt.X(field=by, type="quantitative", scale=alt.Scale(zero=True), axis=axis)


def _clock(hours: pd.Series) -> dict[str, Any]:
    """Axis and scale of hours since the start, with ticks at round minutes or seconds where the run is short."""
    most = hours.max()
    for limit, units, title in CLOCKS:
        if most < limit:
            step = next(step for step in STEPS if units * most <= MOST_TICKS * step)
            n = max(math.ceil(units * most / step), 1)
            axis = alt.Axis(
                title=title,
                labelExpr=f"format({units} * datum.value, '~r')",
                values=[place * step / units for place in range(n + 1)],
            )
            return {"axis": axis, "scale": alt.Scale(domain=[0, n * step / units], nice=False)}
    return {"axis": alt.Axis(title="Hours since the start (h)"), "scale": alt.Scale(zero=True)}


def best_so_far(frame: pd.DataFrame, by: str, title: str, percent: bool) -> Chart:
    """Every judged plan as a faint point, the best so far as a step. `frame`: see frames.progress.best_so_far."""
    shown = format_of(percent)
    x = _time(frame, by)
    base = alt.Chart(frame)
    points = base.mark_circle(size=36, opacity=0.6, color=theme.MUTED).encode(
        x=x,
        y=alt.Y("average:Q", axis=value_axis(title, percent), scale=tight()),
        tooltip=tooltips(
            ("config_id", "Plan"),
            ("average", title, shown),
            ("error", "± (standard error)", shown),
            ("trials", "Trials", "d"),
            ("hours", "Hours", ".2f"),
        ),
    )
    line = base.mark_line(interpolate="step-after", strokeWidth=2.5, color=theme.MAIN).encode(x=x, y="best:Q")
    peaks = (
        base.transform_filter("datum.is_best")
        .mark_point(size=70, filled=True, shape="diamond", opacity=1, color=theme.MAIN)
        .encode(
            x=x,
            y="best:Q",
            tooltip=tooltips(
                ("config_id", "New best: plan"), ("best", title, shown), ("error", "± (standard error)", shown)
            ),
        )
    )
    return alt.layer(points, line, peaks).properties(height=280)


def hypervolume_so_far(frame: pd.DataFrame, by: str) -> Chart:
    x = _time(frame, by)
    base = alt.Chart(frame).encode(
        x=x,
        y=alt.Y("hypervolume:Q", axis=value_axis("Hypervolume (product of scores)", False), scale=tight()),
        tooltip=tooltips(("hypervolume", "Hypervolume", ".4f"), ("trials", "Trials", "d"), ("hours", "Hours", ".2f")),
    )
    line = base.mark_line(interpolate="step-after", strokeWidth=2.5, color=theme.MAIN)
    return alt.layer(line, base.mark_circle(size=18, opacity=0.6, color=theme.MAIN)).properties(height=280)


def timeline(frame: pd.DataFrame, rungs: Sequence[int]) -> Chart:
    """One lane a rung, one bar a trial.

    Crashed trials also carry a cross, cancelled ones a square, running ones an arrow.
    """
    return _lanes(frame, "budget:O", list(reversed(rungs)), "datum.label + ' examples'")


def worker_lanes(frame: pd.DataFrame) -> Chart:
    """The same with one lane a worker; time between the bars is time that it waited."""
    return _lanes(frame, "worker:N", sorted(set(frame["worker"])), "datum.label")


def _lanes(frame: pd.DataFrame, by: str, lanes: list[Any], label: str) -> Chart:
    present = [status for status in theme.STATUS_COLOURS if status in set(frame["status"])]
    legend = alt.Legend(title=None, orient="top")
    colour = alt.Color(
        "status:N", scale=alt.Scale(domain=present, range=[theme.STATUS_COLOURS[s] for s in present]), legend=legend
    )
    shape = alt.Shape(
        "status:N", scale=alt.Scale(domain=present, range=[theme.STATUS_SHAPES[s] for s in present]), legend=legend
    )
    base = alt.Chart(frame).encode(
        y=alt.Y(
            by,
            sort=lanes,
            scale=alt.Scale(domain=lanes),
            axis=row_axis(grid=True, labelExpr=label),
        ),
        color=colour,
        tooltip=tooltips(
            ("trial_id", "Trial"),
            ("config_id", "Plan"),
            ("status", "Status"),
            ("budget", "Examples"),
            ("seconds", "Seconds", ".1f"),
        ),
    )
    bars = base.mark_bar(height=alt.RelativeBandSize(0.7), minBandSize=1, cornerRadius=1).encode(
        x=alt.X("start_hours:Q", **_clock(frame["end_hours"])), x2="end_hours:Q"
    )
    marked = base.transform_filter("datum.status != 'success'").mark_point(size=60, filled=True, opacity=1)
    signs = marked.encode(x="end_hours:Q", shape=shape)
    return alt.layer(bars, signs).properties(height=height(44 * len(lanes), legend=True))


def seconds(frame: pd.DataFrame) -> Chart:
    """A bar a part of the work, with its share of all seconds. `frame`: see frames.seconds."""
    parts = list(frame["part"])
    base = alt.Chart(frame).encode(
        y=alt.Y("part:N", sort=parts, axis=row_axis()),
        x=alt.X("share:Q", axis=value_axis("Share of the run's time", True)),
        tooltip=tooltips(("part", "Part"), ("seconds", "Seconds", ".1f"), ("share", "Share", ".1%")),
    )
    bars = base.mark_bar(height=alt.RelativeBandSize(0.7), color=theme.MAIN)
    labels = base.mark_text(align="left", dx=4, color=theme.MUTED).encode(text=alt.Text("share:Q", format=".0%"))
    return alt.layer(bars, labels).properties(height=height(24 * len(parts)))


def best_of_runs(frame: pd.DataFrame, by: str, title: str, percent: bool, runs: Sequence[str]) -> Chart:
    """`frame`: run, and what best_so_far gives. Runs differ in colour and in dash."""
    return (
        alt.Chart(frame)
        .mark_line(interpolate="step-after", strokeWidth=2.5, point=alt.OverlayMarkDef(size=22, filled=True))
        .encode(
            x=_time(frame, by),
            y=alt.Y("best:Q", axis=value_axis(title, percent), scale=tight()),
            color=run_colour(runs),
            strokeDash=run_dash(runs),
            tooltip=tooltips(
                ("run", "Run"),
                ("config_id", "Plan"),
                ("best", f"Best so far: {title}", NUMBER if not percent else ".1%"),
                ("trials", "Trials", "d"),
                ("hours", "Hours", ".2f"),
            ),
        )
        .properties(height=300)
    )


def run_colour(runs: Sequence[str]) -> alt.Color:
    scale = alt.Scale(domain=list(runs), range=list(theme.RUN_COLOURS[: len(runs)]))
    return alt.Color("run:N", scale=scale, legend=run_legend())


def run_dash(runs: Sequence[str]) -> alt.StrokeDash:
    scale = alt.Scale(domain=list(runs), range=[list(dash) for dash in theme.RUN_DASHES[: len(runs)]])
    return alt.StrokeDash("run:N", scale=scale, legend=run_legend())


def run_legend() -> alt.Legend:
    """The same for colour, dash and shape, so that Vega makes one legend of them."""
    return alt.Legend(title=None, orient="top", labelLimit=260, columns=3, symbolOpacity=1)
