"""Stitching: layers are re-pointed, merges are mergekit's, every architecture stays a sound transformers model."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import yaml
from helpers.families import EXPERTS_BEHIND
from mergekit.merge_methods import merge_state_dicts
from transformers import AutoModelForCausalLM

from gptailor.errors import UserError
from gptailor.family.models import open_family
from gptailor.plan import LayerChoice, StitchPlan
from gptailor.stitch.merging import merge_method_problem, merge_methods, merge_source_counts
from gptailor.stitch.stitcher import Stitcher

IDS = torch.tensor([[5, 17, 250, 33, 4, 99, 120, 7, 61, 200, 3, 44]])


@pytest.fixture(scope="module")
def family(tiny_family, make_spec):
    return open_family(make_spec(tiny_family))


@pytest.fixture
def stitcher(family):
    stitcher = Stitcher(family)
    yield stitcher
    stitcher.stitch(StitchPlan.dense(family.n_layers))


def merged(
    layer: int, *sources: str, factor: float = 0.6, method: str = "task_arithmetic", **parameters
) -> LayerChoice:
    return LayerChoice(layer, sources, method, factor, tuple(sorted(parameters.items())))


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


def state(family, layer: int, source: str = "base") -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in family.layer(layer, source).state_dict().items()}


MIXED = StitchPlan(
    6, (LayerChoice(0), LayerChoice(1, ("math",)), merged(3, "code", "math"), LayerChoice(5, ("prose",)))
)


# --- re-pointing -------------------------------------------------------------------------------------------------


def test_layers_are_the_sources_own_modules(family, stitcher):
    model = stitcher.stitch(MIXED)
    layers = model.model.layers
    assert model is family.model
    assert (
        layers[0] is family.layer(0) and layers[1] is family.layer(1, "math") and layers[3] is family.layer(5, "prose")
    )
    merged_layer, base = layers[2].state_dict(), state(family, 3)
    assert merged_layer["input_layernorm.weight"].data_ptr() == base["input_layernorm.weight"].data_ptr()
    assert merged_layer["mlp.up_proj.weight"].data_ptr() != base["mlp.up_proj.weight"].data_ptr()


def test_dense_again_gives_the_base_again(family, stitcher, tiny_family):
    expected = logits(AutoModelForCausalLM.from_pretrained(tiny_family / "base"))
    stitcher.stitch(MIXED)
    assert torch.equal(logits(stitcher.stitch(StitchPlan.dense(6))), expected)
    for name in family.names:
        theirs = AutoModelForCausalLM.from_pretrained(tiny_family / name)
        assert torch.equal(logits(stitcher.stitch(StitchPlan.dense(6, name))), logits(theirs)), name


def test_sizes_of_a_plan(family, stitcher):
    model = stitcher.stitch(MIXED)
    assert stitcher.n_parameters(MIXED) == sum(p.numel() for p in model.parameters())
    assert stitcher.n_bytes(MIXED) == 4 * stitcher.n_parameters(MIXED)
    assert stitcher.n_parameters(StitchPlan.dense(6)) == family.preflight.n_parameters


def test_generation_agrees_with_and_without_a_cache(stitcher):
    for plan in (MIXED, StitchPlan.without([0, 2, 3], 6), StitchPlan.dense(6, "code")):
        model = stitcher.stitch(plan)
        with_cache, without = (
            model.generate(IDS, max_new_tokens=20, do_sample=False, use_cache=cache, pad_token_id=2)
            for cache in (True, False)
        )
        assert torch.equal(with_cache, without)
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(len(plan.kept)))


def test_hidden_states_are_recorded_for_every_plan(stitcher):
    for plan in (StitchPlan.dense(6), MIXED, StitchPlan.without([1], 6)):
        model = stitcher.stitch(plan)
        with torch.inference_mode():
            assert len(model(IDS, output_hidden_states=True).hidden_states) == len(plan.kept) + 1


def test_plans_of_another_family_are_refused(stitcher):
    with pytest.raises(UserError, match="the plan is for 7 layers, this base has 6"):
        stitcher.stitch(StitchPlan.dense(7))
    with pytest.raises(UserError, match=r"takes layers from \['physics'\]; the family has \['code', 'math', 'prose'\]"):
        stitcher.stitch(StitchPlan.dense(6, "physics"))
    plan = StitchPlan(6, (LayerChoice(0), merged(1, "code", "math", "prose", method="slerp")))
    with pytest.raises(UserError, match=r"layer 1: slerp merges 2 candidates, not \['code', 'math', 'prose'\]"):
        stitcher.stitch(plan)
    with pytest.raises(UserError, match=r"layer 1: merge.method: 'magic' is not known; mergekit has arcee_fusion"):
        stitcher.stitch(StitchPlan(6, (merged(1, "code", "math", method="magic"),)))


# --- merging -----------------------------------------------------------------------------------------------------


def by_mergekit(family, layer, method, names, parameters, *, base="base", leave_out="-") -> dict[str, torch.Tensor]:
    """What mergekit's public function makes of the same layers; the base's tensors where `leave_out` is in the name."""
    models = {model: {n: t for n, t in state(family, layer, model).items() if leave_out not in n} for model in names}
    merged = merge_state_dicts(
        models, method, base=base, parameters=parameters, dtype=torch.float32, out_dtype=family.dtype
    )
    return state(family, layer) | merged


def assert_merged(stitcher, choice: LayerChoice, expected: dict[str, torch.Tensor], ulps: int = 0) -> None:
    found = stitcher.layer(choice).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        eps = torch.finfo(tensor.dtype).eps
        assert torch.allclose(tensor, expected[name], rtol=ulps * eps, atol=ulps * eps), name


@pytest.mark.parametrize("names", [("code", "math"), ("code", "math", "prose")])
@pytest.mark.parametrize("factor", [0.0, 0.37, 1.0, -0.5])
def test_task_arithmetic_equals_mergekit(family, stitcher, names, factor):
    expected = by_mergekit(family, 2, "task_arithmetic", ("base", *names), {"weight": 1.0, "lambda": factor})
    assert_merged(stitcher, merged(2, *names, factor=factor), expected, ulps=1)
    with_parameters = merged(2, *names, factor=factor, normalize=False)
    assert_merged(stitcher, with_parameters, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_task_arithmetic_equals_mergekit_in_half_precision(tiny_family, make_spec, dtype):
    family = open_family(make_spec(tiny_family, dtype=dtype))
    expected = by_mergekit(family, 2, "task_arithmetic", ("base", "code", "math"), {"weight": 1.0, "lambda": 0.37})
    assert_merged(Stitcher(family), merged(2, "code", "math", factor=0.37), expected)


def test_task_arithmetic_works_in_blocks(monkeypatch, family, stitcher):
    whole = stitcher.layer(merged(2, "code", "math")).state_dict()
    monkeypatch.setattr("gptailor.stitch.merging.CPU_BLOCK", 100)
    stitcher = Stitcher(family)
    for name, tensor in stitcher.layer(merged(2, "code", "math")).state_dict().items():
        assert torch.equal(tensor, whole[name])


def test_linear_gives_the_candidates_the_factor_and_the_base_the_rest(family, stitcher):
    weights = {"base": 1 - 3 * 0.2, "code": 0.2, "math": 0.2, "prose": 0.2}
    expected = by_mergekit(family, 1, "linear", weights, {"weight": weights, "normalize": False}, base=None)
    assert_merged(stitcher, merged(1, "code", "math", "prose", factor=0.2, method="linear"), expected)


def test_slerp_goes_from_the_first_candidate_to_the_second(family, stitcher):
    expected = by_mergekit(family, 1, "slerp", ("math", "code"), {"t": 0.3}, base="math")
    assert_merged(stitcher, merged(1, "math", "code", factor=0.3, method="slerp"), expected, ulps=1)
    assert_merged(stitcher, merged(1, "math", "code", factor=0.0, method="slerp"), state(family, 1, "math"), ulps=4)
    assert_merged(stitcher, merged(1, "math", "code", factor=1.0, method="slerp"), state(family, 1, "code"), ulps=4)


def test_ties_takes_the_factor_as_lambda(family, stitcher):
    names = ("base", "code", "math", "prose")
    expected = by_mergekit(family, 4, "ties", names, {"weight": 1.0, "lambda": 0.8, "density": 0.5})
    choice = merged(4, "code", "math", "prose", factor=0.8, method="ties", density=0.5)
    assert_merged(stitcher, choice, expected)
    assert not torch.equal(
        stitcher.layer(merged(4, "code", "math", "prose", factor=0.8, method="ties")).state_dict()[
            "mlp.up_proj.weight"
        ],
        expected["mlp.up_proj.weight"],
    ), "density must reach mergekit"


@pytest.mark.parametrize("method", ["dare_ties", "dare_linear", "della"])
def test_random_methods_repeat_themselves(family, method):
    first, second = (
        Stitcher(family).layer(merged(4, "code", "math", factor=0.7, method=method, density=0.5)).state_dict()
        for _ in range(2)
    )
    other = Stitcher(family).layer(merged(4, "code", "math", factor=0.71, method=method, density=0.5)).state_dict()
    name = "mlp.up_proj.weight"
    assert torch.equal(first[name], second[name])
    zeros = (first[name] == state(family, 4)[name]).float().mean()
    assert 0.1 < zeros < 0.5, "about a quarter of the weights has lost both differences"
    assert not torch.equal(first[name] == state(family, 4)[name], other[name] == state(family, 4)[name])


def test_random_methods_leave_the_callers_dice_alone(stitcher):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    stitcher.layer(merged(4, "code", "math", method="dare_ties", density=0.5))
    assert torch.equal(torch.rand(1), expected)


def test_dare_ties_equals_mergekit_with_the_same_dice(family, stitcher):
    from gptailor.stitch.merging import _seed

    choice = merged(4, "code", "math", factor=0.7, method="dare_ties", density=0.5)
    torch.manual_seed(_seed(choice))
    parameters = {"weight": 1.0, "lambda": 0.7, "density": 0.5}
    expected = by_mergekit(family, 4, "dare_ties", ("base", "code", "math"), parameters, leave_out="layernorm")
    assert_merged(stitcher, choice, expected)


@pytest.mark.parametrize("method", merge_methods())
def test_every_method_of_mergekit_can_be_named(stitcher, method):
    _least, most = merge_source_counts(method)
    sources = ("code", "math", "prose")[: most or 3]
    assert merge_method_problem(method, {}, len(sources)) is None
    at = {factor: stitcher.layer(merged(2, *sources, factor=factor, method=method)) for factor in (0.3, 0.9)}
    values = {f: layer.state_dict()["mlp.down_proj.weight"] for f, layer in at.items()}
    assert all(torch.isfinite(value).all() for value in values.values())
    assert not torch.equal(values[0.3], values[0.9]), "the factor matters"


@pytest.mark.parametrize("method", ["sce", "model_stock", "multislerp"])
def test_methods_without_a_strength_are_scaled_from_the_base(family, stitcher, method):
    names = ("code", "math", "prose")
    parameters = {"weight": 1.0} if method == "multislerp" else {}
    # Norms are equal in this family, and multislerp itself refuses to merge equal tensors.
    expected = by_mergekit(family, 2, method, ("base", *names), parameters, leave_out="layernorm")
    assert_merged(stitcher, merged(2, *names, factor=1.0, method=method), expected, ulps=4)
    assert_merged(stitcher, merged(2, *names, factor=0.0, method=method), state(family, 2), ulps=1)


def test_merge_methods_are_checked_by_name_and_parameter():
    assert merge_method_problem("task_arithmetic", {}, 2) is None
    assert merge_method_problem("ties", {"density": 0.5, "normalize": True}, 3) is None
    cases = [
        (("magic", {}, 2), "merge.method: 'magic' is not known; mergekit has arcee_fusion, breadcrumbs"),
        (("passthrough", {}, 2), "merge.method: 'passthrough' is not known"),
        (("slerp", {}, 1), "merge.method: slerp merges at least 2 candidates, this run has 1"),
        (("ties", {"t": 0.5}, 2), "merge.parameters.t: is what merge.factor sets; leave it out"),
        (("ties", {"epsilon": 0.5}, 2), "merge.parameters.epsilon: ties has no such parameter; it has int8_mask"),
        (("della", {"epsilon": "big"}, 2), "merge.parameters.epsilon: input should be a valid number"),
    ]
    for arguments, message in cases:
        assert (merge_method_problem(*arguments) or "").startswith(message), arguments  # type: ignore[arg-type]
    assert merge_source_counts("slerp") == merge_source_counts("nuslerp") == (2, 2)
    assert merge_source_counts("task_arithmetic") == merge_source_counts("ties") == (2, None)


def test_a_plan_equals_mergekits_own_yaml_merge(stitcher, tiny_family, tmp_path):
    """Base, selected, merged and removed layers in one mergekit run; weight-0 sources pad slices to equal length."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    def piece(choice: LayerChoice) -> dict[Any, Any]:
        span = [choice.layer, choice.layer + 1]
        base = {"model": str(tiny_family / "base"), "layer_range": span}
        lenders = [
            {"model": str(tiny_family / n), "layer_range": span, "parameters": {"weight": choice.factor or 0}}
            for n in ("code", "math")
        ]
        if len(choice.sources) == 1:
            model = str(tiny_family / choice.sources[0])
            return {"base_model": model, "sources": [{"model": model, "layer_range": span}]}
        return {"sources": [base, *lenders]}

    plan = StitchPlan(
        6,
        (LayerChoice(0), LayerChoice(1, ("prose",)), merged(3, "code", "math", factor=0.45), merged(5, "code", "math")),
    )
    document = {"merge_method": "task_arithmetic", "base_model": str(tiny_family / "base")}
    document |= {"parameters": {"normalize": False}, "slices": [piece(choice) for choice in plan.kept]}  # type: ignore[dict-item]
    config = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(document | {"dtype": "float32"})))
    run_merge(config, str(tmp_path / "merged"), MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ours = stitcher.stitch(plan)
    assert theirs.config.num_hidden_layers == ours.config.num_hidden_layers == 4
    its = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.allclose(tensor, its[name], rtol=1e-6, atol=1e-6), name
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-4)


