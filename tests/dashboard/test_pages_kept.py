"""Plans beside the search's own (repaired, healed, one-shot cuts) where people look for them: Layers and Models."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_run import CONFIG, NOW, PLAN, make_tiny_run
from streamlit.testing.v1 import AppTest

from gptailor.dashboard import models, readers
from gptailor.plan import Edit, StitchPlan, Texts
from gptailor.store.folder import RunFolder
from gptailor.store.writer import RunWriter
from gptailor.trial import HEALED, KEPT, REPAIRED, Evaluation, Score, Subject

ROOT = Path(__file__).resolve().parents[2]
TEXTS = Texts("objectives", 600, "abc")
WAS = Subject.config(CONFIG)
CUT = Subject.baseline("last")
REFIT = Subject.repaired(WAS, "refit")
PLANS = {
    REPAIRED + CONFIG: PLAN.edited(Edit("rcpu", texts=TEXTS)),
    KEPT: PLAN.edited(Edit("refit", texts=TEXTS)),
    KEPT + 1: StitchPlan.without({4, 5}, 6),
    HEALED: PLAN.edited(Edit("healed", (("before", str(WAS)), ("name", "1M"), ("weights", "w")), TEXTS)),
}
RIGHT = {(WAS, CONFIG): 4, (REFIT, KEPT): 10, (CUT, KEPT + 1): 4}


@pytest.fixture
def run(tmp_path: Path, tiny_family: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """One searched plan, and the same repaired twice and healed, and a cut; three of them were judged."""
    monkeypatch.setenv("GPTAILOR_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(readers, "DEMO", tmp_path / "demo")
    folder = make_tiny_run(tmp_path / "runs", tiny_family)
    writer = RunWriter.open(folder)
    with writer.batch():
        for config_id, plan in PLANS.items():
            writer.record_plan(config_id, plan, 40_000 + config_id % 10)
        for (subject, config_id), right in RIGHT.items():
            plan_hash = PLANS.get(config_id, PLAN).hash
            score = Score("words", "acc", right / 16, 0.12, 16, True)
            writer.record_evaluation(Evaluation(subject, config_id, "test", score, NOW, plan_hash, 0.25))
            writer.record_examples(plan_hash, "words", "acc", "test", 0, [1] * right + [0] * (16 - right))
    return folder


def open_page(name: str, run: RunFolder, config_id: int) -> AppTest:
    app = AppTest.from_file(str(ROOT / "streamlit_app.py"), default_timeout=90).run()
    app.switch_page(f"pages/{name}.py")
    app.query_params["run"], app.query_params["config"] = run.run_id, str(config_id)
    app.run()
    assert not app.exception and app.query_params["config"] == str(config_id), "the link opens this plan"
    return app


def words(app: AppTest) -> str:
    kinds = (app.markdown, app.caption, app.info)
    return "\n".join(element.value for kind in kinds for element in kind).replace("\\", "").replace("\u2060", "")


def framed(app: AppTest) -> int:
    """How many charts frame layers."""
    return sum("datum.fitted" in chart.proto.spec for chart in app.get("vega_lite_chart"))


def look_at(app: AppTest, config_id: int) -> str:
    app.selectbox(key="select.config").set_value(config_id).run()
    assert not app.exception
    return words(app)


def test_they_stand_behind_the_searched_plans_in_words_and_their_links_open(run: RunFolder) -> None:
    app = open_page("5_Layers", run, KEPT)
    assert app.selectbox(key="select.config").options == [
        "Plan 7 · 83.3 % (best)",
        "Plan 7, repaired",
        "Plan 7, repaired (refit) · 0.625 held out",
        "Plan 7, healed (1M)",
        "last on base · 0.250 held out",
    ]
    shown = words(app)
    assert "The build of plan 7, repaired (refit)" in shown and "Framed: weights that were repaired by refit." in shown
    assert framed(app) == 1, "the grid of sources and layers"
    assert "Framed: weights that were healed." in look_at(app, HEALED)
    shown = look_at(app, KEPT + 1)
    assert "The build of last on base" in shown and "Framed" not in shown and not framed(app)


@pytest.mark.usefixtures("run")
def test_whose_weights_were_fitted() -> None:
    """Those before the gaps; from the first gap on; all."""
    view = readers.read(readers.runs()[0])
    strips = {config_id: view.strip(config_id) for config_id in (CONFIG, REPAIRED + CONFIG, KEPT, HEALED)}
    fitted = [set(one.loc[one["fitted"] != "", "layer"]) for one in strips.values()]
    assert fitted == [set(), {1, 3}, {1, 3, 5}, {0, 1, 3, 5}]


def test_the_models_page_shows_what_is_known_of_them(run: RunFolder) -> None:
    app = open_page("7_Models", run, KEPT)
    metrics = {metric.label: metric.value for metric in app.metric}
    assert metrics["Layers"] == "4 of 6" and metrics["Held-out average"] == "0.625 ± 0.120"
    shown = words(app)
    assert "Plan 7, repaired (refit) is ahead of Plan 7 by 0.375 in acc on words" in shown
    assert "Plan 7, repaired (refit) is ahead of last on base by 0.375 in acc on words" in shown
    assert "1 of 1 held-out result stored" in shown and "#### Export" in shown and "#### Heal" in shown
    assert framed(app) == 1, "the strip"
    row = models.results(readers.read(readers.runs()[0]), KEPT).iloc[0]
    assert (row["Used in the search"], row["This plan"], row["Dense"]) == ("no", 0.625, 0.8)
    look_at(app, HEALED)
    assert {metric.label: metric.value for metric in app.metric}["Held-out average"] == "–"
    assert "Score it on the held-out benchmarks" in [found.label for found in app.button]
