from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from smac.acquisition.function import EI

from gptailor.errors import UserError
from gptailor.plan import LayerChoice, StitchPlan
from gptailor.search.space import NUMBER, PlanConfiguration, PlanSpace, build_space, initial_design, sizes
from gptailor.search.surrogate import PlanSearch
from gptailor.spec.files import build_spec
from gptailor.spec.run import RunSpec


def make_spec(n_candidates: int = 3, **changes: object) -> RunSpec:
    data: dict[str, object] = {
        "name": "x",
        "base_model": "b",
        "candidates": {f"c{k}": f"p{k}" for k in range(n_candidates)},
        "remove": 3,
        "objectives": [{"benchmark": "t"}],
    }
    return build_spec(data | changes)


SPACES = {
    "all operations": build_space(make_spec(), 10),
    "removal alone": build_space(make_spec(0, operations=["remove"]), 10),
    "selection": build_space(make_spec(1, operations=["remove", "select"]), 10),
    "no removal": build_space(make_spec(2, operations=["select", "merge"], remove=0), 6),
    "scales": build_space(make_spec(2, output_scale=[0.7, 1.3], merge={"factor": [-0.5, 1.5]}), 8),
    "one factor": build_space(make_spec(2, merge={"factor": [0.5, 0.5]}), 8),
    "eight candidates": build_space(make_spec(8), 9),
    "pairs only": build_space(make_spec(4), 9, merge_counts=(2, 2)),
    "a range": build_space(make_spec(2, remove={"from": 2, "to": 7}), 10, fixed=frozenset({0, 4})),
}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31 - 1))
def test_every_point_is_a_legal_plan_and_round_trips(space: PlanSpace, seed: int) -> None:
    space.configspace.seed(seed)
    configuration = space.configspace.sample_configuration()
    plan = space.decode(configuration)
    assert len(plan.removed) in space.removals
    assert all(choice.sources in space.source_sets for choice in plan.kept)
    again = space.encode(plan)
    assert space.decode(again) == plan
    vectors = np.array([configuration.get_array(), again.get_array()])
    features = space.features(vectors)
    assert np.array_equal(features[0], features[1]), "equal plans must look equal to the surrogate"
    assert np.flatnonzero(space.removed_mask(vectors)[0]).tolist() == list(plan.removed)


@st.composite
def any_space(draw: st.DrawFn) -> PlanSpace:
    """Any number of layers and candidates, any operations, ranges of any fineness that need not hold 1."""
    n_layers, n_candidates = draw(st.integers(2, 24)), draw(st.integers(0, 8))
    lends = ["select", "merge"][: min(n_candidates, 2)]
    operations = draw(st.lists(st.sampled_from(["remove", *lends]), min_size=1, unique=True))
    removed: object = draw(st.integers(1, n_layers - 1)) if "remove" in operations else 0
    if removed and n_layers > 2 and draw(st.booleans()):
        fewest = draw(st.integers(1, n_layers - 2))
        removed = {"from": fewest, "to": draw(st.integers(fewest + 1, n_layers - 1))}
    ends = st.tuples(st.floats(0, 3), st.floats(0, 3)).map(sorted)
    changes = {"operations": operations, "remove": removed, "merge": {"factor": draw(ends)}}
    return build_space(make_spec(n_candidates, output_scale=draw(st.none() | ends), **changes), n_layers)


@settings(max_examples=60, deadline=None)
@given(space=any_space(), seed=st.integers(0, 2**31 - 1))
def test_any_space_gives_legal_plans_that_round_trip(space: PlanSpace, seed: int) -> None:
    space.configspace.seed(seed)
    drawn = [space.decode(space.configspace.sample_configuration()) for _ in range(3)]
    for plan in [*drawn, *initial_design(space, [("base", list(range(space.n_layers)))])[:5]]:
        assert len(plan.removed) in space.removals
        for choice in plan.kept:
            assert choice.sources in space.source_sets
            for value, ends in ((choice.factor, space.factor_range), (choice.output_scale, space.scale_range)):
                assert value is None or ends is None or ends[0] <= value <= ends[1]
        assert space.decode(space.encode(plan)) == plan


