"""Charts of layers: where each one comes from. Every cell carries a code, so that colour is never needed to read it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import altair as alt
import pandas as pd

from gptailor.plan import BASE
from gptailor.results.charts import theme
from gptailor.results.charts.common import (
    LEGEND_COLUMNS,
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
from gptailor.results.frames.facts import Facts

ROW = 24
"""Pixels of a heatmap's row."""
GRADIENT = 100
"""Pixels that a legend of graded colour takes above a plot."""
_FRAME: dict[str, Any] = {"filled": False, "stroke": theme.ACCENT, "strokeWidth": 1.5, "cornerRadius": 2}
_CELL = (
    ("plan", "Plan"),
    ("layer", "Layer of the base"),
    ("position", "Position in the new model"),
    ("made_of", "Made of"),
    ("factor", "Merge factor", ".2f"),
    ("output_scale", "Output scale", ".2f"),
)


_LEFT = (("heads", "Heads left", ".0%"), ("channels", "Channels left", ".0%"), ("weights", "Weights left", ".0%"))


def _cell(frame: pd.DataFrame, first: int = 0) -> list[alt.Tooltip]:
    """What is told of a cell, from its `first` line on, and what edits left of the layer, where they leave any out."""
    left = _LEFT if frame["weights"].notna().any() else ()
    return tooltips(*_CELL[first:], *left, *((("fitted", "Its weights"),) if _has_fitted(frame) else ()))


def _has_fitted(frame: pd.DataFrame) -> bool:
    """Whether weights of some layers were repaired or healed, which View.strip says."""
    return "fitted" in frame and bool(frame["fitted"].ne("").any())


def _framed(base: alt.Chart, frame: pd.DataFrame) -> list[alt.Chart]:
    """Frames around the cells of those layers."""
    return [base.transform_filter("datum.fitted != ''").mark_rect(**_FRAME)] if _has_fitted(frame) else []


def origins(grid: pd.DataFrame, facts: Facts) -> Chart:
    """The layer-origin heatmap: a row a plan (best on top), a column a layer of the base.

    `grid`: frames.layers.origin_grid.
    """
    rows = list(dict.fromkeys(grid["plan"]))
    base = alt.Chart(grid).encode(
        x=alt.X("layer:O", axis=layer_axis()),
        y=alt.Y("plan:N", sort=rows, axis=row_axis(grid=False)),
        tooltip=_cell(grid),
    )
    cells = base.transform_filter("datum.source != 'removed'").mark_rect(
        cornerRadius=2, stroke="#00000000", strokeWidth=2
    )
    scale = source_scale(facts.candidates, removed=theme.HOLE_COLOUR)
    colour = alt.Color("source:N", scale=scale, legend=source_legend(facts.candidates))
    holes = base.transform_filter("datum.source == 'removed'").mark_rect(
        fill=theme.HOLE_COLOUR, stroke=theme.HOLE_EDGE, strokeDash=[2, 2], cornerRadius=2
    )
    kept = base.transform_filter("datum.source != 'removed'").mark_text(fontSize=10, baseline="middle")
    gone = base.transform_filter("datum.source == 'removed'").mark_text(
        fontSize=13, color=theme.MUTED, baseline="middle"
    )
    ink = alt.Color("ink:N", scale=None, legend=None)
    layers = alt.layer(
        cells.encode(color=colour),
        *_framed(base, grid),
        holes,
        kept.encode(text="code:N", color=ink),
        gone.encode(text="code:N"),
    ).resolve_scale(color="independent")
    return layers.properties(height=height(ROW * len(rows), legend=True) + _second_line(facts))


