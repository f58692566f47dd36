"""Narrower and sparser layers: planted redundancy goes, what stays is refitted exactly, and refusals say why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import save_family, tiny_config
from transformers import AutoModelForCausalLM

from gptailor.errors import UserError
from gptailor.evaluate.direct import is_plain
from gptailor.evaluate.examples import Example, Window
from gptailor.evaluate.forward import score_direct, score_rows, score_tree
from gptailor.evaluate.packing import build_pack
from gptailor.family.models import Family, open_family
from gptailor.plan import Edit, Setting, StitchPlan, Texts
from gptailor.stitch.edits.case import EditCase
from gptailor.stitch.edits.llm_pruner import importances, spared
from gptailor.stitch.edits.registry import settings_of
from gptailor.stitch.edits.slimgpt import Surgeon, _squares
from gptailor.stitch.edits.width import Cut, Widths, cuts
from gptailor.stitch.stitcher import Stitcher

TEXTS = Texts("objectives", 4000, "0123abcd")
IDS = torch.randint(0, 300, (4, 40), generator=torch.Generator().manual_seed(9))
DENSE = StitchPlan.dense(6)
NARROW = ("llm_pruner", "slimgpt")
PLANTED_CHANNELS = (3, 17, 40)


def texts(n: int = 60) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 60, (n,), generator=generator)
    return [torch.randint(0, 300, (int(length),), generator=generator).tolist() for length in lengths]


def stitcher_of(family: Family, some: list[list[int]] | None = None) -> Stitcher:
    return Stitcher(family, texts=lambda _asked, _dense: texts() if some is None else some)


def layers_of(stitcher: Stitcher, plan: StitchPlan) -> list[Any]:
    return list(stitcher.layers(plan))


def edited(method: str, ratio: float, **settings: Setting) -> StitchPlan:
    return DENSE.edited(Edit(method, (("ratio", ratio), *settings.items()), TEXTS))


def case_of(stitcher: Stitcher, plan: StitchPlan) -> EditCase:
    (edit,) = plan.edits
    return EditCase(
        stitcher, DENSE, edit, settings_of(edit), stitcher.layers(DENSE), texts(), lambda _what, _share: None
    )


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def family(tiny_family, make_spec) -> Family:
    return open_family(make_spec(tiny_family))


@pytest.fixture
def planted(tmp_path: Path, make_spec) -> Callable[[Callable[[int, Any], None]], Family]:
    """A family whose base's layers were changed: plant(number, layer)."""

    def make(plant: Callable[[int, Any], None]) -> Family:
        save_family(tmp_path, tiny_config(), candidates=())
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        with torch.no_grad():
            for number, layer in enumerate(model.model.layers):
                plant(number, layer)
        model.save_pretrained(tmp_path / "base")
        return open_family(make_spec(tmp_path, operations=["remove"]))

    return make


def silent(number: int, layer: Any) -> None:
    """One group of heads whose output nobody reads, and half of the channels."""
    group = number % 2
    layer.self_attn.o_proj.weight[:, 16 * group : 16 * group + 16] = 0.0
    layer.mlp.down_proj.weight[:, number % 2 :: 2] = 0.0


def copied(_number: int, layer: Any) -> None:
    """The second group of heads and the second half of the channels compute what the first do."""
    attention, mlp = layer.self_attn, layer.mlp
    attention.q_proj.weight[16:] = attention.q_proj.weight[:16]
    for part in (attention.k_proj, attention.v_proj):
        part.weight[8:] = part.weight[:8]
    for part in (mlp.gate_proj, mlp.up_proj):
        part.weight[32:] = part.weight[:32]
    mlp.up_proj.weight[40:] *= 2  # a multiple is a combination too


def test_half_of_every_layer_is_the_ratio_that_was_asked(family) -> None:
    """Every kept layer's widths are its own, counted in its tensors, and as many parameters go as were asked."""
    for method in NARROW:
        stitcher, plan = stitcher_of(family), edited(method, 0.25)
        model = stitcher.stitch(plan)
        gone = stitcher.n_parameters(DENSE) - stitcher.n_parameters(plan)
        assert stitcher.n_parameters(plan) == sum(p.numel() for p in model.parameters())
        assert stitcher.n_bytes(plan) == 4 * stitcher.n_parameters(plan)
        assert gone == pytest.approx(0.25 * sum(family.layer_parameters), abs=3 * 32)  # one channel of one layer
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(stitcher, plan)]
        whole = family.layer_parameters[0]
        if method == "llm_pruner":
            assert sizes[0] == sizes[-1] == whole and max(sizes[1:-1]) - min(sizes[1:-1]) <= 96
        else:
            assert sizes == sorted(sizes, reverse=True) and sizes[0] == whole > sizes[-1]