def test_every_combination_of_candidates_can_be_drawn() -> None:
    names = ["+".join(sources) for sources in SPACES["all operations"].source_sets]
    assert names == ["", "c0", "c1", "c2", "c0+c1", "c0+c2", "c1+c2", "c0+c1+c2"]
    assert {len(sources) for sources in SPACES["pairs only"].source_sets} == {0, 1, 2}


def test_a_large_space_is_built_and_drawn_from_in_a_second() -> None:
    build_space(make_spec(), 4).configspace.sample_configuration(2)  # imports done
    started = time.process_time()
    space = build_space(make_spec(4, remove=20), 80)
    drawn = space.configspace.sample_configuration(1000)
    assert time.process_time() - started < 1.0
    assert len(drawn) == 1000
    assert not space.configspace.forbidden_clauses


def test_plans_outside_the_space_are_refused() -> None:
    space = SPACES["selection"]
    with pytest.raises(UserError, match="removes 2 of 10 layers; this run removes 3 of 10"):
        space.encode(StitchPlan.without({1, 2}, 10))
    with pytest.raises(UserError, match="layer 0: c9 is not among this run's sources"):
        space.encode(StitchPlan.without({1, 2, 3}, 10, "c9"))
    merged = (LayerChoice(0, ("c0", "c1"), "ties", 0.5), *StitchPlan.without({0, 1, 2, 3}, 10).kept)
    with pytest.raises(UserError, match=r"layer 0: .* is not at this run's method or resolution"):
        SPACES["all operations"].encode(StitchPlan(10, merged))


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_initial_design_starts_with_the_one_shot_picks(space: PlanSpace) -> None:
    free = [layer for layer in range(space.n_layers) if layer not in space.fixed]
    orders = [("base", free)]
    orders += [(s[0], list(reversed(free))) for s in space.source_sets if len(s) == 1]
    plans = initial_design(space, orders)
    for plan, number in zip(plans, sizes(space)[:3], strict=False):  # the base's own picks
        assert plan == StitchPlan.without(set(free[:number]), space.n_layers)
    assert {len(plan.removed) for plan in plans[:20]} == set(sizes(space))
    assert len({plan.hash for plan in plans}) == len(plans)
    assert all(space.decode(space.encode(plan)) == plan for plan in plans)
    if any(len(sources) > 1 for sources in space.source_sets):
        assert any(choice.is_merged for plan in plans for choice in plan.kept)


def test_moves_keep_within_the_range_and_change_one_layer() -> None:
    """What a plan has one layer more or less of is else as it was; both ends are reached and none is passed."""
    space = SPACES["a range"]
    search = PlanSearch(space, EI(), seed=0)
    vectors = search._random(400)
    assert set(space.numbers(vectors)) == set(space.removals)
    before = space.removed_mask(vectors)
    search._move(vectors, np.arange(len(vectors)), NUMBER)
    after = space.removed_mask(vectors)
    assert ((before != after).sum(axis=1) == 1).all() and (after.sum(axis=1) == space.numbers(vectors)).all()
    assert not after[:, sorted(space.fixed)].any() and set(after.sum(axis=1)) == set(space.removals)
    moved = search._moves(vectors)
    assert set(space.removed_mask(moved).sum(axis=1)) == set(space.removals)
    plans = [space.decode(PlanConfiguration(space.configspace, vector=row)) for row in moved]
    assert [len(plan.removed) for plan in plans] == space.numbers(moved).tolist()


def test_scales_that_leave_out_one_begin_as_near_as_they_may() -> None:
    space = build_space(make_spec(2, output_scale=[0.7, 0.9]), 8)
    plans = initial_design(space, [("base", list(range(8)))])
    assert plans[0].removed == (0, 1, 2) and {choice.output_scale for choice in plans[0].kept} == {0.9}


def test_small_models_have_an_initial_design_too() -> None:
    for n_layers in range(2, 6):
        space = build_space(make_spec(2, remove=n_layers - 1), n_layers)
        assert initial_design(space, [("base", list(range(n_layers)))])
