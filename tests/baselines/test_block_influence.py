"""Block Influence: planted identities are found, padding does not count, removal takes the least influential."""

from __future__ import annotations

import itertools

import pytest
import torch

from gptailor.baselines.block_influence import block_influence, plan, removal_order
from gptailor.errors import UserError
from gptailor.family.models import open_family
from gptailor.plan import LayerChoice, StitchPlan
from gptailor.stitch.stitcher import Stitcher

BATCHES = [torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.fixture(scope="module")
def family(tiny_family, make_spec):
    return open_family(make_spec(tiny_family))


@pytest.fixture
def stitcher(family):
    stitcher = Stitcher(family)
    yield stitcher
    stitcher.stitch(StitchPlan.dense(6))


def identities(*layers: int) -> StitchPlan:
    """The base, with output scale 0 at some layers: they give what they get."""
    return StitchPlan(6, tuple(LayerChoice(i, output_scale=0.0 if i in layers else 1.0) for i in range(6)))


def test_planted_identities_are_the_first_to_go(stitcher):
    scores = block_influence(stitcher.stitch(identities(1, 4)), BATCHES)
    assert scores[1] == pytest.approx(0, abs=1e-6) and scores[4] == pytest.approx(0, abs=1e-6)
    assert all(0.001 < scores[i] < 2 for i in (0, 2, 3, 5))
    assert set(removal_order(scores)[:2]) == {1, 4}
    assert plan(6, scores, 2) == StitchPlan.without([1, 4], 6)
    assert plan(6, scores, 2, "math").kept[0] == LayerChoice(0, ("math",))


def test_it_is_the_papers_formula(stitcher):
    """Against transformers' own hidden states, which are right for every layer but the last (past the final norm)."""
    model = stitcher.stitch(StitchPlan.dense(6))
    with torch.inference_mode():
        states = model(BATCHES[0], output_hidden_states=True).hidden_states
    expected = [
        1 - torch.cosine_similarity(before, after, dim=-1).mean().item()
        for before, after in itertools.pairwise(states[:-1])
    ]
    scores = block_influence(model, BATCHES[:1])
    assert scores[:5] == pytest.approx(expected, abs=1e-5)


def test_padding_does_not_count(stitcher):
    model = stitcher.stitch(StitchPlan.dense(6))
    text = BATCHES[0]
    padded = {
        "input_ids": torch.cat([text, torch.full((4, 9), 2)], dim=1),
        "attention_mask": torch.cat([torch.ones_like(text), torch.zeros(4, 9, dtype=torch.long)], dim=1),
    }
    alone = block_influence(model, [text])
    assert block_influence(model, [padded]) == pytest.approx(alone, abs=1e-5)
    assert block_influence(model, [{"input_ids": padded["input_ids"]}]) != pytest.approx(alone, abs=1e-5)


def test_every_token_weighs_the_same(stitcher):
    model = stitcher.stitch(StitchPlan.dense(6))
    one, two = (block_influence(model, [batch]) for batch in (BATCHES[0], BATCHES[1][:1]))
    both = block_influence(model, [BATCHES[0], BATCHES[1][:1]])
    assert both == pytest.approx([(4 * a + b) / 5 for a, b in zip(one, two, strict=True)], abs=1e-6)


def test_shorter_models_have_scores_too(stitcher):
    assert len(block_influence(stitcher.stitch(StitchPlan.without([2, 3], 6)), BATCHES[:1])) == 4


def test_no_hook_is_left_behind(stitcher):
    model = stitcher.stitch(StitchPlan.dense(6))
    before = [(len(layer._forward_hooks), len(layer._forward_pre_hooks)) for layer in model.model.layers]
    block_influence(model, BATCHES[:1])
    with pytest.raises(UserError, match="the batches hold no tokens"):
        block_influence(model, [])
    assert [(len(layer._forward_hooks), len(layer._forward_pre_hooks)) for layer in model.model.layers] == before


def test_broken_models_are_named(stitcher):
    broken = StitchPlan(6, tuple(LayerChoice(i, output_scale=float("inf") if i == 2 else 1.0) for i in range(6)))
    with pytest.raises(UserError, match="layer 2 gives hidden states that are not finite"):
        block_influence(stitcher.stitch(broken), BATCHES[:1])


def test_ties_go_from_the_deeper_end():
    assert removal_order([0.5, 0.1, 0.3, 0.1, 0.1]) == [4, 3, 1, 2, 0]
    with pytest.raises(UserError, match="cannot remove 3 of 3 layers"):
        plan(3, [0.1, 0.2, 0.3], 3)
    with pytest.raises(UserError, match="3 scores for 4 layers"):
        plan(4, [0.1, 0.2, 0.3], 1)
