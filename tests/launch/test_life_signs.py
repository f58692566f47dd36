"""F18: neither a clock that is set nor a process id that is used again makes a run look alive, lost or out of time."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from helpers.engine_processes import SPEC, eventually, shell_engine
from helpers.make_runs import make_run

from gptailor.launch.engine import LOST, StopResult, prepare, state, stop
from gptailor.results.summary import run_summary
from gptailor.scoring.time_limit import TimeLimit, TookTooLong
from gptailor.trial import RunStatus

YEAR = 365 * 86400.0


@pytest.mark.parametrize("shift", [-YEAR, -3600.0, 3600.0, YEAR])
def test_files_of_another_time_change_nothing(tmp_path: Path, shift: float) -> None:
    """What a clock that was set, a suspended laptop or a summer's hour leave behind: times long past or to come."""
    folder = make_run(tmp_path, "moved", n_trials=4, status=RunStatus.RUNNING)
    shell_engine(folder, "exec sleep 60")
    for file in (folder.lock, folder.spec, folder.database, folder.summary, folder.journal):
        os.utime(file, (time.time() + shift,) * 2)
    try:
        assert state(folder, run_summary(folder).status) is RunStatus.RUNNING
    finally:
        assert stop(folder, patience=0.1) is not StopResult.STILL_RUNNING
    assert state(folder, RunStatus.RUNNING) == LOST
    assert state(folder, RunStatus.FINISHED) is RunStatus.FINISHED


def test_a_run_file_from_the_future_is_not_starting_for_ever(tmp_path: Path) -> None:
    folder = prepare(tmp_path, SPEC)
    assert state(folder, RunStatus.QUEUED) is RunStatus.QUEUED
    os.utime(folder.spec, (time.time() + YEAR,) * 2)
    assert state(folder, RunStatus.QUEUED) == LOST


def test_a_time_limit_counts_seconds_and_not_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def hung() -> None:
        raise AssertionError("it did come back")

    with TimeLimit(0.2, hung) as limit:
        monkeypatch.setattr(time, "time", lambda: 0.0)
        limit.check()
        assert eventually(lambda: _is_over(limit), 5)
    with TimeLimit(None, hung) as limit:
        limit.check()


def _is_over(limit: TimeLimit) -> bool:
    try:
        limit.check()
    except TookTooLong:
        return True
    return False
