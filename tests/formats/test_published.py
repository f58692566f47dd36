"""Plans from files: ours, and the flat ones of auto-merge-llm; drawn without weights, built with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.command_line import gptailor
from helpers.mergekit_runs import run_mergekit
from safetensors.torch import load_file

from gptailor.commands.export import stitch_plan
from gptailor.errors import UserError
from gptailor.formats.mergekit import mergekit_yaml
from gptailor.formats.published import plan_of, read_family, read_plan, strip_text
from gptailor.launch.events import Event
from gptailor.plan import LayerChoice, StitchPlan

NAMES = ("math", "code", "prose")


def prune_file() -> dict[str, Any]:
    """6 layers less 1 and 4: base, math, a merge, and one of all three; as published, with active keys alone."""
    bits = {0: (0, 0, 0), 2: (1, 0, 0), 3: (0, 1, 1), 5: (1, 1, 1)}
    data: dict[str, Any] = {"remove_idx_0": 4, "remove_idx_1": 1}
    for layer, chosen in bits.items():
        data |= {f"layer_{layer}_candidate_{c}": bit for c, bit in enumerate(chosen)}
        data |= {f"layer_{layer}_merge_scale_factor": 0.25 + layer / 10, f"layer_{layer}_output_scale": 1.2}
    return data


def dis_file(scale: float = 1.0) -> dict[str, Any]:
    """6 layers of two blocks: layer 2 stacks both, layer 4 neither; no permutation keys."""
    data: dict[str, Any] = {}
    for layer in range(6):
        chosen = {2: "11", 4: "00"}.get(layer, "10")
        data |= {f"layer_{layer}_block_{block}_selection": bit for block, bit in enumerate(chosen)}
        data[f"scale_{layer}"] = scale if layer in (1, 3) else 1.0
    return data


def write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def test_a_prune_file() -> None:
    merges = (
        LayerChoice(3, ("code", "prose"), "task_arithmetic", 0.55),
        LayerChoice(5, NAMES, "task_arithmetic", 0.75),
    )
    assert plan_of(prune_file(), NAMES) == StitchPlan(6, (LayerChoice(0), LayerChoice(2, ("math",)), *merges))
    assert plan_of(prune_file()).candidates == ("c0", "c1", "c2")
    as_done = plan_of(prune_file(), NAMES, "output").kept
    assert [choice.base_layer for choice in as_done] == [None, None, 2, 3]
    assert StitchPlan.from_json(StitchPlan(6, as_done).to_json()).kept == as_done


def test_a_dis_file() -> None:
    plan = plan_of(dis_file(), ("math", "code"))
    assert [(c.layer, c.sources) for c in plan.kept] == [
        (0, ("math",)),
        (1, ("math",)),
        (2, ("code",)),  # without keys, the published code takes the second permutation: reversed
        (2, ("math",)),
        (3, ("math",)),
        (4, ()),
        (5, ("math",)),
    ]
    given = dis_file() | {f"layer_{layer}_permutation_selection": "0" for layer in range(6)}
    assert [c.sources for c in plan_of(given, ("math", "code")).kept][2:4] == [("math",), ("code",)]


def test_its_scales_are_those_of_the_residual_stream(tiny_family: Path, make_spec) -> None:
    """Against a model whose layers multiply what they give, as the published Hugging Face backend does."""
    from gptailor.family.models import open_family
    from gptailor.stitch.stitcher import Stitcher

    family = open_family(make_spec(tiny_family))
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        found = Stitcher(family).stitch(plan_of(dis_file(0.8), ("math", "code")))(ids).logits
        model = Stitcher(family).stitch(plan_of(dis_file(), ("math", "code")))
        hooks = [
            model.model.layers[position].register_forward_hook(
                lambda _, __, out: out * 0.8 if isinstance(out, torch.Tensor) else (out[0] * 0.8, *out[1:])
            )
            for position in (1, 4)  # layers 1 and 3, behind the stacked one
        ]
        expected = model(ids).logits
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_stitch_builds_what_the_file_means(tiny_family: Path, tmp_path: Path) -> None:
    """With the base's layer at the output position, tensor by tensor, and the same by mergekit."""
    family = tmp_path / "family.yaml"
    models = {name: str(tiny_family / name) for name in ("base", *NAMES)}
    family.write_text(
        yaml.safe_dump({"base_model": models["base"], "candidates": {n: models[n] for n in NAMES}}, sort_keys=False)
    )
    file = write(tmp_path / "1.json", prune_file())
    out = tmp_path / "model"
    done = gptailor("stitch", file, "--family", family, "--out", out, "--base-layer", "output")
    assert done.returncode == 0, done.stderr
    assert "·×B+×+" in done.stdout and "B math" in done.stdout
    built = load_file(out / "model.safetensors")
    weights = {name: load_file(tiny_family / name / "model.safetensors") for name in models}
    key = "mlp.up_proj.weight"
    base = weights["base"][f"model.layers.2.{key}"]
    wanted = base + 0.55 * sum(weights[name][f"model.layers.3.{key}"] - base for name in ("code", "prose"))
    torch.testing.assert_close(built[f"model.layers.2.{key}"], wanted, rtol=1e-5, atol=1e-6)
    again = run_mergekit(mergekit_yaml(read_plan(file, NAMES, "output"), models, dtype="float32"), tmp_path / "mk")
    assert again.keys() == built.keys()
    for name, tensor in built.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    copy = gptailor("stitch", out / "gptailor_plan.json", "--family", family, "--out", tmp_path / "copy")
    assert copy.returncode == 0, copy.stderr
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    said: list[Event] = []
    with pytest.raises(UserError, match="holds an earlier export already"):
        stitch_plan(str(file), str(family), out, said.append)
    assert not any("opening" in event.text for event in said), "refused before the family is opened"


