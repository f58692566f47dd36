"""Charts of layers: where each one comes from. Every cell carries a code, so that colour is never needed to read it."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd

from gptailor.dashboard import theme
from gptailor.dashboard.charts.common import (
    Chart,
    format_of,
    height,
    layer_axis,
    row_axis,
    source_legend,
    source_scale,
    tooltips,
    value_axis,
)
from gptailor.dashboard.frames.facts import Facts
from gptailor.plan import BASE

ROW = 24
"""Pixels of a heatmap's row."""
_CELL = (
    ("plan", "Plan"), ("layer", "Layer of the base"), ("position", "Position in the new model"), ("made_of", "Made of"),
    ("factor", "Merge factor", ".2f"), ("output_scale", "Output scale", ".2f"),
)  # fmt: skip


def origins(grid: pd.DataFrame, facts: Facts) -> Chart:
    """The layer-origin heatmap: a row a plan (best on top), a column a layer of the base. `grid`: frames.layers.origin_grid."""
    rows = list(dict.fromkeys(grid["plan"]))
    base = alt.Chart(grid).encode(
        x=alt.X("layer:O", axis=layer_axis()),
        y=alt.Y("plan:N", sort=rows, axis=row_axis(grid=False)),
        tooltip=tooltips(*_CELL),
    )
    cells = base.transform_filter("datum.source != 'removed'").mark_rect(
        cornerRadius=2, stroke="#00000000", strokeWidth=2
    )
    colour = alt.Color("source:N", scale=source_scale(facts.candidates), legend=source_legend(facts.candidates))
    holes = base.transform_filter("datum.source == 'removed'").mark_rect(
        fillOpacity=0.14,
        fill=theme.REMOVED_COLOUR,
        stroke=theme.REMOVED_COLOUR,
        strokeOpacity=0.35,
        strokeDash=[2, 2],
        cornerRadius=2,
    )
    kept = base.transform_filter("datum.source != 'removed'").mark_text(fontSize=10, baseline="middle")
    gone = base.transform_filter("datum.source == 'removed'").mark_text(
        fontSize=13, color=theme.MUTED, baseline="middle"
    )
    ink = alt.Color("ink:N", scale=None, legend=None)
    layers = alt.layer(
        cells.encode(color=colour), holes, kept.encode(text="code:N", color=ink), gone.encode(text="code:N")
    ).resolve_scale(color="independent")
    return layers.properties(height=height(ROW * len(rows), legend=True))


def strip(one: pd.DataFrame, facts: Facts) -> Chart:
    """One plan as a single row. `one`: frames.layers.strip."""
    colours = theme.source_colours(facts.candidates)
    ink = one["source"].map({name: theme.ink_on(colour) for name, colour in colours.items()})
    return origins(one.assign(plan="", ink=ink), facts).properties(height=height(34, legend=True))


def lanes(frame: pd.DataFrame, facts: Facts) -> Chart:
    """One plan as a grid of sources and layers, with the factors of merges. `frame`: frames.layers.strip_sources."""
    order = [BASE, *facts.candidates, theme.REMOVED]
    colours = theme.source_colours(facts.candidates)
    frame = frame.assign(
        ink=frame["lane"].map({n: theme.ink_on(c) for n, c in colours.items()} | {theme.REMOVED: theme.MUTED})
    )
    base = alt.Chart(frame).encode(
        x=alt.X("layer:O", axis=layer_axis(), scale=alt.Scale(domain=list(range(facts.n_layers)))),
        y=alt.Y("lane:N", sort=order, scale=alt.Scale(domain=order), axis=row_axis(160, grid=True)),
        tooltip=tooltips(*_CELL[1:]),
    )
    kept = base.transform_filter("datum.lane != 'removed'").mark_rect(cornerRadius=2)
    colour = alt.Color("lane:N", scale=source_scale(facts.candidates), legend=None)
    words = base.mark_text(fontSize=10).encode(text="text:N", color=alt.Color("ink:N", scale=None))
    return (
        alt.layer(kept.encode(color=colour), words)
        .resolve_scale(color="independent")
        .properties(height=height(ROW * len(order)))
    )


