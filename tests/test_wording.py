"""Words on the screen: other people's text is inert, numbers and times are readable."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptailor import wording


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
    [(None, "–"), (float("nan"), "–"), (-1, "–"), (4.2, "4.2 s"), (42, "42 s"), (180, "3 min"), (3599, "1 h"),
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
