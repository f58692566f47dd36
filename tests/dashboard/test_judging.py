"""Held-out averages where people look for them: the Models and the Compare page."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_run import CONFIG, NOW, PLAN, make_tiny_run
from streamlit.testing.v1 import AppTest

from gptailor.dashboard import readers
from gptailor.plan import StitchPlan
from gptailor.store.folder import RunFolder
from gptailor.store.writer import RunWriter
from gptailor.trial import Evaluation, Origin, Outcome, Score, Subject, Trial, TrialStatus

ROOT = Path(__file__).resolve().parents[2]
RIGHT = {f"config:{CONFIG}": 10, "baseline:sleb@math": 4}


@pytest.fixture
def runs(tmp_path: Path, tiny_family: Path, monkeypatch: pytest.MonkeyPatch) -> list[RunFolder]:
    """Two runs whose plan is ahead of a one-shot cut by six of sixteen held-out examples."""
    monkeypatch.setenv("GPTAILOR_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(readers, "DEMO", tmp_path / "demo")
    folders = [make_tiny_run(tmp_path / "runs", tiny_family, name) for name in ("tiny-one", "tiny-two")]
    for folder in folders:
        writer = RunWriter.open(folder)
        with writer.batch():
            for subject, right in RIGHT.items():
                plan_hash = PLAN.hash if subject.startswith("config") else "cut"
                config_id = CONFIG if subject.startswith("config") else None
                score = Score("words", "acc", right / 16, 0.12, 16, True)
                writer.record_evaluation(
                    Evaluation(Subject.parse(subject), config_id, "test", score, NOW, plan_hash, 0.25)
                )
                writer.record_examples(plan_hash, "words", "acc", "test", 0, [1] * right + [0] * (16 - right))
    return folders


def open_page(name: str, **query: str) -> AppTest:
    app = AppTest.from_file(str(ROOT / "streamlit_app.py"), default_timeout=90).run()
    app.switch_page(f"pages/{name}.py")
    for key, value in query.items():
        app.query_params[key] = value
    app.run()
    assert not app.exception
    return app


def words(app: AppTest) -> str:
    kinds = (app.markdown, app.caption, app.info)
    return "\n".join(element.value for kind in kinds for element in kind).replace("\\", "").replace("\u2060", "")


def test_the_models_page_sets_the_plan_against_the_strongest_cut(runs: list[RunFolder]) -> None:
    shown = words(open_page("7_Models", run=runs[0].run_id))
    assert "Held-out averages" in shown
    assert "Plan 7 is ahead of sleb on math by 0.375 in acc on words" in shown and "more than noise explains" in shown


def test_the_compare_page_says_how_far_a_model_can_be_cut(runs: list[RunFolder]) -> None:
    shown = words(open_page("6_Compare", runs=",".join(folder.run_id for folder in runs)))
    assert "How far can it be cut?" not in shown, "both remove as much"
    shorter = StitchPlan.without({1, 2, 3}, 6)
    writer = RunWriter.open(runs[1])
    with writer.batch():
        writer.record_plan(CONFIG + 1, shorter, 30_000)
        writer.start_trial(Trial(1, CONFIG + 1, 10, 0, Origin.MODEL, {}, NOW, 0.1))
        writer.finish_trial(
            1, Outcome(TrialStatus.SUCCESS, NOW, (Score("words", "acc", 0.9, 0.1, 10, True),), 0.1, 0.2)
        )
        score = Score("words", "acc", 0.25, 0.11, 16, True)
        best = Subject.config(CONFIG + 1)
        writer.record_evaluation(Evaluation(best, CONFIG + 1, "test", score, NOW, shorter.hash, 0.25))
        writer.record_examples(shorter.hash, "words", "acc", "test", 0, [1] * 4 + [0] * 12)
    shown = words(open_page("6_Compare", runs=",".join(folder.run_id for folder in runs)))
    assert "How far can it be cut?" in shown and "the limit is 50% removed" in shown


def test_the_compare_page_shows_baselines_beside_the_fronts(runs: list[RunFolder]) -> None:
    shown = words(open_page("6_Compare", runs=",".join(folder.run_id for folder in runs)))
    assert "Held-out averages of every run" in shown