def _second_line(facts: Facts) -> int:
    """Pixels for the legend's further lines."""
    return 20 * ((len(facts.candidates) + 3 - 1) // LEGEND_COLUMNS)


def strip(one: pd.DataFrame, facts: Facts) -> Chart:
    """One plan as a single row. `one`: frames.layers.strip."""
    colours = theme.source_colours(facts.candidates)
    ink = one["source"].map({name: theme.ink_on(colour) for name, colour in colours.items()})
    return origins(one.assign(plan="", ink=ink), facts).properties(height=height(34, legend=True) + _second_line(facts))


def lanes(frame: pd.DataFrame, facts: Facts) -> Chart:
    """One plan as a grid of sources and layers, with the factors of merges. `frame`: frames.layers.strip_sources."""
    order = [BASE, *facts.candidates, theme.REMOVED]
    colours = theme.source_colours(facts.candidates)
    frame = frame.assign(
        ink=frame["lane"].map({n: theme.ink_on(c) for n, c in colours.items()} | {theme.REMOVED: theme.MUTED})
    )
    x = alt.X("layer:O", axis=layer_axis(), scale=alt.Scale(domain=list(range(facts.n_layers))))
    y = alt.Y("lane:N", sort=order, scale=alt.Scale(domain=order), axis=row_axis(160, grid=False))
    board = pd.DataFrame(list(product(order, range(facts.n_layers))), columns=["lane", "layer"])
    squares = alt.Chart(board).mark_rect(fillOpacity=0.09, fill=theme.REMOVED_COLOUR, cornerRadius=2).encode(x=x, y=y)
    base = alt.Chart(frame).encode(x=x, y=y, tooltip=_cell(frame, 1))
    kept = base.transform_filter("datum.lane != 'removed'").mark_rect(cornerRadius=2)
    colour = alt.Color("lane:N", scale=source_scale(facts.candidates), legend=None)
    words = base.mark_text(fontSize=10).encode(text="text:N", color=alt.Color("ink:N", scale=None))
    return (
        alt.layer(squares, kept.encode(color=colour), *_framed(base, frame), words)
        .resolve_scale(color="independent")
        .properties(height=height(ROW * len(order)))
    )


def frequencies(frame: pd.DataFrame, facts: Facts) -> Chart:
    """How often each layer is removed, kept, or taken from each source, as colour and as percent; nothing where never.

    `frame`: frames.layers.frequencies.
    """
    rows = [theme.REMOVED, "kept", BASE, *facts.candidates, theme.MERGED]
    hover = tooltips(
        ("layer", "Layer of the base"),
        ("source", "Choice"),
        ("plans", "Plans", "d"),
        ("of", "Of", "d"),
        ("share", "Share", ".0%"),
    )
    return by_layer(frame.assign(name=frame["source"], drawn=frame["share"]), rows, "Share of the plans", 1.0, 0, hover)


def left_of_layers(frame: pd.DataFrame) -> Chart:
    """Parts x layers: the share of each that is left, in percent. `frame`: frames.layers.left_of_layers."""
    hover = tooltips(("layer", "Layer of the base"), ("part", "Of its"), ("share", "Left", ".1%"))
    frame = frame.assign(name=frame["part"], drawn=frame["share"])
    return by_layer(frame, list(dict.fromkeys(frame["part"])), "Share that is left", 1.0, -1.0, hover)


def importance(frame: pd.DataFrame, order: Sequence[str]) -> Chart:
    """Objectives x layers: how much of the differences in score hangs on each layer's choice, in percent.

    Nothing below 1 %. `frame`: Importance.rows.
    """
    frame = frame.assign(name=frame["objective"], drawn=frame["importance"].clip(lower=0))
    top = max(float(frame["drawn"].max()), 0.01)
    hover = tooltips(
        ("objective", "Objective"),
        ("layer", "Layer of the base"),
        ("importance", "Explained variance lost", ".3f"),
        ("error", "± (standard error)", ".3f"),
    )
    return by_layer(frame, list(order), "Explained variance lost", top, 0.01, hover)


def by_layer(
    frame: pd.DataFrame,
    rows: list[str],
    title: str,
    top: float,
    least: float,
    hover: list[alt.Tooltip],
    framed: str | None = None,
    across: str = "Layer of the base",
) -> Chart:
    """`drawn` (0 to `top`) by `name` and layer, as colour and as percent; cells at or below `least` stay empty.

    Below a top of 5 % with a digit behind the point. framed: a column that says which cells have a frame.
    """
    base = (
        alt.Chart(frame)
        .transform_filter(f"datum.drawn > {least:g}")
        .encode(
            x=alt.X("layer:O", axis=layer_axis(across), scale=alt.Scale(domain=sorted(set(frame["layer"])))),
            y=alt.Y("name:N", sort=rows, axis=row_axis(), scale=alt.Scale(domain=rows)),
            tooltip=hover,
        )
    )
    colour = alt.Color(
        "drawn:Q",
        scale=alt.Scale(scheme=theme.SHARES, domain=[0, top], clamp=True),
        legend=alt.Legend(title=title, format=".2~%", orient="top", gradientLength=180, titleLimit=360),
    )
    ink = alt.condition(f"datum.drawn > {0.55 * top:g}", alt.value(theme.DARK_INK), alt.value(theme.LIGHT_INK))
    fine = 10 if top < 0.05 else 1
    words = base.transform_calculate(label=f"round({100 * fine} * datum.drawn) / {fine}").mark_text(fontSize=10)
    cells = base.mark_rect(cornerRadius=2).encode(color=colour)
    frames = [base.transform_filter(f"datum[{framed!r}]").mark_rect(**_FRAME)] if framed else []
    return alt.layer(cells, *frames, words.encode(text="label:N", color=ink)).properties(
        height=height(ROW * len(rows)) + GRADIENT
    )


def undo_one(frame: pd.DataFrame, facts: Facts) -> Chart:
    """What each deviation is worth, with its 95 % interval; right of 0 it helps. `frame`: frames.layers.undo_one."""
    percent = facts.average_is_share
    frame = frame.assign(name="Layer " + frame["layer"].astype(str) + ": " + frame["made_of"])
    names, shown = frame["name"].tolist(), format_of(percent)
    base = alt.Chart(frame).encode(
        y=alt.Y("name:N", sort=names, axis=row_axis(260)),
        tooltip=tooltips(
            ("name", "Deviation"),
            ("worth", "Worth", shown),
            ("low", "95 % from", shown),
            ("high", "95 % to", shown),
            ("n_same", "Plans that do the same", "d"),
            ("n_base", "Plans that keep the base's", "d"),
        ),
    )
    title = f"{facts.average_label}: better than keeping the base's layer by" + (" (% points)" if percent else "")
    zero = alt.Chart(pd.DataFrame({"x": [0]})).mark_rule(color=theme.MUTED).encode(x="x:Q")
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", axis=value_axis(title, percent)), x2="high:Q")
    scale = source_scale(facts.candidates, frame["source"])
    dots = base.mark_point(filled=True, size=80, opacity=1).encode(x="worth:Q")
    colour = alt.Color("source:N", scale=scale, legend=None)
    return alt.layer(zero, bars.encode(color=colour), dots.encode(color=colour)).properties(
        height=height(19 * len(names))
    )
