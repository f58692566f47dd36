"""Stitch plans: which layer of which model stands where in the shorter model. Pure data, no tensors.

A plan lists the kept layers in the order of the base; a layer that is not listed is removed. It is stored, hashed,
sent between processes and shown to people, so it knows nothing of torch, SMAC or the run that found it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from itertools import combinations
from typing import Any

from gptailor.errors import UserError

BASE = "base"
"""Name of the base model among the sources; no candidate may be called so."""

FORMAT = 1
"""Version of the JSON form, raised when its meaning changes."""
EDITED_FORMAT = 2
"""Version of the JSON form of plans with edits: what reads format 1 alone refuses them instead of leaving edits out."""

ALL_SUBSETS_UP_TO = 6
"""With more candidates than this, merges are of two candidates or of all, lest a choice have hundreds of values."""


Setting = str | int | float
"""A setting of an edit."""


class Operation(StrEnum):
    """What was done with a layer of the base."""

    REMOVED = "removed"
    BASE = "base"  # kept, the base's own weights
    SELECTED = "selected"  # kept, one candidate's weights
    MERGED = "merged"  # kept, several candidates' weights merged into the base's


@dataclass(frozen=True, order=True)
class LayerChoice:
    """One kept layer.

    layer: its index in the base, from 0. sources: candidate names in the family's order; none means the base's own
    layer, one means that candidate's, several mean a merge. method and factor: of the merge, else empty and None
    (factor is task arithmetic's scaling coefficient). parameters: further scalar parameters of the merge method.
    output_scale: multiplies the layer's two output projections (attention's and the MLP's). folds: (removed layer,
    factor) pairs, ascending: the weight matrices become W + sum of factor * (W of that layer - W), each from this
    layer's own sources; norms and biases stay. base_layer: of a merge, the base's layer that it starts from, where that
    is another than `layer` (some published plans were made so, see gptailor/formats/published.py).
    """

    layer: int
    sources: tuple[str, ...] = ()
    method: str = ""
    factor: float | None = None
    parameters: tuple[tuple[str, float], ...] = ()
    output_scale: float = 1.0
    folds: tuple[tuple[int, float], ...] = ()
    base_layer: int | None = None

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise UserError(f"layer {self.layer}: layers count from 0")
        if len(set(self.sources)) != len(self.sources) or BASE in self.sources:
            raise UserError(
                f"layer {self.layer}: sources {list(self.sources)} must be different candidates (none means the base)"
            )
        if self.is_merged and (self.factor is None or not self.method):
            raise UserError(f"layer {self.layer}: a merge of {list(self.sources)} needs a method and a factor")
        if not self.is_merged and (self.factor is not None or self.method or self.parameters):
            raise UserError(f"layer {self.layer}: method and factor belong to merges of two or more candidates")
        if self.base_layer is not None and (not self.is_merged or not 0 <= self.base_layer != self.layer):
            raise UserError(f"layer {self.layer}: base_layer belongs to merges that start from another layer")
        folded = [layer for layer, _ in self.folds]
        if folded != sorted(set(folded)) or self.layer in folded or min(folded, default=0) < 0:
            raise UserError(f"layer {self.layer}: folds {folded} must be other layers, ascending, each once")
        if not all(math.isfinite(factor) for _, factor in self.folds):
            raise UserError(f"layer {self.layer}: the factors of folds must be finite numbers")

    @property
    def is_merged(self) -> bool:
        return len(self.sources) > 1

    @property
    def operation(self) -> Operation:
        if self.is_merged:
            return Operation.MERGED
        return Operation.SELECTED if self.sources else Operation.BASE

    @property
    def weights_key(self) -> tuple[Any, ...]:
        """Equal keys mean equal weights: what a cache of layers is keyed by (the scale is applied by itself)."""
        return (self.layer, self.sources, self.method, self.factor, self.parameters, self.folds, self.base_layer)


@dataclass(frozen=True)
class Texts:
    """The calibration texts of an edit: at most `n_tokens` tokens of `source`, whose token ids have this digest.

    source: `objectives` (the run's calibration texts), `file:PATH`, `hub:DATA_SET` or `base` (written by the base
    itself). The digest says which texts they were, wherever they come from; other texts are another plan.
    """

    source: str
    n_tokens: int
    digest: str

    def __post_init__(self) -> None:
        if not self.source or not self.digest or self.n_tokens < 1:
            raise UserError(f"edits.texts: must name a source, a digest and a number of tokens, got {self}")


@dataclass(frozen=True)
class Edit:
    """What is done to a stitched model's weights, and all that determines it.

    method: a name of gptailor/stitch/edits/registry.py. parameters: the method's settings by name, sorted, text or
    numbers. texts: what it is computed from; None where the weights alone determine it.
    """

    method: str
    parameters: tuple[tuple[str, Setting], ...] = ()
    texts: Texts | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        names = [name for name, _ in self.parameters]
        if not self.method or len(set(names)) < len(names):
            raise UserError(f"edits: each must have a method, and each of its parameters once, got {names}")
        for name, value in self.parameters:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number and not isinstance(value, str):
                raise UserError(f"edits: {self.method}'s parameter {name} must be text or a number, got {value!r}")
        object.__setattr__(self, "parameters", tuple(sorted((name, _plain(value)) for name, value in self.parameters)))

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"method": self.method, "seed": self.seed}
        if self.parameters:
            data["parameters"] = dict(self.parameters)
        if self.texts is not None:
            data["texts"] = {
                "source": self.texts.source,
                "n_tokens": self.texts.n_tokens,
                "digest": self.texts.digest,
            }
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Edit:
        texts = data.get("texts")
        return cls(
            str(data["method"]),
            tuple((data.get("parameters") or {}).items()),
            None if texts is None else Texts(str(texts["source"]), int(texts["n_tokens"]), str(texts["digest"])),
            int(data.get("seed", 0)),
        )

    def describe(self) -> str:
        """For people: `refit on 16384 tokens of objectives`."""
        of = "" if self.texts is None else f" on {self.texts.n_tokens} tokens of {self.texts.source}"
        settings = ", ".join(f"{name} {value}" for name, value in self.parameters)
        return self.method + (f" ({settings})" if settings else "") + of


def _plain(value: Setting) -> Setting:
    """1.0 as 1: equal values have one form, and so one hash."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True)
