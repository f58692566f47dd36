"""Charts of a family's redundancy: models by layers, two candidates by layers, and states by states."""

from __future__ import annotations

from typing import Literal

import altair as alt
import pandas as pd

from gptailor.results.charts import theme
from gptailor.results.charts.common import Chart, height, layer_axis, row_axis, tooltips
from gptailor.results.charts.layers import GRADIENT, ROW, by_layer

MOST_COST, MOST_INFLUENCE = 0.3, 0.2
"""Where the colours end: what lies above is as bad."""
MOST_COSINE = 0.5
COST = "Cost of leaving it out (percent of what the objectives give)"
_SQUARE = 360
"""Pixels of a side of a chart of states by states."""


def costs(frame: pd.DataFrame) -> Chart:
    """Models x layers: percent of the objectives that leaving out one layer costs; a frame marks layers that are cheap.

    `frame`: frames.redundancy.by_layer, with `kept` known.
    """
    frame = frame.dropna(subset=["kept"])
    frame = frame.assign(name=frame["model"], drawn=(1 - frame["kept"]).clip(lower=0))
    hover = tooltips(
        ("model", "Model"),
        ("layer", "Layer"),
        ("kept", "Kept without it", ".1%"),
        ("kept ±", "± (standard error)", ".1%"),
        ("cheap", "Looks cheap"),
    )
    return by_layer(
        frame,
        _names(frame),
        COST,
        MOST_COST,
        -1,
        hover,
        framed="cheap",
    )


def influence(frame: pd.DataFrame) -> Chart:
    """Models x layers: Block Influence, in percent. `frame`: frames.redundancy.by_layer."""
    hover = tooltips(("model", "Model"), ("layer", "Layer"), ("influence", "Block Influence", ".4f"))
    frame = frame.assign(name=frame["model"], drawn=frame["influence"])
    return by_layer(frame, _names(frame), "Block Influence (percent)", MOST_INFLUENCE, -1, hover)


def blocks(frame: pd.DataFrame) -> Chart:
    """Models x the block's first layer: how far the block turns the stream. `frame`: frames.redundancy.blocks."""
    hover = tooltips(("model", "Model"), ("layer", "First layer of the block"), ("angular", "Angular distance", ".4f"))
    frame = frame.assign(name=frame["model"], drawn=frame["angular"])
    top, across = float(frame["angular"].max()), "First layer of the block"
    return by_layer(frame, _names(frame), "Angular distance (percent of half a turn)", top, -1, hover, across=across)


def distances(frame: pd.DataFrame) -> Chart:
    """Candidates x layers: distance from the base's layer, in percent of its norm. `frame`: redundancy.by_layer."""
    frame = frame.dropna(subset=["distance"])
    hover = tooltips(("model", "Candidate"), ("layer", "Layer"), ("distance", "Distance, of the base's norm", ".2%"))
    frame = frame.assign(name=frame["model"], drawn=frame["distance"])
    top = max(float(frame["distance"].max()), 1e-3)
    return by_layer(frame, _names(frame), "Distance from the base's layer (percent of its norm)", top, 0, hover)


def agreement(frame: pd.DataFrame) -> Chart:
    """Pairs of candidates x layers: the cosine of their differences, times 100: blue agrees, orange conflicts.

    `frame`: frames.redundancy.agreement.
    """
    rows = list(dict.fromkeys(frame["pair"]))
    base = alt.Chart(frame).encode(
        x=alt.X("layer:O", axis=layer_axis(), scale=alt.Scale(domain=list(range(int(frame["layer"].max()) + 1)))),
        y=alt.Y("pair:N", sort=rows, axis=row_axis(260), scale=alt.Scale(domain=rows)),
        tooltip=tooltips(
            ("pair", "Candidates"), ("layer", "Layer"), ("cosine", "Cosine", ".3f"), ("relation", "They are")
        ),
    )
    colour = alt.Color(
        "cosine:Q",
        scale=alt.Scale(scheme=theme.SIGNED, reverse=True, domain=[-MOST_COSINE, MOST_COSINE], clamp=True),
        legend=alt.Legend(
            title="Cosine (times 100), conflict to agreement",
            format=".1f",
            orient="top",
            gradientLength=180,
            titleLimit=360,
        ),
    )
    far = f"abs(datum.cosine) > {0.7 * MOST_COSINE:g}"
    ink = alt.condition(far, alt.value(theme.LIGHT_INK), alt.value(theme.DARK_INK))
    words = base.transform_calculate(label="round(100 * datum.cosine)").mark_text(fontSize=10)
    cells = base.mark_rect(cornerRadius=2).encode(color=colour)
    layers = alt.layer(cells, words.encode(text="label:N", color=ink))
    return layers.properties(height=height(ROW * len(rows)) + GRADIENT)


def similarity(frame: pd.DataFrame, measure: Literal["cosine", "cka"]) -> Chart:
    """States x states of one model; a bright square along the diagonal is a stretch of layers that change little.

    `frame`: frames.redundancy.similarity.
    """
    n = int(frame["row"].max())
    title = {"cosine": "Cosine", "cka": "Linear CKA"}[measure]
    axis = layer_axis("What enters this layer")
    low = float(frame["similarity"].min())
    order = [*map(str, range(n)), "end"]
    chart = alt.Chart(frame.assign(**{side: frame[side].map(dict(enumerate(order))) for side in ("row", "column")}))
    colour = alt.Color(
        "similarity:Q",
        scale=alt.Scale(scheme=theme.SCORES, domain=[min(max(low, 0.0), 0.9), 1.0], clamp=True),
        legend=alt.Legend(title=title, format=".2f", orient="top", gradientLength=180),
    )
    cells = chart.mark_rect().encode(
        x=alt.X("column:N", sort=order, axis=axis),
        y=alt.Y("row:N", sort=order, axis=layer_axis("What enters this layer")),
        color=colour,
        tooltip=tooltips(("row", "State"), ("column", "State"), ("similarity", title, ".3f")),
    )
    return cells.properties(height=height(_SQUARE) + GRADIENT)


def _names(frame: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(frame["model"]))