# --- the cache ---------------------------------------------------------------------------------------------------


def test_merged_layers_are_kept_up_to_a_bound(family):
    one = sum(t.nbytes for n, t in state(family, 0).items() if "layernorm" not in n)
    stitcher = Stitcher(family, cache_bytes=3 * one)
    choices = [merged(i, "code", "math") for i in range(6)]
    layers = [stitcher.layer(choice) for choice in choices]
    assert (len(stitcher.cache), stitcher.cache.n_bytes) == (3, 3 * one)
    assert stitcher.layer(choices[5]) is layers[5], "kept"
    assert stitcher.layer(choices[0]) is not layers[0], "was dropped, merged again"
    assert (len(stitcher.cache), stitcher.cache.n_bytes) == (3, 3 * one)
    nothing = Stitcher(family, cache_bytes=0)
    plan = StitchPlan(6, tuple(choices))
    assert torch.equal(logits(nothing.stitch(plan)), logits(stitcher.stitch(plan)))
    assert (len(nothing.cache), nothing.cache.n_bytes) == (0, 0)


def test_equal_choices_share_and_different_ones_do_not(family):
    stitcher = Stitcher(family)
    a = stitcher.layer(merged(2, "code", "math", factor=0.5))
    assert stitcher.layer(merged(2, "code", "math", factor=0.5)) is a
    others = [
        merged(3, "code", "math", factor=0.5),
        merged(2, "code", "prose", factor=0.5),
        merged(2, "code", "math", factor=0.25),
        merged(2, "code", "math", factor=0.5, method="linear"),
    ]
    for choice in others:
        assert not torch.equal(
            stitcher.layer(choice).state_dict()["mlp.up_proj.weight"], a.state_dict()["mlp.up_proj.weight"]
        )


