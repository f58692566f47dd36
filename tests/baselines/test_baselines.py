"""Published pruning methods, on models with layers that do nothing: the right cut leaves the model as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.planted import IDENTITIES, own_words, planted_family

from gptailor.baselines import block_influence, llm_streamline, lorp
from gptailor.baselines.angular_distance import distances
from gptailor.baselines.case import Case, LossSum, lowest
from gptailor.baselines.laco import _sum_of_differences
from gptailor.baselines.lorp import locality
from gptailor.baselines.registry import METHODS
from gptailor.baselines.relative_magnitude import magnitudes
from gptailor.baselines.shortened_llama import taylor_scores
from gptailor.errors import UserError
from gptailor.evaluate.scoring import NonFinite
from gptailor.family.models import open_family
from gptailor.plan import StitchPlan, Texts
from gptailor.spec.sections import Baseline
from gptailor.stitch.edits.registry import edit_problem
from gptailor.stitch.stitcher import Stitcher

BY_SCORE = (Baseline.GREEDY, Baseline.EVOLUTION)
BLIND = (Baseline.RANDOM, Baseline.LAST)
NARROWER = tuple(name for name in Baseline if not METHODS[name].removes)
PROBE = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def stitcher(tmp_path_factory: pytest.TempPathFactory, make_spec) -> Stitcher:
    return Stitcher(
        open_family(make_spec(planted_family(tmp_path_factory.mktemp("planted")), operations=["remove", "select"]))
    )


def logits(stitcher: Stitcher, plan: StitchPlan) -> torch.Tensor:
    with torch.inference_mode():
        return stitcher.stitch(plan)(PROBE).logits


TEXTS: dict[str, list[dict[str, torch.Tensor]]] = {}


def case_of(stitcher: Stitcher, source: str, n_removed: int = 2, seed: int = 0) -> Case:
    """fitness: how much of the dense model's own next words a plan keeps, over n of its texts."""
    if source not in TEXTS:
        TEXTS[source] = own_words(stitcher.stitch(StitchPlan.dense(6, source)))
    batches = TEXTS[source]
    texts = torch.cat([batch["input_ids"] for batch in batches])

    def fitness(plan: StitchPlan, n: int) -> float:
        model = stitcher.stitch(plan)
        with torch.inference_mode():
            said = model(texts[:n]).logits[:, :-1].argmax(-1)
        return float((said == texts[:n, 1:]).float().mean())

    stitcher.texts = lambda _asked, _dense: texts.tolist()
    return Case(stitcher, source, n_removed, batches, fitness, rungs=(4, 12), allowed=600, seed=seed)


def test_every_name_has_a_method() -> None:
    assert set(METHODS) == set(Baseline)
    for method in METHODS.values():
        assert method.load().__doc__ and method.title


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (name, source)
        for name in Baseline
        for source in IDENTITIES
        if name not in (*BLIND, *NARROWER, Baseline.LORP)  # which takes one of each phase first
        and not (name.startswith("laco") and source == "math")  # its interval jumps over them
    ],
)
def test_layers_that_do_nothing_are_the_first_to_go(stitcher: Stitcher, name: Baseline, source: str) -> None:
    case = case_of(stitcher, source)
    case.texts = lambda n: Texts("objectives", n, "00ff")
    plan = METHODS[name].load()(case)
    assert bool(plan.edits) == METHODS[name].is_repaired
    assert len(plan.kept) == 4 and plan.candidates == (() if source == "base" else (source,))
    near = 1e-4 if METHODS[name].is_repaired else 1e-5
    torch.testing.assert_close(
        logits(stitcher, plan), logits(stitcher, StitchPlan.dense(6, source)), atol=near, rtol=near
    )
    if name.startswith("laco"):  # the run's first layer stays and takes in the weights of its last
        assert plan.removed == (3, 4) and plan.folded[4] == (2, 1.0)
    else:
        assert plan.removed == IDENTITIES[source] and not plan.folded
    assert (case.examples if name in BY_SCORE else case.passes) > 0
    assert METHODS[name].load()(case) == plan, "the same again"


@pytest.mark.parametrize("name", NARROWER)
def test_narrower_ones_keep_all_layers_and_take_as_many_parameters(stitcher: Stitcher, name: Baseline) -> None:
    case = case_of(stitcher, "math")
    named: list[int] = []
    case.texts = lambda n: named.append(n) or Texts("objectives", n, "00ff")  # type: ignore[func-returns-value]
    plan = METHODS[name].load()(case)
    (edit,) = plan.edits
    assert plan.unedited == StitchPlan.dense(6, "math") and not edit_problem(edit)
    assert dict(edit.parameters)["ratio"] == pytest.approx(2 / 6, abs=1e-6) and named == [edit.texts.n_tokens]  # type: ignore[union-attr]
    assert case.passes > 0 and METHODS[name].load()(case) == plan
    with pytest.raises(RuntimeError, match="this method edits weights, and no texts are named"):
        METHODS[name].load()(case_of(stitcher, "math"))


