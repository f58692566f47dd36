from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptailor.errors import UserError
from gptailor.plan import LayerChoice, Operation, StitchPlan

NAMES = ("math", "code", "prose")


@st.composite
def plans(draw: st.DrawFn) -> StitchPlan:
    n_layers = draw(st.integers(2, 12))
    layers = draw(st.lists(st.integers(0, n_layers - 1), min_size=1, unique=True).map(sorted))
    kept = []
    for layer in layers:
        sources = tuple(draw(st.lists(st.sampled_from(NAMES), unique=True)))
        factor = draw(st.integers(0, 100)) / 100
        scale = draw(st.sampled_from([1.0, 0.9]))
        if len(sources) > 1:
            kept.append(LayerChoice(layer, sources, "ties", factor, (("density", 0.5),), scale))
        else:
            kept.append(LayerChoice(layer, sources, output_scale=scale))
    return StitchPlan(n_layers, tuple(kept))


@given(plans())
def test_json_round_trip_keeps_the_plan_and_its_hash(plan: StitchPlan) -> None:
    again = StitchPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and again.hash == plan.hash


@given(plans(), plans())
def test_hash_is_an_identity(a: StitchPlan, b: StitchPlan) -> None:
    assert (a == b) == (a.hash == b.hash)


@given(plans())
def test_every_layer_is_kept_or_removed(plan: StitchPlan) -> None:
    assert sorted([*plan.removed, *(choice.layer for choice in plan.kept)]) == list(range(plan.n_layers))


def test_the_hash_is_stable_across_versions() -> None:
    plan = StitchPlan(4, (LayerChoice(0), LayerChoice(2, ("math",)), LayerChoice(3, NAMES, "task_arithmetic", 0.5)))
    assert plan.hash == "54a36f88669bdaa5c89a"


def test_description_reads_in_order() -> None:
    kept = (LayerChoice(0), LayerChoice(1), LayerChoice(3, ("math",)), LayerChoice(5, ("math", "code"), "ties", 0.52))
    assert StitchPlan(6, kept).describe() == "0-1 base | 3 math | 5 math+code x0.52 | removed 2 4"
    assert [choice.operation for choice in kept[1:]] == [Operation.BASE, Operation.SELECTED, Operation.MERGED]


def test_one_shot_plans() -> None:
    assert StitchPlan.without({1, 2}, 4, "math").describe() == "0 math | 3 math | removed 1 2"
    assert StitchPlan.dense(3).removed == ()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "not a stitch plan"),
        ({"kept": [], "format": 9}, "plan format 9 is not known"),
        ({"kept": [{}], "format": 1, "n_layers": 3}, "not a stitch plan"),
        ({"kept": [], "format": 1, "n_layers": 3}, "at least one layer"),
        ({"kept": [{"layer": 3}], "format": 1, "n_layers": 3}, "layer 3 does not exist: the base has layers 0 to 2"),
        ({"kept": [{"layer": 1}, {"layer": 0}], "format": 1, "n_layers": 3}, "must ascend without repeats"),
        ({"kept": [{"layer": 0, "sources": ["a", "b"]}], "format": 1, "n_layers": 3}, "needs a method and a factor"),
        ({"kept": [{"layer": 0, "sources": ["base"]}], "format": 1, "n_layers": 3}, "must be different candidates"),
        ({"kept": [{"layer": 0, "factor": 1}], "format": 1, "n_layers": 3}, "belong to merges"),
        ({"kept": [{"layer": -1}], "format": 1, "n_layers": 3}, "layers count from 0"),
    ],
)
def test_refusals(data: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        StitchPlan.from_json(data)  # type: ignore[arg-type]