def test_all_ways_of_scoring_agree_on_narrower_layers(family) -> None:
    rows = [tuple(row) for row in IDS.tolist()]
    windows = [Window(row[:30] + row[30 + k :], 10 - k) for row in rows for k in (0, 2)]
    examples = [
        Example(0, None, (), ((first,), (second,))) for first, second in zip(windows[::2], windows[1::2], strict=True)
    ]
    pack = build_pack(examples, range(len(examples)))
    stitcher = stitcher_of(family)
    for plan in (edited("slimgpt", 0.4), edited("besa", 0.4)):
        model: Any = stitcher.stitch(plan)
        assert is_plain(model)
        plain = [scored.precise for scored in score_rows(model, windows, 256)]
        for way in (score_direct, score_tree):
            assert [scored.precise for scored in way(model, pack)] == pytest.approx(plain, abs=1e-3)
        written = [
            model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=use, pad_token_id=2)
            for use in (True, False)
        ]
        assert torch.equal(*written)
    zeros = sum(int((p == 0).sum()) for layer in layers_of(stitcher, plan) for p in layer.parameters())
    assert zeros == pytest.approx(0.4 * sum(family.layer_parameters), rel=0.01)


@pytest.mark.parametrize(
    ("method", "settings"), [("llm_pruner", {}), ("llm_pruner", {"importance": "mixed"}), ("slimgpt", {})]
)
def test_what_nobody_reads_goes_first(planted, method, settings) -> None:
    stitcher = stitcher_of(planted(silent))
    before, after = (logits(stitcher.stitch(plan)) for plan in (DENSE, edited(method, 0.3, **settings)))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_slimgpts_refit_reproduces_copies_exactly(planted) -> None:
    """The half that goes is a combination of the half that stays, whichever that is."""
    stitcher = stitcher_of(planted(copied))
    before, after = (logits(stitcher.stitch(plan)) for plan in (DENSE, edited("slimgpt", 0.3, damping=1e-9)))
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)
    pruned = logits(stitcher.stitch(edited("llm_pruner", 0.3)))
    assert (pruned - before).norm() > 0.1 * before.norm(), "without a refit it would not"


