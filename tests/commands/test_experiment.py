"""Experiments: the files in data/experiments are right; a set of runs ends in one table and goes on where it was."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.command_line import gptailor, write_benchmark
from helpers.make_runs import make_run
from helpers.tiny_run import CONFIG, make_tiny_run, tiny_spec

from gptailor.commands.check import check
from gptailor.commands.experiment import Experiment, fronts, load_experiment, over_seeds, table
from gptailor.errors import UserError
from gptailor.measures import hypervolume
from gptailor.results import scores
from gptailor.results.fronts import attained, volume
from gptailor.spec.files import load_spec
from gptailor.spec.sections import Baseline, SpaceOperation
from gptailor.store import queries
from gptailor.store.writer import RunWriter
from gptailor.trial import Evaluation, Score, Subject

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "data" / "presets" / "demo.yaml")
FILES = sorted((ROOT / "data" / "experiments").glob("*.yaml"))
FOR_EVERY_FAMILY = [path for path in FILES if path.stem not in ("worth", "growing", "training")]
"""Without those that name a candidate, ask for a pool of twelve, or name families of their own."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_files_are_right(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = load_experiment(path)
    assert found.name == path.stem and len(found.runs) >= 3 and found.evaluate
    assert len({spec.to_yaml() for spec in found.runs.values()}) == len(found.runs)
    assert {spec.name for spec in found.runs.values()} == {f"{found.name}: {label}" for label in found.runs}


def test_another_family_and_changes_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    llama = "data/presets/llama-2-7b.yaml"
    found = load_experiment("data/experiments/operations.yaml", llama, ["trials=7"])
    assert {spec.trials for spec in found.runs.values()} == {7}
    assert all("llama" in spec.base_model.lower() for spec in found.runs.values())
    assert found.runs["remove, fold"].operations == (SpaceOperation.REMOVE, SpaceOperation.FOLD)
    assert Baseline.BLOCK_INFLUENCE in found.runs["one-shot"].baselines


