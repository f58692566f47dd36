"""A plan's mergekit YAML, run by mergekit itself, gives the tensors that the plan means."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.mergekit_runs import run_mergekit
from safetensors.torch import load_file, save_file

from gptailor.errors import UserError
from gptailor.formats.mergekit import mergekit_yaml
from gptailor.plan import BASE, LayerChoice, StitchPlan


def expected(family: Path, plan: StitchPlan) -> dict[str, torch.Tensor]:
    """Straight from the definition (docs/how-it-works.md, A plan), task arithmetic and linear."""
    names = (BASE, *plan.candidates)
    weights = {name: load_file(family / name / "model.safetensors") for name in names}
    result = {key: value for key, value in weights[BASE].items() if ".layers." not in key}
    for position, choice in enumerate(plan.kept):
        prefix = f"model.layers.{choice.layer}."
        for key in (k for k in weights[BASE] if k.startswith(prefix)):
            base = weights[BASE][key]
            if choice.is_merged:
                value = base + choice.factor * sum(weights[name][key] - base for name in choice.sources)  # type: ignore[operator]
            else:
                value = weights[choice.sources[0] if choice.sources else BASE][key]
            if "o_proj" in key or "down_proj" in key:
                value = value * choice.output_scale
            result[f"model.layers.{position}." + key.removeprefix(prefix)] = value
    return result


MERGED = LayerChoice(3, ("math", "code"), "task_arithmetic", 0.6)
PLANS = {
    "merge in the middle": (LayerChoice(0), LayerChoice(1, ("math",)), MERGED, LayerChoice(5)),
    "merge first and last": (LayerChoice(0, ("math", "code"), "task_arithmetic", 0.5), MERGED),
    "selection alone": (LayerChoice(1, ("code",)), LayerChoice(2), LayerChoice(4, ("math",))),
    "removal alone": (LayerChoice(0), LayerChoice(5)),
    "three candidates": (LayerChoice(0), LayerChoice(2, ("math", "code", "prose"), "task_arithmetic", 0.3)),
    "scales": (LayerChoice(0, output_scale=0.9), LayerChoice(1, ("math",), output_scale=1.2), MERGED, LayerChoice(4)),
}


@pytest.mark.parametrize("kept", PLANS.values(), ids=PLANS)
def test_mergekit_builds_what_the_plan_means(kept: tuple[LayerChoice, ...], tiny_family: Path, tmp_path: Path) -> None:
    plan = StitchPlan(6, kept)
    models = {name: str(tiny_family / name) for name in (BASE, "math", "code", "prose")}
    built = run_mergekit(mergekit_yaml(plan, models, dtype="float32"), tmp_path / "out")
    wanted = expected(tiny_family, plan)
    assert built.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(built[key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize(("method", "parameters"), [("ties", (("density", 0.5),)), ("slerp", ())])
def test_other_methods_are_accepted_by_mergekit(
    method: str, parameters: tuple[tuple[str, float], ...], tiny_family: Path, tmp_path: Path
) -> None:
    merged = LayerChoice(2, ("math", "code"), method, 0.5, parameters)
    plan = StitchPlan(6, (LayerChoice(0), LayerChoice(1, ("code",)), merged))
    models = {name: str(tiny_family / name) for name in (BASE, "math", "code")}
    built = run_mergekit(mergekit_yaml(plan, models, dtype="float32"), tmp_path / "out")
    wanted = expected(tiny_family, StitchPlan(6, plan.kept[:2]))
    for key, value in wanted.items():
        torch.testing.assert_close(built[key], value, rtol=1e-5, atol=1e-6, msg=key)
    base = load_file(tiny_family / "base" / "model.safetensors")
    key = "self_attn.q_proj.weight"
    assert not torch.allclose(built[f"model.layers.2.{key}"], base[f"model.layers.2.{key}"])


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("first", [LayerChoice(0, ("math",)), LayerChoice(0, ("math", "code"), "task_arithmetic", 0.5)])
def test_embeddings_norm_and_head_are_the_bases(
    first: LayerChoice, scale: float, tiny_family: Path, tmp_path: Path
) -> None:
    """Full fine-tunes have others."""
    models = {name: str(tiny_family / name) for name in (BASE, "math", "code")}
    for name in ("math", "code"):
        models[name] = str(shutil.copytree(tiny_family / name, tmp_path / name))
        weights = load_file(Path(models[name]) / "model.safetensors")
        outside = {key: value + 1 for key, value in weights.items() if "layers." not in key}
        save_file(weights | outside, Path(models[name]) / "model.safetensors", {"format": "pt"})
    plan = StitchPlan(6, (first, LayerChoice(1), LayerChoice(2, ("code",), output_scale=scale)))
    built = run_mergekit(mergekit_yaml(plan, models, dtype="float32"), tmp_path / "out")
    base = load_file(tiny_family / "base" / "model.safetensors")
    for key in (key for key in base if "layers." not in key):
        torch.testing.assert_close(built[key], base[key], msg=key)


def test_refusals() -> None:
    models = {BASE: "b", "a": "x", "c": "y"}
    with pytest.raises(UserError, match="model_stock cannot be written so that mergekit does the same"):
        mergekit_yaml(StitchPlan(3, (LayerChoice(0, ("a", "c"), "model_stock", 0.5),)), models, dtype="float32")
    mixed = (LayerChoice(0, ("a", "c"), "ties", 0.5), LayerChoice(1, ("a", "c"), "slerp", 0.5))
    with pytest.raises(UserError, match="one file has one merge method, this plan uses slerp, ties"):
        mergekit_yaml(StitchPlan(3, mixed), models, dtype="float32")
    with pytest.raises(UserError, match="no path is known for d"):
        mergekit_yaml(StitchPlan(3, (LayerChoice(0, ("d",)),)), models, dtype="float32")
    scaled = (LayerChoice(0, ("a", "c"), "ties", 0.5, output_scale=0.9),)
    with pytest.raises(UserError, match="output scales can be written for task_arithmetic and linear, not ties"):
        mergekit_yaml(StitchPlan(3, scaled), models, dtype="float32")
