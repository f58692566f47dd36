"""Edits of a plan: what determines them is in its hash, they are computed once, and repairs do what they say."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.families import tiny_config
from helpers.planted import family_with_a_linear_layer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gptailor.baselines.cost import edit_cost
from gptailor.errors import UserError
from gptailor.evaluate.direct import is_plain
from gptailor.evaluate.examples import Example, Window
from gptailor.evaluate.forward import score_direct, score_rows
from gptailor.evaluate.packing import build_pack
from gptailor.family.models import open_family
from gptailor.family.structure import with_tensors
from gptailor.formats.huggingface import export_hf
from gptailor.plan import Edit, LayerChoice, StitchPlan, Texts
from gptailor.spec.sections import Baseline, Repair
from gptailor.stitch.edits import registry
from gptailor.stitch.edits.case import EditCase
from gptailor.stitch.edits.cost import Cost, Sizes, repair_cost
from gptailor.stitch.edits.registry import EDITS, repair_edit
from gptailor.stitch.edits.solve import Normal, best_ridge
from gptailor.stitch.stitcher import Stitcher

TEXTS = Texts("objectives", 4000, "0123abcd")
CUT = StitchPlan.without([3], 6)
REPAIRS = ["replaceme", "replaceme_cosine", "refit", "prune_comp", "rcpu"]
IDS = torch.randint(0, 300, (4, 40), generator=torch.Generator().manual_seed(9))


def texts(n: int = 60, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 60, (n,), generator=generator)
    return [torch.randint(0, 300, (int(length),), generator=generator).tolist() for length in lengths]


def stitcher_of(family, some: list[list[int]] | None = None, **settings) -> Stitcher:
    return Stitcher(family, texts=lambda _asked, _dense: texts() if some is None else some, **settings)


@pytest.fixture(scope="module")
def family(tiny_family, make_spec):
    return open_family(make_spec(tiny_family))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


# --- plans -----------------------------------------------------------------------------------------------------------


def test_what_determines_an_edit_is_in_the_hash() -> None:
    edit = Edit("refit", (("layers", "gaps"), ("projections", "mlp")), TEXTS, seed=3)
    plan = CUT.edited(edit)
    again = StitchPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and again.hash == plan.hash and again.unedited == CUT
    others = [
        CUT,
        CUT.edited(edit, edit),
        CUT.edited(replace(edit, method="rcpu")),
        CUT.edited(replace(edit, seed=4)),
        CUT.edited(replace(edit, parameters=())),
        CUT.edited(replace(edit, texts=replace(TEXTS, digest="ffff"))),
    ]
    assert len({plan.hash, *(other.hash for other in others)}) == 7
    assert CUT.edited(replace(edit, parameters=edit.parameters[::-1])).hash == plan.hash
    assert Edit("m", (("a", 1.0),)) == Edit("m", (("a", 1),))


def test_plans_without_edits_are_written_as_ever_and_older_versions_refuse_others() -> None:
    assert CUT.to_json().keys() == {"format", "n_layers", "kept"} and CUT.to_json()["format"] == 1
    assert CUT.edited(Edit("refit", texts=TEXTS)).to_json()["format"] == 2
    with pytest.raises(UserError, match="plan format 3 is not known here; this version reads formats 1 and 2"):
        StitchPlan.from_json(CUT.to_json() | {"format": 3})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit("magic"), "'magic' is not known here; this version has replaceme"),
        (Edit("refit"), "refit is computed from calibration texts, and the plan names none"),
        (Edit("refit", (("speed", 1),), TEXTS), "refit has no parameter 'speed'; it has teacher, layers, projections"),
        (Edit("refit", (("layers", 1),), TEXTS), "refit's layers must be text, got 1"),
        (Edit("refit", (("layers", "all"),), TEXTS), "layers must be one of kept, gaps, got 'all'"),
        (Edit("refit", (("teacher", "physics"),), TEXTS), "'physics' is not in this family"),
    ],
)
def test_edits_that_cannot_be_done_are_refused(family, edit, message) -> None:
    with pytest.raises(UserError, match=message):
        stitcher_of(family).stitch(CUT.edited(edit))


def test_an_edit_needs_its_texts(family) -> None:
    with pytest.raises(UserError, match=r"calibration texts .objectives. cannot be read here"):
        Stitcher(family).stitch(CUT.edited(Edit("refit", texts=TEXTS)))
    with pytest.raises(UserError, match="refit needs calibration texts, and they hold no tokens"):
        stitcher_of(family, [[]]).stitch(CUT.edited(Edit("refit", texts=TEXTS)))


# --- the seam --------------------------------------------------------------------------------------------------------


def test_edited_layers_are_computed_once_and_are_the_plans_own(family) -> None:
    asked = []
    stitcher = Stitcher(family, cache_bytes=0, texts=lambda of, _dense: asked.append(of) or texts())  # type: ignore[func-returns-value]
    plan = CUT.edited(Edit("refit", texts=TEXTS))
    first = logits(stitcher.stitch(plan))
    before = logits(stitcher.stitch(CUT))
    assert torch.equal(logits(stitcher.stitch(plan)), first) and asked == [TEXTS]
    assert not torch.equal(first, before)
    assert torch.equal(before, logits(Stitcher(family).stitch(CUT))), "the family's own tensors were changed"
    stitcher.stitch(CUT.edited(Edit("rcpu", texts=TEXTS)))
    assert len(stitcher.edited) == 1, "without room, only the last edited plan is kept"


def test_edits_follow_one_another(family) -> None:
    refit, scale = Edit("refit", texts=TEXTS), Edit("prune_comp", texts=TEXTS)
    found = [logits(stitcher_of(family).stitch(CUT.edited(*edits))) for edits in ((refit, scale), (scale, refit))]
    assert not torch.allclose(*found, rtol=1e-3)  # type: ignore[arg-type, misc]


def test_progress_is_told_and_may_stop(family) -> None:
    told = []

    class Enough(Exception):
        pass

    def between(what: str, share: float) -> None:
        told.append((what, share))
        if len(told) > 3:
            raise Enough

    stitcher, plan = stitcher_of(family), CUT.edited(Edit("refit", texts=TEXTS))
    with pytest.raises(Enough):
        stitcher.stitch(plan, between)
    assert all(what.startswith("refit: ") and 0 <= share <= 1 for what, share in told)
    assert not torch.equal(logits(stitcher.stitch(plan)), logits(stitcher.stitch(CUT))), "a stopped edit is done anew"


def narrower(case: EditCase) -> list[torch.nn.Module]:
    """Every layer with fewer MLP channels, and half of its KV groups in every second one."""
    edited = []
    for position, layer in enumerate(case.layers):
        state, own = layer.state_dict(), {}  # type: ignore[var-annotated]
        width = 40 + 8 * position
        own |= {f"mlp.{name}.weight": state[f"mlp.{name}.weight"][:width] for name in ("gate_proj", "up_proj")}
        own["mlp.down_proj.weight"] = state["mlp.down_proj.weight"][:, :width]
        if position % 2:
            for name, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
                own[f"self_attn.{name}.weight"] = state[f"self_attn.{name}.weight"][:rows]
            own["self_attn.o_proj.weight"] = state["self_attn.o_proj.weight"][:, :16]
        edited.append(with_tensors(layer, {name: tensor.contiguous() for name, tensor in own.items()}))
    return edited


def test_layers_may_each_have_their_own_widths(family, monkeypatch) -> None:
    monkeypatch.setitem(EDITS, "narrower", registry.Method("", "none.none", keeps_shapes=False, needs_texts=False))
    monkeypatch.setattr(registry.Method, "load", lambda _self: narrower)
    stitcher, plan = stitcher_of(family), StitchPlan.dense(6).edited(Edit("narrower"))
    model = stitcher.stitch(plan)
    assert (
        stitcher.n_parameters(plan) == sum(p.numel() for p in model.parameters()) < stitcher.n_parameters(plan.unedited)
    )
    rows = [tuple(row) for row in IDS.tolist()]
    windows = [Window(row[:30] + row[30 + k :], 10 - k) for row in rows for k in (0, 2)]
    examples = [
        Example(0, None, (), ((first,), (second,))) for first, second in zip(windows[::2], windows[1::2], strict=True)
    ]
    assert is_plain(model)
    fast = score_direct(model, build_pack(examples, range(len(examples))))
    plain = score_rows(model, windows, 256)
    assert [f.precise for f in fast] == pytest.approx([p.precise for p in plain], abs=1e-3)
    written = [
        model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=use, pad_token_id=2)  # type: ignore[operator]
        for use in (True, False)
    ]
    assert torch.equal(*written)


# --- repairs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "settings"), [*((m, ()) for m in REPAIRS), ("refit", (("projections", "both"),))])
def test_a_repair_brings_the_model_nearer_and_its_export_is_plain(family, method, settings, tmp_path) -> None:
    plan = CUT.edited(Edit(method, settings, TEXTS))
    dense, before = (logits(Stitcher(family).stitch(one)) for one in (StitchPlan.dense(6), CUT))
    stitcher = stitcher_of(family)
    after = logits(stitcher.stitch(plan))
    assert (after - dense).norm() < (before - dense).norm()
    done = export_hf(family, plan, tmp_path / "out", stitcher=stitcher)
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(theirs), after, atol=1e-5)
    assert done.n_parameters == sum(p.numel() for p in theirs.parameters()) == stitcher.n_parameters(CUT)
    assert StitchPlan.from_json(json.loads((tmp_path / "out" / "gptailor_plan.json").read_text())) == plan
    assert torch.equal(logits(stitcher_of(open_family(family.spec)).stitch(plan)), after), "equal texts, equal weights"


def test_a_small_model_is_repaired_from_fewer_tokens(family) -> None:
    assert [Repair().tokens_for(inner) for inner in (family.inner_size, 256, 11_008)] == [768, 3072, 16_384]
    assert Repair(tokens=500).tokens_for(11_008) == 500


@pytest.mark.parametrize("layers", ["kept", "gaps"])
def test_a_layer_that_was_a_linear_map_is_restored(tmp_path, make_spec, layers) -> None:
    family = open_family(
        make_spec(family_with_a_linear_layer(tmp_path, tiny_config(tie_word_embeddings=True)), operations=["remove"])
    )
    plan = CUT.edited(Edit("refit", (("layers", layers),), TEXTS))
    dense, before = (logits(Stitcher(family).stitch(one)) for one in (StitchPlan.dense(6), CUT))
    after = logits(stitcher_of(family).stitch(plan))
    assert (before - dense).abs().max() > 0.1
    assert (after - dense).abs().max() < 1e-5 * dense.abs().max()


def test_with_few_texts_and_no_structure_the_weights_stay() -> None:
    """What is missing has nothing to do with what is read: any fit is noise."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(80, 64, generator=generator)
    targets = torch.randn(80, 32, generator=generator)
    weights, held = torch.ones(80, dtype=torch.float64), torch.arange(80) % 5 == 4
    fit, judge = (Normal.of(inputs, targets, weights, rows) for rows in (~held, held))
    assert best_ridge(fit, judge) is None
    least = fit.solve(1e-8)
    assert fit.error(least) < 0.1 * fit.square and judge.error(least) > judge.square, "free least squares overfits"  # type: ignore[arg-type]
    structured = inputs @ torch.randn(64, 32, generator=generator)
    fit, judge = (Normal.of(inputs, structured, weights, rows) for rows in (~held, held))
    assert best_ridge(fit, judge) is not None


