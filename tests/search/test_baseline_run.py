"""Runs of baselines from the command line: every method on every source, in a run like any other."""

from __future__ import annotations

import io
import json
import re
import threading
from pathlib import Path

import pytest
import yaml
from helpers import kills
from helpers.command_line import gptailor, only_run, write_benchmark
from helpers.make_runs import make_run
from helpers.planted import IDENTITIES, planted_family
from helpers.warm_engines import shared

from gptailor.baselines.registry import METHODS, cuts
from gptailor.errors import UserError
from gptailor.launch.engine import LOST, prepare
from gptailor.launch.supervisor import DEATHS
from gptailor.plan import StitchPlan
from gptailor.results import scores
from gptailor.results.summary import run_summary
from gptailor.schedule import schedule
from gptailor.search import baseline_run
from gptailor.search.baseline_run import BaselineRun
from gptailor.search.engine import run_engine
from gptailor.search.progress import Report
from gptailor.search.replay import read_history
from gptailor.search.selection import FINALISTS
from gptailor.spec.files import load_spec
from gptailor.spec.sections import Baseline
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.writer import RunWriter
from gptailor.trial import RunStatus, Subject


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controls")
    family = planted_family(folder / "family")
    write_benchmark(folder, "first_words", 24, 0)
    spec = {
        "name": "planted",
        "base_model": str(family / "base"),
        "candidates": {"math": str(family / "math")},
        "operations": ["remove", "select"],
        "remove": 2,
        "objectives": [{"benchmark": "first_words", "metric": "choice_prob"}],
        "held_out": [{"benchmark": "first_words", "metric": "acc"}],
        "include_path": [str(folder)],
        "budget": {"min": 6, "max": 18},
        "trials": 12,
        "device": "cpu",
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@pytest.fixture(scope="module")
def finished(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    runs = tmp_path_factory.mktemp("runs")
    done = gptailor("baseline", "all", run_file, "--runs", runs)
    assert done.returncode == 0, done.stdout + done.stderr
    return only_run(runs)


def test_every_method_on_every_source_is_a_trial(finished: RunFolder) -> None:
    tables = queries.read_run(finished)
    asked = cuts(load_spec(finished.spec), Baseline, 6)
    assert len(asked) == 2 * (len(Baseline) - 1 + METHODS[Baseline.RANDOM].seeds)
    assert list(tables.trials.trial_id) == list(range(len(asked)))
    assert tables.n_asked == run_summary(finished).n_asked == run_summary(finished).n_done == len(asked)
    assert set(tables.trials.status) == {"success"} and set(tables.trials.origin) == {"baseline"}
    assert set(tables.trials.budget) == {18} and set(tables.scores.n_samples) == {18}
    removed = tables.layers[tables.layers.operation == "removed"].groupby("config_id").size()
    assert set(removed) == {2}
    named = tables.evaluations[tables.evaluations.subject != "dense"]
    assert dict(zip(named.config_id, named.subject, strict=True)) == {
        i: str(cut.subject) for i, cut in enumerate(asked)
    }
    assert {"baseline:sleb", "baseline:sleb@math", "baseline:random-3@math"} <= set(named.subject)


DYING = """
import os
from gptailor.search.baseline_run import BaselineRun
from gptailor.search.engine import run_engine
from gptailor.search.progress import Report
from gptailor.store.folder import RunFolder
plan = BaselineRun._plan
def dying(self, scorer, trial_id, *others):
    if trial_id == 1 and "TOLD" not in arguments:
        os.kill(os.getpid(), 9)
    return plan(self, scorer, trial_id, *others)
BaselineRun._plan = dying
if "TOLD" in arguments:
    os.environ[DEATHS] = "SIGKILL: killed"
print("ended:", run_engine(RunFolder(__import__("pathlib").Path(arguments[0])), Report()))
"""


def test_a_method_that_kills_its_process_costs_its_own_trial_alone(run_file: Path, tmp_path: Path) -> None:
    spec = load_spec(run_file, ["baselines=[last, block_influence, sleb]", "baselines_on=[base]"])
    folder, code = prepare(tmp_path, spec), DYING.replace("DEATHS", repr(DEATHS))
    shared().run(code, folder.path)
    assert kills.status_of(folder) == LOST and list(queries.read_run(folder).trials.status) == ["success", "running"]
    assert "ended: finished" in shared().run(code, folder.path, "TOLD")
    tables = queries.read_run(folder)
    assert list(tables.trials.status) == ["success", "crashed", "success"]
    assert tables.trials.error[1].startswith("Died: the engine's process died 3 times while it ran this trial")
    removed = tables.layers[tables.layers.operation == "removed"].groupby("config_id").size()
    assert removed.to_dict() == {0: 2, 2: 2}, "the plan of the one that died was never known"


def test_it_says_how_far_a_method_is(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a method may score as many examples as the search with its selection of four rows."""
    monkeypatch.setattr(baseline_run, "SECONDS_BETWEEN_NOTES", -1.0)
    chooser = "{benchmark: first_words, metric: acc, split: 'validation[18:22]'}"
    changes = ["baselines=[greedy, sleb]", "baselines_on=[math]", "trials=9", f"selection=[{chooser}]"]
    spec = load_spec(run_file, changes)
    folder, told = prepare(tmp_path, spec), io.StringIO()
    assert run_engine(folder, Report(told)) is RunStatus.FINISHED
    allowed = sum(rung.examples for rung in schedule(spec.budget, 9)) + 4 * FINALISTS
    scored = re.findall(rf"baseline:greedy@math: (\d+) of {allowed} examples a benchmark so far", told.getvalue())
    assert len(scored) > 2 and sorted(map(int, scored)) == list(map(int, scored)) and int(scored[-1]) <= allowed
    assert "baseline:sleb@math: 2 passes over the calibration texts so far" in told.getvalue()


def test_layers_that_do_nothing_go_and_the_dense_score_stays(finished: RunFolder) -> None:
    tables = queries.read_run(finished)
    plans = {int(row.config_id): StitchPlan.from_json(json.loads(row.plan)) for row in tables.plans.itertuples()}
    found = tables.evaluations.set_index("subject")
    for source, layers in IDENTITIES.items():
        subject = "baseline:block_influence" + ("" if source == "base" else f"@{source}")
        plan = plans[int(found.loc[subject].config_id)]
        assert plan == StitchPlan.without(layers, 6, source)
        assert plan.hash == found.loc[subject].plan_hash
    dense = found.loc["dense"].set_index("n_samples").score[18]
    assert found.loc["baseline:block_influence"].score == pytest.approx(dense, abs=1e-6)


def test_what_a_method_cost_is_stored(finished: RunFolder) -> None:
    trials = queries.read_run(finished).trials
    spent = {facts["subject"]: facts for facts in map(json.loads, trials.configuration)}
    assert spent["baseline:block_influence"]["passes"] == 1
    assert spent["baseline:sleb@math"]["passes"] == 5.5
    assert spent["baseline:greedy"]["examples"] > 0 == spent["baseline:last"]["examples"]


def test_narrower_models_are_as_small_as_shorter_ones(finished: RunFolder) -> None:
    """The same parameters are gone, to one channel of one layer; BESA's zeros are parameters."""
    tables = queries.read_run(finished)
    sizes = tables.plans.set_index("config_id").n_parameters
    named = tables.evaluations.dropna(subset="config_id").set_index("subject").config_id.map(lambda c: sizes[int(c)])
    for place in ("", "@math"):
        shorter = named[f"baseline:last{place}"]
        for name in ("llm_pruner", "llm_pruner_mixed", "slimgpt"):
            assert named[f"baseline:{name}{place}"] == pytest.approx(shorter, abs=96)
        assert named[f"baseline:besa{place}"] == sizes.max() > shorter
    left = tables.layers.set_index("config_id")[["heads", "channels", "weights"]]
    ids = tables.evaluations.dropna(subset="config_id").set_index("subject").config_id.astype(int)
    slimgpt, besa = left.loc[ids["baseline:slimgpt"]], left.loc[ids["baseline:besa"]]
    assert slimgpt.iloc[0].tolist() == [1.0, 1.0, 1.0] and (slimgpt.iloc[-1] < 1).all(), "more goes in later layers"
    assert (besa[["heads", "channels"]] == 1).all(axis=None) and (besa.weights < 0.7).all()
    assert left.loc[ids["baseline:last"]].isna().all(axis=None)


def test_show_and_held_out_evaluation_take_it_as_a_run(finished: RunFolder) -> None:
    story = json.loads(gptailor("show", finished.run_id, "--runs", finished.root, "--json").stdout)
    assert story["status"] == "finished" and story["front"]
    done = gptailor("evaluate", finished.run_id, "--runs", finished.root, "--subjects", "dense,best")
    assert done.returncode == 0, done.stderr
    judged, believed = queries.read_run(finished).evaluations, scores.calibration(queries.read_run(finished))
    (best,) = set(judged[judged.split == "test"].subject) - {"dense"}
    assert believed[Subject.parse(best)] == max(kept for who, kept in believed.items() if who.config_id is not None)
    named = "baseline:sleb@math,baseline:last"
    done = gptailor("evaluate", finished.run_id, "--runs", finished.root, "--subjects", named)
    assert done.returncode == 0, done.stderr
    told = queries.read_run(finished).evaluations
    told = told[told.split == "test"].set_index("subject")
    plans = queries.read_run(finished).plans.set_index("config_id").plan_hash
    for subject in named.split(","):
        assert plans[int(told.loc[subject].config_id)] == told.loc[subject].plan_hash
    assert told.loc["dense"].chance == pytest.approx(1 / 3)
    text = gptailor("show", finished.run_id, "--runs", finished.root).stdout
    assert "Held out" in text and "baseline:sleb@math" in text


def test_some_of_the_models_may_be_named(run_file: Path) -> None:
    some = load_spec(run_file, ["baselines=[last, sleb]", "baselines_on=[math]"])
    assert [str(cut.subject) for cut in cuts(some, some.baselines, 6)] == ["baseline:last@math", "baseline:sleb@math"]
    with pytest.raises(UserError, match="baselines_on: 'prose' is neither 'base' nor a candidate"):
        load_spec(run_file, ["baselines=[last]", "baselines_on=[prose]"])


@pytest.mark.usefixtures("finished")
def test_it_goes_on_where_it_stopped(run_file: Path, tmp_path: Path) -> None:
    done = gptailor("baseline", "last,sleb", run_file, "--runs", tmp_path)
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path)
    before = queries.read_run(folder).trials
    again = gptailor("engine", folder.run_id, "--runs", tmp_path)
    assert again.returncode == 0 and "4 trials are stored" in again.stdout, again.stdout + again.stderr
    assert queries.read_run(folder).trials.started_at.tolist() == before.started_at.tolist()


def test_mistakes(run_file: Path, tmp_path: Path) -> None:
    done = gptailor("baseline", "magic", run_file, "--runs", tmp_path)
    assert done.returncode == 2 and "baselines.0" in done.stderr and "block_influence" in done.stderr
    done = gptailor(
        "baseline", "last", run_file, "--runs", tmp_path, "--set", "remove=0", "--set", "operations=[select]"
    )
    assert done.returncode == 2 and "they leave layers out" in done.stderr


def test_its_time_counts_earlier_sessions_and_no_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path, n_trials=12, status=RunStatus.STOPPED)
    spent = read_history(folder).seconds
    assert spent > queries.read_run(folder).trials.suggest_seconds.sum() > 0  # what making a plan took is part of it

    def run_of(walltime: str) -> BaselineRun:
        spec = load_spec(folder.spec).model_copy(update={"walltime": walltime})
        run = BaselineRun(folder, spec, RunWriter.open(folder), Report(io.StringIO()), threading.Event())
        assert not run._is_time_up, "waiting for a device and the references do not count"
        run._start_clock()
        return run

    assert run_of(f"{int(spent) - 5}s")._is_time_up
    run = run_of(f"{int(spent) + 60}s")
    assert not run._is_time_up
    before, asked = run.deadline, iter([True, True, False])
    monkeypatch.setattr("gptailor.launch.engine.asked", lambda _folder, what: what == "pause" and next(asked))
    run._wait_while_paused()
    assert run.deadline - before == pytest.approx(0.2, abs=0.15)
