"""Shorter models of architectures whose layers are of several kinds: what a configuration can say, and what not."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import save_family, tiny_config
from transformers import AutoModelForCausalLM

from gptailor.baselines.case import Case
from gptailor.errors import UserError
from gptailor.family.models import open_family, prove_small
from gptailor.family.proof import prove
from gptailor.family.renumbering import find_renumbering
from gptailor.family.repointing import passing_through
from gptailor.family.skeleton import skeleton_of
from gptailor.family.structure import layer_list
from gptailor.formats.huggingface import export_hf
from gptailor.plan import Edit, StitchPlan
from gptailor.search.space import build_space
from gptailor.stitch.edits.case import EditCase
from gptailor.stitch.edits.walk import Walk
from gptailor.stitch.stitcher import Stitcher

IDS = torch.arange(3, 15).reshape(2, 6)
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
WINDOWS = ["sliding_attention", "full_attention"] * 3
GEMMA = {
    "layer_types": WINDOWS,
    "sliding_window": 4,
    "vocab_size_per_layer_input": 300,
    "hidden_size_per_layer_input": 8,
}

SEVERAL_KINDS: dict[str, dict[str, Any]] = {
    # first layers dense, then experts: a count, and a list
    "deepseek_v3": LATENT | EXPERTS | ROUTED | {"first_k_dense_replace": 2, "num_key_value_heads": 4, "head_dim": 4},
    "glm4_moe": EXPERTS | ROUTED | {"first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    # every second layer dense, by a rule that is written as a list
    "qwen2_moe": EXPERTS | {"num_experts": 4, "decoder_sparse_step": 2, "shared_expert_intermediate_size": 16},
    # every second layer of experts, by a list of layer numbers
    "llama4_text": {"interleave_moe_layer_step": 2, "num_local_experts": 2, "intermediate_size_mlp": 64},
    # hybrids: a list of layer numbers, a list of kinds, a pattern that repeats
    "bamba": MAMBA | {"attn_layer_indices": [1, 4], "mamba_expand": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 3},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8},
    # kinds nested in tuples; a place that layers call layer_id
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "num_layers": 6, "num_heads": 4, "window_size": 4},
    # overrides by layer, a last layer that has to attend to everything, tensors packed by layer, shared keys and values
    "gemma4_text": GEMMA | {"global_head_dim": 16},
    "gemma3n_text": GEMMA | {"num_kv_shared_layers": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 6},
}
FIXED = {"gemma4_text": {5}, "gemma3n_text": {2, 3}, "bamba": {4}, "recurrent_gemma": {5}}


@pytest.fixture(scope="module", params=SEVERAL_KINDS)
def family(request, tmp_path_factory, make_spec):
    folder = tmp_path_factory.mktemp(request.param)
    save_family(folder, tiny_config(request.param, **SEVERAL_KINDS[request.param]), candidates=("math", "code"))
    return open_family(make_spec(folder, remove=2))


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


def cuts(family) -> list[tuple[int, ...]]:
    """Two of the layers that may go: the first ones, the last ones, and one from each end."""
    free = [layer for layer in range(6) if layer not in family.renumbering.fixed]
    return [tuple(free[:2]), tuple(free[-2:]), (free[0], free[-1])]


def test_kept_layers_compute_what_they_did_and_the_export_too(family, tmp_path):
    """Bit for bit; and alike with and without a cache, in the live model and in the exported folder.

    Weights that want gradients, as transformers opens them, take RecurrentGemma another way through its kernels: 4e-7.
    """
    model_type = family.model.config.model_type
    assert family.renumbering.fixed == FIXED.get(model_type, set())
    stitcher = Stitcher(family)
    dense: Any = AutoModelForCausalLM.from_pretrained(family.spec.base_model).requires_grad_(False)
    for number, gone in enumerate(cuts(family)):
        plan = StitchPlan.without(gone, 6)
        found = logits(stitcher.stitch(plan))
        with passing_through([layer_list(dense)[layer] for layer in gone]):
            assert torch.equal(found, logits(dense)), gone
        export_hf(family, plan, tmp_path / str(number), stitcher=stitcher)
    exported: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "2").eval()
    models: tuple[Any, ...] = (stitcher.stitch(plan), exported)
    written = [
        model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=2)
        for model in models
        for cache in (True, False)
    ]
    assert all(torch.equal(text, written[0]) for text in written)
    assert torch.equal(logits(stitcher.stitch(StitchPlan.dense(6))), logits(dense)), "and back again"


def test_layers_that_have_to_stay_are_in_every_plan(family):
    fixed = family.renumbering.fixed
    if not fixed:
        pytest.skip("every layer of this one can go")
    space = build_space(family.spec, 6, fixed=fixed)
    plans = [space.decode(configuration) for configuration in space.configspace.sample_configuration(40)]
    assert all(len(plan.removed) == 2 and not fixed & set(plan.removed) for plan in plans)
    vectors = [space.encode(plan).get_array() for plan in plans]
    assert [tuple(mask.nonzero()[0]) for mask in space.removed_mask(np.array(vectors))] == [
        plan.removed for plan in plans
    ]
    with pytest.raises(UserError, match="stay in every plan"):
        space.encode(StitchPlan.without([min(fixed), min(set(range(6)) - fixed)], 6))
    with pytest.raises(UserError, match="can do without"):
        Stitcher(family).stitch(StitchPlan.without([min(fixed)], 6))
    case = Case(Stitcher(family), "base", 2, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}], lambda *_: 0)
    losses = case.losses(case.free)
    assert losses.keys() == set(range(6)) - fixed and all(0 < loss < 50 for loss in losses.values())
    assert any("stay in every plan" in note for note in family.preflight.notes)
    batch: dict[str, torch.Tensor] = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    plan, edit = StitchPlan.without(sorted(set(range(6)) - fixed)[:2], 6), Edit("refit")
    walk = Walk(EditCase(Stitcher(family), plan, edit, {}, [], [], lambda *_: None), [batch])
    assert len(walk.begin()) == 1, "an edit can go through its layers"


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("diffllama", {}, r"layer 1 would be another one at place 0 \(self_attn.lambda_init is 0.3555"),
        ("minicpm3", LATENT | {"num_key_value_heads": 4}, r"layer 1 would be another .*\(residual_scale is 0.57"),
        ("jamba", EXPERTS | {"num_experts": 4, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_dt_rank": 4},
         r"layer 1 would be another one at place 0"),
        ("zamba2", {"layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2, "n_mamba_heads": 4,
                    "mamba_d_state": 8, "mamba_ngroups": 1, "chunk_size": 8, "num_key_value_heads": 4},
         r"layer 2 would be another one at place 1 \(shared_transformer"),
        ("bert", {}, "BertLMHeadModel looks at tokens to come: it is an encoder"),
        ("cpmant", {"dim_head": 8, "dim_ff": 64}, "CpmAntForCausalLM looks at tokens to come"),
    ],
)  # fmt: skip
def test_what_no_configuration_can_say_is_refused_by_check(tmp_path, make_spec, model_type, options, message):
    folder = save_family(tmp_path, tiny_config(model_type, **options), candidates=("math",))
    spec = make_spec(folder, remove=2, operations=["remove", "select"])
    with pytest.raises(UserError, match=message) as caught:
        prove_small(spec)
    assert str(caught.value).count("\n") == 1, "a heading and one sentence"


def test_layers_that_compute_with_their_number_are_found_by_trying():
    """No setting tells: the number itself is multiplied with."""
    model = AutoModelForCausalLM.from_config(tiny_config()).eval()
    found = find_renumbering(skeleton_of(model.config), 2)
    for layer in model.model.layers:
        layer.mlp.forward = lambda x, own=layer.mlp.forward, at=layer.self_attn: own(x) * (1 + at.layer_idx)
    with pytest.raises(UserError, match="they depend on their number, or on each other"):
        prove(model, found, 2)


def test_a_weight_that_is_no_number_is_named_before_the_start(tmp_path, make_spec):
    folder = save_family(tmp_path, tiny_config(), candidates=("math",))
    for name in ("base", "math"):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        with torch.no_grad():
            model.model.layers[3].mlp.up_proj.weight[5, 7] = float("nan")
        model.save_pretrained(folder / name)
    spec = make_spec(folder, operations=["remove", "select"])
    said = "model.safetensors: tensor model.layers.3.mlp.up_proj.weight holds NaN or infinite values"
    with pytest.raises(UserError, match=f"base_model: {said}"):
        prove_small(spec)
    save_family(folder, tiny_config(), candidates=())
    found = prove_small(make_spec(folder, operations=["remove", "select"]))
    assert f"candidates.math: {said}; plans with it will fail" in found.notes


def test_a_skeleton_is_not_built_from_wishes(tmp_path, make_spec):
    """A wish for an implementation of attention that is not here, and code of the folder's own, are not followed."""
    folder = save_family(tmp_path, tiny_config(), candidates=("math",))
    for name in ("base", "math"):
        path = folder / name / "config.json"
        wishes = {"_attn_implementation": "flash_attention_2", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
        path.write_text(json.dumps(json.loads(path.read_text()) | wishes))
    family = open_family(make_spec(folder, operations=["remove", "select"]))
    assert type(family.model).__module__.startswith("transformers.models.llama")
    notes = [note for note in family.preflight.notes if "auto_map" in note]
    assert len(notes) == 2 and "transformers has this architecture" in notes[0]
    assert dataclasses.is_dataclass(family.preflight)
