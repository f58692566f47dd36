"""Every analysis page, opened on every kind of run: it says something sensible and never breaks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.make_runs import PERPLEXITY, leave_out, make_run
from helpers.redundant import family_of, model_of
from streamlit.testing.v1 import AppTest

from gptailor.dashboard import readers
from gptailor.launch.engine import EngineLock, asked, is_alive, prepare, request
from gptailor.plan import LayerShares
from gptailor.results import redundancy
from gptailor.spec.files import build_spec
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.notes import Notes, write_notes
from gptailor.trial import RunStatus

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "Progress": "pages/2_Progress.py",
    "Fidelity": "pages/3_Fidelity.py",
    "Trade-offs": "pages/4_Trade-offs.py",
    "Layers": "pages/5_Layers.py",
    "Compare": "pages/6_Compare.py",
}
HOSTILE = "<script>alert(1)</script> **bold** :red[x] $x$ " + "שלום " * 5 + "long " * 60


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One run of every kind. The running one's engine lock is held here."""
    root = tmp_path_factory.mktemp("runs")
    make_run(root, "finished", n_trials=90, run_id="finished")
    make_run(root, "three", n_trials=60, benchmarks=("piqa", "csqa", f"wiki/{PERPLEXITY}"), run_id="three")
    make_run(root, "one objective", n_trials=40, benchmarks=("piqa",), candidates=(), run_id="one-objective")
    make_run(root, "single", n_trials=1, run_id="single", status=RunStatus.STOPPED)
    make_run(root, "failures", n_trials=12, failures=1.0, run_id="failures", status=RunStatus.FAILED)
    make_run(root, "running", n_trials=60, run_id="running", status=RunStatus.RUNNING)
    make_run(root, "lost", n_trials=30, run_id="lost", status=RunStatus.RUNNING)
    make_run(root, "queued", run_id="queued", status=RunStatus.QUEUED)
    nasty = ("<script>alert(1)</script>", "**b** :red[x] $x$", "ar/acc_norm")
    folder = make_run(root, HOSTILE[:80], n_trials=40, benchmarks=nasty, run_id="hostile")
    write_notes(folder, Notes(name=HOSTILE[:80]))
    with EngineLock(RunFolder.of(root, "running")):
        yield root


