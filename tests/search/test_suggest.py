from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.suggestions import N_LAYERS, WORTH, costs_of, make_spec
from sklearn.ensemble import RandomForestRegressor
from smac.acquisition.function import EI

from gptailor.search.space import build_space, initial_design
from gptailor.search.suggest import Suggester, Suggestion, cost
from gptailor.search.surrogate import PlanForest, PlanSearch
from gptailor.spec.files import build_spec
from gptailor.spec.run import RunSpec
from gptailor.trial import Origin, Score


def search(spec: RunSpec, folder: Path, crash_every: int = 0) -> list[Suggestion]:
    space = build_space(spec, N_LAYERS)
    initial = initial_design(space, [("base", list(range(N_LAYERS)))])[: spec.trials // 4]
    suggester = Suggester(spec, space, initial, folder)
    asked = []
    for index in range(spec.trials):
        suggestion = suggester.ask()
        assert suggestion is not None
        asked.append(suggestion)
        crashed = crash_every and index % crash_every == 0
        suggester.tell(suggestion, None if crashed else costs_of(suggestion.plan, len(spec.objectives)))
    return asked


def test_rungs_origins_and_identities(tmp_path: Path) -> None:
    asked = search(make_spec(), tmp_path)
    assert Counter(s.budget for s in asked) == {27: 18, 81: 16, 243: 10}
    assert asked[0].origin == Origin.INITIAL
    assert {s.origin for s in asked} >= {Origin.INITIAL, Origin.MODEL}
    assert len({(s.config_id, s.budget) for s in asked}) == len(asked), "a configuration is asked once at each rung"
    plans = {s.config_id: s.plan.hash for s in asked}
    assert len(set(plans.values())) > 0.9 * len(plans), "few configurations describe a plan that was tried"


def test_the_same_seed_asks_the_same(tmp_path: Path) -> None:
    def trace(name: str, seed: int) -> list[tuple[int, int, str]]:
        return [(s.config_id, s.budget, s.plan.hash) for s in search(make_spec(seed=seed), tmp_path / name)]

    assert trace("a", 1) == trace("b", 1)
    assert trace("a", 1) != trace("c", 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_several_objectives_over_budgets_never_die(tmp_path: Path, seed: int) -> None:
    """With SMAC's defaults this combination dies of an assertion within 50 trials, and of a single crash."""
    assert len(search(make_spec(seed=seed, trials=88), tmp_path, crash_every=7)) == 88


def test_all_trials_crashing_is_survived(tmp_path: Path) -> None:
    assert len(search(make_spec(trials=30), tmp_path, crash_every=1)) == 30


def test_a_single_objective_is_plain(tmp_path: Path) -> None:
    assert len(search(make_spec(n_objectives=1, trials=30), tmp_path)) == 30


def test_the_best_mean_may_be_looked_for(tmp_path: Path) -> None:
    """Two objectives as one: the search asks what a search of their mean asks."""
    space = build_space(make_spec(), N_LAYERS)

    def trace(spec: RunSpec, costs_told) -> list[tuple[str, int]]:
        suggester = Suggester(spec, space, [], tmp_path / spec.aim / str(len(spec.objectives)))
        asked = []
        for _ in range(30):
            suggestion = suggester.ask()
            assert suggestion is not None
            asked.append((suggestion.plan.hash, suggestion.budget))
            suggester.tell(suggestion, costs_told(costs_of(suggestion.plan, 2)))
        return asked

    both = trace(make_spec(aim="mean"), lambda costs: costs)
    assert both == trace(make_spec(n_objectives=1), lambda costs: [sum(costs) / 2])
    assert both != trace(make_spec(), lambda costs: costs)


def test_the_control_draws_all_but_the_start(tmp_path: Path) -> None:
    asked = search(make_spec(suggester="random"), tmp_path)
    assert {s.origin for s in asked} == {Origin.INITIAL, Origin.RANDOM}
    assert Counter(s.budget for s in asked) == {27: 18, 81: 16, 243: 10}


@pytest.mark.slow
def test_the_model_beats_chance(tmp_path: Path) -> None:
    """At equal trials, the plans that the model suggests are better than random ones of the same space."""
    spec = make_spec(trials=66)
    asked = search(spec, tmp_path)
    space = build_space(spec, N_LAYERS)
    drawn = [space.decode(c) for c in space.configspace.sample_configuration(200)]
    chance = np.mean([sum(costs_of(plan, 2)) for plan in drawn])
    late = [sum(costs_of(s.plan, 2)) for s in asked[33:] if s.origin == Origin.MODEL]
    assert np.mean(late) < chance - 2 * np.std(late) / np.sqrt(len(late))


def test_what_adds_up_is_learnt_from_few_plans() -> None:
    """Costs of removed layers that add up, with half as much noise: the forest alone knows less of new plans."""
    space = build_space(make_spec(), N_LAYERS)
    rng = np.random.default_rng(0)
    vectors = np.array([config.get_array() for config in space.configspace.sample_configuration(240)])
    costs = space.removed_mask(vectors) @ rng.permutation(WORTH)
    noisy = costs + 0.5 * costs.std() * rng.normal(size=len(costs))
    model = PlanForest(space, seed=0)
    model._train(vectors[:40], noisy[:40])
    features = space.features(vectors)
    forest = RandomForestRegressor(20, max_features=5 / 6, random_state=0).fit(features[:40], noisy[:40])
    means, variances = model._predict(vectors[40:])
    assert variances is not None and (variances >= 0).all()
    learnt = np.corrcoef(means.ravel(), costs[40:])[0, 1]
    assert learnt > np.corrcoef(forest.predict(features[40:]), costs[40:])[0, 1] + 0.1
    assert learnt > 0.6


def test_many_sources_do_not_hide_what_removals_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 plans of 30 layers, whose sources do not matter: new plans are told apart as removals alone would have it."""
    space, rng = build_space(make_spec(), 30), np.random.default_rng(0)
    vectors = PlanSearch(space, EI(), seed=0)._random(260)
    costs = space.removed_mask(vectors) @ rng.normal(0, 0.015, 30)
    noisy = costs + rng.normal(0, 0.01, len(costs))

    def learnt() -> float:
        model = PlanForest(space, seed=0)
        model._train(vectors[:60], noisy[:60])
        return float(np.corrcoef(model._predict(vectors[60:])[0].ravel(), costs[60:])[0, 1])

    weighed = learnt()
    monkeypatch.setattr("gptailor.search.space.SOURCE_WEIGHT", 1.0)
    assert weighed > 0.8 and weighed > learnt() + 0.2


def test_half_of_the_moves_are_swaps_and_no_move_is_lost_on_a_layer_that_is_gone() -> None:
    space = build_space(make_spec(), N_LAYERS)
    search = PlanSearch(space, EI(), seed=0)
    before = search._random(2000)
    after = search._moves(before)
    gone, still = space.removed_mask(before), space.removed_mask(after)
    swapped = (gone != still).any(axis=1)
    # One to three moves, the lesser of two draws: 5/9, 3/9 and 1/9 of the plans; all but (1/2)^moves of them swap.
    assert abs(swapped.mean() - (1 - 5 / 9 / 2 - 3 / 9 / 4 - 1 / 9 / 8)) < 0.04
    source = space.columns["source"]
    unchanged = (before[:, source] == after[:, source]) | ~(gone & still)
    assert unchanged[~swapped].all()


def test_a_batch_begins_with_different_removed_layers() -> None:
    space = build_space(make_spec(), N_LAYERS)
    search = PlanSearch(space, EI(), seed=0)
    cuts = np.repeat(search._random(3), 20, axis=0)
    cuts[:, space.columns["source"]] = search._random(60)[:, space.columns["source"]]
    values = np.repeat([3.0, 2.0, 1.0], 20)
    chosen = [config.get_array() for _, config in search._top(cuts, values, cuts[:1], 6)]
    masks = [space.removed_mask(one[None]).tobytes() for one in chosen]
    assert len(set(masks[:3])) == 3 and set(masks[3:]) == {masks[0]}


def test_an_exhausted_space_ends(tmp_path: Path) -> None:
    spec = build_spec(
        {
            "name": "x",
            "base_model": "b",
            "remove": 1,
            "operations": ["remove"],
            "objectives": [{"benchmark": "t"}],
            "budget": {"min": 9, "max": 9},
            "trials": 50,
        }
    )
    space = build_space(spec, 3)
    suggester = Suggester(spec, space, initial_design(space, [("base", [0, 1, 2])]), tmp_path)
    plans = set()
    for _ in range(50):
        suggestion = suggester.ask()
        if suggestion is None:
            break
        plans.add(suggestion.plan.hash)
        suggester.tell(suggestion, [0.5])
    assert len(plans) == 3


@pytest.mark.parametrize(
    ("score", "higher", "dense", "expected"),
    [(0.4, True, 0.5, 0.2), (0.6, True, 0.5, -0.2), (20.0, False, 10.0, 0.5), (0.3, True, 0.0, 0.7)],
)
def test_cost_is_what_is_not_retained(score: float, higher: bool, dense: float, expected: float) -> None:
    assert cost(Score("b", "m", score, None, 10, higher), dense) == pytest.approx(expected)


@pytest.mark.parametrize(("higher", "expected"), [(True, 0.2), (False, 0.2)])
def test_easy_examples_are_easy_for_the_dense_base_too(higher: bool, expected: float) -> None:
    """A low rung whose examples flatter plan and dense base alike says what the full budget would say."""
    score = Score("b", "m", 0.5 if higher else 6.25, None, 10, higher)
    there = 0.6 if higher else 5.0
    assert cost(score, 0.5 if higher else 10.0, there) == pytest.approx(expected)
