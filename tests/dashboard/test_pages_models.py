"""The Models page as a browser would get it: facts, held-out results, and real exports and answers of a tiny family."""

from __future__ import annotations

import fcntl
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.make_runs import leave_out, make_run
from helpers.tiny_run import CONFIG, PLAN, make_tiny_run
from streamlit.testing.v1 import AppTest

from gptailor.dashboard import models, readers
from gptailor.plan import LayerShares
from gptailor.results.frames.view import View
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.notes import Notes, write_notes
from gptailor.store.writer import RunWriter
from gptailor.trial import Evaluation, RunStatus, Score, Subject, now
from gptailor.wording import gigabytes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPTAILOR_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(readers, "DEMO", tmp_path / "demo")
    return tmp_path / "runs"


def open_models(folder: RunFolder | None = None) -> AppTest:
    app = AppTest.from_file(str(ROOT / "streamlit_app.py"), default_timeout=60).run()
    app.switch_page("pages/7_Models.py")
    if folder is not None:
        app.query_params["run"] = folder.run_id
    app.run()
    assert not app.exception
    return app


def words(app: AppTest) -> str:
    kinds = (app.markdown, app.caption, app.info, app.success, app.warning, app.error)
    return "\n".join(element.value for kind in kinds for element in kind)


def button(app: AppTest, label: str):
    return next(found for found in app.button if found.label == label)


def after_its_job(app: AppTest, root: Path, says: str) -> None:
    """Wait for every job's process to let go of its lock, as it does when it ends; then the page `says` so."""
    locks = [asked.parent / "lock" for asked in root.parent.rglob("job.json")]
    with ThreadPoolExecutor() as waiting:
        for over in [waiting.submit(is_let_go, lock) for lock in locks]:
            over.result(timeout=120)
    app.run()
    assert not app.exception and says in words(app), words(app)


def is_let_go(lock: Path) -> None:
    with lock.open() as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)


def test_nothing_to_take_home_yet(root: Path) -> None:
    assert "No run is saved here yet" in words(open_models())
    make_run(root, status=RunStatus.QUEUED)
    open_models()
    failed = make_run(root, n_trials=8, failures=1.0, status=RunStatus.FAILED)
    assert "failed" in words(open_models(failed))


@pytest.mark.parametrize(
    "options",
    [{"n_trials": 1}, {"status": RunStatus.RUNNING}, {}, {"benchmarks": ("a", "b", "c/word_perplexity")}],
    ids=["single trial", "lost", "finished", "three objectives"],
)
def test_every_kind_of_run(root: Path, options: dict[Any, Any]) -> None:
    app = open_models(make_run(root, **({"failures": 0.0} | options)))
    metrics = {metric.label: metric.value for metric in app.metric}
    assert metrics["Layers"] == "22 of 30" and metrics["Parameters"] == "106 M"
    assert app.dataframe and app.get("vega_lite_chart")


def test_zeros_are_said_beside_the_number_of_parameters(root: Path) -> None:
    folder = make_run(root, "sparse", n_trials=1, run_id="sparse", status=RunStatus.STOPPED)
    (config_id,) = queries.read_run(folder).plans.config_id
    leave_out(folder, int(config_id), *[LayerShares(1.0, 1.0, 0.75)] * 22)
    (parameters,) = (metric for metric in open_models(folder).metric if metric.label == "Parameters")
    assert parameters.delta == "25% of the layers' are zeros"
    assert parameters.proto.help == "Zeros make a model neither smaller nor faster."


def test_facts_and_results_on_values(root: Path, tiny_family: Path) -> None:
    folder = make_tiny_run(root, tiny_family)
    view = readers.read(readers.runs()[0])
    frame = models.results(view, CONFIG)
    assert frame[["Benchmark", "Split", "Used in the search", "Examples", "This plan", "Dense"]].values.tolist() == [
        ["words / acc", "validation", "yes", 10, 0.5, 0.6],
        ["words / acc", "test", "no", 16, 0.4, 0.8],
    ]
    assert frame["retention"].tolist() == pytest.approx([5 / 6, 0.5])
    tables, searched = view.tables, view.tables.evaluations["subject"] != "dense"
    alone = models.results(View(replace(tables, evaluations=tables.evaluations[searched])), CONFIG)
    assert list(alone.columns) == ["Benchmark", "Split", "Used in the search", "Examples", "This plan", "±"]
    app = open_models(folder)
    assert "1 of 1 held-out result stored" in words(app)
    on_disk = next(metric for metric in app.metric if metric.label == "Size on disk")
    assert on_disk.help == "Weights of 4 bytes each (float32)." and on_disk.value == gigabytes(41_000 * 4)


