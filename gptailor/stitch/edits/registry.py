"""The table of edits, as that of baselines: names, and where each is done. Importing it brings none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING

from gptailor.errors import UserError
from gptailor.plan import Edit, Setting, StitchPlan, Texts
from gptailor.spec.sections import Repair, RepairMethod
from gptailor.trial import Subject

if TYPE_CHECKING:
    from torch import nn

    from gptailor.stitch.edits.case import EditCase


@dataclass(frozen=True)
class Method:
    """A kind of edit, and where its function is.

    title: for people. function: module.function in this package. parameters: its settings with their defaults, whose
    kind a value must be of. choices: of settings that are one of a few words. keeps_shapes: whether every tensor of the
    result has the shape that it had. leaves_out: whether it leaves out heads, channels or single weights of layers.
    reads_texts: whether it is computed from its texts anew wherever it is stitched.
    """

    title: str
    function: str
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    keeps_shapes: bool = True
    needs_texts: bool = True
    leaves_out: bool = False
    reads_texts: bool = True

    def load(self) -> Callable[[EditCase], list[nn.Module]]:
        module, name = self.function.split(".")
        return getattr(import_module(f"gptailor.stitch.edits.{module}"), name)


_WHO = {"teacher": ""}
_WHERE = {"layers": ("kept", "gaps"), "projections": ("mlp", "both")}
_HEAL: dict[str, Setting] = {"before": "", "name": "", "teacher": "", "tokens": 0, "lora": 0, "rate": 0, "weights": ""}
HEALED = "healed"
"""The edit that is no computation: weights that a heal trained, found by their digest."""

EDITS: dict[str, Method] = {
    "replaceme": Method("ReplaceMe, least squares", "replaceme.least_squares", _WHO),
    "replaceme_cosine": Method("ReplaceMe, cosine", "replaceme.cosine", _WHO),
    "refit": Method("Ridge refit", "refit.refit", _WHO | {"layers": "kept", "projections": "mlp"}, _WHERE),
    "prune_comp": Method("Prune&Comp", "prune_comp.scale", _WHO),
    "rcpu": Method("RCPU, rotation", "rcpu.rotation", _WHO),
    "llm_pruner": Method(
        "LLM-Pruner",
        "llm_pruner.cut",
        {"ratio": 0.25, "importance": "first"},
        {"importance": ("first", "mixed")},
        keeps_shapes=False,
        leaves_out=True,
    ),
    "slimgpt": Method("SlimGPT", "slimgpt.cut", {"ratio": 0.25, "damping": 0.01}, keeps_shapes=False, leaves_out=True),
    "besa": Method("BESA, zeros", "besa.sparsify", {"ratio": 0.25}, leaves_out=True),
    HEALED: Method("Healed", "healed.healed", _HEAL, reads_texts=False),
}
"""Method by the name that a plan has for it."""


def repair_edit(repair: Repair, texts: Texts, seed: int) -> Edit:
    """The edit that a run file's `repair` asks for."""
    return Edit(str(repair.method), tuple(repair.settings.items()), texts, seed)


def refuse_repair(plan: StitchPlan, who: str, method: str) -> None:
    """Raises UserError for a plan that is not to be repaired by this method. who: what the plan is called."""
    if fitted := [edit.method for edit in plan.edits if edit.method in {*RepairMethod, HEALED}]:
        raise UserError(
            f"--repair {method}: {who} has fitted weights already ({fitted[-1]}); repair the plan that it was before"
        )
    if zeros := [edit.method for edit in plan.edits if makes_zeros(edit)]:
        raise UserError(
            f"--repair {method}: {who} has zeros among its weights ({zeros[-1]}), which a repair would fill again"
        )
    if not plan.removed:
        raise UserError(f"--repair {method}: {who} leaves out no layer, so there is no gap to repair")


def fitted_places(plan: StitchPlan, at_gaps: bool) -> set[int]:
    """Places among the kept layers whose weights a repair fits: before the gaps alone, or all from the first gap on."""
    if at_gaps:
        return set(plan.before_gaps)
    n = len(plan.kept)
    return set(range(0 if plan.kept[0].layer else min(plan.before_gaps, default=n), n))


def fitted_layers(plan: StitchPlan) -> dict[int, str]:
    """Layers of the base whose weights were repaired or healed -> how, in words: `repaired by refit, then healed`."""
    found: dict[int, list[str]] = {}
    for edit in plan.edits:
        for place in _fitted_by(plan, edit):
            words = "healed" if edit.method == HEALED else f"repaired by {edit.method}"
            found.setdefault(plan.kept[place].layer, []).append(words)
    return {layer: ", then ".join(words) for layer, words in found.items()}


def _fitted_by(plan: StitchPlan, edit: Edit) -> set[int]:
    if edit.method == HEALED:
        return set(range(len(plan.kept)))
    if edit.method == RepairMethod.PRUNE_COMP:  # which scales what is behind a gap
        places = fitted_places(plan, at_gaps=False)
        return places if plan.kept[0].layer else places - {min(places, default=0)}
    if edit.method in set(RepairMethod):
        return fitted_places(plan, at_gaps=settings_of(edit).get("layers") != "kept")
    return set()


def makes_zeros(edit: Edit) -> bool:
    """Whether it leaves out single weights: training or fitting would fill them again."""
    return EDITS[edit.method].leaves_out and keeps_shapes(edit)


def settings_of(edit: Edit) -> dict[str, Setting]:
    """Its settings, those that it leaves out as they are by default."""
    return dict(EDITS[edit.method].parameters) | dict(edit.parameters)


def healed_subject(plan: StitchPlan) -> Subject | None:
    """Who a healed plan is; None where a plan's last edit is no heal."""
    last = plan.edits[-1] if plan.edits else None
    if last is None or last.method != HEALED:
        return None
    said = dict(last.parameters)
    before = Subject.find(str(said.get("before")))
    return None if before is None else Subject.healed(before, str(said.get("name")))


def keeps_shapes(edit: Edit) -> bool:
    return EDITS[edit.method].keeps_shapes


def edit_problem(edit: Edit) -> str | None:
    """What is wrong with an edit of a plan, wherever the plan comes from; None if nothing is."""
    method = EDITS.get(edit.method)
    if method is None:
        return f"edits: {edit.method!r} is not known here; this version has {', '.join(EDITS)}"
    if method.needs_texts and edit.texts is None:
        return f"edits: {edit.method} is computed from calibration texts, and the plan names none"
    for name, value in edit.parameters:
        if name not in method.parameters:
            return f"edits: {edit.method} has no parameter {name!r}; it has {', '.join(method.parameters) or 'none'}"
        if isinstance(method.parameters[name], str) is not isinstance(value, str):
            kind = "text" if isinstance(method.parameters[name], str) else "a number"
            return f"edits: {edit.method}'s {name} must be {kind}, got {value!r}"
        if name in method.choices and value not in method.choices[name]:
            return f"edits: {edit.method}'s {name} must be one of {', '.join(method.choices[name])}, got {value!r}"
    return None
