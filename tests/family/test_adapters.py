"""Adapters and the folders they merge into are one family: the same plan has the same scores, example by example."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import write_adapter
from helpers.command_line import write_benchmark

from gptailor.plan import LayerChoice, StitchPlan
from gptailor.scoring.plan_scorer import PlanScorer
from gptailor.spec.run import RunSpec

SHARED = Path(__file__).resolve().parents[3] / "shared"


def scored(spec: RunSpec, plan: StitchPlan, budget: int) -> tuple[list[Any], list[Any]]:
    """A plan's scores, and what each example gave."""
    result = PlanScorer.open(spec, spec.objectives, max_examples=budget).score(plan, budget)
    return list(result.scores), [items for _, _, items in result.fresh]


def assert_equal(
    make: Callable[[Mapping[str, str]], RunSpec], places: tuple[dict[Any, Any], dict[Any, Any]], plan: StitchPlan
) -> None:
    adapters, folders = (scored(make(candidates), plan, 27) for candidates in places)
    assert adapters == folders
    assert all(len(items) == 27 for items in adapters[1])


def mixed(n_layers: int, removed: range, one: str, other: str) -> StitchPlan:
    """Base, selected and merged layers in turn."""
    kinds = [(), (one,), (one, other), (other,)]
    kept = []
    for layer in (i for i in range(n_layers) if i not in removed):
        sources = kinds[layer % 4]
        merge = ("task_arithmetic", 0.4) if len(sources) > 1 else ("", None)
        kept.append(LayerChoice(layer, sources, *merge))
    return StitchPlan(n_layers, tuple(kept))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_of_adapters_are_those_of_merged_folders(
    tiny_family: Path, tmp_path: Path, make_spec: Callable[..., Any], dtype: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    write_benchmark(tmp_path, "words", 40, 0)
    adapters, folders = {}, {}
    for name, targets in (("math", ("q_proj", "down_proj")), ("code", ("v_proj", "up_proj"))):
        adapters[name] = str(write_adapter(tmp_path / name, tiny_family / "base", targets=targets))
        dense = AutoModelForCausalLM.from_pretrained(tiny_family / "base", dtype=torch.float32)
        merged = PeftModel.from_pretrained(dense, adapters[name]).merge_and_unload()
        merged.to(getattr(torch, dtype)).save_pretrained(tmp_path / f"{name}-merged")
        folders[name] = str(tmp_path / f"{name}-merged")

    def make(candidates: Mapping[str, str]) -> RunSpec:
        asked = {"objectives": [{"benchmark": "words", "metric": "acc_norm"}], "include_path": [str(tmp_path)]}
        return make_spec(tiny_family, candidates=dict(candidates), dtype=dtype, **asked)

    assert_equal(make, (adapters, folders), mixed(6, range(4, 5), "math", "code"))


@pytest.mark.family
@pytest.mark.slow
def test_scores_of_the_real_adapters_are_those_of_their_folders(make_spec: Callable[..., Any]) -> None:
    built = os.environ.get("GPTAILOR_SMOLLM2", "")
    if not (SHARED / "smollm2").is_dir() or not built:
        pytest.skip(
            "needs the SmolLM2 family beside the project, and GPTAILOR_SMOLLM2 naming the folder it was built in"
        )
    names = ("math", "code", "language")

    def make(candidates: Mapping[str, str]) -> RunSpec:
        objectives = [
            {"benchmark": f"{name}_local", "metric": "acc_norm", "split": "validation"}
            for name in ("piqa", "commonsenseqa")
        ]
        asked = {"objectives": objectives, "include_path": [str(SHARED / "benchmarks")], "dtype": "bfloat16"}
        return make_spec(Path(built), candidates=dict(candidates), **asked)

    places = tuple(
        {name: str(root / name) for name in names} for root in (SHARED / "smollm2" / "adapters", Path(built))
    )
    assert_equal(make, places, mixed(30, range(18, 26), "math", "code"))  # type: ignore[arg-type]