def test_a_refit_without_gain_is_the_unrepaired_layer(family) -> None:
    stitcher = stitcher_of(family, [[7, 8, 9]] * 3)
    layers = stitcher.layers(CUT.edited(Edit("refit", (("teacher", "math"),), Texts("objectives", 9, "a"))))
    assert all(edited is plain for edited, plain in zip(layers[:2], stitcher.layers(CUT)[:2], strict=True))


def test_normal_equations_are_those_of_float64_least_squares() -> None:
    generator = torch.Generator().manual_seed(2)
    inputs, targets = torch.randn(5000, 24, generator=generator), torch.randn(5000, 8, generator=generator)
    weights = torch.rand(5000, generator=generator, dtype=torch.float64) + 0.5
    problem = Normal.of(inputs, targets, weights, torch.ones(5000, dtype=torch.bool))
    a, r = inputs.double() * weights[:, None], targets.double() * weights[:, None]
    x = torch.linalg.lstsq(a, r).solution.T
    assert torch.allclose(problem.solve(0.0), x, atol=1e-10)  # type: ignore[arg-type]
    assert problem.error(x) == pytest.approx(float((a @ x.T - r).square().sum()))


def test_attention_sinks_do_not_rule_a_fit(tmp_path, make_spec) -> None:
    """A first token a thousand times as large as others leaves their repair as it is."""
    folder = family_with_a_linear_layer(tmp_path, tiny_config())
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        model.model.embed_tokens.weight[0] *= 1000
    model.save_pretrained(folder / "base")
    family = open_family(make_spec(folder, operations=["remove"]))
    stitcher = stitcher_of(family, [[0, *text] for text in texts()])
    after = logits(stitcher.stitch(CUT.edited(Edit("refit", (("layers", "gaps"),), TEXTS))))
    dense = logits(stitcher.stitch(StitchPlan.dense(6)))
    assert (after - dense).abs().max() < 1e-3 * dense.abs().max()


