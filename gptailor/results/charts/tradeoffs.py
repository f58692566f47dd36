"""Charts of the Trade-offs page; Compare draws the fronts of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import altair as alt
import pandas as pd

from gptailor.results.charts import theme
from gptailor.results.charts.common import Chart, format_of, height, row_axis, rung_scale, tight, tooltips, value_axis
from gptailor.results.charts.progress import run_colour, run_dash, run_legend
from gptailor.results.frames.tradeoffs import Axis

SELECTION = "plan"
"""Name of the click selection; its field is config_id."""


def _side(axis: Axis) -> str:
    return f"{axis.label} ({'higher' if axis.maximise else 'lower'} is better)"


def _scaled(axis: Axis, kind: type[alt.X] | type[alt.Y], field: str) -> alt.X | alt.Y:
    form = (
        alt.Axis(title=_side(axis), format="~s")
        if axis.column == "parameters"
        else value_axis(_side(axis), axis.percent)
    )
    return kind(f"{field}:Q", axis=form, scale=tight())


def _step(x: Axis) -> Literal["step-before", "step-after"]:
    """The front as steps through what was attained: at each place across, the best plan that is there or better."""
    return "step-before" if x.maximise else "step-after"


def front(frame: pd.DataFrame, x: Axis, y: Axis, selected: int | None) -> Chart:
    """Plans as points; click one to choose it.

    The front is strong and joined by steps, dominated plans are faint, the knee is a diamond, the chosen plan has a
    ring. Bars are one standard error. `frame`: see frames.tradeoffs.front.
    """
    click = alt.selection_point(name=SELECTION, fields=["config_id"], on="click", clear="dblclick")
    frame = frame.assign(chosen=frame["config_id"] == selected, mark=frame["knee"].map({True: "knee", False: "plan"}))
    base = alt.Chart(frame)
    px, py = _scaled(x, alt.X, "x"), _scaled(y, alt.Y, "y")
    faint = alt.condition("datum.on_front", alt.value(0.55), alt.value(0.12))
    bars_x = base.mark_rule(color=theme.MAIN).encode(x=alt.X("x_low:Q"), x2="x_high:Q", y=py, opacity=faint)
    bars_y = base.mark_rule(color=theme.MAIN).encode(x=px, y=alt.Y("y_low:Q"), y2="y_high:Q", opacity=faint)
    line = (
        base.transform_filter("datum.on_front")
        .mark_line(
            interpolate=_step(x),
            strokeDash=[4, 3],
            color=theme.MAIN,
            opacity=0.7,
        )
        .encode(x=px, y=py, order="x:Q")
    )
    points = (
        base.mark_point(filled=True, cursor="pointer")
        .encode(
            x=px,
            y=py,
            size=alt.when("datum.knee")
            .then(alt.value(170))
            .when("datum.on_front")
            .then(alt.value(95))
            .otherwise(alt.value(55)),
            shape=alt.Shape(
                "mark:N", scale=alt.Scale(domain=["plan", "knee"], range=["circle", "diamond"]), legend=None
            ),
            color=alt.condition("datum.on_front", alt.value(theme.MAIN), alt.value(theme.MUTED)),
            opacity=alt.condition("datum.on_front", alt.value(1), alt.value(0.5)),
            tooltip=tooltips(
                ("config_id", "Plan"),
                ("x", x.label, _number(x)),
                ("y", y.label, _number(y)),
                ("mark", "Mark"),
                ("on_front", "On the front"),
            ),
        )
        .add_params(click)
    )
    ring = (
        base.transform_filter("datum.chosen")
        .mark_point(filled=False, size=330, strokeWidth=3, color=theme.ACCENT, opacity=1)
        .encode(x=px, y=py)
    )
    return alt.layer(bars_x, bars_y, line, points, ring).properties(height=440)


def _number(axis: Axis) -> str:
    return {"parameters": ".4s", "kept_layers": "d", "latency": ".3g"}.get(axis.column, format_of(axis.percent))


def fronts_of_runs(frame: pd.DataFrame, x: Axis, y: Axis, runs: Sequence[str]) -> Chart:
    """`frame`: run, and what frames.tradeoffs.front gives. Runs differ in colour, shape and dash."""
    base = alt.Chart(frame)
    px, py = _scaled(x, alt.X, "x"), _scaled(y, alt.Y, "y")
    colour, dash = run_colour(runs), run_dash(runs)
    shape = alt.Shape(
        "run:N", scale=alt.Scale(domain=list(runs), range=list(theme.RUN_SHAPES[: len(runs)])), legend=run_legend()
    )
    rest = (
        base.transform_filter("!datum.on_front")
        .mark_point(filled=True, size=35, opacity=0.35)
        .encode(x=px, y=py, color=colour, shape=shape)
    )
    on_front = base.transform_filter("datum.on_front")
    line = on_front.mark_line(interpolate=_step(x), strokeWidth=1.5).encode(
        x=px, y=py, order="x:Q", color=colour, strokeDash=dash
    )
    best = on_front.mark_point(filled=True, size=90, opacity=1).encode(
        x=px,
        y=py,
        color=colour,
        shape=shape,
        tooltip=tooltips(("run", "Run"), ("config_id", "Plan"), ("x", x.label, _number(x)), ("y", y.label, _number(y))),
    )
    return alt.layer(rest, line, best).properties(height=400)


def parallel(frame: pd.DataFrame, ends: pd.DataFrame, title: str, percent: bool) -> Chart:
    """One line a plan over all objectives, each scaled from its worst to its best.

    Coloured by the average, the chosen plan on top.
    """
    order = ends.sort_values("order")["objective"].tolist()
    x = alt.X(
        "objective:N",
        sort=order,
        title=None,
        axis=alt.Axis(
            labelAngle=0 if len(order) <= 6 else -35,
            labelOverlap=False,
            labelLimit=240 if len(order) <= 4 else 130,
            grid=True,
            domain=False,
        ),
        scale=alt.Scale(padding=0.3),
    )
    y = alt.Y(
        "position:Q",
        title="Worst to best of these plans",
        axis=alt.Axis(labels=False, ticks=False, grid=False),
        scale=alt.Scale(domain=[-0.12, 1.12], nice=False),
    )
    base = alt.Chart(frame).encode(
        x=x,
        y=y,
        detail="config_id:N",
        tooltip=tooltips(
            ("config_id", "Plan"),
            ("objective", "Objective"),
            ("score", "Score", ".4f"),
            ("average", title, format_of(percent)),
        ),
    )
    colour = alt.Color(
        "average:Q",
        scale=alt.Scale(scheme=alt.SchemeParams(theme.SCORES, extent=[0.25, 0.85])),
        legend=alt.Legend(title=title, format="~%" if percent else "~g", gradientLength=140),
    )
    lines = (
        base.transform_filter("!datum.selected")
        .mark_line(strokeWidth=1.6)
        .encode(color=colour, opacity=alt.condition("datum.on_front", alt.value(0.95), alt.value(0.4)))
    )
    chosen = base.transform_filter("datum.selected").mark_line(
        strokeWidth=4, color=theme.ACCENT, point=alt.OverlayMarkDef(size=60, color=theme.ACCENT, filled=True)
    )
    tips = alt.Chart(ends).mark_text(fontSize=11, color=theme.MUTED).encode(x=x)
    top = tips.transform_calculate(at="1.08").encode(y="at:Q", text="best:N")
    bottom = tips.transform_calculate(at="-0.08").encode(y="at:Q", text="worst:N")
    return alt.layer(lines, chosen, top, bottom).properties(height=320)


def scores_at_rungs(frame: pd.DataFrame, rungs: Sequence[int], retention: bool) -> Chart:
    """A plan's objectives, each with its score at every rung it reached (colour and shape).

    Bars are one standard error.
    """
    field, title = ("retention", "Retention of the dense model's score (%)") if retention else ("score", "Score")
    spread = (frame["error"] * (frame[field] / frame["score"]).abs()) if retention else frame["error"]
    frame = frame.assign(value=frame[field], low=frame[field] - spread, high=frame[field] + spread)
    names = list(dict.fromkeys(frame["objective"]))
    reached = sorted(set(frame["budget"]))
    legend = alt.Legend(title="Rung (examples)", orient="top")
    shapes = alt.Scale(
        domain=list(rungs), range=[theme.RUN_SHAPES[i % len(theme.RUN_SHAPES)] for i in range(len(rungs))]
    )
    base = alt.Chart(frame).encode(
        y=alt.Y("objective:N", sort=names, axis=row_axis()),
        yOffset=alt.YOffset("budget:N", sort=reached),
        color=alt.Color("budget:N", scale=rung_scale(rungs), legend=legend),
        tooltip=tooltips(
            ("objective", "Objective"),
            ("budget", "Examples"),
            ("score", "Score", ".4f"),
            ("error", "± (standard error)", ".4f"),
            ("retention", "Retention", ".1%"),
        ),
    )
    bars = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("low:Q", axis=value_axis(title, retention), scale=tight()), x2="high:Q"
    )
    dots = base.mark_point(filled=True, size=80, opacity=1).encode(
        x="value:Q", shape=alt.Shape("budget:N", scale=shapes, legend=legend)
    )
    return alt.layer(bars, dots).properties(height=height(max(14 * len(reached) + 12, 34) * len(names), legend=True))
