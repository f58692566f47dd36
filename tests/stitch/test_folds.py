"""Folding: a removed layer's weights go into a kept one; pure plans, live models, stored rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptailor.errors import UserError
from gptailor.family.models import open_family
from gptailor.formats.huggingface import export_hf
from gptailor.formats.mergekit import mergekit_yaml
from gptailor.plan import LayerChoice, StitchPlan
from gptailor.stitch.stitcher import Stitcher
from gptailor.store.tables import rows_of

PLAN = StitchPlan(
    6,
    (
        LayerChoice(0),
        LayerChoice(1, ("math",), folds=((2, 0.5), (3, 0.25))),
        LayerChoice(4, ("math", "code"), "task_arithmetic", 0.5, folds=((5, 1.0),)),
    ),
)


@pytest.fixture(scope="module")
def family(tiny_family: Path, make_spec):
    return open_family(make_spec(tiny_family))


def weight(layer: torch.nn.Module, name: str = "mlp.down_proj.weight") -> torch.Tensor:
    return layer.state_dict()[name]


def test_the_folded_weights_are_the_formula(family) -> None:
    stitcher = Stitcher(family)
    model = stitcher.stitch(PLAN)
    own, second, third = (weight(family.layer(i, "math")) for i in (1, 2, 3))
    torch.testing.assert_close(
        weight(model.model.layers[1]), own + 0.5 * (second - own) + 0.25 * (third - own), rtol=1e-5, atol=1e-6
    )
    whole = Stitcher(family).layer(LayerChoice(5, ("math", "code"), "task_arithmetic", 0.5))
    torch.testing.assert_close(weight(model.model.layers[2]), weight(whole), rtol=1e-5, atol=1e-6)
    norm = "input_layernorm.weight"
    assert torch.equal(weight(model.model.layers[1], norm), weight(family.layer(1, "math"), norm))
    assert torch.equal(weight(family.layer(1, "math")), own), "the family's own tensors are left alone"


def test_a_fold_of_factor_zero_is_a_removal(family) -> None:
    stitcher = Stitcher(family)
    ids = torch.arange(3, 40)[None]
    plain = stitcher.stitch(StitchPlan.without([3], 6))(ids).logits
    kept = tuple(LayerChoice(i, folds=((3, 0.0),) if i == 2 else ()) for i in (0, 1, 2, 4, 5))
    torch.testing.assert_close(stitcher.stitch(StitchPlan(6, kept))(ids).logits, plain)


def test_plans_with_folds_travel(family, tmp_path: Path) -> None:
    assert StitchPlan.from_json(PLAN.to_json()) == PLAN
    assert PLAN.removed == (2, 3, 5) and PLAN.folded == {2: (1, 0.5), 3: (1, 0.25), 5: (4, 1.0)}
    assert PLAN.describe() == "0 base | 1 math +2 x0.50 +3 x0.25 | 4 math+code x0.50 +5 x1.00 | removed 2 3 5"
    without = StitchPlan(6, tuple(LayerChoice(c.layer, c.sources, c.method, c.factor) for c in PLAN.kept))
    assert PLAN.hash != without.hash
    done = export_hf(family, PLAN, tmp_path / "model")
    assert done.n_layers == 3 and done.max_difference == 0


def test_stored_rows_say_where_a_layer_went() -> None:
    event = {"event": "plan", "v": 1, "config_id": 3, "plan": PLAN.to_json(), "n_parameters": 1}
    rows = {row["layer"]: row for table, row in rows_of(event) if table == "layers"}
    assert (rows[2]["operation"], rows[2]["method"], rows[2]["folded_into"], rows[2]["factor"]) == (
        "removed",
        "fold",
        1,
        0.5,
    )
    assert rows[1]["folded_into"] is None and rows[1]["operation"] == "selected"


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ((LayerChoice(0, folds=((1, 0.5),)), LayerChoice(1)), "folded layers must be removed ones"),
        ((LayerChoice(0, folds=((2, 0.5),)), LayerChoice(1, folds=((2, 0.1),))), "each folded once, got"),
        ((LayerChoice(0, folds=((7, 0.5),)),), "folded layers must be removed ones"),
    ],
)
def test_impossible_folds(kept: tuple[LayerChoice, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StitchPlan(3, kept)


def test_impossible_choices() -> None:
    with pytest.raises(UserError, match="must be other layers, ascending, each once"):
        LayerChoice(1, folds=((1, 0.5),))
    with pytest.raises(UserError, match="must be finite numbers"):
        LayerChoice(1, folds=((2, float("nan")),))
    with pytest.raises(UserError, match="folded layers cannot be written"):
        mergekit_yaml(PLAN, {"base": "b", "math": "m", "code": "c"}, dtype="float32")


def fold_space():
    from gptailor.search.space import build_space
    from gptailor.spec.files import build_spec

    data = {
        "name": "x",
        "base_model": "b",
        "candidates": {"math": "p"},
        "remove": 3,
        "objectives": [{"benchmark": "t"}],
    }
    return build_space(build_spec(data | {"operations": ["remove", "select", "fold"], "trials": 30}), 8)


def test_a_search_may_fold() -> None:
    """Every point of the space is a plan, folds go to the kept layer before, and plans come back from their points."""
    space = fold_space()
    plans = [space.decode(dict(configuration)) for configuration in space.configspace.sample_configuration(60)]
    assert all(len(plan.removed) == 3 for plan in plans)
    shares = [len(plan.folded) / 3 for plan in plans]
    assert 0.3 < sum(shares) / len(shares) < 0.7, "about half of the removed layers are dropped for good"
    for plan in plans:
        kept = [choice.layer for choice in plan.kept]
        for layer, (into, factor) in plan.folded.items():
            assert into == max([k for k in kept if k < layer] or kept[:1]) and 0 < factor <= 1
        assert space.decode(space.encode(plan)) == plan
    plain = StitchPlan.without([1, 2, 5], 8)
    assert space.decode(space.encode(plain)) == plain


def test_the_surrogate_sees_folds() -> None:
    from gptailor.search.space import folded

    space = fold_space()
    plain = StitchPlan.without([1, 2, 5], 8)
    plans = [plain, folded(plain, {1: 0.3}), folded(plain, {1: 0.6}), folded(plain, {5: 0.3})]
    rows = space.features([space.encode(plan).get_array() for plan in plans])
    assert len({row.tobytes() for row in rows}) == 4
    dropped = space.encode(plain).get_array().copy()
    dropped[space.columns["fold"][1]] = 0.1  # another point of the same plan
    assert (space.features([dropped]) == rows[:1]).all()


def test_a_design_begins_without_folds_and_goes_on_with_them() -> None:
    from gptailor.search.space import initial_design

    plans = initial_design(fold_space(), [("base", list(range(8))), ("math", list(reversed(range(8))))])
    assert plans[0] == StitchPlan.without([0, 1, 2], 8)
    assert any(plan.folded for plan in plans[:6])


def test_spaces_without_folding_refuse_such_plans() -> None:
    from gptailor.search.space import build_space, folded
    from gptailor.spec.files import build_spec

    data = {"name": "x", "base_model": "b", "remove": 3, "objectives": [{"benchmark": "t"}], "operations": ["remove"]}
    space = build_space(build_spec(data), 8)
    plan = folded(StitchPlan.without([1, 2, 5], 8), {2: 0.5})
    with pytest.raises(UserError, match="folds layers in a way that this run does not"):
        space.encode(plan)
    elsewhere = StitchPlan(8, tuple(LayerChoice(i, folds=((5, 0.5),) if i == 0 else ()) for i in (0, 3, 4, 6, 7)))
    with pytest.raises(UserError, match="folds layers in a way"):
        fold_space().encode(elsewhere)
    with pytest.raises(UserError, match="fold says what becomes of removed layers"):
        build_spec(data | {"operations": ["select", "fold"], "candidates": {"m": "p"}, "remove": 0})
