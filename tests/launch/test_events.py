"""What a command tells the program that started it: JSON lines among whatever else is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command_line import gptailor
from helpers.tiny_run import make_tiny_run

from gptailor.launch.events import Event, read_events, say_to_people, say_to_programs


def test_events_are_read_among_other_words(capsys: pytest.CaptureFixture[str]) -> None:
    said = [Event("opening", share=0.0), Event("two\nlines", result={"a": [1, None]}), Event(error="no")]
    for event in said:
        say_to_programs(event)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(said), "a line an event, whatever it says"
    noise = ["Loading 50%", lines[0][9:], "[1]", '{"event": 3}', '{"event": {"other": 1}}', "null", '{"step": "x"}']
    mixed = [line for pair in zip(noise, [*lines, "", "", "", ""], strict=True) for line in pair]
    assert read_events("\n".join(mixed)) == said


def test_people_read_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    for event in (Event("opening", share=0.055), Event("done", result={"a": 1})):
        say_to_people(event)
    assert capsys.readouterr().out == "  6% opening\ndone\n"


@pytest.mark.parametrize(
    "arguments", [("export", "tiny-run", 8, "OUT"), ("generate", "tiny-run", 8, "--prompt", "x"), ("evaluate", "none")]
)
def test_a_refusal_is_an_event(arguments: tuple[object, ...], tiny_family: Path, tmp_path: Path) -> None:
    make_tiny_run(tmp_path / "runs", tiny_family)
    done = gptailor(*arguments, "--json", "--runs", tmp_path / "runs")
    (event,) = read_events(done.stdout)
    assert done.returncode == 2 and done.stderr == "" and json.loads(done.stdout)["event"]["error"] == event.error
    assert (event.error or "").startswith("run none: there is none" if "none" in arguments else "configuration 8: run")