def test_the_teacher_is_whom_most_layers_come_from(family) -> None:
    kept = tuple(LayerChoice(i, ("math",) if i > 1 else ()) for i in (0, 1, 2, 4, 5))
    plan = StitchPlan(6, kept).edited(Edit("refit", texts=TEXTS))
    named = plan.unedited.edited(Edit("refit", (("teacher", "math"),), TEXTS))
    by_base = plan.unedited.edited(Edit("refit", (("teacher", "base"),), TEXTS))
    found = [logits(stitcher_of(family).stitch(one)) for one in (plan, named, by_base)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("model_type", ["qwen2", "gpt_neox", "gpt2"])
def test_the_projection_is_found_by_structure(make_family, make_spec, model_type) -> None:
    sizes = {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 256} if model_type == "gpt2" else {}
    family = open_family(make_spec(make_family(model_type, **sizes)))
    dense, before = (logits(Stitcher(family).stitch(one)) for one in (StitchPlan.dense(6), CUT))
    after = logits(stitcher_of(family).stitch(CUT.edited(Edit("refit", texts=TEXTS))))
    assert (after - dense).norm() < (before - dense).norm()


def test_an_architecture_whose_projection_is_not_found_is_refused(make_family, make_spec) -> None:
    family = open_family(make_spec(make_family("gemma2")))
    with pytest.raises(UserError, match=r"refit: Gemma2ForCausalLM normalises the outputs .* leave refit out"):
        stitcher_of(family).stitch(CUT.edited(Edit("refit", texts=TEXTS)))


def test_states_that_are_not_finite_are_refused(tmp_path, make_spec) -> None:
    family = open_family(make_spec(family_with_a_linear_layer(tmp_path, tiny_config()), operations=["remove"]))
    layer: Any = family.layer(4)
    with torch.no_grad():
        layer.mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(UserError, match=r"refit: layer \d gives hidden states that are not finite"):
        stitcher_of(family).stitch(CUT.edited(Edit("refit", texts=TEXTS)))


def test_an_mlp_whose_output_is_changed_on_its_way_is_refused(family) -> None:
    layer: Any = family.layer(2)
    hook = layer.mlp.register_forward_hook(lambda _, _args, output: output.tanh())
    try:
        with pytest.raises(
            UserError, match=r"refit: LlamaForCausalLM does not add its MLP's output to the stream as i"
        ):
            stitcher_of(family).stitch(CUT.edited(Edit("refit", (("layers", "gaps"),), TEXTS)))
    finally:
        hook.remove()


class Live(TorchDispatchMode):
    """Bytes of the tensors that were made while it lasts and live still, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "refit", "layers": "gaps"},
        {"method": "refit", "projections": "both"},
        *({"method": m} for m in REPAIRS),
    ],
    ids=lambda asked: " ".join(asked.values()),
)
def test_what_a_repair_takes_is_told_before(family, asked) -> None:
    repair = Repair(**asked, tokens=3000)
    plan = StitchPlan.without([2, 3], 6).edited(repair_edit(repair, TEXTS, 0))
    _is_told_before(family, plan, repair_cost(repair, Sizes(6, 4, 32, 64, family.layer_parameters[0], 4)))


@pytest.mark.parametrize("name", [Baseline.LLM_PRUNER, Baseline.LLM_PRUNER_MIXED, Baseline.SLIMGPT, Baseline.BESA])
def test_what_the_edit_of_a_baseline_takes_is_told_before(family, name, monkeypatch) -> None:
    monkeypatch.setattr("gptailor.baselines.narrower.TOKENS", 3000)
    for module in ("besa", "cost"):
        monkeypatch.setattr(f"gptailor.stitch.edits.{module}.STEPS", 6)
    ratio = ("ratio", round(2 / 6, 6))
    settings = (ratio, ("importance", "mixed")) if name is Baseline.LLM_PRUNER_MIXED else (ratio,)
    plan = StitchPlan.dense(6).edited(Edit(name.removesuffix("_mixed"), settings, TEXTS))
    vocabulary = family.model.config.vocab_size
    told = edit_cost(name, Sizes(6, 4, 32, 64, family.layer_parameters[0], 4, vocabulary))
    assert told is not None
    _is_told_before(family, plan, told)


def _is_told_before(family, plan: StitchPlan, told: Cost) -> None:
    """The formula of `check` is above what is held and what is computed, by less than a factor of 3."""
    stitcher = stitcher_of(family, [list(range(3, 103))] * 30)
    stitcher.stitch(plan.unedited)
    with FlopCounterMode(display=False) as counted, Live() as live:
        stitcher.stitch(plan)
    assert live.most < told.n_bytes < 3 * live.most
    assert counted.get_total_flops() < told.operations < 3 * counted.get_total_flops()
