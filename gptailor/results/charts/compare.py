"""Charts of the Compare page that no other page has."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd

from gptailor.results.charts import theme
from gptailor.results.charts.common import Chart, height, row_axis, tooltips


def overlap(frame: pd.DataFrame, runs: Sequence[str]) -> Chart:
    """Jaccard overlap of the removed layers of the runs' best plans. `frame`: frames.compare.removed_overlap."""
    rows = row_axis(180)
    across = alt.Axis(
        title=None,
        labelLimit=150,
        labelAngle=0 if len(runs) <= 3 else -20,
        labelOverlap=False,
        labelFlush=False,
        ticks=False,
        domain=False,
    )
    base = alt.Chart(frame).encode(
        x=alt.X("one:N", sort=list(runs), axis=across),
        y=alt.Y("other:N", sort=list(runs), axis=rows),
        tooltip=tooltips(
            ("one", "Run"),
            ("other", "Run"),
            ("jaccard", "Jaccard overlap", ".2f"),
            ("both", "Removed by both"),
            ("either", "Removed by either", "d"),
        ),
    )
    cells = base.mark_rect(cornerRadius=3, stroke="#7F889655").encode(
        color=alt.Color("jaccard:Q", scale=alt.Scale(scheme=theme.SHARES, domain=[0, 1]), legend=None)
    )
    known = "isValid(datum.jaccard)"
    ink = (
        alt.when(f"{known} && datum.jaccard > 0.55")
        .then(alt.value(theme.DARK_INK))
        .when(known)
        .then(alt.value(theme.LIGHT_INK))
        .otherwise(alt.value(theme.MUTED))
    )
    words = base.transform_calculate(label="isValid(datum.jaccard) ? format(datum.jaccard, '.2f') : '–'").mark_text(
        fontSize=13
    )
    return alt.layer(cells, words.encode(text="label:N", color=ink)).properties(height=height(44 * len(runs)) + 20)