class LayerShares:
    """What edits left of a kept layer, as shares of what it was: query heads, MLP channels, weights that are not 0."""

    heads: float
    channels: float
    weights: float


@dataclass(frozen=True)
class StitchPlan:
    """A shorter model: `kept` layers, ascending, out of the base's `n_layers`.

    edits: what is done to the stitched model's weights afterwards, in this order.
    Published plans that deepen a model list a layer several times, from different sources; a search never does.
    """

    n_layers: int
    kept: tuple[LayerChoice, ...]
    edits: tuple[Edit, ...] = ()

    def __post_init__(self) -> None:
        indices = [choice.layer for choice in self.kept]
        if indices != sorted(indices) or len({(c.layer, c.sources) for c in self.kept}) < len(indices):
            raise UserError(f"kept layers must ascend without repeats, got {indices}")
        if not indices:
            raise UserError("a plan must keep at least one layer")
        if (last := max(indices[-1], *(choice.base_layer or 0 for choice in self.kept))) >= self.n_layers:
            raise UserError(f"layer {last} does not exist: the base has layers 0 to {self.n_layers - 1}")
        folded = [layer for choice in self.kept for layer, _ in choice.folds]
        if len(set(folded)) != len(folded) or set(folded) - set(self.removed):
            raise UserError(f"folded layers must be removed ones, each folded once, got {sorted(folded)}")

    @classmethod
    def dense(cls, n_layers: int, source: str = BASE) -> StitchPlan:
        """Every layer of the base, or of one candidate."""
        return cls.without((), n_layers, source)

    @classmethod
    def without(cls, removed: tuple[int, ...] | list[int] | set[int], n_layers: int, source: str = BASE) -> StitchPlan:
        """The base (or one candidate) less the removed layers."""
        sources = () if source == BASE else (source,)
        gone = set(removed)
        return cls(n_layers, tuple(LayerChoice(i, sources) for i in range(n_layers) if i not in gone))

    @property
    def removed(self) -> tuple[int, ...]:
        here = {choice.layer for choice in self.kept}
        return tuple(i for i in range(self.n_layers) if i not in here)

    @property
    def before_gaps(self) -> tuple[int, ...]:
        """Places among the kept layers, from 0, of those behind which layers are left out; maybe the last one's."""
        behind = [*(choice.layer for choice in self.kept[1:]), self.n_layers]
        pairs = enumerate(zip(self.kept, behind, strict=True))
        return tuple(place for place, (choice, next_one) in pairs if next_one > choice.layer + 1)

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of all candidates that lend a layer, sorted."""
        return tuple(sorted({name for choice in self.kept for name in choice.sources}))

    @property
    def folded(self) -> dict[int, tuple[int, float]]:
        """Removed layer -> the kept layer it is folded into, and the factor."""
        return {layer: (choice.layer, factor) for choice in self.kept for layer, factor in choice.folds}

    def edited(self, *edits: Edit) -> StitchPlan:
        """This plan with these edits after those that it has."""
        return replace(self, edits=(*self.edits, *edits))

    @property
    def unedited(self) -> StitchPlan:
        return replace(self, edits=()) if self.edits else self

    @cached_property
    def hash(self) -> str:
        """A stable identity: equal plans, and only they, have equal hashes, in every process and version."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:20]

    def to_json(self) -> dict[str, Any]:
        layers = []
        for choice in self.kept:
            entry: dict[str, Any] = {"layer": choice.layer}
            if choice.sources:
                entry["sources"] = list(choice.sources)
            if choice.is_merged:
                entry |= {"method": choice.method, "factor": choice.factor}
            if choice.base_layer is not None:
                entry["base_layer"] = choice.base_layer
            if choice.parameters:
                entry["parameters"] = dict(choice.parameters)
            if choice.output_scale != 1.0:
                entry["output_scale"] = choice.output_scale
            if choice.folds:
                entry["folds"] = [[layer, factor] for layer, factor in choice.folds]
            layers.append(entry)
        plain = {"format": FORMAT, "n_layers": self.n_layers, "kept": layers}
        if not self.edits:
            return plain
        return plain | {"format": EDITED_FORMAT, "edits": [edit.to_json() for edit in self.edits]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StitchPlan:
        """The inverse of to_json. Raises UserError for anything that is not a plan of a known format."""
        if not isinstance(data, Mapping) or "kept" not in data:
            raise UserError("not a stitch plan: expected an object with 'format', 'n_layers' and 'kept'")
        if data.get("format") not in (FORMAT, EDITED_FORMAT):
            raise UserError(
                f"plan format {data.get('format')!r} is not known here; this version reads formats {FORMAT} and "
                f"{EDITED_FORMAT}"
            )
        try:
            kept = tuple(
                LayerChoice(
                    layer=int(entry["layer"]),
                    sources=tuple(entry.get("sources", ())),
                    method=entry.get("method", ""),
                    factor=None if entry.get("factor") is None else float(entry["factor"]),
                    parameters=tuple(sorted((entry.get("parameters") or {}).items())),
                    output_scale=float(entry.get("output_scale", 1.0)),
                    folds=tuple((int(layer), float(factor)) for layer, factor in entry.get("folds", ())),
                    base_layer=None if entry.get("base_layer") is None else int(entry["base_layer"]),
                )
                for entry in data["kept"]
            )
            edits = tuple(map(Edit.from_json, data.get("edits", ())))
            return cls(int(data["n_layers"]), kept, edits)
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"not a stitch plan: {error!r}") from error

    def describe(self) -> str:
        """One line for people: runs of equal layers, e.g. `0-3 base | 4 math | 5 math+code x0.52 | removed 6 7`."""
        parts: list[str] = []
        start = previous = None
        label = ""

        def close() -> None:
            if start is not None:
                parts.append(f"{start} {label}" if start == previous else f"{start}-{previous} {label}")

        for choice in self.kept:
            this = "+".join(choice.sources) or BASE
            if choice.is_merged:
                this += f" x{choice.factor:.2f}"
                this += "" if choice.base_layer is None else f" on base {choice.base_layer}"
            if choice.output_scale != 1.0:
                this += f" scale {choice.output_scale:.2f}"
            this += "".join(f" +{layer} x{factor:.2f}" for layer, factor in choice.folds)
            if this != label or previous is None or choice.layer != previous + 1:
                close()
                start, label = choice.layer, this
            previous = choice.layer
        close()
        if self.removed:
            parts.append("removed " + " ".join(map(str, self.removed)))
        parts += [f"then {edit.describe()}" for edit in self.edits]
        return " | ".join(parts)


def merge_sets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The sets of candidates that a layer may be merged of: all of two or more, or fewer where they would be many."""
    if len(names) <= ALL_SUBSETS_UP_TO:
        return [s for size in range(2, len(names) + 1) for s in combinations(names, size)]
    return [*combinations(names, 2), names]


def layers_of(asked: int | float, n_layers: int) -> int:
    """A number of layers as it is; a share of `n_layers` rounded up, as in the paper."""
    return asked if isinstance(asked, int) else math.ceil(asked * n_layers - 1e-9)


def evenly(numbers: range, most: int) -> list[int]:
    """Up to `most` of these numbers, with equal steps as near as that goes, both ends among them, ascending."""
    if len(numbers) <= most:
        return list(numbers)
    step = (len(numbers) - 1) / (most - 1)
    return [numbers[round(index * step)] for index in range(most)]
