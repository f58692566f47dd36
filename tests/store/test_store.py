"""The store: what the engine records is what readers get, once, in every version, whatever the text."""

from __future__ import annotations

import json
import math
import os
import shutil
import string
import zipfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from helpers.make_runs import make_run
from helpers.store_samples import FIXTURES, NOON, PLAN, SPEC, a_trial, new_writer, scores, success
from hypothesis import given, settings
from hypothesis import strategies as st

from gptailor.errors import UserError
from gptailor.measures import gain, retention
from gptailor.plan import StitchPlan
from gptailor.results.summary import list_runs, run_summary
from gptailor.store import queries
from gptailor.store.connection import StoreMissing, StoreNewer, known_version, open_writer
from gptailor.store.folder import RunFolder, new_run_id, run_folders
from gptailor.store.notes import Notes, read_notes, write_notes
from gptailor.store.writer import RunWriter
from gptailor.trial import DENSE, Evaluation, ItemKey, Outcome, RunRecord, RunStatus, Subject, TrialStatus


def test_what_is_recorded_is_read_back(tmp_path: Path) -> None:
    writer = new_writer(tmp_path, versions={"torch": "2.13.0"})
    writer.set_status(RunStatus.RUNNING)
    writer.start_trial(a_trial())
    with writer.batch():
        writer.record_plan(0, PLAN, 123_456)
        writer.finish_trial(0, success())
    writer.record_evaluation(Evaluation(DENSE, None, "test", scores()[0], NOON))
    tables = queries.read_run(writer.folder)

    run = tables.runs.iloc[0]
    assert (run.run_id, run["name"], run.status) == (writer.folder.run_id, "test", "running")
    assert (run.n_layers, run.n_removed, run.seed, run.engine_pid) == (5, 1, 7, os.getpid())
    assert json.loads(run.spec) == SPEC and json.loads(run.versions) == {"torch": "2.13.0"}
    assert run.created_at.to_pydatetime() == NOON and run.started_at is not None

    trial = tables.trials.iloc[0]
    assert (trial.status, trial.origin, trial.budget) == ("success", "model", 90)
    assert (trial.suggest_seconds, trial.stitch_seconds, trial.evaluate_seconds) == (0.25, 0.5, 8.0)
    assert json.loads(trial.configuration) == {"removed_0": 2}
    assert (trial.ended_at - trial.started_at).total_seconds() == 9

    assert tables.scores[["benchmark", "score", "n_samples", "higher_is_better"]].values.tolist() == [
        ["piqa", 0.5, 90, True],
        ["wikitext", 20.0, 62, False],
    ]
    plan = tables.plans.iloc[0]
    assert StitchPlan.from_json(json.loads(plan.plan)) == PLAN and plan.plan_hash == PLAN.hash
    assert plan.n_parameters == 123_456

    layers = tables.layers
    assert layers.operation.tolist() == ["base", "selected", "removed", "merged", "base"]
    assert [list(names) for names in layers.sources] == [[], ["math"], [], ["math", "code"], []]
    assert [None if pd.isna(p) else int(p) for p in layers.position] == [0, 1, None, 2, 3]
    assert layers.factor.tolist()[3] == 0.5 and layers.output_scale.tolist()[3] == 1.25

    evaluation = tables.evaluations.iloc[0]
    assert (evaluation.subject, evaluation.split, evaluation.score) == ("dense", "test", 0.5)
    assert pd.isna(evaluation.config_id) and tables.notice is None


def test_recording_twice_changes_nothing(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)

    def record() -> None:
        writer.start_trial(a_trial())
        with writer.batch():
            writer.record_plan(0, PLAN, 1)
            writer.record_plan(0, PLAN, 1)
            writer.record_examples(PLAN.hash, "piqa", "acc", "validation", 0, [1.0, 0.0])
            writer.record_evaluation(Evaluation(DENSE, None, "test", scores()[0], NOON))
            writer.finish_trial(0, success())

    record()
    once = queries.read_run(writer.folder)
    record()
    twice = queries.read_run(writer.folder)
    for table in ("trials", "scores", "plans", "layers", "evaluations"):
        assert getattr(once, table).equals(getattr(twice, table)), table
    assert writer.behind == 0