# --- output scales -----------------------------------------------------------------------------------------------


def test_a_scale_multiplies_both_output_projections_and_nothing_else(family, stitcher):
    for source in ((), ("math",)):
        plain = family.layer(2, source[0] if source else "base").state_dict()
        before = {name: tensor.clone() for name, tensor in plain.items()}
        found = stitcher.layer(LayerChoice(2, source, output_scale=0.75)).state_dict()
        for name, tensor in plain.items():
            scaled = name in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
            assert torch.equal(found[name], tensor * 0.75 if scaled else tensor)
            assert torch.equal(tensor, before[name]), "the family's own weights stay"
            assert scaled or found[name].data_ptr() == tensor.data_ptr()


def test_the_projections_are_found_whatever_is_stitched(tiny_family, make_spec):
    family = open_family(make_spec(tiny_family))
    Stitcher(family).stitch(StitchPlan.without([0, 1], 6, "math"))
    assert family.output_projections == ("self_attn.o_proj", "mlp.down_proj")


def test_a_scale_of_zero_makes_a_layer_the_identity(stitcher):
    nothing = StitchPlan(6, tuple(LayerChoice(i, output_scale=0.0 if i == 3 else 1.0) for i in range(6)))
    expected = logits(stitcher.stitch(StitchPlan.without([3], 6)))
    assert torch.allclose(logits(stitcher.stitch(nothing)), expected, atol=1e-6)