def test_show_draws_a_plan_without_weights(tmp_path: Path) -> None:
    shown = gptailor("show", write(tmp_path / "plan.json", prune_file()))
    assert shown.returncode == 0 and "\n  ·×A+×+\n" in shown.stdout and "4 layers from a base of 6" in shown.stdout
    assert "2 layers stacked" not in shown.stdout and "A c0" in shown.stdout
    as_json = gptailor("show", tmp_path / "plan.json", "--json")
    assert StitchPlan.from_json(json.loads(as_json.stdout)) == plan_of(prune_file())
    assert "AA2A·A" in strip_text(plan_of(dis_file()))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1], "expected an object"),
        ({"a": 1}, "neither a plan of gptailor .* nor a published"),
        (prune_file() | {"remove_idx_2": 8}, "do not make one model"),
        (prune_file() | {"remove_idx_1": 4}, "do not make one model"),
        (prune_file() | {"layer_3_candidate_1": 2}, "layer_3_candidate_1: expected 0 or 1, got 2"),
        (prune_file() | {"layer_3_merge_scale_factor": "much"}, "expected a number, got 'much'"),
        (prune_file() | {"temperature": 1}, "the key 'temperature' belongs to no published"),
        (dis_file() | {"layer_0_permutation_selection": "7"}, "7 is not one of 2 permutations"),
        (dis_file(0.0), "scale_1: 0.0 cannot be undone"),
        ({"format": 9, "kept": []}, "plan format 9 is not known"),
    ],
)
def test_files_that_are_no_plan(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_plan(write(tmp_path / "x.json", data))


def test_further_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it numbers 3 candidates, the family has 1: math"):
        plan_of(prune_file(), ("math",))
    (tmp_path / "broken.json").write_text("{")
    for name, message in (("none.json", "no such file"), ("broken.json", "not JSON")):
        with pytest.raises(UserError, match=message):
            read_plan(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        read_family(tmp_path / "family.yaml")
    (tmp_path / "family.yaml").write_text("base_model: a\nbase_model: b")
    with pytest.raises(UserError, match="'base_model' is given twice"):
        read_family(tmp_path / "family.yaml")
    (tmp_path / "family.yaml").write_text("candidates: {}")
    with pytest.raises(UserError, match="base_model: is required but missing"):
        read_family(tmp_path / "family.yaml")