def test_a_batch_is_one_write_and_survives_an_error_inside(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    before = writer.folder.version(), writer.folder.journal.stat().st_size
    with pytest.raises(KeyError), writer.batch():
        writer.start_trial(a_trial())
        writer.finish_trial(0, success())
        assert (writer.folder.version(), writer.folder.journal.stat().st_size) == before
        raise KeyError
    assert queries.read_run(writer.folder).trials.status.tolist() == ["success"]


def test_no_score_is_invented(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    writer.start_trial(a_trial())
    with pytest.raises(ValueError, match="crashed"):
        writer.finish_trial(0, success(replace(scores()[0], score=math.nan)))
    with pytest.raises(ValueError, match="crashed"):
        writer.record_evaluation(Evaluation(DENSE, None, "test", replace(scores()[0], score=math.inf), NOON))
    writer.finish_trial(0, Outcome(TrialStatus.CRASHED, NOON, error="out of memory"))
    writer.finish_trial(1, success(replace(scores()[0], stderr=math.nan)))
    tables = queries.read_run(writer.folder)
    assert tables.trials.error.tolist()[0] == "out of memory"
    assert tables.scores.trial_id.tolist() == [1] and tables.scores.stderr.isna().all()


@pytest.mark.parametrize(
    "text",
    [
        "'; DROP TABLE runs; --",
        "a\x00b",
        "\ud800 lone",
        "\u202eright to left",
        "<script>alert(1)</script>",
        "é😀" * 900,
    ],
    ids=["sql", "nul", "surrogate", "rtl", "html", "long"],
)
def test_text_is_stored_as_text(tmp_path: Path, text: str) -> None:
    writer = new_writer(tmp_path, name=text)
    writer.finish_trial(0, Outcome(TrialStatus.CRASHED, NOON, error=text))
    tables = queries.read_run(writer.folder)
    expected = text.replace("\x00", "\ufffd").replace("\ud800", "?")
    assert tables.runs["name"].tolist() == tables.trials.error.tolist() == [expected]
    assert run_summary(writer.folder).name == expected


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    first = new_writer(tmp_path)
    first.set_status(RunStatus.RUNNING)
    first.finish_trial(0, success())
    first.set_status(RunStatus.STOPPED)
    stopped = queries.read_run(first.folder).runs.iloc[0]
    second = RunWriter.open(first.folder)
    second.set_status(RunStatus.RUNNING)
    second.finish_trial(1, success())
    again = queries.read_run(first.folder)
    run = again.runs.iloc[0]
    assert run.started_at == stopped.started_at and stopped.ended_at is not None
    assert str(run.ended_at) == "NaT" and run.status == "running" and again.trials.trial_id.tolist() == [0, 1]
    with pytest.raises(FileExistsError):
        RunWriter.create(first.folder, RunRecord(first.folder.run_id, "x", SPEC, "m", 5, 1, 0, NOON), "name: x\n")
    with pytest.raises(StoreMissing):
        RunWriter.open(RunFolder.of(tmp_path, "nobody"))


def test_an_extended_run_says_so(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    writer.change_spec(SPEC | {"trials": 99}, "name: test\ntrials: 99\n")
    assert run_summary(writer.folder).n_asked == 99
    assert "trials: 99" in writer.folder.spec.read_text()


def test_retention_and_gain() -> None:
    assert retention(0.6, 0.8, True) == pytest.approx(0.75) and retention(20.0, 10.0, False) == 0.5
    assert retention(0.5, 0.0, True) is None and retention(0.5, -1.0, True) is None
    assert retention(-1.0, 0.5, True) == 0.0, "less than nothing"
    assert gain(0.3, True) == 0.3 and gain(4.0, False) == 0.25 and gain(0.0, False) == 0.0


def test_examples_in_their_nested_order(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    key = (PLAN.hash, "piqa", "acc", "validation")
    writer.record_examples(*key, 0, [1.0, 0.0])
    writer.record_examples(*key, 2, [math.nan, [1, 2]])
    writer.record_examples(*key, 9, [5.0])  # behind a gap
    writer.record_examples("other", "piqa", "acc", "validation", 0, [True])
    items = queries.load_examples(writer.folder)
    assert repr(items[ItemKey(*key)]) == repr([1.0, 0.0, math.nan, [1, 2]]) and items[
        ItemKey("other", "piqa", "acc", "validation")
    ] == [True]
    assert set(queries.answers_of(writer.folder, [PLAN.hash]).items) == {key}


def test_a_heartbeat_leaves_the_database_alone(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    writer.folder.lock.touch()
    os.utime(writer.folder.lock, (0, 0))
    before = writer.folder.version()
    writer.heartbeat()
    assert writer.folder.version() == before and writer.folder.lock.stat().st_mtime > 0


def test_a_prepared_run_is_listed_before_its_engine_wrote(tmp_path: Path) -> None:
    folder = make_run(tmp_path, n_trials=3)
    prepared = RunFolder.of(tmp_path, "prepared")
    prepared.path.mkdir()
    shutil.copy(folder.spec, prepared.spec)
    broken = RunFolder.of(tmp_path, "broken")
    broken.path.mkdir()
    broken.spec.write_text("][")
    (tmp_path / "no run").mkdir()
    (tmp_path / ".hidden").mkdir()
    listed = {summary.run_id: summary for summary in list_runs(tmp_path)}
    assert set(listed) == {folder.run_id, "prepared", "broken"}
    assert listed["prepared"].status is RunStatus.QUEUED and listed["prepared"].name == "smollm2-27pct"
    assert "run file" in (listed["broken"].problem or "")
    assert list_runs(tmp_path / "nowhere") == []


# Versions


@pytest.mark.parametrize("version", range(1, known_version() + 1))
def test_every_version_opens_and_goes_on(tmp_path: Path, version: int) -> None:
    folder = RunFolder.of(tmp_path, "old")
    with zipfile.ZipFile(
        FIXTURES / f"store-v{version}.zip"
    ) as kept:  # `python tests/helpers/store_samples.py` makes them
        kept.extractall(folder.path)
    tables = queries.read_run(folder)
    assert tables.notice is None and tables.trials.status.tolist() == ["success"]
    assert run_summary(folder).n_asked == 5
    writer = RunWriter.open(folder)  # it has no journal: one is made
    writer.finish_trial(1, success())
    assert queries.read_run(folder).trials.trial_id.tolist() == [0, 1]
    folder.database.unlink()
    RunWriter.open(folder)
    assert queries.read_run(folder).trials.trial_id.tolist() == [0, 1]


def test_a_newer_version_is_shown_and_not_written(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    with open_writer(writer.folder) as con:
        con.execute("INSERT INTO schema_version VALUES (999, now())")
        con.execute("ALTER TABLE trials ADD COLUMN tomorrow VARCHAR")
    tables = queries.read_run(writer.folder)
    assert "newer gptailor" in (tables.notice or "") and "tomorrow" in tables.trials
    with pytest.raises(StoreNewer, match="update gptailor"):
        RunWriter.open(writer.folder)
    writer.finish_trial(0, success())  # an engine that was surprised by it loses nothing
    assert writer.behind == 1 and '"trial_finished"' in writer.folder.journal.read_text()


# Folders and notes


@given(st.text(max_size=120) | st.text(alphabet=string.ascii_lowercase + string.digits + "-./", max_size=110))
@settings(max_examples=100, deadline=None)
def test_only_plain_ids_reach_a_folder(run_id: str) -> None:
    try:
        folder = RunFolder.of("runs", run_id)
    except UserError:
        return
    assert folder.path == Path("runs") / run_id and set(run_id) <= set(string.ascii_lowercase + string.digits + "-")
    assert 1 <= len(run_id) <= 96 and not run_id.startswith("-")


@pytest.mark.parametrize(
    "run_id", ["../x", "/etc", "a/b", "C:\\x", "a\x00", "ok\n", "", ".", "A", "x" * 300, "é", "\u202e"]
)
def test_other_ids_are_refused(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(UserError, match="run id"):
        RunFolder.of(tmp_path, run_id)


def test_links_and_devices_are_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root = tmp_path / "runs"
    root.mkdir()
    (root / "link").symlink_to(outside)
    (root / "file").write_text("x")
    for name in ("inside", "pipe"):
        (root / name).mkdir()
    (root / "inside" / "engine.log").symlink_to("/etc/passwd")
    os.mkfifo(root / "pipe" / "notes.json")
    for name in ("link", "file", "inside", "pipe"):
        with pytest.raises(UserError, match="refused"):
            RunFolder.of(root, name)
    assert run_folders(root) == []


@given(st.text(max_size=100))
@settings(max_examples=100, deadline=None)
def test_new_ids_are_ids(name: str) -> None:
    run_id = new_run_id(name)
    assert RunFolder.of("runs", run_id).run_id == run_id


def test_notes_are_kept_and_capped(tmp_path: Path) -> None:
    folder = new_writer(tmp_path).folder
    assert read_notes(folder) == Notes()
    notes = Notes("<b>best</b>", "seen on\nTuesday 😀", ("7B", "مقارنة"))
    write_notes(folder, notes)
    assert read_notes(folder) == notes
    folder.notes.write_text('{"name": [}')
    assert read_notes(folder) == Notes()
    folder.notes.write_text(json.dumps({"name": "x" * 10_000_000, "note": "", "tags": []}))
    assert read_notes(folder) == Notes()
    for wrong in ({"name": "x" * 81}, {"note": "x" * 20_001}, {"tags": ("",)}, {"tags": ("a",) * 21}, {"name": "a\nb"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Notes(**wrong)
    shutil.rmtree(folder.path)
    with pytest.raises(UserError, match="cannot be saved"):
        write_notes(folder, notes)


def test_made_runs_are_alike_and_telling(tmp_path: Path) -> None:
    one, two = (queries.read_run(make_run(tmp_path / name, n_trials=30, seed=5)) for name in ("a", "b"))
    assert one.scores.drop(columns="run_id").equals(two.scores.drop(columns="run_id"))
    assert set(one.layers.operation) == {"base", "selected", "merged", "removed"}
    assert {"dense", "candidate:math", "baseline:random"} <= set(one.evaluations.subject)
    assert any(Subject.parse(text).config_id is not None for text in one.evaluations.subject)
    assert set(one.trials.budget) == {111, 333, 1000}
    failed = queries.read_run(make_run(tmp_path, n_trials=8, failures=1.0, status=RunStatus.FAILED))
    assert set(failed.trials.status) == {"crashed"} and failed.scores.empty and failed.runs.error[0]
    live = queries.read_run(make_run(tmp_path, n_trials=8, failures=0, status=RunStatus.RUNNING))
    assert live.trials.status.tolist()[-1] == "running" and live.runs.status[0] == "running"


def test_what_is_in_the_journal_alone_comes_with_the_next_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = new_writer(tmp_path)
    writer.start_trial(a_trial())
    with writer.batch(journal_only=True):
        writer.finish_trial(0, success())
    assert b"trial_finished" in writer.folder.journal.read_bytes() and writer.behind == 1
    assert queries.read_run(writer.folder).trials.status.tolist() == ["running"]
    with writer.batch():
        pass
    assert queries.read_run(writer.folder).trials.status.tolist() == ["success"] and not writer.behind
    assert not writer.is_due, "a write took its time, and has twenty times that"
    monkeypatch.setattr("gptailor.store.writer.DATABASE_SHARE", 1e9)
    writer.record_run({"n_layers": 6})
    assert writer.is_due


def test_a_run_that_goes_away_while_runs_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_writer(tmp_path).folder
    assert folder.size() > 1000
    shutil.rmtree(folder.path)
    monkeypatch.setattr(
        "gptailor.results.summary.run_folders", lambda _root: [folder]
    )  # it was there when they were listed
    assert list_runs(tmp_path) == []
