"""Home on every kind of store, as a browser would get it, and what can be done there."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers.make_runs import make_run
from streamlit.testing.v1 import AppTest

from gptailor.dashboard import actions, readers, run_table
from gptailor.launch.engine import EngineLock, delete_run
from gptailor.store.folder import RunFolder
from gptailor.store.imports import import_run
from gptailor.store.notes import MAX_NAME, Notes, read_notes, write_notes
from gptailor.trial import RunStatus

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "<script>alert(1)</script> **b** :red[x] $x$ ![i](http://e.vil/x.png) \u202eمرحبا"  # noqa: RUF001 (Arabic)


def open_home() -> AppTest:
    app = AppTest.from_file(str(ROOT / "streamlit_app.py"), default_timeout=60).run()
    assert not app.exception
    return app


def tick(app: AppTest, rows: Sequence[int]) -> AppTest:
    runs = readers.runs()
    app.session_state[run_table.table_key(runs)] = {"selection": {"rows": list(rows), "columns": [], "cells": []}}
    app.run()
    assert not app.exception
    return app


def button(app: AppTest, label: str):
    return next(found for found in app.button if found.label == label)


def words(app: AppTest) -> str:
    return "\n".join(element.value for element in (*app.markdown, *app.caption, *app.info))


@pytest.mark.usefixtures("store")
def test_an_empty_store_says_what_this_is() -> None:
    app = open_home()
    assert "makes a language model **shorter**" in words(app) and "No run is saved here yet." in words(app)
    assert not app.dataframe


@pytest.mark.usefixtures("store")
def test_a_fresh_clone_has_the_example(tmp_path: Path) -> None:
    make_run(tmp_path / "demo", "demo", n_trials=22, run_id="run")
    app = open_home()
    assert list(app.dataframe[0].value["name"]) == ["demo (example)"]
    assert "1 · Look at a run" in words(app)
    tick(app, [0])
    assert button(app, "Delete …").disabled and button(app, "Name, note, tags …").disabled
    assert not button(app, "Open").disabled


@pytest.mark.parametrize(
    ("options", "state", "done", "retention"),
    [
        ({"n_trials": 1}, "Finished", "1 of 1 trial done", False),
        ({"n_trials": 12, "failures": 1.0, "status": RunStatus.FAILED}, "Failed", "12 of 12 trials done (12 f", False),
        ({"status": RunStatus.RUNNING}, "Lost", "39 of 60 trials done", True),
        ({"status": RunStatus.QUEUED}, "Queued", "0 of 60 trials done", False),
        ({}, "Finished", "60 of 60 trials done", True),
        ({"benchmarks": ("a", "b", "c/word_perplexity")}, "Finished", "60 of 60 trials done", True),
    ],
    ids=["single trial", "only failures", "lost", "queued", "finished", "three objectives"],
)
def test_every_kind_of_run(store: Path, options: dict[Any, Any], state: str, done: str, retention: bool) -> None:
    make_run(store, **({"failures": 0.0} | options))
    app = open_home()
    row = app.dataframe[0].value.iloc[0]
    assert row["state"] == [state]
    assert (row["retention"] > 0) == retention
    assert done in words(tick(app, [0]))


def test_a_run_whose_engine_lives_is_running_and_cannot_be_deleted(store: Path) -> None:
    folder = make_run(store, status=RunStatus.RUNNING, n_trials=30)
    with EngineLock(folder):
        app = open_home()
        row = app.dataframe[0].value.iloc[0]
        assert row["state"] == ["Running"] and 60 < row["progress"] < 65 and row["left"]
        tick(app, [0])
        assert button(app, "Delete …").disabled


def test_hostile_names_are_text(store: Path) -> None:
    folder = make_run(store, HOSTILE[:80], n_trials=5)
    write_notes(folder, Notes(HOSTILE[:MAX_NAME], "x" * 300 + HOSTILE, (HOSTILE[:40], "=cmd()")))
    app = tick(open_home(), [0])
    row = app.dataframe[0].value.iloc[0]
    assert "<script>" in row["name"] and "\u202e" not in row["name"]
    assert "x" * 300 in words(app) and len(max(words(app).splitlines(), key=len)) < 1300
    button(app, "Delete …").click().run()
    shown = words(app)
    assert "\\<script\\>" in shown and not re.search(r"(?<!\\)<script", shown)
    assert not app.exception


def test_find_by_words_state_and_tag(store: Path) -> None:
    a = make_run(store, "alpha", n_trials=4, seed=1)
    make_run(store, "beta", n_trials=4, seed=2, status=RunStatus.STOPPED)
    write_notes(a, Notes("", "for the paper", ("7B",)))
    app = open_home()
    assert len(app.dataframe[0].value) == 2

    def shown() -> list[str]:
        assert not app.exception
        return list(app.dataframe[0].value["name"]) if app.dataframe else []

    app.text_input(key="home.find").set_value("PAPER piqa").run()
    assert shown() == ["alpha"]
    app.text_input(key="home.find").set_value("nothing like it").run()
    assert shown() == [] and "No run matches these filters." in words(app)
    app.text_input(key="home.find").set_value("").run()
    app.button_group(key="home.states").set_value(["stopped"]).run()
    assert shown() == ["beta"]
    app.button_group(key="home.states").set_value([]).run()
    app.multiselect(key="home.tags").set_value(["7B"]).run()
    assert shown() == ["alpha"]


def test_compare_takes_the_ticked_runs_along(store: Path) -> None:
    for seed, name in enumerate(("one", "two", "three")):
        make_run(store, name, n_trials=30, seed=seed)
    runs = [run.run_id for run in readers.runs()]
    app = tick(open_home(), [0, 2])
    button(app, "Compare").click().run()
    assert not app.exception
    assert app.title[0].value == "Compare"
    assert app.query_params["runs"] == f"{runs[0]},{runs[2]}"


def name_it() -> None:
    from gptailor.dashboard import home, readers

    if found := readers.runs():
        home._describe(found[0])


def delete_it() -> None:
    from gptailor.dashboard import home, readers

    if found := readers.runs():
        home._delete(found[0])


def test_name_note_and_tags_are_kept(store: Path) -> None:
    folder = make_run(store, "plain", n_trials=4)
    dialog = AppTest.from_function(name_it, default_timeout=60).run()
    dialog.text_input[0].set_value(" Better ")
    dialog.text_area[0].set_value("A note")
    button(dialog, "Save").click().run()
    assert not dialog.exception
    assert read_notes(folder) == Notes("Better", "A note", ())
    assert list(open_home().dataframe[0].value["name"]) == ["Better"]


def test_delete_takes_the_name(store: Path) -> None:
    folder = make_run(store, "old one", n_trials=4)
    dialog = AppTest.from_function(delete_it, default_timeout=60).run()
    assert button(dialog, "Delete for good").disabled
    dialog.text_input[0].set_value("another one").run()
    assert button(dialog, "Delete for good").disabled and folder.path.exists()
    dialog.text_input[0].set_value("old one").run()
    button(dialog, "Delete for good").click().run()
    assert not dialog.exception and not folder.path.exists()


def test_a_download_can_be_imported_again(store: Path, tmp_path: Path) -> None:
    folder = make_run(store, "travels", n_trials=8)
    archive = tmp_path / "run.zip"
    [run] = readers.runs()
    archive.write_bytes(actions.take(run))
    assert zipfile.ZipFile(io.BytesIO(archive.read_bytes())).testzip() is None
    delete_run(folder)
    app = open_home()
    app.file_uploader[0].set_value(("run.zip", archive.read_bytes(), "application/zip")).run()
    assert not app.exception and not app.error
    assert RunFolder.of(store, folder.run_id).exists()
    assert list(app.dataframe[0].value["name"]) == ["travels"]


@pytest.mark.usefixtures("store")
def test_a_zip_that_is_no_run_is_refused_in_words() -> None:
    app = open_home()
    app.file_uploader[0].set_value(("bad.zip", b"PK nonsense", "application/zip")).run()
    assert not app.exception
    assert "is not a run that can be imported" in app.error[0].value
    assert readers.runs() == []


def test_rows_on_values(store: Path) -> None:
    folder = make_run(store, "values", n_trials=40, failures=0.2, seed=3)
    frame = run_table.listing(readers.runs(), {folder.run_id: Notes("", "a\nnote", ("x",))})
    row, summary = frame.iloc[0], readers.runs()[0].summary
    assert row["progress"] == 100
    assert row["retention"] == pytest.approx(100 * summary.retention)  # type: ignore[operator]
    assert row["layers"] == "8 of 30" and row["tags"] == ["x"]
    best = summary.best_scores["piqa_local/acc_norm"]
    assert row["objectives"].startswith(f"piqa_local {best:.3f} · commonsense… ")
    many = {f"{name}/acc": 0.25 for name in ("one", "three", "sixteen", "twenty", "more")}
    assert run_table.best_scores(many) == "one 0.25 · three 0.25 · sixt… 0.25 · +2"
    assert run_table.only_numbers(many) == f"0.250 · 0.250 · +{len(many) - 2}"
    assert run_table.only_numbers({"wiki/word_perplexity": 36.31}) == "36.3"


def test_time_left_is_at_the_pace_so_far(store: Path) -> None:
    make_run(store, status=RunStatus.RUNNING, n_trials=30)
    run = readers.runs()[0]
    summary = run.summary
    assert summary.worked and summary.started_at and summary.last_activity
    assert run_table.seconds_left(run) == pytest.approx(summary.worked / 19 * 11)
    before = summary.started_at - timedelta(days=2)
    resumed = replace(run, summary=replace(summary, started_at=before))
    assert run_table.seconds_left(resumed) == run_table.seconds_left(run), "a run that stood still is no slower"


def test_import_names_what_is_wrong(store: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("../run.yaml", "name: x")
    with pytest.raises(ValueError, match="leads out of its folder"):
        import_run(tmp_path / "x.zip", store)
