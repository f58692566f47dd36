"""One question, one answer: everybody names the same best plan, with the same numbers.

The selection split prefers the plan that is second by the search's own scores. That plan scored 0 on one of the
held-out benchmarks.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest
from helpers.make_runs import START, make_run
from streamlit.testing.v1 import AppTest

from gptailor.__main__ import command_parser, main
from gptailor.commands.evaluate import DEFAULT_SUBJECTS
from gptailor.commands.experiment import table
from gptailor.commands.subjects import find_subjects
from gptailor.dashboard import readers
from gptailor.measures import MAX_HYPERVOLUME, hypervolume
from gptailor.results import scores
from gptailor.results.comparison import write_comparison
from gptailor.results.frames.view import View
from gptailor.results.report import write_report
from gptailor.results.summary import list_runs, run_summary
from gptailor.search.selection import finalists
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.writer import RunWriter
from gptailor.trial import Evaluation, Score, Subject

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name in ("chosen", "other"):
        folder = make_run(root, name, n_trials=90, run_id=name, selection=("boolq",), seed=len(name))
        best = _best(folder)
        last = queries.read_run(folder).evaluations.query("subject == 'dense' and benchmark == 'winogrande_local'")
        zero = Score("winogrande_local", "acc_norm", 0.0, 0.0, int(last.n_samples.max()), higher_is_better=True)
        RunWriter.open(folder).record_evaluation(Evaluation(Subject.config(best), best, "test", zero, START))
    return root


def _best(folder: RunFolder) -> int:
    """The plan that was best on the selection split, as the rows say."""
    rows = queries.read_run(folder).evaluations
    own = rows[(rows.benchmark == "boolq") & rows.subject.str.startswith("config:")]
    return int(own.loc[own.score.idxmax(), "config_id"])


@pytest.fixture
def chosen(runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[RunFolder]:
    monkeypatch.setenv("GPTAILOR_RUNS", str(runs))
    monkeypatch.setattr(readers, "DEMO", tmp_path / "none")
    yield RunFolder.of(runs, "chosen")


def share(folder: RunFolder) -> str:
    """The mean retention of the best plan on the objectives, worked out by hand from the rows."""
    tables = queries.read_run(folder)
    spec = json.loads(tables.runs.spec[0])
    trials = tables.trials[(tables.trials.config_id == _best(folder)) & (tables.trials.budget == spec["budget"]["max"])]
    own = tables.scores[tables.scores.trial_id == trials.trial_id.iloc[-1]].set_index("benchmark").score
    dense = tables.evaluations[(tables.evaluations.subject == "dense") & (tables.evaluations.split == "validation")]
    whole = dense.set_index("benchmark").score
    return f"{100 * sum(own[name] / whole[name] for name in own.index) / len(own):.1f}"


def page(name: str, **query: str) -> AppTest:
    app = AppTest.from_file(str(ROOT / "streamlit_app.py"), default_timeout=120)
    for key, value in query.items():
        app.query_params[key] = value
    if name:
        app.switch_page(f"pages/{name}.py")
    app.run()
    assert not app.exception, app.exception[0].message
    return app


def words(app: AppTest) -> str:
    kinds = (app.markdown, app.caption, app.info)
    text = "\n".join(element.value for kind in kinds for element in kind)
    return text.replace("\\", "").replace("\u2060", "")


def test_the_search_alone_would_have_said_another(chosen: RunFolder) -> None:
    found = scores.searched(queries.read_run(chosen))
    assert found.average.idxmax() != _best(chosen) and len(found.front) > 1


def test_pages_name_the_chosen_plan(chosen: RunFolder) -> None:
    best, kept = _best(chosen), share(chosen)
    home = page("").dataframe[0].value
    row = home[home["name"].str.startswith("chosen")].iloc[0]
    assert f"{row['retention']:.1f}" == kept
    for name in ("2_Progress", "4_Trade-offs", "7_Models"):
        app = page(name, run="chosen")
        assert f"{kept} %" in " ".join(str(metric.value) for metric in app.metric), name
    for name in ("4_Trade-offs", "5_Layers", "7_Models"):
        app = page(name, run="chosen")
        (plan,) = [box for box in app.selectbox if box.label == "Plan"]
        assert plan.value == best and "(best, chosen by the selection)" in next(
            option for option in plan.options if option.startswith(f"Plan {best}")
        ), name
    page("3_Fidelity", run="chosen")


def test_compare_names_the_chosen_plans_and_shows_held_out_scores_alone(chosen: RunFolder) -> None:
    app = page("6_Compare", runs="chosen,other")
    kept = share(chosen)
    assert f"{kept} %" in words(app)
    tables = [frame.value for frame in app.dataframe]
    outside = next(frame for frame in tables if frame.iloc[:, 0].str.contains("arc_easy_local").any())
    assert not outside.iloc[:, 0].str.contains("boolq").any(), "the selection split is not held out"
    assert outside.iloc[:, 0].tolist() == ["arc_easy_local/acc_norm (test)", "winogrande_local/acc_norm (test)"]


def test_a_held_out_score_of_0_keeps_nothing(chosen: RunFolder) -> None:
    from gptailor.dashboard import models
    from gptailor.results.frames import compare

    view, best = View(queries.read_run(chosen)), _best(chosen)
    models_page = models.results(view, best)
    assert models_page.loc[models_page.Benchmark.str.startswith("winogrande"), "retention"].tolist() == [0.0]
    found = compare.held_out_scores(compare.entries([("chosen", view)]))
    assert found.loc[found.measure.str.startswith("winogrande"), "retention"].tolist() == [0.0]
    judged = scores.judged(view.tables)
    own = judged[(judged.subject == f"config:{best}") & (judged.benchmark == "winogrande_local")]
    assert own.retention.tolist() == [0.0]


def test_the_command_line_names_it(chosen: RunFolder, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best, kept = _best(chosen), share(chosen)
    assert main(["show", "chosen", "--runs", str(runs)]) == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith(f"config {best} (best)")]
    assert f"{kept}%" in line and f"export chosen {best} OUT" in shown
    assert main(["show", "chosen", "--runs", str(runs), "--json"]) == 0
    story = json.loads(capsys.readouterr().out)
    assert story["best"]["config_id"] == best and f"{100 * story['best']['retention']:.1f}" == kept
    assert story["held_out"]["best"] == f"config:{best}" and story["selection"]["subject"] == f"config:{best}"
    assert main(["runs", "--runs", str(runs), "--json"]) == 0
    (listed,) = [run for run in json.loads(capsys.readouterr().out) if run["run_id"] == "chosen"]
    assert listed["best_config"] == best and f"{100 * listed['retention']:.1f}" == kept
    head, row = table({"chosen": chosen})
    told = dict(zip(head, row, strict=True))
    assert (told["plan"], told["calibration"]) == (str(best), f"{kept}%")
    assert [one.config_id for one in find_subjects(chosen, ["best"])] == [best]
    assert best in [one.config_id for one in find_subjects(chosen, DEFAULT_SUBJECTS)]
    assert not command_parser().parse_args(["evaluate", "chosen"]).subjects, "which leaves them to the command"


def test_both_reports_name_it(chosen: RunFolder, runs: Path, tmp_path: Path) -> None:
    best, kept = _best(chosen), share(chosen)
    report = unescape(write_report(chosen, tmp_path / "one.html").read_text())
    assert f"The best plan is {best}: {kept} %" in report
    assert f"Plan {best} and block_influence on base have no examples in common" in report, "the paired test is of it"
    both = [chosen, RunFolder.of(runs, "other")]
    comparison = unescape(write_comparison("two", both, tmp_path / "two.html").read_text())
    assert f"{kept} %" in comparison
    outside = comparison.split("Held-out results, not seen by the search:")[1].split("</table>")[0]
    assert "arc_easy_local" in outside and "boolq" not in outside


def test_the_front_is_one(chosen: RunFolder) -> None:
    from gptailor.results.frames import tradeoffs
    from gptailor.results.story import run_json

    tables = queries.read_run(chosen)
    view, found = View(tables), scores.searched(tables)
    on_page = view.plans.loc[tradeoffs.front_of_all(view.plans, view.facts), "config_id"].astype(int).tolist()
    assert on_page == found.front == [plan["config_id"] for plan in run_json(chosen)["front"]]
    assert [one.config_id for one in find_subjects(chosen, ["front"])] == found.front
    assert set(list(finalists(chosen))[:1]) == {found.front[0]}
    volumes = (found.hypervolume, tradeoffs.hypervolume_of_all(view.plans, view.facts), run_summary(chosen).hypervolume)
    assert volumes == pytest.approx([found.hypervolume] * 3)
    assert view.plans["average"].tolist() == pytest.approx(found.average[view.plans["config_id"].astype(int)].tolist())


@pytest.mark.parametrize("n_objectives", [12, 14])
def test_many_objectives_take_a_moment(tmp_path: Path, n_objectives: int) -> None:
    """Their exact hypervolume takes ten seconds, or for ever."""
    names = [f"benchmark_{i}" for i in range(n_objectives)]
    folder = make_run(tmp_path, n_trials=200, benchmarks=names, failures=0.0)
    tables = queries.read_run(folder)
    points = scores.searched(tables).gains
    assert len(points) > 20 and hypervolume(points, [0.0] * n_objectives) is None and MAX_HYPERVOLUME < 12
    from gptailor.results.story import run_json

    before = time.process_time()
    story = run_json(folder)
    finalists(folder)
    table({"a": folder})
    (summary,) = list_runs(tmp_path)
    assert time.process_time() - before < 8
    assert story["hypervolume"] is summary.hypervolume is None and len(story["front"]) > 10
    assert re.search(r"\d", str(summary.retention))
