"""The whole engine on a tiny family: a run file in, scored trials out, twice the same, stopped and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import ROOT, gptailor, only_run

from gptailor.plan import StitchPlan
from gptailor.results.frames.seconds import seconds
from gptailor.schedule import schedule
from gptailor.spec.sections import Budget
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.trial import ItemKey
from gptailor.wording import duration


def results(folder: RunFolder) -> list[tuple[Any, ...]]:
    """What must not depend on when and how often the run was interrupted."""
    tables = queries.read_run(folder)
    hashes = dict(zip(tables.plans.config_id, tables.plans.plan_hash, strict=True))
    scores = tables.scores.set_index("trial_id")
    return [
        (t.trial_id, hashes[t.config_id], t.budget, t.status, scores.loc[[t.trial_id]].score.tolist())
        for t in tables.trials.itertuples()
    ]


@pytest.fixture(scope="module")
def finished(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    runs = tmp_path_factory.mktemp("runs")
    done = gptailor("search", run_file, "--runs", runs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trial 24/24" in done.stdout and "finished" in done.stdout
    return only_run(runs)


def test_every_trial_is_in_the_store(finished: RunFolder) -> None:
    tables = queries.read_run(finished)
    run = tables.runs.iloc[0]
    assert (run.status, run.n_layers, run.n_removed) == ("finished", 6, 2)
    assert len(tables.trials) == 24 and set(tables.trials.status) == {"success"}
    assert set(tables.trials.budget) == {6, 18, 54}
    assert len(tables.scores) == 48
    by_trial = tables.scores.merge(tables.trials, on="trial_id")
    small = by_trial[by_trial.benchmark == "other_words"]
    assert (small.n_samples == small.budget.clip(upper=40)).all(), "a small benchmark saturates below the budget"
    layers = tables.layers.groupby("config_id")
    assert (layers.size() == 6).all()
    assert (layers.apply(lambda g: (g.operation == "removed").sum()) == 2).all()
    assert set(tables.trials.origin) >= {"initial", "model"}


def test_references_are_scored_at_every_rung(finished: RunFolder) -> None:
    evaluations = queries.read_run(finished).evaluations
    assert set(evaluations.subject) == {"dense", "baseline:block_influence"}
    assert len(evaluations) == 2 * 2 * 3


def test_low_rungs_are_the_beginning_of_high_rungs(finished: RunFolder) -> None:
    """The score at 6 examples is the mean of the first six stored items; nothing was scored twice."""
    tables = queries.read_run(finished)
    examples = queries.load_examples(finished)
    hashes = dict(zip(tables.plans.config_id, tables.plans.plan_hash, strict=True))
    merged = tables.scores.merge(tables.trials, on="trial_id")
    for row in merged.itertuples():
        items = examples[ItemKey(hashes[row.config_id], str(row.benchmark), str(row.metric), "validation")]
        assert sum(items[: row.n_samples]) / row.n_samples == pytest.approx(row.score)


def test_show_tells_the_story(finished: RunFolder) -> None:
    story = json.loads(gptailor("show", finished.run_id, "--runs", finished.root, "--json").stdout)
    assert story["status"] == "finished"
    planned = {str(rung.budget): rung.trials for rung in schedule(Budget(min=6, max=54), 24)}
    assert story["trials"]["by_rung"] == planned
    assert story["front"] and all(set(plan["scores"]) == set(story["objectives"]) for plan in story["front"])
    text = gptailor("show", finished.run_id, "--runs", finished.root).stdout
    assert "removed" in text and "dense" in text and "block_influence" in text
    listed = json.loads(gptailor("runs", "--runs", finished.root, "--json").stdout)
    assert [run["run_id"] for run in listed] == [finished.run_id]


def test_every_second_of_the_engine_is_told_once(finished: RunFolder) -> None:
    tables = queries.read_run(finished)
    spent = tables.seconds.set_index("part").seconds
    assert {"start", "loading", "references", "suggest", "stitch", "score", "store"} <= set(spent.index)
    process = (tables.runs.ended_at - tables.seconds.began_at[0])[0].total_seconds()
    assert spent.sum() == pytest.approx(process, abs=0.5), "from the command to the last status, nothing twice"
    asked = tables.trials[["suggest_seconds", "stitch_seconds", "evaluate_seconds"]].sum()
    assert spent[["stitch", "score"]].sum() >= asked[["stitch_seconds", "evaluate_seconds"]].sum() * 0.95
    assert spent["suggest"] >= asked["suggest_seconds"] * 0.95
    story = json.loads(gptailor("show", finished.run_id, "--runs", finished.root, "--json").stdout)
    assert story["seconds_by_part"] == seconds(tables.seconds).set_index("part").seconds.round(3).to_dict()
    told = gptailor("show", finished.run_id, "--runs", finished.root).stdout
    assert f"references {duration(story['seconds_by_part']['references'])}" in told


def test_the_same_run_file_and_seed_give_the_same_trials(run_file: Path, finished: RunFolder, tmp_path: Path) -> None:
    assert gptailor("search", run_file, "--runs", tmp_path, PYTHONHASHSEED="7").returncode == 0
    assert results(only_run(tmp_path)) == results(finished)


@pytest.mark.slow
def test_killed_and_gone_on_with_it_ends_the_same(run_file: Path, finished: RunFolder, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gptailor", "search", str(run_file), "--runs", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as engine:
        assert engine.stdout is not None
        for line in engine.stdout:
            if line.startswith("trial 9/"):
                engine.send_signal(signal.SIGKILL)
                break
    folder = only_run(tmp_path)
    resumed = gptailor("engine", folder.run_id, "--runs", tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "trials are stored and will not be run again" in resumed.stdout
    assert results(folder) == results(finished)


def test_stop_leaves_a_clean_state(run_file: Path, finished: RunFolder, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gptailor", "search", str(run_file), "--runs", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout is not None
        for line in engine.stdout:
            if line.startswith("trial 5/"):
                engine.send_signal(signal.SIGINT)
                asked = time.monotonic()
                break
        rest = engine.stdout.read()
        assert engine.wait(timeout=20) == 130
    assert "stopped" in rest and "go on with it:  python -m gptailor resume" in rest and "Traceback" not in rest
    assert time.monotonic() - asked < 10
    folder = only_run(tmp_path)
    assert queries.read_run(folder).runs.iloc[0].status == "stopped"
    assert gptailor("engine", folder.run_id, "--runs", tmp_path).returncode == 0
    assert results(folder) == results(finished)


def test_ablations_use_their_operations_alone(run_file: Path, tmp_path: Path) -> None:
    for operations, kinds in [("[remove]", {"removed", "base"}), ("[remove, select]", {"removed", "base", "selected"})]:
        runs = tmp_path / operations.strip("[]").replace(", ", "_")
        done = gptailor("search", run_file, "--runs", runs, "--set", f"operations={operations}", "--set", "trials=9")
        assert done.returncode == 0, done.stderr
        assert set(queries.read_run(only_run(runs)).layers.operation) == kinds


def test_a_single_objective(run_file: Path, tmp_path: Path) -> None:
    one = "objectives=[{benchmark: first_words, metric: acc}]"
    done = gptailor("search", run_file, "--runs", tmp_path, "--set", one, "--set", "trials=13")
    assert done.returncode == 0, done.stderr
    said = "first_words/acc: the dense base scores"  # no better than guessing: its weights are drawn at random
    assert said in done.stdout and "examples, guessing 0." in done.stdout
    story = json.loads(gptailor("show", only_run(tmp_path).run_id, "--runs", tmp_path, "--json").stdout)
    assert len({plan["scores"]["first_words/acc"]["score"] for plan in story["front"]}) == 1


@pytest.mark.parametrize("trials", [1, 3])
def test_few_trials(run_file: Path, tmp_path: Path, trials: int) -> None:
    """Fewer than the plans that a search of several rungs begins with; it can be given more."""
    done = gptailor("search", run_file, "--runs", tmp_path, "--set", f"trials={trials}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert queries.read_run(only_run(tmp_path)).trials.status.tolist() == ["success"] * trials


def test_a_candidate_that_is_not_numbers_fails_its_trials_and_not_the_run(
    run_file: Path, tiny_family: Path, tmp_path: Path
) -> None:
    """A candidate whose weights are not numbers: each trial that uses it is a failure, never a score."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (tiny_family / "math").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    save_file({k: v * float("nan") if "layers." in k else v for k, v in weights.items()}, broken / "model.safetensors")
    changes = [f"candidates={{math: {broken}}}", "operations=[remove, select]", "trials=40"]
    done = gptailor("search", run_file, "--runs", tmp_path / "runs", *[x for c in changes for x in ("--set", c)])
    folder = only_run(tmp_path / "runs")
    tables = queries.read_run(folder)
    crashed = tables.trials[tables.trials.status == "crashed"]
    assert len(crashed) and crashed.error.str.startswith("NonFinite").all()
    assert not set(tables.scores.trial_id) & set(crashed.trial_id)
    uses = {
        row.config_id
        for row in tables.plans.itertuples()
        if "math" in StitchPlan.from_json(json.loads(row.plan)).candidates
    }
    assert set(crashed.config_id) == uses & set(tables.trials.config_id)
    assert done.returncode == 0 and len(tables.trials) == 40, done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("base_model=no/such/model", "no/such/model"),
        ("remove=6", "remove: 6 takes 6 of 6 layers"),
        ("objectives.0.benchmark=first_wrods", "first_words"),
        ("objectives.0.metric=accuracy", "acc"),
        ("held_out=[{benchmark: last_wrods}]", "last_wrods"),
        ("selection=[{benchmark: last_wrods}]", "last_wrods"),
        ("merge.method=stir", "stir"),
    ],
)
def test_mistakes_are_told_without_a_traceback(run_file: Path, tmp_path: Path, change: str, message: str) -> None:
    done = gptailor("search", run_file, "--runs", tmp_path, "--set", change)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr + done.stdout


def test_commands_refuse_what_is_not_there(tmp_path: Path) -> None:
    for command in (["show", "nothing"], ["engine", "nothing"], ["show", "../up"], ["search", "none.yaml"]):
        done = gptailor(*command, "--runs", tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("gptailor: ") and "Traceback" not in done.stderr
    assert "No runs in" in gptailor("runs", "--runs", tmp_path).stdout
