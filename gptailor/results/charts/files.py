"""What leaves the page as a file: a chart's data as CSV, its picture as PNG or SVG. Made when asked for, not before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from gptailor.results.charts import theme
from gptailor.wording import csv_safe, plain

if TYPE_CHECKING:  # brings altair, which a page without charts opens sooner without
    from gptailor.results.charts.common import Chart

PICTURE_WIDTH = 900
"""Pixels of a downloaded picture's plot; PNG is drawn at twice that."""


def inert(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with no cell and no heading that a spreadsheet takes for a formula."""
    table = frame.rename(columns=lambda name: csv_safe(str(name)))
    for name in table.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes]]:
        table[name] = table[name].map(csv_safe)
    return table


def csv_bytes(frame: pd.DataFrame) -> bytes:
    """UTF-8 CSV with a BOM (spreadsheets need it), inert."""
    return b"\xef\xbb\xbf" + inert(frame).to_csv(index=False).encode()


def picture_spec(chart: Chart, title: str, note: str) -> dict[str, Any]:
    """The chart as it is downloaded: with its title and note inside, on white, at a fixed width."""
    spec = chart.to_dict()
    spec["title"] = {"text": plain(title, 120), "subtitle": _wrapped(note)}
    if not {"hconcat", "vconcat", "concat", "facet", "spec"} & spec.keys():
        spec["width"] = PICTURE_WIDTH
    spec["config"] = theme.export_config() | spec.get("config", {})
    return spec


def png_bytes(chart: Chart, title: str, note: str) -> bytes:
    import vl_convert

    return vl_convert.vegalite_to_png(picture_spec(chart, title, note), scale=2)


def svg_bytes(chart: Chart, title: str, note: str) -> bytes:
    import vl_convert

    return vl_convert.vegalite_to_svg(picture_spec(chart, title, note)).encode()


def _wrapped(note: str, width: int = 130) -> list[str]:
    import textwrap

    return textwrap.wrap(plain(note, 600), width)