def test_held_out_benchmarks_count_once_whatever_they_were_scored_on(root: Path, tiny_family: Path) -> None:
    folder = make_tiny_run(root, tiny_family)
    view = readers.read(readers.runs()[0])
    fewer = view.tables.evaluations.query("split == 'test'").assign(n_samples=8, score=0.3)
    tables = replace(view.tables, evaluations=pd.concat([view.tables.evaluations, fewer]))
    frame = models.results(View(tables), CONFIG)
    assert frame[["Split", "Examples", "This plan"]].values.tolist() == [["validation", 10, 0.5], ["test", 16, 0.4]]
    writer = RunWriter.open(folder)
    (row,) = fewer[fewer.subject == f"config:{CONFIG}"].itertuples()
    score = Score(row.benchmark, row.metric, 0.3, 0.1, 8, True)
    writer.record_evaluation(Evaluation(Subject.config(CONFIG), CONFIG, "test", score, now(), PLAN.hash))
    assert "1 of 1 held-out result stored" in words(open_models(folder))


def test_less_is_better_turns_the_retention(root: Path) -> None:
    make_run(root, benchmarks=("c/word_perplexity",), held_out=(), failures=0.0)
    view = readers.read(readers.runs()[0])
    row = models.results(view, int(view.plans["config_id"].iloc[0])).iloc[0]
    assert row["This plan"] > row["Dense"] and row["retention"] == pytest.approx(row["Dense"] / row["This plan"])


def test_a_plan_without_held_out_results_says_so(root: Path) -> None:
    folder = make_run(root, status=RunStatus.STOPPED, failures=0.0)
    assert "None of the 2 held-out benchmarks is stored for this plan" in words(open_models(folder))


def test_hostile_names_are_text(root: Path) -> None:
    folder = make_run(root, "<b>x</b>", benchmarks=("<i>task</i>", "b"), failures=0.0, candidates=("a", "b"))
    write_notes(folder, Notes("<script>alert(1)</script> :red[x]", "", ()))
    shown = words(open_models(folder))
    assert not re.search(r"(?<!\\)<(script|i)", shown)


@pytest.mark.slow
def test_export_and_try_it(root: Path, tiny_family: Path) -> None:
    folder = make_tiny_run(root, tiny_family)
    app = open_models(folder)
    button(app, "Export as a Hugging Face folder").click().run()
    assert not app.exception and app.get("progress")
    again = open_models(folder)  # whoever opens the page finds the same export under way
    assert "Export as a Hugging Face folder" not in [found.label for found in again.button]
    after_its_job(app, root, "Exported, reloaded and compared")
    out = root.parent / "exports" / f"tiny-run-{CONFIG}"
    assert (out / "model.safetensors").is_file() and (out / "README.md").is_file()
    assert f"from_pretrained('{out}')" in app.code[0].value
    elsewhere = out.rename(out.with_name("elsewhere"))
    assert not open_models(folder).error, "one that was moved away did not fail"
    elsewhere.rename(out)
    app.run()

    app.text_area(key="models.text").set_value("--plain <b>the cat</b> sat")
    app.number_input(key="models.tokens").set_value(6)
    button(app, "Generate").click().run()
    after_its_job(app, root, "**Plan 7**")
    shown = words(app)
    assert "**Dense base**: 6 layers" in shown and "4 layers" in shown and shown.count("tokens/s") == 2
    assert not (folder.path / "jobs").exists()


@pytest.mark.slow
def test_an_export_that_fails_says_why(root: Path, tiny_family: Path) -> None:
    folder = make_tiny_run(root, tiny_family)
    folder.spec.write_text(folder.spec.read_text().replace(str(tiny_family / "base"), "nowhere/at/all"))
    app = open_models(folder)
    button(app, "Export as a Hugging Face folder").click().run()
    after_its_job(app, root, "The export failed")
    assert "no such folder" in app.error[0].value and "Traceback" not in app.error[0].value
    assert button(app, "Export as a Hugging Face folder")
