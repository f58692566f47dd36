"""Metrics that compare a plan with the dense base: agree and closeness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.command_line import gptailor, only_run
from helpers.evaluate_tools import rows, write_task
from helpers.tiny_run import PLAN, tiny_spec

from gptailor.evaluate.benchmarks import chance_of
from gptailor.evaluate.metrics import AGREE, CLOSENESS, item_beside
from gptailor.plan import StitchPlan
from gptailor.scoring.item_cache import OPTIONS
from gptailor.scoring.plan_scorer import PlanScorer
from gptailor.search.example_order import ORDER
from gptailor.spec.run import RunSpec
from gptailor.store import queries

DENSE = StitchPlan.dense(6)
LIKE = [{"benchmark": "many", "metric": metric, "split": "test"} for metric in ("acc", AGREE, CLOSENESS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agreement")
    write_task(folder, "many", test=rows(3, 24, options=(2, 3, 4)))
    return folder


@pytest.fixture(scope="module")
def spec(tiny_family: Path, folder: Path) -> RunSpec:
    budget = {"min": 8, "max": 24, "eta": 3}
    return tiny_spec(tiny_family, objectives=LIKE, held_out=[], include_path=[str(folder)], budget=budget)


def opened(spec: RunSpec, known: Any = None) -> tuple[PlanScorer, list[StitchPlan]]:
    """A plan scorer, and the plans that it stitches from now on."""
    plan_scorer = PlanScorer.open(spec, spec.objectives, max_examples=24)
    plan_scorer.known = known or {}
    stitched: list[StitchPlan] = []
    stitch = plan_scorer.stitcher.stitch

    def noting(plan: StitchPlan, *_: Any) -> Any:
        stitched.append(plan)
        return stitch(plan)

    plan_scorer.stitcher.stitch = noting  # type: ignore[assignment, method-assign]
    return plan_scorer, stitched


@pytest.mark.parametrize(
    "plan, dense, agree, closeness",
    [
        ([-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], 1.0, 1.0),
        ([-1.0, -2.0, -3.0], [-5.0, -6.0, -7.0], 1.0, 1.0),  # the same shares
        ([0.0, -2000.0], [-2000.0, 0.0], 0.0, 0.0),
        ([0.0, 0.0], [0.0, -2000.0], 1.0, 1 - 0.31127812**0.5),  # (1/2, 1/2) beside (1, 0)
    ],
)
def test_one_example(plan: list[float], dense: list[float], agree: float, closeness: float) -> None:
    assert item_beside(AGREE, plan, dense) == item_beside(AGREE, dense, plan) == agree
    assert item_beside(CLOSENESS, plan, dense) == pytest.approx(closeness, abs=1e-7)
    assert item_beside(CLOSENESS, dense, plan) == item_beside(CLOSENESS, plan, dense)


def test_the_dense_base_agrees_with_itself_and_is_run_once(spec: RunSpec) -> None:
    plan_scorer, stitched = opened(spec)
    for budget in spec.budget.rungs:
        _, agree, closeness = plan_scorer.score(DENSE, budget).scores
        assert (agree.score, agree.stderr, closeness.score) == (1.0, 0.0, 1.0) and agree.n_samples == budget
        assert agree.higher_is_better and closeness.higher_is_better
    first = plan_scorer.score(PLAN, 24)
    assert stitched == [DENSE] * 2 + [PLAN]  # a rung: the options, of which two metrics are made, and accuracy
    assert {key.plan_hash for key, _, _ in first.fresh} == {PLAN.hash}


def test_scores_are_those_of_the_options(spec: RunSpec) -> None:
    """Computed a second time from each example's own log-likelihoods."""
    plan_scorer, _ = opened(spec)
    _, agree, closeness = plan_scorer.score(PLAN, 24).scores
    _, relative, _ = plan_scorer.benchmarks
    said = {}
    for plan in (DENSE, PLAN):
        said[plan.hash] = plan_scorer.evaluator.items(plan_scorer.stitcher.stitch(plan), relative, 0, 24)
    picks = [
        [max(range(len(options)), key=options.__getitem__) for options in said[plan.hash]] for plan in (DENSE, PLAN)
    ]
    same = sum(one == other for one, other in zip(*picks, strict=True)) / 24
    assert agree.score == pytest.approx(same) and 0 < agree.score < 1 and agree.stderr
    assert agree.score != pytest.approx(plan_scorer.score(PLAN, 24).scores[0].score)
    assert 0 < closeness.score < 1
    pairs = zip(said[PLAN.hash], said[DENSE.hash], strict=True)
    assert closeness.score == pytest.approx(sum(item_beside(CLOSENESS, *pair) for pair in pairs) / 24)
    lengths = [len(example.doc["choices"]) for example in relative.examples]
    assert relative.chance == pytest.approx(sum(1 / n for n in lengths) / 24)
    assert chance_of(CLOSENESS, relative.tasks, relative.examples) is None


def test_what_is_stored_is_gone_on_from(spec: RunSpec) -> None:
    """The dense base's answers too: a plan that is scored first brings them, and nothing is run again."""
    whole, _ = opened(spec)
    expected = whole.score(PLAN, 24)
    plan_scorer, _ = opened(spec)
    fresh = plan_scorer.score(PLAN, 8).fresh
    assert {key for key, _, _ in fresh if key.plan_hash == DENSE.hash} == {(DENSE.hash, "many", OPTIONS, "test")}
    stored = json.loads(json.dumps([[list(key), items] for key, _, items in fresh]))
    resumed, stitched = opened(spec, {tuple(key): items for key, items in stored})
    assert resumed.score(PLAN, 8).scores == plan_scorer.score(PLAN, 8).scores and stitched == []
    grown = resumed.score(PLAN, 24)
    assert grown.scores == expected.scores and stitched == [DENSE, PLAN]
    assert {first for _, first, _ in grown.fresh} == {8}


def test_a_search_and_what_judges_it(tiny_family: Path, folder: Path, tmp_path: Path) -> None:
    spec = tiny_spec(
        tiny_family,
        objectives=LIKE[1:],
        held_out=[{"benchmark": "many", "metric": AGREE, "split": "validation"}],
        include_path=[str(folder)],
        budget={"min": 8, "max": 24, "eta": 3},
        trials=4,
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    done = gptailor("search", tmp_path / "run.yaml", "--runs", tmp_path / "runs")
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(tmp_path / "runs")
    tables = queries.read_run(run)
    dense = tables.evaluations[tables.evaluations.subject == "dense"]
    assert set(dense.score) == {1.0} and tables.scores.score.between(0, 1).all() and len(tables.scores) == 8
    config = int(tables.trials.config_id.iloc[0])
    done = gptailor("evaluate", run.run_id, "--runs", run.root, "--subjects", f"config:{config}")
    assert done.returncode == 0, done.stdout + done.stderr
    kept = queries.load_examples(run)
    options = {key.of: len(items) for key, items in kept.items() if key.metric == OPTIONS}
    assert options == {("many", OPTIONS, "test"): 24, ("many", OPTIONS, "validation"): 20}
    assert all(
        isinstance(item, float) for key, items in kept.items() if key.metric not in (OPTIONS, ORDER) for item in items
    )
