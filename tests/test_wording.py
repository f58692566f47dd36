"""Words on the screen: other people's text is inert, numbers and times are readable."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptailor import wording
from gptailor.search.progress import Report
from gptailor.spec.files import build_spec
from gptailor.trial import Origin, Outcome, Trial, TrialStatus


@pytest.mark.parametrize(
    ("given_text", "shown"),
    [
        ("piqa", "piqa"),
        ("a\n\tb\x00c", "a b c"),
        ("x" * 300, "x" * 79 + "…"),
        ("abc\u202egnp.exe", "abcgnp.exe"),  # the override that turns text round is gone
        ("שלום", "\u2068שלום\u2069"),  # noqa: RUF001 (right-to-left text keeps to itself)
        ("", ""),
    ],
)
def test_plain_text(given_text: str, shown: str) -> None:
    assert wording.plain(given_text) == shown


@given(st.text(max_size=200))
def test_safe_text_escapes_all_punctuation(anything: str) -> None:
    shown = wording.safe(anything)
    position = 0
    while position < len(shown):
        character = shown[position]
        if character == "\\":
            position += 2
            continue
        assert not (character.isascii() and not character.isalnum() and character != " "), shown
        position += 1
    assert "\n" not in shown and "\u202e" not in shown


@pytest.mark.parametrize(
    "hostile", [":red[x]", ":material/home:", ":smile:", "https://a.b", "www.a.b", "a -> b", "(c)", "a@b.c"]
)
def test_what_is_recognised_after_parsing_is_broken_up(hostile: str) -> None:
    bare = wording.safe(hostile).replace("\\", "")
    assert hostile not in bare and hostile == bare.replace("\u2060", "")


@pytest.mark.parametrize("formula", ["=1+1", "+1", "-1", "@x", " =1", "\t=1"])
def test_cells_are_not_formulas(formula: str) -> None:
    assert wording.csv_safe(formula) == "'" + formula
    assert wording.csv_safe("a=1") == "a=1" and wording.csv_safe(-1.0) == -1.0


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "–"), (float("nan"), "–"), (-1, "–"), (0.25, "0.25 s"), (4.2, "4.2 s"), (42, "42 s"),
     (59.7, "1 min"), (60, "1 min"), (75, "1 min"), (89, "1 min"), (91, "2 min"), (180, "3 min"), (3599, "1 h"),
     (30000, "8 h 20 min"), (7200, "2 h"), (187200, "2 d 4 h"), (172800, "2 d")],
)  # fmt: skip
def test_durations(seconds: float | None, shown: str) -> None:
    assert wording.duration(seconds) == shown


def test_numbers() -> None:
    assert wording.count(12345) == "12\u202f345" and wording.count(None) == "–"
    assert wording.size(134_515_008) == "135 M" and wording.size(6.74e9) == "6.74 B" and wording.size(None) == "–"
    assert wording.value(0.6123, 0.0154) == "0.612 ± 0.015"
    assert wording.value(0.9612, 0.012, percent=True) == "96.1 % ± 1.2"
    assert wording.value(None) == "–" and wording.value(0.5, float("nan")) == "0.500"
    assert wording.plural(1, "trial") == "1 trial" and wording.plural(3, "trial") == "3 trials"


def test_sizes_and_moments() -> None:
    shown = [wording.gigabytes(n) for n in (6_710_000_000, 150_000_000, 43_000_000, 7_240_000, 310_000, 0)]
    assert shown == ["6.71 GB", "0.15 GB", "43 MB", "7.2 MB", "310 kB", "0 kB"]
    zone = timezone(timedelta(hours=2))
    assert wording.moment(datetime(2026, 11, 28, 23, 52, tzinfo=zone)) == "2026-11-28 21:52 UTC"


ONE = [{"benchmark": "piqa"}]
OTHER_WAYS = re.compile(r"strftime|datetime\.now|utcnow|%Y-%m-%d|/ 1e9|/ 1e6|>> 20|/ 1024\*\*2|\} ?[GM]i?B")
ALLOWED = {
    "gptailor/wording.py": "where they are written",
    "gptailor/trial.py": "where now is",
    "gptailor/stopwatch.py": "the same, for what must not import its neighbour",
    "gptailor/dashboard/pickers.py": "hours and minutes where the reader is",
    "gptailor/commands/check.py": "products a second",
    "gptailor/evaluate/examples.py": "a name that chat templates have",
    "gptailor/results/frames/progress.py": "a column of numbers in gigabytes",
}


def test_durations_sizes_and_now_are_written_in_one_way() -> None:
    root = Path(__file__).resolve().parents[1]
    files = [path for folder in ("gptailor", "pages") for path in (root / folder).rglob("*.py")]
    found = {
        f"{path.relative_to(root)}: {line.strip()}"
        for path in files
        if str(path.relative_to(root)) not in ALLOWED
        for line in path.read_text(encoding="utf-8").splitlines()
        if OTHER_WAYS.search(line)
    }
    assert not found


@pytest.mark.parametrize("seconds", [60.0, 75.0, 89.0])
def test_a_terminal_and_a_page_agree_on_a_minute(seconds: float) -> None:
    """The line of a trial in the terminal, and the time that the Progress page and `show` tell."""
    at = datetime(2026, 11, 1, tzinfo=UTC)
    told = StringIO()
    report = Report(told)
    report.started(
        build_spec({"name": "x", "base_model": "b", "remove": 1, "operations": ["remove"], "objectives": ONE}), 0
    )
    trial = Trial(0, 0, 9, 0, Origin.INITIAL, {}, at, 0.1)
    report.trial(trial, Outcome(TrialStatus.SUCCESS, at, (), 0.0, seconds), None, replayed=False)
    assert f"  {wording.duration(seconds)}  " in told.getvalue() and wording.duration(seconds) == "1 min"