def test_experts_behind_a_dense_first_layer_have_no_output_projection(make_family, make_spec):
    folder = make_family("deepseek_v3", **EXPERTS_BEHIND)
    with pytest.raises(UserError, match="output_scale: the output projections of DeepseekV3ForCausalLM are not known"):
        _ = open_family(make_spec(folder, output_scale=(0.5, 1.5))).output_projections


@pytest.mark.parametrize(
    ("model_type", "projections"),
    [
        ("qwen2", ("self_attn.o_proj", "mlp.down_proj")),
        ("gpt_neox", ("attention.dense", "mlp.dense_4h_to_h")),
        ("phi", ("self_attn.dense", "mlp.fc2")),
        ("opt", ("self_attn.out_proj", "fc2")),
        ("gpt2", ("attn.c_proj", "mlp.c_proj")),
    ],
)
def test_output_projections_are_found_by_looking(make_family, make_spec, model_type, projections):
    options = {"gpt2": {"n_layer": 6, "n_head": 4, "n_embd": 32}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}}
    folder = make_family(model_type, **options.get(model_type, {}))
    family = open_family(make_spec(folder, output_scale=(0.5, 1.5)))
    assert family.output_projections == projections
    stitcher = Stitcher(family)
    layer = stitcher.layer(LayerChoice(1, output_scale=0.5))
    for name in projections:
        for key, value in layer.get_submodule(name).state_dict().items():  # biases too
            assert torch.equal(value, family.layer(1).get_submodule(name).state_dict()[key] * 0.5)


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("gemma2", {}, "Gemma2ForCausalLM normalises the outputs of its attention and MLP again"),
        ("mixtral", {"num_local_experts": 2}, "the output projections of MixtralForCausalLM are not known"),
    ],
)
def test_scales_are_refused_where_they_have_no_place(make_family, make_spec, model_type, options, message):
    folder = make_family(model_type, **options)
    open_family(make_spec(folder))
    with pytest.raises(UserError, match=f"output_scale: {message}"):
        open_family(make_spec(folder, output_scale=(0.5, 1.5)))


