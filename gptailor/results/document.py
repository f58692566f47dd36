"""HTML pages that can be sent to somebody: one file, no script, no network, charts as SVG inside.

Every word that comes from a run (names, paths, errors) is escaped, and a policy in the page forbids whatever might slip
through.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from gptailor import wording
from gptailor.errors import UserError
from gptailor.results.charts import files
from gptailor.results.charts.common import Chart

MOST_ROWS = 40
_STYLE = """
body { font: 16px/1.5 Helvetica, Arial, sans-serif; color: #1d2530; max-width: 1000px; margin: 2em auto }
h1 { font-size: 1.7em } h2 { margin-top: 2em; border-bottom: 1px solid #d5dbe3 }
table { border-collapse: collapse; font-size: .88em; margin: .8em 0; display: block; overflow-x: auto }
th, td { text-align: left; padding: .25em .8em .25em 0; border-bottom: 1px solid #e6eaef; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums } img { max-width: 100% }
.note { color: #5b6572; font-size: .9em } pre { background: #f3f5f8; padding: .8em; overflow-x: auto }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, parts: Iterable[str]) -> str:
    """The whole file. title: plain text; parts: what the functions below give, and HTML that we wrote."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def write(out: Path, content: str) -> Path:
    """Raises UserError where the file cannot be written."""
    try:
        out.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"report {out}: cannot be written: {error.strerror}") from error
    return out


def note(words: str) -> str:
    return f'<p class="note">{escape(wording.plain(words, 900))}</p>'


def frame(shown: pd.DataFrame) -> str:
    shares = {"retention": "Retention", "above_chance": "Above chance", "gap": "Gap"}
    rows = [
        [
            ("–" if pd.isna(value) else f"{value:.1%}" if name in shares else f"{value:.4g}")
            if isinstance(value, float)
            else value
            for name, value in zip(shown.columns, row, strict=True)
        ]
        for row in shown.head(MOST_ROWS).itertuples(index=False)
    ]
    return table([shares.get(str(name), str(name)) for name in shown.columns], rows)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(wording.plain(name))}</th>" for name in header)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table>{f'<tr>{head}</tr>' if any(header) else ''}{body}</table>"


def _cell(value: Any) -> str:
    words = wording.plain(value, 400)
    is_number = words[:1].isdigit() or words[:1] in "+-–"
    return f"<td{' class=n' if is_number and len(words) < 24 else ''}>{escape(words)}</td>"


def picture(chart: Chart, title: str) -> str:
    """The chart as an image of its own: whatever its text holds cannot become part of the page."""
    data = base64.b64encode(files.svg_bytes(chart, title, "")).decode()
    return f'<p><img alt="{escape(wording.plain(title, 200))}" src="data:image/svg+xml;base64,{data}"></p>'