def test_the_refit_is_the_least_squares_solution() -> None:
    """Against the normal equations of the columns that are left, in float64."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    x = torch.randn(400, 24, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(5, 24, generator=generator, dtype=torch.float64)
    hessian = 2 / len(x) * x.T @ x
    for damping in (0.0, 0.01):
        surgeon = Surgeon(weight, hessian, damping)
        spans = surgeon.remove_groups(2, 6)
        damped = hessian + damping * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
        kept = surgeon.left
        assert kept.tolist() == [6 * span + i for span in spans.tolist() for i in range(6)]
        solution = torch.linalg.solve(damped[kept][:, kept], (weight @ damped[:, kept]).T).T
        torch.testing.assert_close(surgeon.weight, solution, rtol=1e-8, atol=1e-8)
        columns = surgeon.remove_columns(5)
        solution = torch.linalg.solve(damped[columns][:, columns], (weight @ damped[:, columns]).T).T
        torch.testing.assert_close(surgeon.weight, solution, rtol=1e-7, atol=1e-7)


def test_what_slimgpt_removes_costs_less_than_anything_else() -> None:
    """By the squared error that is left after the best refit."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500, 16, generator=generator, dtype=torch.float64)
    x[:, 4:8] = x[:, :4] + 0.05 * x[:, 4:8]  # nearly a copy
    weight = torch.randn(6, 16, generator=generator, dtype=torch.float64)
    weight[:, 12] *= 0.02

    def cost(kept: list[int]) -> float:
        refit = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution
        return float((x[:, kept] @ refit - x @ weight.T).square().sum())

    spans = Surgeon(weight, x.T @ x, 0.0).remove_groups(1, 4).tolist()
    costs = {gone: cost([c for c in range(16) if c // 4 != gone]) for gone in range(4)}
    assert set(range(4)) - set(spans) == {min(costs, key=costs.__getitem__)}
    columns = Surgeon(weight, x.T @ x, 0.0).remove_columns(1).tolist()
    costs = {gone: cost([c for c in range(16) if c != gone]) for gone in range(16)}
    assert set(range(16)) - set(columns) == {min(costs, key=costs.__getitem__)}


def test_half_precision_is_summed_as_exactly_as_in_float64() -> None:
    x = torch.randn(5000, 24, generator=torch.Generator().manual_seed(4)) * torch.logspace(-3, 3, 24)
    for dtype in (torch.bfloat16, torch.float32):
        some = x.to(dtype)
        exact = some.double().T @ some.double()
        scale = exact.diagonal().sqrt()
        assert float(((_squares(some) - exact) / scale / scale[:, None]).abs().max()) < 1e-6


def test_a_block_of_channels_never_takes_both_of_a_pair() -> None:
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x[:, 32:] = x[:, :32]
    weight = torch.ones(2, 64, dtype=torch.float64)
    surgeon = Surgeon(weight, x.T @ x, 1e-9)
    kept = surgeon.remove_columns(32)
    assert sorted(kept.remainder(32).tolist()) == list(range(32))
    torch.testing.assert_close(surgeon.weight, torch.full((2, 32), 2.0, dtype=torch.float64), atol=1e-5, rtol=1e-5)


def test_importances_are_those_of_the_formulas(family) -> None:
    """Against autograd's gradients of transformers' own loss; and nothing is left on the family's tensors."""
    found = {}
    for importance in ("first", "mixed"):
        stitcher = stitcher_of(family)
        case = case_of(stitcher, edited("llm_pruner", 0.2, importance=importance))
        case.texts = [list(range(5 + i, 45 + i)) for i in range(4)]
        widths = {2: Widths.of(case.layers[2], "", "")}
        groups, channels = importances(case, widths)[2]
        model, layer = case.model(), layers_of(stitcher, DENSE)[2]
        down = layer.mlp.down_proj.weight
        each = [_gradient(model, down, torch.tensor([text])) for text in case.texts]
        g = _gradient(model, down, torch.tensor(case.texts))
        squares = torch.stack([one.square() for one in each]).mean(0)
        value = down * g - (0.5 * down * squares * down if importance == "mixed" else 0.0)
        others = [(layer.mlp.gate_proj.weight, 1), (layer.mlp.up_proj.weight, 1)]
        total = value.abs().sum(0)
        for weight, dim in others:
            each = [_gradient(model, weight, torch.tensor([text])) for text in case.texts]
            squares = torch.stack([one.square() for one in each]).mean(0)
            g = _gradient(model, weight, torch.tensor(case.texts))
            total = total + (
                weight * g - (0.5 * weight * squares * weight if importance == "mixed" else 0.0)
            ).abs().sum(dim)
        torch.testing.assert_close(channels, total.detach(), rtol=1e-4, atol=1e-6)
        found[importance] = channels
        assert len(groups) == 2 and (groups > 0).all()
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    apart = (found["first"] - found["mixed"]).abs() / found["first"]
    assert 1e-3 < float(apart.max()) < 0.1, "the second term is seen, and is small"


def _gradient(model: Any, weight: Any, ids: torch.Tensor) -> torch.Tensor:
    weight.requires_grad_(True)
    (found,) = torch.autograd.grad(model(ids, labels=ids).loss, weight)
    weight.requires_grad_(False)
    return found


def test_what_llm_pruner_removes_is_missed_less_than_the_rest(family) -> None:
    """The loss rises less without the channels that it takes than without as many others."""
    stitcher = stitcher_of(family, own := _own_words(family))
    case = case_of(stitcher, edited("llm_pruner", 0.2))
    case.texts = own
    widths = {p: Widths.of(case.layers[p], "", "") for p in spared(6)}
    scores = importances(case, widths)

    def loss(best_first: bool) -> float:
        layers = list(case.layers)
        for p, its in widths.items():
            order = scores[p][1].argsort(descending=not best_first)
            layers[p] = its.narrowed(layers[p], channels=order[8:].sort().values)
        ids = torch.tensor(own)
        with torch.no_grad():
            model: Any = case.model(layers)
            return float(model(ids, labels=ids).loss)

    assert loss(best_first=True) < loss(best_first=False)


def _own_words(family: Family) -> list[list[int]]:
    model: Any = Stitcher(family).stitch(DENSE)
    ids = torch.arange(3, 90, 7)[:, None]
    with torch.inference_mode():
        for _ in range(16):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids.tolist()


def test_besa_divides_its_zeros_better_than_evenly(planted, monkeypatch) -> None:
    """Rows that nobody reads get more of them; the count is the ratio's, and the model keeps its size."""
    family = planted(silent)
    dense, off = _behind_the_first_layer(Stitcher(family).stitch(DENSE)), {}
    monkeypatch.setattr("gptailor.stitch.edits.besa.STEPS", 40)
    for rate in (0.05, 0.0):  # without learning, Wanda's even share
        monkeypatch.setattr("gptailor.stitch.edits.besa.RATE", rate)
        stitcher, plan = stitcher_of(family), edited("besa", 0.4)
        off[rate] = float((_behind_the_first_layer(stitcher.stitch(plan)) - dense).norm())
        layers = layers_of(stitcher, plan)
        assert stitcher.n_parameters(plan) == stitcher.n_parameters(DENSE), "zeros are parameters too"
        rows = [layer.mlp.gate_proj.weight.eq(0).sum(dim=1).float() for layer in layers]
        unread = sum(float(row[number % 2 :: 2].mean()) for number, row in enumerate(rows))
        read = sum(float(row[1 - number % 2 :: 2].mean()) for number, row in enumerate(rows))
        assert unread > read if rate else unread == read
    assert off[0.05] < 0.99 * off[0.0]


def test_besa_leaves_less_error_than_wanda_at_the_same_sparsity(family, monkeypatch) -> None:
    monkeypatch.setattr("gptailor.stitch.edits.besa.STEPS", 40)
    dense, errors, zeros = _behind_the_first_layer(Stitcher(family).stitch(DENSE)), {}, {}
    for rate in (0.05, 0.0):  # without learning, Wanda's even share
        monkeypatch.setattr("gptailor.stitch.edits.besa.RATE", rate)
        stitcher, plan = stitcher_of(family), edited("besa", 0.5)
        zeros[rate] = [sum(int(p.eq(0).sum()) for p in layer.parameters()) for layer in layers_of(stitcher, plan)]
        errors[rate] = float((_behind_the_first_layer(stitcher.stitch(plan)) - dense).norm())
    assert zeros[0.05] == pytest.approx(zeros[0.0], rel=0.01)
    assert errors[0.05] < 0.98 * errors[0.0]


@torch.no_grad()
def _behind_the_first_layer(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(
        torch.cat([torch.tensor(t) for t in texts()])[None, :200], output_hidden_states=True
    ).hidden_states[1]
    return found


@pytest.mark.parametrize("method", ["llm_pruner", "slimgpt", "besa"])
def test_equal_plans_are_equal_models(family, method, monkeypatch) -> None:
    """Two stitchers that know nothing of each other; another ratio, seed or text is another plan."""
    monkeypatch.setattr("gptailor.stitch.edits.besa.STEPS", 6)
    plan = edited(method, 0.3)
    one, other = (logits(stitcher_of(family).stitch(plan)) for _ in range(2))
    assert torch.equal(one, other)
    (edit,) = plan.edits
    changes = [
        replace(edit, parameters=(("ratio", 0.25),)),
        replace(edit, seed=1),
        replace(edit, texts=replace(TEXTS, digest="ff")),
    ]
    assert len({plan.hash, *(DENSE.edited(changed).hash for changed in changes)}) == 4


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "mistral", "llama"])
def test_biases_head_norms_and_tied_heads(make_family, make_spec, model_type) -> None:
    """Cut layers give what the whole layer gives when what is cut was silent; biases of q, k, v go with their rows."""
    family = open_family(make_spec(make_family(model_type, tie_word_embeddings=True)))
    layer: Any = family.layer(1)
    widths = Widths.of(layer, "slimgpt", "")
    assert (widths.groups, widths.heads, widths.head_dim, widths.channels) == (2, 2, 8, 64)
    if model_type == "qwen2":
        assert layer.self_attn.q_proj.bias is not None
    plan = edited("slimgpt", 0.3)
    stitcher = stitcher_of(family)
    model = stitcher.stitch(plan)
    assert stitcher.n_parameters(plan) == sum(p.numel() for p in model.parameters())
    assert torch.isfinite(logits(model)).all()
    last = layers_of(stitcher, plan)[-1].self_attn
    assert last.k_proj.weight.shape[0] == 8 and last.q_proj.out_features == last.o_proj.in_features == 16
    sizes = {p.shape[0] for name, p in last.named_parameters() if name.endswith("bias")}
    assert sizes <= {16, 8, 32}


def test_shares_become_whole_groups_and_channels() -> None:
    its = Widths(3, 2, 8, 600, {}, 1000, 10)
    case: Any = type("C", (), {"parameter": lambda *_: 0.3, "edit": Edit("slimgpt"), "plan": DENSE})()
    off = cuts(case, {0: its, 1: its}, {0: 0.3, 1: 0.5})
    assert off == {0: Cut(1, 168), 1: Cut(2, 256)}, "channels go by eights and make up for groups"
    assert sum(cut.groups * 1000 + cut.channels * 10 for cut in off.values()) == pytest.approx(0.8 * 9000, abs=40)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NARROW)
def test_one_key_value_head_cannot_be_halved(make_family, make_spec, method) -> None:
    family = open_family(make_spec(make_family("llama", num_key_value_heads=1)))
    with pytest.raises(UserError, match=rf"{method}: layer \d of LlamaForCausalLM has one key-value head, and whole"):
        stitcher_of(family).stitch(edited(method, 0.25))


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2", "phi3", "mixtral"])
def test_layers_of_other_parts_are_refused(make_family, make_spec, model_type) -> None:
    sizes = {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 256} if model_type == "gpt2" else {}
    family = open_family(make_spec(make_family(model_type, **sizes)))
    with pytest.raises(UserError, match=r"slimgpt: the layers of \w+ have no gated MLP \(one gate_proj, one up_proj"):
        stitcher_of(family).stitch(edited("slimgpt", 0.25))


def test_norms_over_all_heads_are_refused(make_family, make_spec) -> None:
    family = open_family(make_spec(make_family("olmo2")))
    with pytest.raises(UserError, match=r"heads of Olmo2ForCausalLM cannot be told apart in its tensors .*k_norm"):
        stitcher_of(family).stitch(edited("llm_pruner", 0.25))


@pytest.mark.parametrize(
    ("method", "ratio", "message"),
    [
        (
            "llm_pruner",
            0.7,
            r"llm_pruner: a ratio of 0.7 leaves layer 1 empty: 106% of its heads and channels would go",
        ),
        ("slimgpt", 0.8, r"slimgpt: a ratio of 0.8 leaves layer \d empty"),
        ("besa", 1.2, r"edits: besa's ratio must be between 0 and 1, got 1.2"),
        ("besa", 0.999, r"besa: a ratio of 0.999 leaves every layer empty"),
        ("slimgpt", 0.0, r"slimgpt's ratio must be between 0 and 1, got 0"),
    ],
)
def test_a_ratio_that_leaves_a_layer_empty_is_refused(family, method, ratio, message) -> None:
    with pytest.raises(UserError, match=message):
        stitcher_of(family).stitch(edited(method, ratio))


def test_an_attention_of_other_projections_is_refused(make_family, make_spec) -> None:
    family = open_family(make_spec(make_family("olmo")))
    layer: Any = family.layer(0)
    del layer.self_attn.k_proj
    with pytest.raises(UserError, match=r"llm_pruner: the layers of \w+ have no attention of q_proj, k_proj, v_proj"):
        Widths.of(layer, "llm_pruner", "OlmoForCausalLM")


def test_besa_needs_linear_maps(make_family, make_spec) -> None:
    sizes = {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 256}
    family = open_family(make_spec(make_family("gpt2", **sizes)))
    with pytest.raises(UserError, match=r"besa: the weights of GPT2LMHeadModel's layers are not in linear maps"):
        stitcher_of(family).stitch(edited("besa", 0.25))


def test_texts_that_predict_nothing_are_refused(family) -> None:
    with pytest.raises(UserError, match="llm_pruner: the calibration texts hold none of two tokens or more"):
        stitcher_of(family, [[7]] * 80).stitch(edited("llm_pruner", 0.25))


def test_inputs_that_are_one_are_refused_without_damping(planted) -> None:
    with pytest.raises(UserError, match="slimgpt: inputs cannot be told apart on these calibration texts"):
        stitcher_of(planted(copied), [[7, 8, 9]] * 30).stitch(edited("slimgpt", 0.25, damping=0.0))


def test_texts_too_few_for_the_hessian_are_refused(family) -> None:
    with pytest.raises(UserError, match=r"slimgpt: 40 tokens of calibration texts are too few for a Hessian of 64 col"):
        stitcher_of(family, [list(range(40))]).stitch(edited("slimgpt", 0.25))
