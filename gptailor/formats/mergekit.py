"""A stitch plan as one mergekit YAML file (mergekit 0.1.5), for people who build models with mergekit.

Layers that are not listed are removed. Two things need care:

- mergekit 0.1.5 (plan.py, plan_module) takes the embeddings from the models of the first slice and what follows the
  layers (final norm, head) from those of the last one: silently zeros in the worst case. A slice of no layers at either
  end pins them to the base, and every slice lists equally many sources, padded with weight 0.
- task arithmetic has no scale, so a plan with output scales is written as a linear merge (base 1 - K * factor, each
  candidate factor), whose weights are multiplied on the two output projections by filters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from gptailor.errors import UserError
from gptailor.plan import BASE, LayerChoice, StitchPlan

PAIRWISE = ("slerp",)
WRITABLE = ("task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", "linear", *PAIRWISE)
"""Others draw masks of their own, or know no factor or no weight of 0: mergekit would build another model."""
LINEAR_FILTERS = ("o_proj", "down_proj")


def mergekit_yaml(
    plan: StitchPlan, models: Mapping[str, str], *, dtype: str, projections: tuple[str, str] = LINEAR_FILTERS
) -> str:
    """YAML text of a plan. models: paths or hub ids of the base ("base") and of every candidate of the plan.

    dtype: of the result's weights; the maths is done in float32. projections: last parts of the names of the two output
    projections that an output scale multiplies. Raises UserError where mergekit cannot express the plan.
    """
    missing = [name for name in (BASE, *plan.candidates) if name not in models]
    if missing:
        raise UserError(f"mergekit YAML: no path is known for {', '.join(missing)}")
    if plan.folded:
        raise UserError("mergekit YAML: folded layers cannot be written; export the model instead")
    if plan.edits:
        raise UserError("mergekit YAML: edits of weights cannot be written; export the model instead")
    method = _method(plan)
    writers = {"linear": _linear_slice, "slerp": _slerp_slice}
    write = writers.get(method, _base_slice)
    width = max([2 if method in PAIRWISE else 1, *(len(choice.sources) + 1 for choice in plan.kept)])
    width = 2 if method in PAIRWISE else width
    slices = [write(choice, models, width, projections) for choice in plan.kept]
    for end, layer in ((0, 0), (len(slices) + 1, plan.n_layers - 1)):
        slices.insert(end, write(LayerChoice(layer), models, width, projections, empty=True))
    document: dict[str, Any] = {"merge_method": method, "base_model": models[BASE]}
    if method not in PAIRWISE:
        document["parameters"] = {"normalize": method in ("ties", "della")} | _extra(plan)
    return yaml.safe_dump(
        document | {"slices": slices, "dtype": "float32", "out_dtype": dtype}, sort_keys=False, allow_unicode=True
    )


def _method(plan: StitchPlan) -> str:
    """The one merge method of the file."""
    used = {choice.method for choice in plan.kept if choice.is_merged}
    if len(used) > 1:
        raise UserError(f"mergekit YAML: one file has one merge method, this plan uses {', '.join(sorted(used))}")
    method = used.pop() if used else "task_arithmetic"
    if method not in WRITABLE:
        raise UserError(
            f"mergekit YAML: {method} cannot be written so that mergekit does the same; export the model instead"
        )
    if any(choice.output_scale != 1.0 for choice in plan.kept):
        if method not in ("task_arithmetic", "linear"):
            raise UserError(f"mergekit YAML: output scales can be written for task_arithmetic and linear, not {method}")
        return "linear"
    return method


def _extra(plan: StitchPlan) -> dict[str, float]:
    return {key: value for choice in plan.kept if choice.is_merged for key, value in choice.parameters}


def _range(choice: LayerChoice, empty: bool, of_base: bool = False) -> list[int]:
    """of_base: of the base's part of a merge, which may start from another layer of the base."""
    layer = choice.base_layer if of_base and choice.base_layer is not None else choice.layer
    return [layer + 1, layer + 1] if empty else [layer, layer + 1]


def _base_slice(
    choice: LayerChoice, models: Mapping[str, str], width: int, _: tuple[str, str], empty: bool = False
) -> dict[str, Any]:
    """Methods with a base: task arithmetic, ties, their kin. A kept layer is a base of its own with nothing added."""
    span = _range(choice, empty)
    home = choice.sources[0] if len(choice.sources) == 1 else BASE
    lenders = choice.sources if choice.is_merged else ()
    sources: list[dict[str, Any]] = [{"model": models[home], "layer_range": _range(choice, empty, home == BASE)}]
    sources += [{"model": models[n], "layer_range": span, "parameters": {"weight": 1.0}} for n in lenders]
    others = [name for name in models if name not in (home, *lenders)]
    for name in others[: width - len(sources)]:
        sources.append({"model": models[name], "layer_range": span, "parameters": {"weight": 0.0}})
    piece: dict[str, Any] = {"sources": sources, "base_model": models[home]}
    if choice.is_merged:
        piece["parameters"] = {"lambda": choice.factor}
    return piece


def _linear_slice(
    choice: LayerChoice, models: Mapping[str, str], width: int, projections: tuple[str, str], empty: bool = False
) -> dict[str, Any]:
    weights = dict.fromkeys(models, 0.0)
    if choice.is_merged:
        assert choice.factor is not None
        weights |= dict.fromkeys(choice.sources, choice.factor)
        weights[BASE] = 1.0 - len(choice.sources) * choice.factor
    else:
        weights[choice.sources[0] if choice.sources else BASE] = 1.0
    order = sorted(models, key=lambda name: (name != BASE, weights[name] == 0.0))
    sources = []
    for name in order[:width] if weights[BASE] or width >= len(models) else [n for n in order if n != BASE][:width]:
        weight: Any = weights[name]
        if choice.output_scale != 1.0:
            scaled = [{"filter": part, "value": weight * choice.output_scale} for part in projections]
            weight = [*scaled, {"value": weight}]
        span = _range(choice, empty, name == BASE)
        sources.append({"model": models[name], "layer_range": span, "parameters": {"weight": weight}})
    return {"sources": sources}


def _slerp_slice(
    choice: LayerChoice, models: Mapping[str, str], _width: int, _: tuple[str, str], empty: bool = False
) -> dict[str, Any]:
    """Always two models; a kept layer is a slerp of nothing (t = 0) from its source towards another."""
    first = choice.sources[0] if choice.sources else BASE
    second = choice.sources[1] if choice.is_merged else next(name for name in models if name != first)
    span = _range(choice, empty)
    return {
        "sources": [{"model": models[first], "layer_range": span}, {"model": models[second], "layer_range": span}],
        "base_model": models[first],
        "parameters": {"t": choice.factor if choice.is_merged else 0.0},
    }
