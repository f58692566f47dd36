"""The selection split: scored once, after the search, on its own examples; the choice, and the optimism removed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers.command_line import gptailor, only_run, write_benchmark
from helpers.make_runs import make_run
from helpers.run_tables import SPEC, run_tables

from gptailor.dashboard import models, pickers
from gptailor.errors import UserError
from gptailor.plan import StitchPlan
from gptailor.results import scores
from gptailor.results.frames.view import View
from gptailor.search.selection import FINALISTS, finalists
from gptailor.spec.files import build_spec
from gptailor.store import queries
from gptailor.store.writer import RunWriter
from gptailor.trial import REPAIRED, Evaluation, Score, Subject, now

RUN = SPEC | {
    "objectives": [{"benchmark": "piqa", "metric": "acc", "split": "validation"}],
    "selection": [{"benchmark": "piqa", "metric": "acc", "split": "train"}],
    "held_out": [{"benchmark": "piqa", "metric": "acc", "split": "test"}],
}


def test_the_choice_is_by_the_selection_split_alone() -> None:
    promised, kept, judged = {1: 0.78, 2: 0.74, 3: 0.70}, {1: 0.66, 2: 0.72, 3: 0.64}, {1: 0.80, 2: 0.50, 3: 0.50}
    trials = [{"config_id": c, "budget": 900, "scores": {"piqa/acc": s}} for c, s in promised.items()]
    found = [
        {"subject": f"config:{c}", "name": "piqa/acc", "score": s, "n_samples": 500, "split": split}
        for split, scores in (("test", judged), ("train", kept))
        for c, s in scores.items()
    ]
    for split, n in (("validation", 900), ("train", 500), ("test", 500)):
        found.append({"subject": "dense", "name": "piqa/acc", "score": 0.8, "n_samples": n, "split": split})
    plans = {c: StitchPlan.without([c - 1], 4) for c in promised}
    tables = run_tables(trials, plans, found, spec=RUN)
    chosen = scores.choice(tables)
    assert chosen is not None
    assert (chosen.subject, chosen.by_search, chosen.finalists) == (Subject.config(2), Subject.config(1), 3)
    assert (chosen.retention, chosen.promised) == pytest.approx((0.9, 0.925))
    assert chosen.by_search_retention == pytest.approx(0.825)
    assert chosen.optimism == pytest.approx((0.12 + 0.02 + 0.06) / 3 / 0.8)
    text = scores.choice_text(chosen)
    assert (
        "plan 2 is best" in text and "would have chosen plan 1" in text and "promised 8.3% more than was kept" in text
    )
    modest = scores.choice_text(replace(chosen, optimism=-0.059))
    assert "promised 5.9% less than was kept" in modest
    assert scores.choice(run_tables(trials, plans, [], spec=RUN)) is None
    assert pickers.chosen_plan(View(tables)) == 2, "pages begin with the run's choice"
    assert list(models.results(View(tables), 2)["Used in the search"]) == ["yes", "to choose", "no"]
    without = run_tables(trials, plans, found, spec=RUN | {"selection": []})
    assert pickers.chosen_plan(View(without)) == 1


@pytest.mark.parametrize("split", ["validation", "test"])
def test_it_needs_a_split_of_its_own(split: str) -> None:
    data = RUN | {"operations": ["remove"], "selection": [{"benchmark": "piqa", "metric": "acc", "split": split}]}
    with pytest.raises(UserError, match=f"selection.0: piqa on its {split} split is (an objective|held out)"):
        build_spec(data)


def test_what_the_search_does_not_read_of_its_split_will_do() -> None:
    data = RUN | {"operations": ["remove"], "budget": {"min": 5, "max": 20}, "held_out": []}
    for split, fits in (("validation[20:]", True), ("validation[20:90]", True), ("validation[19:]", False)):
        asked = data | {"selection": [{"benchmark": "piqa", "metric": "acc", "split": split}]}
        if fits:
            assert build_spec(asked).selection[0].part[0] == 20
        else:
            with pytest.raises(UserError, match=r"does not read of it, validation\[20:\]"):
                build_spec(asked)
    chooser = {"benchmark": "piqa", "metric": "acc", "split": "validation[20:60]"}
    judge = {"benchmark": "piqa", "metric": "acc_norm"}
    build_spec(data | {"selection": [chooser], "held_out": [judge | {"split": "validation[60:]"}]})
    with pytest.raises(UserError, match="the selection needs examples of its own"):
        build_spec(data | {"selection": [chooser], "held_out": [judge | {"split": "validation[59:]"}]})
    with pytest.raises(UserError, match=r"held_out.0: piqa on its validation\[19:\] split is an objective"):
        build_spec(data | {"held_out": [judge | {"split": "validation[19:]"}]})


def test_finalists_differ_in_what_they_remove(tmp_path: Path) -> None:
    """Six layers, one removed: six cuts at most, each by its best plan before any other plan of the same cut."""
    folder = make_run(tmp_path, n_trials=120, n_layers=6, n_removed=1, failures=0.0)
    believed = scores.calibration(queries.read_run(folder))
    plans = finalists(folder)
    cuts = [plan.removed for plan in plans.values()]
    n = len(set(cuts))
    assert len(plans) == FINALISTS and 1 < n <= 6 and len(set(cuts[:n])) == n
    assert sorted(plans, key=lambda config_id: -believed[Subject.config(config_id)])[0] in list(plans)[:n]
    best = next(iter(plans))
    writer = RunWriter.open(folder)  # as after a selection that repaired it and found that better, and an extension
    writer.record_plan(REPAIRED + best, plans[best], 1)
    subject = Subject.config(REPAIRED + best)
    for one in queries.read_run(folder).spec.objectives:
        score = Score(one.benchmark, one.metric, 0.9, 0.01, 1000, True)
        writer.record_evaluation(Evaluation(subject, REPAIRED + best, one.split, score, now(), plans[best].hash))
    assert subject in scores.calibration(queries.read_run(folder)) and list(finalists(folder)) == list(plans)
    few = make_run(tmp_path, n_trials=6, rungs=(1000,), failures=0.0)
    assert len(finalists(few)) <= 6


def test_a_search_ends_with_it(tiny_family: Path, tmp_path: Path) -> None:
    write_benchmark(tmp_path, "first_words", 30, 0)
    write_benchmark(tmp_path, "other_words", 25, 3)
    spec = {
        "name": "selected",
        "base_model": str(tiny_family / "base"),
        "candidates": {"math": str(tiny_family / "math")},
        "operations": ["remove", "select"],
        "remove": 2,
        "objectives": [{"benchmark": "first_words", "metric": "acc"}],
        "selection": [
            {"benchmark": "other_words", "metric": "acc"},
            {"benchmark": "other_words", "metric": "acc_norm"},
            {"benchmark": "first_words", "metric": "acc", "split": "validation[10:22]"},
        ],
        "include_path": [str(tmp_path)],
        "budget": {"min": 5, "max": 10, "eta": 2},
        "trials": 10,
        "device": "cpu",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(spec))
    done = gptailor("search", tmp_path / "run.yaml", "--runs", tmp_path / "runs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is best on the selection split" in done.stdout
    assert "examples each that the search did not read" in done.stdout and "scored, about" in done.stdout
    folder = only_run(tmp_path / "runs")
    tables = queries.read_run(folder)
    chosen = tables.evaluations[tables.evaluations.benchmark == "other_words"]
    configs = set(chosen.subject) - {"dense"}
    assert "dense" in set(chosen.subject) and 1 <= len(configs) <= FINALISTS
    assert set(chosen.n_samples) == {25} and len(chosen) == 2 * (1 + len(configs))
    part = tables.evaluations[tables.evaluations.split == "validation[10:22]"]
    assert set(part.n_samples) == {12} and set(part.subject) == set(chosen.subject)
    story = json.loads(gptailor("show", folder.run_id, "--runs", folder.root, "--json").stdout)
    assert story["selection"]["subject"] in configs and story["selection"]["finalists"] == len(configs)
    assert set(story["references"]) == {"dense", "baseline:block_influence"}
    assert set(story["references"]["dense"]) == {"first_words/acc"}