# --- architectures -----------------------------------------------------------------------------------------------

SLIDING = ["sliding_attention", "full_attention"] * 3
ARCHITECTURES = {
    "llama": {"vocab_size": 320},  # padded: the tokenizer has 300
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True, "vocab_size": 320},
    "qwen3": {"layer_types": SLIDING, "use_sliding_window": True, "sliding_window": 8},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 8, "layer_types": SLIDING},
    "gemma3_text": {"tie_word_embeddings": True, "sliding_window": 8, "layer_types": SLIDING},
    "phi": {},
    "gpt_neox": {},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 1, 0]},
    "mixtral": {"num_local_experts": 2},
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architectures_are_stitched_generically(make_family, make_spec, model_type):
    """Every kept layer computes what it computed in the base; generation agrees with and without a cache."""
    folder = make_family(model_type, **ARCHITECTURES[model_type])  # type: ignore[arg-type]
    family = open_family(make_spec(folder))
    stitcher = Stitcher(family)
    dense = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert torch.equal(logits(stitcher.stitch(StitchPlan.dense(6))), logits(dense))
    theirs = AutoModelForCausalLM.from_pretrained(folder / "math")
    assert torch.allclose(logits(stitcher.stitch(StitchPlan.dense(6, "math"))), logits(theirs), atol=1e-4), (
        "norms, embeddings and head are equal in these families"
    )
    plan = StitchPlan(6, (LayerChoice(0), LayerChoice(2, ("math",)), merged(3, "code", "math"), LayerChoice(5)))
    model = stitcher.stitch(plan)
    config = model.config.get_text_config()
    assert config.num_hidden_layers == 4
    for name, values in family.per_layer_lists.items():
        assert getattr(config, name) == [values[i] for i in (0, 2, 3, 5)]
    if "layer_types" in ARCHITECTURES[model_type]:  # type: ignore[operator]
        assert config.layer_types == [SLIDING[i] for i in (0, 2, 3, 5)]
    with_cache, without = (
        model.generate(IDS, max_new_tokens=12, do_sample=False, use_cache=cache, pad_token_id=2)  # type: ignore[operator]
        for cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_stitching_does_not_copy(family, stitcher):
    """Re-pointing 6 layers is bookkeeping: no tensor but the merged layers' is new."""
    rng = random.Random(0)
    known = {t.data_ptr() for s in ("base", *family.names) for i in range(6) for t in state(family, i, s).values()}
    known |= {p.data_ptr() for p in family.model.parameters()}
    for _ in range(20):
        kept = [LayerChoice(i, rng.choice([(), ("math",), ("code",)])) for i in sorted(rng.sample(range(6), 4))]
        model = stitcher.stitch(StitchPlan(6, tuple(kept)))
        assert {p.data_ptr() for p in model.parameters()} <= known
