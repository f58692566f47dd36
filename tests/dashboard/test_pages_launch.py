"""The Launch page as a browser would get it, on a real tiny family: the check, the words, and one start only."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.evaluate_tools import write_task
from helpers.make_runs import make_run
from helpers.tiny_run import tiny_spec
from streamlit.testing.v1 import AppTest

from gptailor.__main__ import main
from gptailor.dashboard import actions, checking, form, readers
from gptailor.launch.engine import EngineLock, stop
from gptailor.launch.jobs import Job
from gptailor.spec.files import describe, load_spec
from gptailor.spec.run import RunSpec
from gptailor.store.folder import RunFolder, run_folders
from gptailor.trial import RunStatus

ROOT = Path(__file__).resolve().parents[2]
WIDGETS = ("text_input", "text_area", "number_input", "toggle", "selectbox", "button_group")


@pytest.fixture
def spec(tiny_family: Path, tmp_path: Path) -> RunSpec:
    write_task(tmp_path / "tasks", "words")
    return tiny_spec(tiny_family, include_path=[str(tmp_path / "tasks")], output_scale=None)


@pytest.fixture
def root(spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The runs folder of a dashboard whose only preset is the tiny family; what was started is stopped."""
    presets, runs = tmp_path / "presets", tmp_path / "runs"
    presets.mkdir()
    (presets / "tiny.yaml").write_text("# Tiny\n# For tests.\n" + spec.to_yaml())
    monkeypatch.setattr(form, "PRESETS", (presets,))
    monkeypatch.setenv("GPTAILOR_RUNS", str(runs))
    monkeypatch.setattr(readers, "DEMO", tmp_path / "demo")
    yield runs
    for folder in run_folders(runs):
        stop(folder, patience=1.0)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No check is run: the desk answers that all is well. For what does not look at the answer."""
    facts = {
        "problems": [],
        "notes": ["a note"],
        "family": {
            "architecture": "Tiny",
            "n_parameters": 1,
            "dtype": "float32",
            "n_removed": 2,
            "n_layers": 6,
            "kept": 0.5,
            "removal": "2 of 6 layers go, 50.0% of the parameters stay",
        },
        "memory": {"parts": {"base": 10**9}, "needed": 10**9, "free": 2 * 10**9, "device": "cpu", "verdict": "fits"},
        "estimate": {"seconds": 90.0, "how": "as in run x"},
    }
    monkeypatch.setattr(checking, "_check", lambda _text, _runs: checking.Answer(facts))


def open_launch() -> AppTest:
    app = AppTest.from_file(str(ROOT / "streamlit_app.py"), default_timeout=60).run()
    app.switch_page("pages/1_Launch.py").run()
    return answered(app)


def answered(app: AppTest) -> AppTest:
    """Wait for the check that the page asked for, and draw it."""
    assert not app.exception
    for _, future in list(checking.desk()._asked.values()):
        future.result(timeout=120)
    app.run()
    assert not app.exception
    return app


def words(app: AppTest) -> str:
    kinds = (app.markdown, app.caption, app.info, app.success, app.warning, app.error)
    return "\n".join(element.value for kind in kinds for element in kind)


def start(app: AppTest):
    return next(button for button in app.button if button.label == "Start the search")


def change(app: AppTest, kind: str, name: str, value: object) -> AppTest:
    getattr(app, kind)(key=f"launch.tiny.{name}").set_value(value).run()
    return answered(app)


def test_it_checks_and_starts_one_run(root: Path, spec: RunSpec) -> None:
    app = open_launch()
    assert "The models fit together" in words(app) and "2 of 6 layers go" in words(app)
    metrics = {metric.label: metric.value for metric in app.metric}
    assert metrics["Trials"] == "1" and metrics["Examples"] == "30" and metrics["Memory"].endswith("B")
    assert metrics["Time"] not in ("…", "–")
    assert not start(app).disabled
    start(app).click().run()
    assert not app.exception and not app.error
    [folder] = run_folders(root)
    assert folder.spec.read_text() == spec.to_yaml() and folder.log.exists()
    again = open_launch()  # a second tab, or a reload
    shown = words(again)
    assert "**tiny** is " in shown and "Start the search" not in [button.label for button in again.button]
    assert len(run_folders(root)) == 1


@pytest.mark.usefixtures("unchecked")
def test_a_field_that_the_click_left_is_looked_at_first(root: Path) -> None:
    app = open_launch()
    next(field for field in app.text_input if field.label == "Name of the run").set_value("another")
    start(app).click().run()
    assert not run_folders(root) and "The form changed as you clicked" in app.error[0].value
    start(app).click().run()
    [folder] = run_folders(root)
    stop(folder, patience=0.5)
    assert load_spec(folder.spec).name == "another"


@pytest.mark.usefixtures("unchecked")
def test_whether_a_search_is_promising_is_measured_before_there_is_a_run(
    root: Path, spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def start_job(_place: Path, arguments: list[str], name: str) -> Job:
        asked.append(arguments)
        return Job(root / name)

    monkeypatch.setattr(actions, "start_job", start_job)
    app = open_launch()
    assert "Is a search promising?" in words(app)
    next(button for button in app.button if button.label == "Measure the redundancy").click().run()
    [arguments] = asked
    assert Path(arguments[1]).read_text() == spec.to_yaml() and not run_folders(root)
    assert main(arguments) == 0  # as the job does in a process of its own
    app = open_launch()
    assert "Different from the base" in words(app) and "The family, layer by layer" in words(app)
    assert "Measure again" in [button.label for button in app.button] and app.get("vega_lite_chart")


@pytest.mark.usefixtures("unchecked")
def test_a_second_click_on_a_sent_form_does_nothing(root: Path) -> None:
    app = open_launch()
    clicked = start(app)
    clicked.click().run()
    [folder] = run_folders(root)
    stop(folder, patience=0.5)
    clicked.click().run()  # the old form again, after the run it started has ended
    assert [found.run_id for found in run_folders(root)] == [folder.run_id]


def test_many_people_at_once_start_one_engine(root: Path, spec: RunSpec) -> None:
    found: list[RunFolder] = []
    people = [threading.Thread(target=lambda: found.append(actions.start(spec))) for _ in range(6)]
    for person in people:
        person.start()
    for person in people:
        person.join()
    assert len({folder.run_id for folder in found}) == 1 == len(run_folders(root))
    assert len(found) == 6
    stop(found[0], patience=0.5)


@pytest.mark.usefixtures("root")
def test_an_ended_run_makes_room_for_another(spec: RunSpec) -> None:
    first = actions.start(spec)
    assert actions.start(spec).run_id == first.run_id
    stop(first, patience=0.5)
    old = first.spec.stat().st_mtime - 60  # older than an engine takes to come up
    os.utime(first.spec, (old, old))
    assert actions.start(spec).run_id != first.run_id


@pytest.mark.usefixtures("root", "unchecked")
def test_what_is_wrong_is_shown_as_text_at_its_field() -> None:
    app = open_launch()
    change(app, "text_input", "remove", "<script>alert(1)</script>")
    change(app, "text_area", "candidates", "[x](http) **b**")
    shown = words(app)
    assert "write a number of layers such as 8" in shown and "write one a line as name" in shown
    assert "\\<script\\>" in shown and "[x](http" not in shown
    assert start(app).disabled and "Some fields need a change" in shown
    change(app, "text_input", "remove", "2")
    change(app, "text_area", "candidates", "math: a\ncode: b")
    assert not start(app).disabled
    change(app, "selectbox", "remove_by", "memory")
    assert "must be an amount such as 9GB" in words(app) and start(app).disabled
    change(app, "text_input", "remove", "12 MB")
    assert not start(app).disabled and any("memory: 12MB" in code.value for code in app.code)
    change(app, "selectbox", "remove_by", "range")
    change(app, "text_input", "remove", "1 to 4")
    assert not start(app).disabled and any("from: 1" in code.value and "to: 4" in code.value for code in app.code)


@pytest.mark.usefixtures("root")
def test_problems_of_the_models_are_shown_as_text() -> None:
    app = open_launch()
    change(app, "text_input", "base_model", "nowhere/<img src=x>")
    shown = words(app)
    assert "This search cannot run yet." in shown and "no such folder" in shown and "\\<img" in shown
    assert start(app).disabled


@pytest.mark.usefixtures("root", "unchecked")
def test_settings_reach_the_run_file() -> None:
    app = open_launch()
    change(app, "number_input", "trials", 22)
    change(app, "number_input", "budget_max", 90)
    change(app, "text_input", "walltime", "1h")
    code = "\n".join(block.value for block in app.code)
    assert "--set trials=22" in code and "--set budget.max=90" in code and "walltime: 1h" in code
    assert list(app.dataframe[0].value["Trials"]) == [9, 8, 5]
    assert not any("remote" in widget.label.lower() for kind in ("toggle", "checkbox") for widget in app.get(kind))  # type: ignore[union-attr]


@pytest.mark.usefixtures("root", "unchecked")
def test_what_a_key_means_is_said_beside_its_field(spec: RunSpec) -> None:
    app = open_launch()
    widgets = {
        str(w.key).rpartition(".")[2]: w
        for kind in WIDGETS
        for w in app.get(kind)
        if str(w.key).startswith("launch.tiny.")
    }
    assert len(widgets) >= len(form.values_of(spec)) - len({"scale_low", "scale_high"})
    for name, widget in widgets.items():
        assert describe(form.KEYS.get(name, name)) in widget.help


@pytest.mark.usefixtures("unchecked")
def test_a_taken_device_is_said(root: Path) -> None:
    folder = make_run(root, "the other *one*", status=RunStatus.RUNNING, n_trials=12)
    with EngineLock(folder):
        shown = words(open_launch())
    assert "this run will queue behind the other \\*one\\*" in shown


@pytest.mark.parametrize("preset", form.presets(), ids=lambda preset: preset.path.stem)
@pytest.mark.usefixtures("unchecked")
def test_every_preset_opens(
    preset: form.Preset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GPTAILOR_RUNS", str(tmp_path / "runs"))
    app = AppTest.from_file(str(ROOT / "streamlit_app.py"), default_timeout=60).run()
    app.switch_page("pages/1_Launch.py")
    app.query_params["preset"] = preset.path.stem
    app.run()
    assert not app.exception
    assert app.text_input(key=f"launch.{preset.path.stem}.base_model").value == preset.spec.base_model