def test_lorp_spreads_over_phases_and_then_goes_where_layers_are_most_alike() -> None:
    """Two phases, 0-3 and 4-7; the second is more alike."""
    similarity = np.full((8, 8), 0.1)
    similarity[:4, :4], similarity[4:, 4:] = 0.6, 0.8
    similarity[1, 2] = similarity[2, 1] = 0.7  # both redundant; the lower goes first
    similarity[5, 6] = similarity[6, 5] = 0.9
    np.fill_diagonal(similarity, 1.0)
    assert locality(similarity) == pytest.approx(-np.log2(similarity[np.triu_indices(8, 1)].mean()))
    assert lorp.phases(similarity) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    inner = set(range(1, 7))
    order = lorp.choose(similarity, [[0, 1, 2, 3], [4, 5, 6, 7]], inner, 5)
    assert order == [1, 5, 6, 4, 2], "one of each, then the more alike half until it may not, then the other"
    with pytest.raises(UserError, match="LoRP: only 6 layers may go, 7 are to be removed"):
        lorp.choose(similarity, [[0, 1, 2, 3], [4, 5, 6, 7]], inner, 7)


@pytest.mark.parametrize("source", IDENTITIES)
def test_lorp_takes_what_does_nothing_once_every_other_phase_gave_one(stitcher: Stitcher, source: str) -> None:
    """Layer 1 is the one that its phase gives; the first and the last layer stay."""
    plan = lorp.cut(case_of(stitcher, source, 3))
    assert plan.removed == (1, *IDENTITIES[source])
    torch.testing.assert_close(logits(stitcher, plan), logits(stitcher, StitchPlan.without([1], 6, source)))


@pytest.mark.parametrize("name", BY_SCORE)
def test_cuts_without_numbers_are_the_worst(stitcher: Stitcher, name: Baseline) -> None:
    """Layer 2 gives none; it does nothing else, and goes first."""
    case = case_of(stitcher, "base", 1)
    fitness, gone = case.fitness, 2

    def broken(plan: StitchPlan, n: int) -> float:
        if gone not in plan.removed:
            raise NonFinite("a layer gives no numbers")
        return fitness(plan, n)

    case.fitness = broken
    assert METHODS[name].load()(case).removed == (gone,)
    case, gone = case_of(stitcher, "base", 1), 6
    case.fitness = broken
    with pytest.raises(UserError, match=f"{name}: .* numbers"):
        METHODS[name].load()(case)


