"""Single values of a run file: whole numbers, shares, durations, amounts of memory, paths, names."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, Strict, WithJsonSchema

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$"
SPLIT = re.compile(r"(train|validation|test)(\[(?P<start>\d{0,9}):(?P<end>\d{0,9})\])?")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
"""Not what merely looks like one: '60' is text, true is no number, 1 is no flag."""


def parse_duration(text: str) -> float:
    """Seconds of '90s', '45m', '2h', '1d' or a sum such as '1h30m'. Raises ValueError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not parts or "".join(n + u for n, u in parts) != text.replace(" ", ""):
        raise ValueError("must be a duration such as 90s, 45m, 2h or 1h30m")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not seconds:
        raise ValueError("must be longer than nothing, such as 90s, 45m, 2h or 1h30m")
    return seconds


def parse_bytes(text: str) -> float:
    """Bytes of '9GB', '512 MiB' and the like. Raises ValueError."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d+)?) ?([MGT]i?B)", text.strip())
    if found is None or not float(found[1]):
        raise ValueError("must be an amount such as 9GB or 512MiB")
    return float(found[1]) * _BYTES[found[2]]


def share_of(value: Any) -> Any:
    """The share that a text such as '25%' means; anything else as it is."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d+)?) ?%", value.strip()) if isinstance(value, str) else None
    return float(found[1]) / 100 if found else value


def _number_of_layers(value: Any) -> Any:
    value = share_of(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            "must be a number of layers such as 8, a fraction of them such as 0.25, or keys such as {parameters: 20%}, "
            "{memory: 9GB}, {speed: 1.3} or {from: 4, to: 12}"
        )
    if value < 0 or not math.isfinite(value) or (isinstance(value, float) and value >= 1 and value != int(value)):
        raise ValueError("must be a whole number of layers such as 8, or a fraction between 0 and 1 such as 0.25")
    if isinstance(value, float) and value == 1:
        raise ValueError("could mean one layer or all of them; write 1 for one layer, or a fraction below 1")
    return int(value) if value >= 1 else value


def interval(value: tuple[float, float], *, lowest: float, highest: float) -> tuple[float, float]:
    """The two ends of an interval, as fine as ConfigSpace has them. Raises ValueError."""
    low, high = value
    if not lowest <= low <= high <= highest:
        raise ValueError(f"must be [low, high] with {lowest} <= low <= high <= {highest}")
    return round(low, 6), round(high, 6)


def known_texts(value: str) -> str:
    """The sources of texts that an edit is computed from, as they are. Raises ValueError for one that is none."""
    for source in value.split("+"):
        if source not in ("objectives", "base") and not re.fullmatch(r"(file|hub):.+", source):
            raise ValueError("must be objectives, base, file:PATH or hub:DATA_SET, or several joined by +")
    return value


ODD = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's names for control characters, halves of characters (bytes that are no UTF-8) and ends of lines."""


def _plain_path(text: str) -> str:
    """A path or a hub id as it can be written into files and looked up on a disk."""
    odd = [c for c in text if unicodedata.category(c) in ODD]
    if odd:
        raise ValueError(f"has the character {odd[0]!a}, which cannot be in a path here; rename the folder")
    if any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError("has a name of more than 255 bytes, which no folder has")
    return text


Place = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_plain_path)]
_PERCENT = {"type": "string", "pattern": r"^\d+(\.\d+)? ?%$"}
Share = Annotated[float, WithJsonSchema({"anyOf": [{"type": "number"}, _PERCENT]})]
Count = Annotated[
    int | float,
    BeforeValidator(_number_of_layers),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "number"}, _PERCENT]}),
]
"""Layers: a number of them, or a share."""