@pytest.mark.parametrize("family", ["data/presets/llama-2-7b.yaml", "data/experiments/families/smollm2.yaml"])
@pytest.mark.parametrize("path", FOR_EVERY_FAMILY, ids=lambda path: path.stem)
def test_every_experiment_fits_every_family(path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found, spec = load_experiment(path, family), load_spec(family)
    for asked in found.runs.values():
        assert asked.base_model in (spec.base_model, *spec.candidates.values())
        assert set(asked.candidates) <= set(spec.candidates)
        named = [objective.benchmark for objective in spec.objectives]
        assert [objective.benchmark for objective in asked.objectives] == named[: len(asked.objectives)]


@pytest.mark.parametrize("path", FOR_EVERY_FAMILY, ids=lambda path: path.stem)
def test_every_experiment_passes_check_for_llama(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the weights, which are not here: its last run, which asks for most."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(ROOT / "nowhere"))
    spec = list(load_experiment(path, "data/presets/llama-2-7b.yaml").runs.values())[-1]
    problems = check(spec).problems
    assert len(problems) == 1 + len(spec.candidates)
    assert all("not in the local hub cache" in problem for problem in problems)


def test_each_run_once_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "x.yaml"
    file.write_text("run: data/presets/demo.yaml\nseeds: 2\nruns: {a: {}, b: {operations: [remove]}}")
    found = load_experiment(file).runs
    assert list(found) == ["a, seed 0", "b, seed 0", "a, seed 1", "b, seed 1"]
    assert [spec.seed for spec in found.values()] == [0, 0, 1, 1]
    for wrong in ("0", "1.5", "yes", "101"):
        file.write_text(f"run: data/presets/demo.yaml\nseeds: {wrong}\nruns: {{a: {{}}}}")
        with pytest.raises(UserError, match=r"seeds: expected a number from 1 to 100; got "):
            load_experiment(file)


def test_one_model_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "x.yaml"
    runs = {f"{number}": {"model": number, "operations": ["remove"]} for number in range(4)}
    file.write_text(yaml.safe_dump({"run": "data/presets/demo.yaml", "runs": runs}))
    demo, found = load_spec("data/presets/demo.yaml"), load_experiment(file).runs
    assert [spec.base_model for spec in found.values()] == [demo.base_model, *demo.candidates.values()]
    assert not any(spec.candidates for spec in found.values())
    file.write_text("run: data/presets/demo.yaml\nruns: {a: {model: 4, operations: [remove]}}")
    with pytest.raises(UserError, match=r"runs.a.model: expected a number from 0, the base, to 3, the last candidate"):
        load_experiment(file)


def test_short_keys_depend_on_the_run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    pools = load_experiment("data/experiments/pools.yaml").runs
    assert [len(spec.candidates) for spec in pools.values()] == [1, 2, 3]
    elsewhere = ["candidates={a: models/a, b: models/b, c: models/c}", "seed=3"]
    moved = load_experiment("data/experiments/pools.yaml", changes=elsewhere).runs
    assert [list(spec.candidates) for spec in moved.values()] == [["a"], ["a", "b"], ["a", "b", "c"]]
    assert all(spec.seed == 3 for spec in moved.values())
    runs = load_experiment("data/experiments/objectives.yaml", "data/experiments/families/smollm2.yaml").runs
    assert [len(spec.objectives) for spec in runs.values()] == [1, 1, 1, 3, 3, 3]
    assert {objective.metric for objective in runs["several, perplexity"].objectives} == {"answer_perplexity"}
    for wrong in ("4", "0", "yes", "two"):
        (tmp_path / "x.yaml").write_text(f"run: data/presets/demo.yaml\nruns: {{a: {{first_candidates: {wrong}}}}}")
        with pytest.raises(
            UserError, match=r"runs.a.first_candidates: expected a number from 1 to 3, the candidates there"
        ):
            load_experiment(tmp_path / "x.yaml")


def test_what_needs_the_dense_base_is_blank_without_it(tmp_path: Path) -> None:
    folders = {name: make_tiny_run(tmp_path / "runs", tmp_path, name, name == "judged") for name in ("judged", "not")}
    head, judged, without = (dict(zip(table(folders)[0], row, strict=True)) for row in table(folders))
    assert judged["retention"] == "50.0%" and judged["held-out average"] == without["held-out average"] != ""
    assert (without["retention"], without["gap"]) == ("", "") and set(head) == set(judged)


def test_runs_that_differ_in_their_seed_are_put_together(tmp_path: Path) -> None:
    labels = ("search, seed 0", "search, seed 1", "other", "other, unlike")
    folders = {label: make_tiny_run(tmp_path / "runs", tmp_path, f"run-{k}") for k, label in enumerate(labels)}
    for label, other in (("search, seed 1", {"seed": 1}), ("other", {"trials": 30}), ("other, unlike", {"trials": 31})):
        folders[label].spec.write_text(tiny_spec(tmp_path, **other).to_yaml())
    writer = RunWriter.open(folders["search, seed 1"])
    with writer.batch():
        score = Score("words", "acc", 0.5, 0.12, 16, True)
        writer.record_evaluation(Evaluation(Subject.config(CONFIG), CONFIG, "test", score, datetime.now(UTC)))
    head, *rows = over_seeds(folders)
    assert rows == [("search", "2", "0.4500", "0.0707")], "0.4 and 0.5"
    assert len(head) == 4 and over_seeds({"other": folders["other"]}) == [head]


def test_a_plan_that_some_benchmarks_still_lack_is_not_judged(tmp_path: Path) -> None:
    folder = make_tiny_run(tmp_path / "runs", tmp_path)
    held_out = [{"benchmark": name, "metric": "acc", "split": "test"} for name in ("words", "further_words")]
    column = table({"a": folder})[0].index("held-out average")
    assert table({"a": folder})[1][column]
    folder.spec.write_text(tiny_spec(tmp_path, held_out=held_out).to_yaml())
    assert not table({"a": folder})[1][column], "an average over other benchmarks than the other runs' does not compare"


def test_groups_of_runs_have_fronts_of_quality_against_size(tmp_path: Path) -> None:
    """One run with a range against two of one size: what each attains at every size, and how much that covers."""
    made = {
        "range": make_run(tmp_path, "range", n_trials=90, n_removed=12, fewest_removed=4, failures=0.0),
        "eight": make_run(tmp_path, "eight", n_trials=30, n_removed=8, failures=0.0),
        "four": make_run(tmp_path, "four", n_trials=30, n_removed=4, failures=0.0),
    }
    specs = {label: load_spec(folder.spec) for label, folder in made.items()}
    asked = Experiment("x", specs, (), {"one": ("range",), "two": ("eight", "four")})
    covers, sizes = ({row[0]: row[1:] for row in told} for told in fronts(asked, made))
    assert covers["two"][:2] == ("2", "60") and covers["one"][:2] == ("1", "90")
    points = []
    for label in ("eight", "four"):
        tables = queries.read_run(made[label])
        best = scores.best(tables)
        assert best is not None
        kept = scores.calibration(tables)[best]
        number = specs[label].n_removed(30)
        points.append([kept, number / 30])
        assert sizes[str(30 - number)][2] == f"{kept:.1%}"
    assert covers["two"][2] == f"{hypervolume(points, [0.0, 0.0]):.4f}"
    found = attained(queries.read_run(made["range"]))
    assert len(found) > 5 and covers["one"][2] == f"{volume([found], 'calibration'):.4f}"
    assert float(covers["one"][2]) >= max(found["calibration"] * found["gone"]) - 1e-4
    assert covers["one"][3] == "", "not every best plan is judged"


@pytest.mark.slow
def test_runs_end_in_one_table(tiny_family: Path, tmp_path: Path) -> None:
    write_benchmark(tmp_path, "first_words", 20, 0)
    run = {
        "name": "x",
        "base_model": str(tiny_family / "base"),
        "candidates": {"math": str(tiny_family / "math")},
        "operations": ["remove"],
        "remove": 2,
        "objectives": [{"benchmark": "first_words", "metric": "acc"}],
        "held_out": [{"benchmark": "first_words", "metric": "acc_norm"}],
        "include_path": [str(tmp_path)],
        "budget": {"min": 6, "max": 6},
        "trials": 4,
        "device": "cpu",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    asked = {
        "run": str(tmp_path / "run.yaml"),
        "runs": {"search": {"operations": ["remove", "fold"]}, "one-shot": {"baselines": ["last"]}},
        "evaluate": ["dense", "front"],
        "redundancy": ["one-shot"],
    }
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(asked, sort_keys=False))
    report = tmp_path / "small.html"
    done = gptailor("experiment", file, "--runs", tmp_path / "runs", "--report", report, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"small", "search", "one-shot"} <= set(re.findall(r"[\w-]+", report.read_text()))
    lines = [
        line for line in done.stdout.splitlines() if "finished" in line and line.startswith(("search", "one-shot"))
    ]
    assert len(lines) == 2 and all(line.count("%") == 3 and "±" in line for line in lines), done.stdout
    again = gptailor("experiment", file, "--runs", tmp_path / "runs")
    assert again.returncode == 0 and "rung" not in again.stdout, "nothing is run twice"
    assert done.stdout.count("BI: Block Influence") == 1 and "BI: Block" not in again.stdout, "measured once"
    assert len([path for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")]) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"runs": {}}, "at least one entry under runs"),
        ({"runs": {"a": {}}, "step": 1}, "unknown key 'step'"),
        ({"runs": {"a": {}}}, "run: name the run file to start from"),
        ({"run": "none.yaml", "runs": {"a": {}}}, "no such file"),
        ({"run": "r.yaml", "runs": {"a": 3}}, "runs.a: expected keys of a run file"),
        ({"run": DEMO, "runs": {"a": {}}, "fronts": {"x": ["b"]}}, "fronts.x: there is no run 'b'; the runs are a"),
        ({"run": DEMO, "runs": {"a": {}}, "fronts": ["a"]}, "fronts: expected names, each with a list of labels"),
        ({"run": DEMO, "runs": {"a": {}}, "redundancy": ["b"]}, "redundancy: there is no run 'b'; the runs are a"),
        ({"run": DEMO, "runs": {"a": {}}, "redundancy": "a"}, "redundancy: expected a list of labels of runs"),
    ],
)
def test_mistakes(tmp_path: Path, data: dict[Any, Any], message: str) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(UserError, match=message):
        load_experiment(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="no such file"):
        load_experiment(tmp_path / "none.yaml")
    (tmp_path / "x.yaml").write_text("run: r.yaml\nruns: {a: {trials: 3}, a: {trials: 4}}")
    with pytest.raises(UserError, match="'a' is given twice"):
        load_experiment(tmp_path / "x.yaml")