@pytest.mark.parametrize("name", ["angular", "llm_streamline", "laco"])
def test_layers_that_must_stay_are_in_no_block(stitcher: Stitcher, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = METHODS[Baseline(name)].load()(case_of(stitcher, "base"))
    monkeypatch.setattr(Case, "free", [layer for layer in range(6) if layer not in whole.removed[:1]])
    plan = METHODS[Baseline(name)].load()(case_of(stitcher, "base"))
    assert len(plan.removed) == 2 and whole.removed[0] not in plan.removed
    monkeypatch.setattr(Case, "free", [0, 2, 4])
    with pytest.raises(UserError, match=r"every block of 2 layers has one|3 of which must stay"):
        METHODS[Baseline(name)].load()(case_of(stitcher, "base"))


def hidden_states(case: Case) -> list[torch.Tensor]:
    """Transformers' own, of all calibration texts: before each layer and after the last, [texts, tokens, hidden]."""
    model = case.model()
    with torch.inference_mode():
        told = [model(batch["input_ids"], output_hidden_states=True).hidden_states for batch in case.batches]
    return [torch.cat(parts) for parts in zip(*told, strict=True)]


def test_similarities_are_those_of_transformers_own_states(stitcher: Stitcher) -> None:
    case = case_of(stitcher, "base")
    states = hidden_states(case)
    streams = llm_streamline.similarities(case)
    found = lorp.similarities(case)
    for start in range(4):
        cosine = float(torch.cosine_similarity(states[start], states[start + 2], dim=-1).mean())
        assert streams[start] == pytest.approx(cosine, abs=1e-5)
        assert found[start, start + 2] == pytest.approx(cosine, abs=1e-5)


def test_prune_comp_ranks_anew_after_each_removal(stitcher: Stitcher) -> None:
    """With the first layer gone and the rest scaled, the next is the least influential of that model."""
    case = case_of(stitcher, "base", 3)
    case.texts = lambda n: Texts("objectives", n, "00ff")
    plan = METHODS[Baseline.BLOCK_INFLUENCE_PRUNE_COMP].load()(case)
    assert {2, 3} < set(plan.removed) and plan.edits[0].method == "prune_comp"
    without = StitchPlan.without({2, 3}, 6).edited(*plan.edits)
    scores = block_influence.block_influence(stitcher.stitch(without), case.batches)
    (third,) = set(plan.removed) - {2, 3}
    assert [0, 1, 4, 5][block_influence.removal_order(scores)[0]] == third


def test_costs_are_counted(stitcher: Stitcher) -> None:
    passes = {}
    for name in (Baseline.LAST, Baseline.BLOCK_INFLUENCE, Baseline.SHORTENED_PERPLEXITY, Baseline.SLEB):
        case = case_of(stitcher, "base")
        METHODS[name].load()(case)
        passes[name] = case.passes
        assert case.examples == 0
    one_by_one = 1 + (5 + 4 + 3 + 2 + 1 + 5) / 5  # what the tries share, what is behind each, all for the last layer
    sleb = 1 + (4 + 3 + 2 + 1) / 5 + 1 + (3 + 2 + 1) / 4
    assert passes == pytest.approx({"last": 0, "block_influence": 1, "shortened_perplexity": one_by_one, "sleb": sleb})
    case = case_of(stitcher, "base")
    METHODS[Baseline.GREEDY].load()(case)
    assert case.examples == (6 + 5) * 12
    case = case_of(stitcher, "base")
    METHODS[Baseline.EVOLUTION].load()(case)
    assert case.examples <= 600 + 16 * 4 + 5 * 12, "one generation over the allowance at most"


def test_blind_methods(stitcher: Stitcher) -> None:
    assert METHODS[Baseline.LAST].load()(case_of(stitcher, "math", 3)) == StitchPlan.without([3, 4, 5], 6, "math")
    cuts = {METHODS[Baseline.RANDOM].load()(case_of(stitcher, "base", seed=seed)).removed for seed in range(12)}
    assert len(cuts) > 6 and all(len(removed) == 2 for removed in cuts)


def test_formulas(stitcher: Stitcher) -> None:
    """Angular distance and relative magnitude against transformers' own hidden states; Taylor leaves nothing behind."""
    case = case_of(stitcher, "base")
    states = hidden_states(case)
    cosine = torch.cosine_similarity(states[1][:, -1], states[3][:, -1], dim=-1)
    assert distances(case)[1] == pytest.approx(float(cosine.arccos().mean()) / torch.pi, abs=1e-4)
    ratio = (states[2] - states[1]).norm(dim=-1) / states[2].norm(dim=-1)
    assert magnitudes(case)[1] == pytest.approx(float(ratio.mean()), rel=1e-4)
    scores = taylor_scores(case)
    assert scores[2] == scores[3] == 0 and min(scores[i] for i in (0, 1, 4, 5)) > 0
    model = case.model()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_loss_is_that_of_real_tokens(stitcher: Stitcher) -> None:
    case = case_of(stitcher, "base")
    padded = []
    for batch in case.batches:
        ids = batch["input_ids"]
        pad = torch.full((len(ids), 5), 2)
        padded.append(
            {"input_ids": torch.cat([ids, pad], 1), "attention_mask": torch.cat([torch.ones_like(ids), pad * 0], 1)}
        )
    assert mean_loss(case.model(), padded) == pytest.approx(mean_loss(case.model(), case.batches), rel=1e-5)
    with pytest.raises(UserError, match="hold no text of two tokens"):
        mean_loss(case.model(), [{key: value[:, :1] for key, value in case.batches[0].items()}])


@pytest.mark.parametrize(("source", "removed"), [("base", ()), ("math", (1, 4))])
def test_losses_are_those_of_the_shorter_models(stitcher: Stitcher, source: str, removed: tuple[int, ...]) -> None:
    """The layers before a tried one are run once, and the first and the last may be tried."""
    case = case_of(stitcher, source)
    tried = [layer for layer in range(6) if layer not in removed]
    before = logits(stitcher, StitchPlan.dense(6, source))
    found = case.losses(tried, removed)
    asked = case.passes
    whole = {layer: mean_loss(case.model([*removed, layer]), case.batches) for layer in tried}
    assert found == pytest.approx(whole, rel=1e-5) and list(found) == tried
    n = len(tried)
    assert asked == pytest.approx(1 + sum(range(1, n)) / (n - 1) + 1), "a shared pass, the rest of each, one whole"
    assert torch.equal(logits(stitcher, StitchPlan.dense(6, source)), before), "no hook is left"


def mean_loss(model, batches) -> float:
    total = LossSum()
    for batch in batches:
        total.add(model, batch)
    return total.mean()


def test_lacos_two_formulas_differ() -> None:
    assert _sum_of_differences({3: 1.0}, [{4: 1.0}, {5: 1.0}]) == {3: -1.0, 4: 1.0, 5: 1.0}
    assert sum(_sum_of_differences({3: 1.0}, [{4: -1.0, 5: 1.0, 6: 1.0}, {7: 1.0}]).values()) == 1


def test_layers_without_numbers_are_not_removed_blindly() -> None:
    assert lowest({0: 0.5, 1: 0.2, 2: 0.2, 3: float("inf")}, 2, "x") == [2, 1]
    with pytest.raises(UserError, match="SLEB: only 1 layers have a finite score, 2 are to be removed"):
        lowest({0: 0.5, 1: float("nan")}, 2, "SLEB")