@pytest.fixture(autouse=True)
def _runs(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPTAILOR_RUNS", str(root))
    monkeypatch.setattr(readers, "DEMO", tmp_path / "no-demo")
    RunFolder.of(root, "queued").spec.touch()  # freshly prepared: its engine may still be on its way


def visit(page: str, **choices: str) -> AppTest:
    app = AppTest.from_file(str(ROOT / "streamlit_app.py"), default_timeout=60)
    for name, value in choices.items():
        app.query_params[name] = value
    app.switch_page(PAGES[page]).run()
    assert not app.exception, app.exception[0].message
    assert [title.value for title in app.title] == [page]
    return app


def words(app: AppTest) -> str:
    """Everything that is written on the page, Markdown's escapes taken out."""
    shown = [*app.markdown, *app.caption, *app.info, *app.warning, *app.error]
    return "\n".join(element.value for element in shown).replace("\\", "").replace("\u2060", "")


def charts(app: AppTest) -> list[Any]:
    return [element.proto for element in app.get("vega_lite_chart")]


def test_what_edits_left_of_a_plans_layers_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTAILOR_RUNS", str(tmp_path))
    folder = make_run(tmp_path, "narrow", n_trials=1, run_id="narrow", status=RunStatus.STOPPED)
    (config_id,) = queries.read_run(folder).plans.config_id
    leave_out(folder, int(config_id), LayerShares(0.5, 0.25, 0.3))
    app = visit("Layers", run="narrow")
    assert f"What is left of each layer of plan {config_id}" in words(app)
    assert len(charts(app)) == HOW_MANY_CHARTS["single"]["Layers"] + 1


def test_what_was_measured_of_the_family_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTAILOR_RUNS", str(tmp_path))
    folder = make_run(tmp_path, "known", n_trials=1, run_id="known", status=RunStatus.STOPPED)
    app = visit("Layers", run="known")
    assert "was not measured for this run" in words(app)
    assert [button.label for button in app.button] == ["Measure the redundancy"]
    one = model_of([0.5, 0.99, 0.98, 0.97])
    redundancy.write(family_of(one, replace(one, copies={2: 1}), cosine=-0.4), redundancy.own_file(folder))
    before, app = len(charts(app)), visit("Layers", run="known")
    said = words(app)
    assert "3 of 4 layers look cheap" in said and "Copies in a: layer 2 is layer 1" in said
    assert "a and b conflict in every layer" in said and not app.button
    for part, n in {"Layers": 3, "Candidates": 2, "States": 2}.items():
        app.button_group(key="redundancy.part").set_value(part).run()
        assert not app.exception and len(charts(app)) == before + n


# --- every page, every kind of run ------------------------------------------------------------------------------------

HOW_MANY_CHARTS = {
    "finished": {"Progress": 3, "Fidelity": 4, "Trade-offs": 4, "Layers": 5},
    "three": {"Progress": 3, "Fidelity": 4, "Trade-offs": 4, "Layers": 5},
    "one-objective": {"Progress": 3, "Fidelity": 4, "Trade-offs": 3, "Layers": 4},
    "single": {"Progress": 3, "Fidelity": 3, "Trade-offs": 3, "Layers": 3},
    "failures": {"Progress": 1, "Fidelity": 1, "Trade-offs": 0, "Layers": 0},
    "running": {"Progress": 4, "Fidelity": 4, "Trade-offs": 4, "Layers": 4},
    "lost": {"Progress": 3, "Fidelity": 4, "Trade-offs": 4, "Layers": 4},
    "queued": {"Progress": 0, "Fidelity": 0, "Trade-offs": 0, "Layers": 0},
    "hostile": {"Progress": 3, "Fidelity": 4, "Trade-offs": 4, "Layers": 5},
}


@pytest.mark.parametrize("run", HOW_MANY_CHARTS)
@pytest.mark.parametrize("page", ["Progress", "Fidelity", "Trade-offs", "Layers"])
def test_page_on_a_run(page: str, run: str) -> None:
    app = visit(page, run=run)
    drawn = charts(app)
    assert len(drawn) == HOW_MANY_CHARTS[run][page], words(app)
    assert all(chart.alt for chart in drawn), "a chart without a description"
    if not drawn:
        assert app.info, "a page with nothing to draw says why"


@pytest.mark.parametrize("page", PAGES)
def test_page_without_any_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTAILOR_RUNS", str(tmp_path / "empty"))
    app = visit(page)
    assert len(app.info) == 1 and not charts(app)


@pytest.mark.parametrize(
    ("page", "run", "said"),
    [
        ("Trade-offs", "failures", "All 12 trials so far failed"),
        ("Layers", "queued", "No trial has ended yet"),
        ("Trade-offs", "single", "1 plan scored at 111 examples a benchmark, the highest rung reached so far"),
        ("Trade-offs", "finished", "scored at the full budget of 1000 examples"),
        ("Progress", "failures", "No trial has succeeded so far"),
        ("Progress", "failures", "three trials in a row ran out of memory"),
        ("Progress", "failures", "12 trials failed"),
        ("Progress", "lost", "its engine is gone"),
        ("Progress", "finished", "3 candidates"),
        ("Fidelity", "single", "Too few plans"),
        ("Fidelity", "finished", "agree with those at 1000"),
        ("Fidelity", "finished", "the paper reports 41.4%"),
        ("Layers", "single", "from 30 scored plans on"),
    ],
)
def test_what_a_page_says(page: str, run: str, said: str) -> None:
    assert said in words(visit(page, run=run))


def test_other_peoples_text_is_shown_as_text() -> None:
    for page in PAGES:
        app = visit(page, run="hostile", runs="hostile,three")
        for element in [*app.markdown, *app.caption, *app.info, *app.warning]:
            assert "<script>" not in element.value and ":red[" not in element.value, element.value
            assert len(element.value) < 4000
        for box in app.selectbox:
            assert all(len(option) <= 140 for option in box.options)


CHARTS = {
    "Progress": ["best", "hypervolume", "timeline"],
    "Fidelity": ["shares", "agreement", "moves", "ladder"],
    "Trade-offs": ["front", "parallel", "strip", "scores"],
    "Layers": ["origins", "frequencies", "lanes", "undo", "importance"],
    "Compare": ["compare.held-out", "curves", "fronts", "best-origins", "overlap"],
}


@pytest.mark.parametrize("page", PAGES)
def test_all_data_tables_open(page: str) -> None:
    app = visit(page, run="finished", runs="finished,running")
    boxes = [f"data.{name}" for name in CHARTS[page]]
    assert len(boxes) == len(charts(app))
    for key in boxes:
        app.session_state[key] = True
    app.run()
    assert not app.exception, app.exception[0].message
    assert len(app.get("download_button")) == 3 * len(boxes)


@pytest.mark.parametrize("page", PAGES)
def test_a_run_that_has_only_been_prepared(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = build_spec(
        {
            "name": "fresh",
            "base_model": "models/base",
            "remove": 2,
            "operations": ["remove"],
            "objectives": [{"benchmark": "piqa"}],
        }
    )
    monkeypatch.setenv("GPTAILOR_RUNS", str(tmp_path))
    folders = [prepare(tmp_path, spec, token) for token in ("one-token-of-many", "another-token")]
    app = visit(page, run=folders[0].run_id, runs=",".join(folder.run_id for folder in folders))
    assert len(app.info) == 1 and not charts(app)


@pytest.mark.parametrize("page", PAGES)
def test_a_damaged_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        folder = make_run(tmp_path, name, n_trials=3, run_id=name)
        folder.database.write_bytes(b"not a database" * 100)
    monkeypatch.setenv("GPTAILOR_RUNS", str(tmp_path))
    app = visit(page, run="a", runs="a,b")
    assert "cannot be" in words(app) and not charts(app)


# --- choices ----------------------------------------------------------------------------------------------------------


def test_a_link_opens_the_same_view() -> None:
    app = visit("Trade-offs", run="three", config="0")
    other = next(int(c) for c in app.selectbox(key="select.config").options[1].split() if c.isdecimal())
    app = visit("Trade-offs", run="three", config=str(other))
    assert app.selectbox(key="select.run").value == "three" and app.selectbox(key="select.config").value == other
    assert f"Layers of plan {other}" in words(app)


def test_the_choice_is_in_the_url_and_goes_along() -> None:
    app = visit("Fidelity")
    app.selectbox(key="select.run").set_value("three").run()
    assert app.query_params["run"] == "three"
    app.query_params.clear()
    app.switch_page(PAGES["Layers"]).run()
    assert not app.exception and app.selectbox(key="select.run").value == "three"


def test_another_run_forgets_the_plan() -> None:
    app = visit("Trade-offs", run="three")
    config = app.selectbox(key="select.config")
    config.set_value(list(readers_plans("three"))[1]).run()
    app.selectbox(key="select.run").set_value("finished").run()
    assert not app.exception
    assert app.selectbox(key="select.config").value == next(iter(readers_plans("finished")))


def test_a_plan_remembered_from_another_run_is_not_taken_for_this_ones() -> None:
    app = visit("Trade-offs", run="finished", config=str(readers_plans("finished")[2]))
    app.query_params.clear()
    app.query_params["run"] = "three"
    app.switch_page(PAGES["Layers"]).run()
    assert app.selectbox(key="select.config").value == readers_plans("three")[0]


def readers_plans(run_id: str) -> list[int]:
    run = next(run for run in readers.runs() if run.run_id == run_id)
    return readers.read(run).plans["config_id"].astype(int).tolist()


@pytest.mark.parametrize("config", ["-1", "99999", "x", "1e9", "<script>", "0" * 500])
def test_a_made_up_plan_in_the_url_shows_the_best(config: str) -> None:
    app = visit("Trade-offs", run="finished", config=config)
    assert app.selectbox(key="select.config").value == readers_plans("finished")[0]


@pytest.mark.parametrize("run", ["../../etc", "nope", "<script>alert(1)</script>", "a" * 900])
def test_a_made_up_run_in_the_url_is_told(run: str) -> None:
    app = visit("Fidelity", run=run)
    assert "which is not saved here" in words(app) and "<script>" not in app.warning[0].value


def test_a_click_on_a_plan_chooses_it() -> None:
    app = visit("Trade-offs", run="finished")
    clicked = readers_plans("finished")[3]
    app.session_state["chart.front"] = {"selection": {"plan": [{"config_id": clicked}]}}
    app.run()
    assert not app.exception and app.query_params["config"] == str(clicked)
    assert app.selectbox(key="select.config").value == clicked


def test_weights_choose_a_plan() -> None:
    app = visit("Trade-offs", run="three")
    app.slider(key="weight.0").set_value(0.0)
    app.slider(key="weight.1").set_value(0.0)
    app.run()
    best = readers.read(next(run for run in readers.runs() if run.run_id == "three")).plans
    assert f"plan {int(best.loc[best[f'wiki/{PERPLEXITY}'].idxmin(), 'config_id'])}" in words(app)


def test_data_and_downloads_open_on_demand() -> None:
    app = visit("Fidelity", run="finished")
    assert not app.get("download_button")
    app.session_state["data.shares"] = True
    app.run()
    assert not app.exception
    assert [button.label for button in app.get("download_button")] == ["CSV", "PNG", "SVG"]  # type: ignore[union-attr]
    assert len(app.dataframe) == 1


# --- progress ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("run", "has_parts_within"), [("running", False), ("finished", True)])
def test_what_polls_has_no_parts_that_run_on_their_own(run: str, has_parts_within: bool) -> None:
    """A browser that opens a busy run stays empty otherwise (see gptailor/dashboard/polling.py)."""
    parts = visit("Progress", run=run)._fragment_storage._parent_by_id
    assert parts and any(parent is not None for parent in parts.values()) == has_parts_within


def buttons(app: AppTest) -> list[str]:
    return [button.label for button in app.button]


@pytest.mark.parametrize(
    ("run", "shown"),
    [
        ("running", ["Pause", "Stop …"]),
        ("lost", ["Resume"]),
        ("failures", ["Resume"]),
        ("single", ["Resume", "Extend …"]),
        ("finished", ["Extend …"]),
        ("queued", ["Stop …"]),
    ],
)
def test_the_buttons_fit_the_state(run: str, shown: list[str]) -> None:
    assert buttons(visit("Progress", run=run)) == shown


def test_pause_is_asked_of_the_engine(root: Path) -> None:
    folder = RunFolder.of(root, "running")
    app = visit("Progress", run="running")
    try:
        app.button[0].click().run()
        assert not app.exception and asked(folder, "pause")
        assert buttons(app)[0] == "Pausing …"
    finally:
        request(folder, "resume")


def test_stop_asks_first(root: Path) -> None:
    app = visit("Progress", run="running")
    app.button[1].click().run()
    assert not app.exception and "A stopped run can be resumed" in words(app)
    assert not asked(RunFolder.of(root, "running"), "stop")


def test_extending_asks_for_how_much(root: Path) -> None:
    app = visit("Progress", run="finished")
    app.button[0].click().run()
    assert not app.exception and "The search goes on where it ended" in words(app)
    [trials] = [field for field in app.number_input if field.label == "Trials in all"]
    assert trials.min == trials.value and not is_alive(RunFolder.of(root, "finished"))


def test_only_an_active_run_is_live() -> None:
    assert [toggle.label for toggle in visit("Progress", run="running").toggle] == ["Live"]
    assert not visit("Progress", run="finished").toggle


def test_the_log_is_read_when_it_is_opened(root: Path) -> None:
    RunFolder.of(root, "finished").log.write_text("trial 1\ntrial 2 <script>\n" * 300, encoding="utf-8")
    app = visit("Progress", run="finished")
    assert not app.code
    app.session_state["log"] = True
    app.run()
    assert app.code[0].value.count("trial 2") == 100


# --- compare ----------------------------------------------------------------------------------------------------------


def test_compare_two_runs_with_shared_objectives() -> None:
    app = visit("Compare", runs="finished,running,lost")
    assert "is ahead of" in words(app) and len(charts(app)) == 5
    table = app.dataframe[0].value
    assert list(table.columns) == ["measure", "finished", "running", "lost"]


def test_compare_runs_that_share_nothing() -> None:
    app = visit("Compare", runs="finished,three")
    assert "share no objective" in words(app) and len(charts(app)) == 2


def test_compare_with_a_run_without_plans() -> None:
    assert "Only one of these runs has scored a plan" in words(visit("Compare", runs="finished,failures"))
    assert "None of these runs" in words(visit("Compare", runs="queued,failures"))


def test_compare_begins_with_runs_that_share_an_objective() -> None:
    assert visit("Compare", run="three").multiselect[0].value[0] == "three"
    picked = visit("Compare", run="finished").multiselect[0].value
    assert picked[0] == "finished" and picked[1] in {"single", "failures", "running", "lost", "queued"}


def test_compare_needs_two_runs() -> None:
    app = visit("Compare", runs="finished")
    assert "Pick at least two" in words(app)


def test_compare_forgets_runs_that_are_gone() -> None:
    app = visit("Compare", runs="finished,nope,three,<script>")
    assert app.multiselect[0].value == ["finished", "three"]


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("root")
def test_readers_share_one_answer_for_each_version(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "shared", n_trials=5, run_id="shared")
    run = readers._run(folder)
    first = readers.read(run)
    assert readers.read(run) is first
    make_run(tmp_path, "other", n_trials=3, run_id="other")
    assert readers.read(readers._run(RunFolder.of(tmp_path, "other"))) is not first
    folder.database.touch()  # a new version of a run that is not active is read at once
    assert readers.read(run) is not first


def test_a_run_that_was_deleted_meanwhile(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "gone", n_trials=3, run_id="gone")
    assert readers.status(folder) == "finished"
    shutil.rmtree(folder.path)
    assert readers.status(folder) == "deleted"


def test_a_busy_file_shows_the_last_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path, "busy", n_trials=5, run_id="busy")
    run = readers._run(folder)
    first = readers.read(run)
    folder.database.touch()

    def refuse(*_: object) -> None:
        raise readers.StoreBusy("run busy: another process holds it")

    monkeypatch.setattr(readers.queries, "read_run", refuse)
    assert readers.read(run) is first


def test_a_live_run_is_read_once_in_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path, "live", n_trials=5, run_id="live", status=RunStatus.RUNNING)
    with EngineLock(folder):
        run = readers._run(folder)
        first = readers.read(run)
        folder.database.touch()
        assert readers.read(run) is first
        monkeypatch.setattr(readers, "LEAST_SECONDS", 0.0)
        assert readers.read(run) is first, "a reading that took long is not begun again at once"
        monkeypatch.setattr(readers, "REST", 0)
        assert readers.read(run) is not first
