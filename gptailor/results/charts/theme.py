"""One theme for every chart: colours that colour-blind readers tell apart and that stand on light and on dark ground.

Colour never speaks alone: sources also have a short code, statuses and runs also have a shape or a dash. Streamlit's
theme paints fonts, axes and grids (they follow the reader's light or dark choice); only what carries meaning is fixed
here. Okabe and Ito's colours name things (https://jfly.uni-koeln.de/color/), cividis and viridis grade numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from gptailor.plan import BASE

BASE_COLOUR = "#A9B1BD"
MERGED_COLOUR = "#CC79A7"
REMOVED_COLOUR = "#6B7480"
HOLE_COLOUR, HOLE_EDGE = REMOVED_COLOUR + "24", REMOVED_COLOUR + "59"
"""Fill and edge of a removed layer's cell: a hole, and the same in the legend."""
MUTED = "#7F8896"
"""Grey for annotations: at least 3.5 : 1 on white and on the dark ground."""
ACCENT = "#E69F00"
"""Marks the plan that the reader chose, everywhere."""
MAIN = "#2A85C0"
"""The one colour of a chart that needs only one."""

CANDIDATE_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#F0E442", "#0072B2")
RUN_COLOURS = ("#2A85C0", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
RUN_DASHES = ((1, 0), (6, 3), (2, 2), (8, 3, 2, 3), (10, 4), (4, 2, 1, 2))
RUN_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")

STATUS_COLOURS = {"success": "#009E73", "running": "#56B4E9", "crashed": "#D55E00", "cancelled": "#8A94A3"}
STATUS_SHAPES = {"success": "circle", "running": "triangle-right", "crashed": "cross", "cancelled": "square"}

MERGED, REMOVED = "merged", "removed"
Scheme = Literal["cividis", "viridis", "blueorange"]
SCORES: Scheme = "cividis"
SHARES: Scheme = "viridis"
SIGNED: Scheme = "blueorange"
"""From a negative to a positive number, with 0 pale between."""

DARK_INK, LIGHT_INK = "#10151B", "#FFFFFF"
_BLUES = ("#B4BFCE", "#97B3D1", "#78A5D3", "#5896D2", "#3A86CE", "#1F77C9")


def source_colours(candidates: Sequence[str]) -> dict[str, str]:
    """Colour of every source label: the base, each candidate in the family's order, merged, removed.

    Candidates beyond the sixth repeat colours; their codes tell them apart.
    """
    lent = {name: CANDIDATE_COLOURS[i % len(CANDIDATE_COLOURS)] for i, name in enumerate(candidates)}
    return {BASE: BASE_COLOUR, **lent, MERGED: MERGED_COLOUR, REMOVED: REMOVED_COLOUR}


def source_codes(candidates: Sequence[str]) -> dict[str, str]:
    """Short code of every source label, unique, at most three characters.

    Written into the cells of strips and heatmaps.
    """
    codes = {BASE: "·", MERGED: "+", REMOVED: "×"}
    taken: set[str] = set()
    for index, name in enumerate(candidates):
        letters = [c for c in name.upper() if c.isalnum()] or ["C"]
        options = [letters[0], *(letters[0] + c.lower() for c in letters[1:]), f"{letters[0]}{index}", f"C{index}"]
        code = next(option for option in options if option not in taken)
        taken.add(code)
        codes[name] = code
    return codes


def rung_colours(rungs: Sequence[int]) -> dict[int, str]:
    """Ordered colours for rungs, the highest the strongest, all of them visible on light and on dark ground."""
    last, step = len(_BLUES) - 1, max(len(rungs) - 1, 1)
    return {rung: _BLUES[round(index * last / step)] for index, rung in enumerate(rungs)}


def ink_on(colour: str) -> str:
    """Text colour that reads on a fill of `colour`: whichever contrasts more (WCAG's relative luminance)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return DARK_INK if luminance > 0.2 else LIGHT_INK


def export_config() -> dict[str, Any]:
    """Vega-Lite config of downloaded pictures: as on a light page, for papers and slides."""
    label = {"labelColor": "#3C4654", "titleColor": "#3C4654", "labelFontSize": 12, "titleFontSize": 12}
    return {
        "background": "#FFFFFF",
        "font": "Helvetica, Arial, sans-serif",
        "padding": 16,
        "view": {"stroke": None},
        "axis": {
            **label,
            "titleFontWeight": "normal",
            "gridColor": "#E6EAEF",
            "domainColor": "#C5CCD6",
            "tickColor": "#C5CCD6",
        },
        "legend": {**label, "titleFontWeight": "normal"},
        "title": {"anchor": "start", "fontSize": 15, "subtitleFontSize": 12, "subtitleColor": "#5B6572", "offset": 14},
        "range": {"category": list(RUN_COLOURS)},
    }
