"""What several charts share: how a quantity is formatted, and the scales of sources and statuses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd
import pyarrow as pa
from altair.utils import schemapi

from gptailor.results.charts import theme
from gptailor.wording import plain

Chart = alt.Chart | alt.LayerChart | alt.HConcatChart | alt.VConcatChart | alt.ConcatChart | alt.FacetChart
"""What a drawing step gives back, whichever of Altair's kinds it is."""
# Altair checks every part of a chart while it is put together, half of a page's time; the tests check all charts.
schemapi.disable_debug_mode()
alt.theme.enable("none")  # Streamlit's theme is the browser's, export.py's the pictures'
alt.data_transformers.disable_max_rows()  # frames are bounded by what a person can look at
PERCENT, NUMBER = ".1%", ".3f"
LEGEND_COLUMNS = 6
_AXIS, _LEGEND = 62, 58
"""Pixels below a plot for an axis with a title, and above it for a legend: Streamlit's height is the whole
picture's."""


@dataclass(frozen=True, eq=False)
class Drawing:
    """A chart as it goes to browsers: Vega-Lite with its data as Arrow tables.

    Whoever looks at the same may share it.
    """

    chart: Chart
    spec: dict[str, Any]


def draw(chart: Chart) -> Drawing:
    spec = chart.to_dict(validate=False)
    data = spec.get("datasets", {})
    tables = {name: pa.Table.from_pandas(pd.DataFrame(rows), preserve_index=False) for name, rows in data.items()}
    return Drawing(chart, {**spec, "datasets": tables})


def height(plot: float, axis: bool = True, legend: bool = False) -> float:
    """Height of a picture whose plot is `plot` pixels high."""
    return plot + _AXIS * axis + _LEGEND * legend


def format_of(percent: bool) -> str:
    return PERCENT if percent else NUMBER


def value_axis(title: str, percent: bool, **options: Any) -> alt.Axis:
    """An axis of scores (their own unit) or of shares (percent)."""
    # labels stay below their ticks: pushed inwards, the outer ones touch the next
    return alt.Axis(title=title, format=".3~%" if percent else ".4~g", labelFlush=False, **options)


def tight() -> alt.Scale:
    """Scores rarely start at 0, and their differences are what is looked at."""
    return alt.Scale(zero=False, nice=True, padding=8)


def tooltips(*fields: tuple[str, str] | tuple[str, str, str]) -> list[alt.Tooltip]:
    """(field, title[, format]): quantitative where a format is given, text otherwise."""
    return [
        alt.Tooltip(field=f[0], title=f[1], type="quantitative", format=f[2])
        if len(f) == 3
        else alt.Tooltip(field=f[0], title=f[1], type="nominal")
        for f in fields
    ]


def source_scale(
    candidates: Sequence[str], present: Iterable[str] | None = None, removed: str = theme.REMOVED_COLOUR
) -> alt.Scale:
    """Colours of sources, always the same for the same family; only those present where that is told."""
    colours = theme.source_colours(candidates) | {theme.REMOVED: removed}
    here = [name for name in colours if present is None or name in set(present)]
    return alt.Scale(domain=here, range=[colours[name] for name in here])


def source_legend(candidates: Sequence[str]) -> alt.Legend:
    """Names with the codes that stand in the cells: `math (M)`."""
    codes = {**theme.source_codes(candidates), theme.MERGED: "several letters"}
    words = "; ".join(
        f"datum.label == {_quoted(name)} ? {_quoted(f'{plain(name, 24)} ({codes[name]})')}" for name in codes
    )
    expression = words.replace("; ", " : ") + " : datum.label"
    return alt.Legend(
        title=None, orient="top", labelExpr=expression, symbolType="square", symbolStrokeWidth=0, columns=LEGEND_COLUMNS
    )


def _quoted(text: str) -> str:
    """A string literal of Vega's expression language.

    Candidate names are checked when a run file is read, but runs are shared.
    """
    escaped = "".join(c if c.isalnum() or c in " _.-()+,·×" else f"\\u{ord(c):04x}" for c in text if ord(c) < 0x10000)
    return f"'{escaped}'"


def rung_scale(rungs: Sequence[int]) -> alt.Scale:
    colours = theme.rung_colours(rungs)
    return alt.Scale(domain=list(colours), range=list(colours.values()))


def layer_axis(title: str = "Layer of the base") -> alt.Axis:
    """Every layer is a column; labels thin out by themselves where there is no room."""
    return alt.Axis(
        title=title, labelAngle=0, labelOverlap="greedy", labelFlush=False, ticks=False, domain=False, grid=False
    )


def row_axis(limit: int = 200, **options: Any) -> alt.Axis:
    """Names of rows, every one of them."""
    return alt.Axis(
        title=None, labelLimit=limit, labelOverlap=False, labelFlush=False, ticks=False, domain=False, **options
    )
