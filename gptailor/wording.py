"""Words on the screen: other people's text made inert, and numbers and times in a form that people read.

Names, notes, paths and benchmarks come from run files that somebody may have sent. Streamlit's labels and captions are
Markdown with directives of its own (`:red[...]`, `:material/...:`, `$...$`, emoji codes, arrows), so text goes through
`safe` there and through `plain` where it is shown as it is (tables, charts, select boxes). Plain strings in, plain
strings out.
"""

from __future__ import annotations

import math
import re
import time
import unicodedata
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

LIMIT = 80
"""Characters of a name that are shown; the rest is cut with an ellipsis."""

_FIRST_STRONG_ISOLATE, _POP_ISOLATE = "\u2068", "\u2069"
_JOINER = "\u2060"  # zero width: keeps `:smile:`, `->` and `https://` from being recognised after parsing
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
_RECOGNISED_LATER = re.compile(r"(:|www|@|[-<>=.]{1}(?=[-<>=.])|\()", re.I)


def plain(text: Any, limit: int = LIMIT) -> str:
    """`text` on one line, without control and direction-changing characters, cut at `limit`.

    Shown by itself whatever its script.
    """
    kept = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in str(text))
    kept = "".join(c for c in kept if unicodedata.category(c) not in ("Cf", "Cs", "Co", "Cn"))
    kept = " ".join(kept.split())
    if len(kept) > limit:
        kept = kept[: limit - 1].rstrip() + "…"
    if kept and not kept.isascii() and any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in kept):
        return f"{_FIRST_STRONG_ISOLATE}{kept}{_POP_ISOLATE}"
    return kept


def safe(text: Any, limit: int = LIMIT) -> str:
    """`plain`, and inert inside Streamlit's Markdown: shown letter for letter."""
    guarded = _RECOGNISED_LATER.sub(rf"\1{_JOINER}", plain(text, limit))
    return _PUNCTUATION.sub(r"\\\1", guarded)


def csv_safe(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula (OWASP: CSV injection)."""
    if isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value


def now_and_then(say: Callable[[str], None], seconds: float = 10.0) -> Callable[[str, float], None]:
    """Who is told often what is done and the share of it, and says so every so many seconds."""
    last = time.monotonic()

    def told(what: str, share: float) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            say(f"{what}, {share:.0%} done")

    return told


def removal(asked: Mapping[str, Any] | float | None) -> str:
    """What a run file's `remove` asks for, as people say it: '8', '20 % of the parameters', 'from 4 to 12'.

    '' where that is not known.
    """
    if not isinstance(asked, Mapping):
        return "" if asked is None else f"{asked:g}"
    if asked.get("parameters") is not None:
        return f"{100 * asked['parameters']:g} % of the parameters"
    if asked.get("memory") is not None:
        return f"down to {asked['memory']} of weights"
    if asked.get("to") is not None:
        return f"from {asked.get('from')} to {asked['to']}"
    return "" if asked.get("speed") is None else f"{asked['speed']:g} times the speed"


def span(low: int, high: int) -> str:
    """'8', '4 to 12'."""
    return str(high) if low == high else f"{low} to {high}"


def duration(seconds: float | None) -> str:
    """'0.25 s', '4.2 s', '42 s', '3 min', '8 h 20 min', '2 d 4 h'; '–' where unknown."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return "–"
    if seconds < 1:
        return f"{seconds:.2g} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def count(number: float | None) -> str:
    """A whole number with thin spaces between thousands; '–' where unknown."""
    if number is None or not math.isfinite(number):
        return "–"
    return f"{number:,.0f}".replace(",", "\u202f")


def size(number: float | None) -> str:
    """Parameters: '134.5 M', '6.7 B'."""
    if number is None or not math.isfinite(number):
        return "–"
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f}"


def value(number: float | None, error: float | None = None, *, percent: bool = False) -> str:
    """A score with its standard error where known: '0.612 ± 0.015', or in percent '96.1 % ± 1.2'."""
    if number is None or not math.isfinite(number):
        return "–"
    shown, unit = (100 * number, " %") if percent else (number, "")
    digits = 1 if percent or abs(shown) >= 100 else 3
    text = f"{shown:.{digits}f}{unit}"
    if error is not None and math.isfinite(error):
        text += f" ± {100 * error if percent else error:.{digits}f}"
    return text


def plural(number: int, one: str, many: str | None = None) -> str:
    """'1 trial', '3 trials'."""
    return f"{count(number)} {one if number == 1 else many or one + 's'}"


def as_table(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells, the first the heading, in columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def gigabytes(n_bytes: float) -> str:
    """Bytes: '6.71 GB', '43 MB', '7.2 MB', '310 kB'."""
    if n_bytes >= 1e8:
        return f"{n_bytes / 1e9:.2f} GB"
    if n_bytes >= 1e6:
        return f"{n_bytes / 1e6:.{1 if n_bytes < 1e7 else 0}f} MB"
    return f"{n_bytes / 1e3:.0f} kB"


def moment(at: datetime) -> str:
    """A time for readers anywhere: '2026-11-28 23:52 UTC'."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
