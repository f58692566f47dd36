"""What a person sees of a search: a bar on a terminal, plain lines in a pipe, nothing lost when the pipe closes."""

from __future__ import annotations

import io
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from helpers.tiny_run import tiny_spec

from gptailor.search.progress import Report
from gptailor.trial import DENSE, Origin, Outcome, RunStatus, Score, Trial, TrialStatus
from gptailor.wording import duration

NOW = datetime(2026, 11, 1, tzinfo=UTC)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def tell(report: Report, folder: Path) -> None:
    """Three trials: at a low rung, at the high rung, and one that crashes."""
    report.started(tiny_spec(folder, trials=3, budget={"min": 10, "max": 30}), 0)
    report.reference(DENSE, (Score("words", "acc", 0.6, 0.1, 30, True),))
    for number, (budget, score) in enumerate([(10, 0.55), (30, 0.5), (10, None)]):
        trial = Trial(number, number + 1, budget, 0, Origin.MODEL, {}, NOW, 0.1)
        if score is None:
            report.trial(trial, Outcome(TrialStatus.CRASHED, NOW, error="Traceback\nOutOfMemory: no room"), None, False)
        else:
            scores = (Score("words", "acc", score, 0.1, budget, True),)
            report.trial(trial, Outcome(TrialStatus.SUCCESS, NOW, scores, 0.1, 0.4), score / 0.6, False)
    report.ended(RunStatus.FINISHED, None)


def test_plain_lines_when_piped(tmp_path: Path) -> None:
    stream = io.StringIO()
    tell(Report(stream), tmp_path)
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()
    assert lines[:2] == ["tiny: 3 trials on rungs of 10, 30 examples a benchmark", "dense: words acc 0.6000"]
    assert lines[2].startswith("trial 1/3  rung 10  words acc 0.5500  (91.7% of dense)  0.5 s  about ")
    assert lines[2].endswith(" left") and lines[4].endswith("done")
    assert lines[4].startswith("trial 3/3  rung 10  crashed") and lines[5:] == [
        "trial 3 crashed: OutOfMemory: no room",
        "finished",
    ]


def test_time_left_counts_examples_and_the_references_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five references of 30 examples and a trial of 10 took 150 s; to come are two more plans and a promotion."""
    now = iter([0.0, 0.0, 150.0])
    monkeypatch.setattr("gptailor.search.progress.time.monotonic", lambda: next(now))
    stream = io.StringIO()
    report = Report(stream)
    report.started(tiny_spec(tmp_path, trials=4, budget={"min": 10, "max": 30}), 0)
    scores = (Score("words", "acc", 0.5, 0.1, 10, True),)
    report.trial(
        Trial(0, 1, 10, 0, Origin.INITIAL, {}, NOW, 0.1), Outcome(TrialStatus.SUCCESS, NOW, scores), 0.9, False
    )
    assert stream.getvalue().rstrip().endswith("about 38 s left")


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    """Trial, rung, best so far (of the highest rung reached) and time left."""
    stream = Terminal()
    tell(Report(stream), tmp_path)
    drawn = stream.getvalue().split("\r")
    last = [line for line in drawn if "3/3" in line][-1]
    assert "rung 10, best 83.3% of dense at 30" in last and "100%" in last
    assert "[00:00<00:00" in last, "time spent and time left"
    assert "dense: words acc 0.6000" in stream.getvalue() and stream.getvalue().endswith("finished\n")
    assert "trial 1/3  rung" not in stream.getvalue(), "no lines beside the bar"


def test_a_closed_pipe_does_not_end_a_search(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    tell(Report(stream), tmp_path)
    with pytest.raises(BrokenPipeError):  # it was closed indeed
        stream.close()


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45 s"), (720, "12 min"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")]
)
def test_times_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text