def frequencies(frame: pd.DataFrame, facts: Facts) -> Chart:
    """How often each layer is removed, kept, or taken from each source, as colour and as percent. `frame`: frames.layers.frequencies."""
    rows = [theme.REMOVED, "kept", BASE, *facts.candidates, theme.MERGED]
    return _layer_heatmap(
        frame, rows, "source", "share", "Share of the plans", "%", [0, 1], "round(100 * datum.share)", "datum.share > 0", 0.55,
        tooltips(("layer", "Layer of the base"), ("source", "Choice"), ("plans", "Plans", "d"), ("of", "Of", "d"), ("share", "Share", ".0%")), theme.SHARES,
    )  # fmt: skip


def importance(frame: pd.DataFrame, order: Sequence[str]) -> Chart:
    """Objectives x layers: how much of the differences in score hangs on each layer's choice. `frame`: Importance.rows."""
    frame = frame.assign(drawn=frame["importance"].clip(lower=0))
    top = max(float(frame["drawn"].max()), 0.01)
    return _layer_heatmap(
        frame, list(order), "objective", "drawn", "Explained variance lost", ".0%", [0, top], "round(100 * datum.drawn)", "datum.drawn >= 0.01", 0.55 * top,
        tooltips(("objective", "Objective"), ("layer", "Layer of the base"), ("importance", "Explained variance lost", ".3f"), ("error", "± (standard error)", ".3f")), theme.SHARES,
    )  # fmt: skip


def _layer_heatmap(
    frame: pd.DataFrame, rows: list[str], row: str, value: str, title: str, form: str, domain: list[float],
    label: str, labelled: str, bright: float, hover: list[alt.Tooltip], scheme: theme.Scheme,
) -> Chart:  # fmt: skip
    base = alt.Chart(frame).encode(
        x=alt.X("layer:O", axis=layer_axis()),
        y=alt.Y(field=row, type="nominal", sort=rows, axis=row_axis()),
        tooltip=hover,
    )
    colour = alt.Color(
        f"{value}:Q",
        scale=alt.Scale(scheme=scheme, domain=domain, clamp=True),
        legend=alt.Legend(title=title, format=form, orient="top", gradientLength=180),
    )
    cells = base.transform_filter(labelled).mark_rect(cornerRadius=2).encode(color=colour)
    ink = alt.condition(f"datum.{value} > {bright:.6g}", alt.value(theme.DARK_INK), alt.value(theme.LIGHT_INK))
    words = base.transform_filter(labelled).transform_calculate(label=label).mark_text(fontSize=10)
    return alt.layer(cells, words.encode(text="label:N", color=ink)).properties(
        height=height(ROW * len(rows), legend=True) + 16
    )


def undo_one(frame: pd.DataFrame, facts: Facts) -> Chart:
    """What each deviation is worth, with its 95 % interval; right of 0 it helps. `frame`: frames.layers.undo_one."""
    percent = facts.average_is_share
    frame = frame.assign(name="Layer " + frame["layer"].astype(str) + ": " + frame["made_of"])
    names, shown = frame["name"].tolist(), format_of(percent)
    base = alt.Chart(frame).encode(
        y=alt.Y("name:N", sort=names, axis=row_axis(260)),
        tooltip=tooltips(
            ("name", "Deviation"), ("worth", "Worth", shown), ("low", "95 % from", shown), ("high", "95 % to", shown),
            ("n_same", "Plans that do the same", "d"), ("n_base", "Plans that keep the base's", "d"),
        ),
    )  # fmt: skip
    title = f"{facts.average_label}: better than keeping the base's layer by" + (" (% points)" if percent else "")
    zero = alt.Chart(pd.DataFrame({"x": [0]})).mark_rule(color=theme.MUTED).encode(x="x:Q")
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", axis=value_axis(title, percent)), x2="high:Q")
    scale = source_scale(facts.candidates, frame["source"])
    dots = base.mark_point(filled=True, size=80, opacity=1).encode(x="worth:Q")
    colour = alt.Color("source:N", scale=scale, legend=None)
    return alt.layer(zero, bars.encode(color=colour), dots.encode(color=colour)).properties(
        height=height(19 * len(names))
    )
