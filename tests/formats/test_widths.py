"""Exports of narrower and sparser models: plain folders that compute the same, and say what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptailor.errors import UserError
from gptailor.family.models import Family, open_family
from gptailor.formats import widths
from gptailor.formats.huggingface import export_hf
from gptailor.plan import Edit, StitchPlan, Texts
from gptailor.stitch.edits import llm_pruner
from gptailor.stitch.stitcher import Stitcher

TEXTS = Texts("objectives", 4000, "0123abcd")
IDS = torch.tensor([[5, 17, 250, 33, 4, 99, 120, 7, 61, 200, 3, 44]])


def stitcher_of(family: Family) -> Stitcher:
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(0, 300, (40, 30), generator=generator).tolist()
    return Stitcher(family, texts=lambda _asked, _dense: some)


def plan_of(method: str, ratio: float) -> StitchPlan:
    return StitchPlan.dense(6).edited(Edit(method, (("ratio", ratio),), TEXTS))


def exported(family: Family, plan: StitchPlan, out: Path) -> tuple[Any, Any, dict[str, Any], str]:
    """What export_hf says, the model that plain transformers opens, its configuration as written, and its card."""
    stitcher = stitcher_of(family)
    made = export_hf(family, plan, out, stitcher=stitcher)
    theirs = AutoModelForCausalLM.from_pretrained(out)
    with torch.inference_mode():
        torch.testing.assert_close(
            theirs(IDS).logits, stitcher.stitch(plan)(IDS, use_cache=False).logits, rtol=1e-4, atol=1e-4
        )
    assert made.n_parameters == sum(p.numel() for p in theirs.parameters())
    return made, theirs, json.loads((out / "config.json").read_text()), (out / "README.md").read_text()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_layers_of_one_width_are_said_in_the_configuration(
    make_family, make_spec, tmp_path, monkeypatch, model_type
) -> None:
    """Half of the heads and channels of every layer: a smaller model that needs nothing of this project."""
    monkeypatch.setattr(llm_pruner, "spared", lambda n: list(range(n)))
    family = open_family(make_spec(make_family(model_type)))
    may_go = llm_pruner.Widths.of(family.layer(0), "", "").parameters
    plan = plan_of("llm_pruner", 0.5 * may_go / family.layer_parameters[0])
    made, theirs, config, card = exported(family, plan, tmp_path / "out")
    said = {key: config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")}
    assert said == {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 32,
    }
    assert made.n_parameters == stitcher_of(family).n_parameters(plan) and made.notes == ()
    assert theirs.model.layers[0].mlp.down_proj.weight.shape == (32, 32) and "A smaller model of the family" in card
    assert family.model.config.intermediate_size == 64 and family.model.config.num_attention_heads == 4


def test_narrower_layers_are_padded_to_the_widest_and_that_is_said(make_family, make_spec, tmp_path) -> None:
    """SlimGPT's first layer is whole, so that nothing is saved on disk; with biases, which are padded too."""
    family = open_family(make_spec(make_family("qwen2")))
    plan = plan_of("slimgpt", 0.3)
    made, theirs, config, card = exported(family, plan, tmp_path / "out")
    assert config["intermediate_size"] == 64 and config["num_attention_heads"] == 4
    own = stitcher_of(family).n_parameters(plan)
    assert made.n_parameters == stitcher_of(family).n_parameters(plan.unedited) > own
    (note,) = made.notes
    assert note.startswith("Its layers have different widths") and "zeros to 4 heads and 64 channels" in note
    assert f"{made.n_parameters:,} parameters instead of {own:,}" in note and "padded with zeros" in card
    last = theirs.model.layers[-1]
    assert (last.mlp.gate_proj.weight[-1] == 0).all() and (last.mlp.gate_proj.weight[0] != 0).any()


def test_zeros_are_plain_weights_and_are_said_beside_the_number(make_family, make_spec, tmp_path) -> None:
    family = open_family(make_spec(make_family("llama")))
    plan = plan_of("besa", 0.25)
    made, theirs, _, card = exported(family, plan, tmp_path / "out")
    share = sum(int((p == 0).sum()) for layer in theirs.model.layers for p in layer.parameters())
    assert share / sum(family.layer_parameters) == pytest.approx(0.25, abs=0.01)
    (note,) = made.notes
    assert note.startswith("25.0% of its layers' weights are zeros. It is as large as without them") and "zeros" in card


def test_a_configuration_that_cannot_say_widths_is_refused(make_family, make_spec, tmp_path, monkeypatch) -> None:
    family = open_family(make_spec(make_family("llama")))
    monkeypatch.setattr(widths, "CHANNELS", "ffn_widths")
    with pytest.raises(
        UserError, match="the configuration of LlamaForCausalLM has no ffn_widths, so that it cannot say"
    ):
        export_hf(family, plan_of("slimgpt", 0.3), tmp_path / "out", stitcher=stitcher_of(family))
    assert not list(tmp_path.glob("out*"))
