"""The table of runs: what the engine keeps of a run, and what readers work out where it is missing or old."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers.run_tables import START, run_tables
from helpers.store_samples import NOON, a_trial, new_writer, scores, success

from gptailor.results.summary import run_summary, summarise
from gptailor.store.summary import FORMAT
from gptailor.store.writer import RunWriter
from gptailor.trial import DENSE, Evaluation, Outcome, RunStatus, TrialStatus


def test_summary_is_kept_and_equals_the_databases(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    for score in scores(0.8, 10.0):
        writer.record_evaluation(Evaluation(DENSE, None, "validation", score, NOON))
    writer.finish_trial(0, success())  # a trial that was never started has no budget: it counts, but is not the best
    for trial_id, (budget, got) in enumerate(
        [(10, scores(0.7, 11.0, 10)), (90, scores(0.6, 40)), (90, scores(0.4, 12.5))], 1
    ):
        writer.start_trial(a_trial(trial_id, trial_id, budget))
        writer.finish_trial(trial_id, success(*got))
    writer.start_trial(a_trial(9, 9))
    writer.finish_trial(9, Outcome(TrialStatus.CRASHED, NOON, error="x"))
    writer.set_status(RunStatus.RUNNING)  # which a summary follows at once, as it need not follow every trial
    kept = run_summary(writer.folder)
    assert (kept.n_done, kept.n_failed, kept.n_asked, kept.best_config) == (5, 1, 20, 2)
    assert kept.best_scores == {"piqa/acc": 0.6, "wikitext/word_perplexity": 40.0}
    assert kept.retention == pytest.approx(0.6 / 0.8), "a perplexity is averaged with no accuracy"
    assert kept.hypervolume == pytest.approx(0.6 / 40 + 0.4 * (1 / 12.5 - 1 / 40))
    writer.folder.summary.unlink()
    computed = run_summary(writer.folder)
    same: dict[str, Any] = {"size": 0, "last_activity": None}
    assert replace(computed, **same) == replace(kept, **same)


def test_an_old_summary_is_not_shown(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    early = writer.folder.summary.stat().st_mtime_ns - 10**9
    os.utime(writer.folder.summary, ns=(early, early))
    writer.folder.summary.write_text(writer.folder.summary.read_text().replace('"test"', '"old"'))
    os.utime(writer.folder.summary, ns=(early, early))
    assert run_summary(writer.folder).name == "test"
    writer.folder.summary.write_text("{")
    assert run_summary(writer.folder).name == "test"


def test_a_summary_of_another_version_is_worked_out(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    kept = writer.folder.summary.read_text()
    writer.folder.summary.write_text(kept.replace(f'"format": {FORMAT}', '"format": 1').replace('"test"', '"old"'))
    assert run_summary(writer.folder).name == "test"


def test_seconds_at_work_leave_out_the_nights_and_count_what_overlaps_once(tmp_path: Path) -> None:
    def trial(number: int, ended: timedelta, **other: Any) -> dict[str, Any]:
        return {"config_id": number, "budget": 900, "started_at": START, "ended_at": START + ended} | other

    minute, night = timedelta(seconds=60), timedelta(hours=9)
    trials = [trial(1, minute), trial(2, night), trial(3, night + minute / 2), trial(4, 2 * night, status="cancelled")]
    found = summarise(run_tables(trials), new_writer(tmp_path).folder)
    took = 59.1  # of every trial: 59 s of scoring, 0.1 s of stitching
    assert found.worked == pytest.approx(took + took + 30)
    assert summarise(run_tables(), new_writer(tmp_path / "other").folder).worked == 0.0


def test_a_summary_that_is_not_kept_is_worked_out(tmp_path: Path) -> None:
    """What stops or extends a run writes without one; readers do not show the old one."""
    writer = RunWriter.open(new_writer(tmp_path).folder)
    kept = writer.folder.summary.read_text()
    writer.record_run({"name": "anew"})
    assert writer.folder.summary.read_text() == kept and run_summary(writer.folder).name == "anew"
