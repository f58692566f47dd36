"""What a family's redundancy promises a search, in plain words: which layers look cheap, and what candidates add.

Each layer was left out alone, so costs of several are not known: they add up to more where layers stand in for each
other. The verdict is a rule of thumb, and says on what it rests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

from gptailor.plan import BASE
from gptailor.results.redundancy import SURE, Agreement, Kept, ModelFound, Redundancy
from gptailor.spec.sections import SpaceOperation
from gptailor.wording import plural

CHEAP = 0.95
"""A layer is cheap where the objectives keep at least this share, above guessing, without it."""
IDENTITY = 0.002
"""Block Influence below which a layer hands on what it gets, whatever is scored."""
ALIKE = 0.1
"""Cosine between two candidates' differences from which on they agree; below its negative they conflict. Differences
that have nothing to do with each other are at 0 (Ilharco et al., arXiv 2212.04089)."""
SLIGHT = 0.001
"""Distance from the base's layer, in units of its norm, below which a candidate's layer is the base's."""


class Verdict(StrEnum):
    PROMISING = "promising"
    MIXED = "mixed"
    DOUBTFUL = "doubtful"
    UNKNOWN = "cannot be told"


class Relation(StrEnum):
    """What two candidates' differences from the base have to do with each other in a layer."""

    AGREE = "agree"
    APART = "unrelated"
    CONFLICT = "conflict"


@dataclass(frozen=True)
class Outlook:
    """headline: the verdict in a sentence. reasons: what it rests on, a sentence or two each."""

    verdict: Verdict
    headline: str
    reasons: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join([self.headline, *(f"  {reason}" for reason in self.reasons)])


def outlook(found: Redundancy, n_removed: int | None, operations: Iterable[str]) -> Outlook:
    """What to expect of a search that removes so many layers and may do these things with layers.

    n_removed: None where it is not known yet.
    """
    lends = bool(found.candidates) and bool({SpaceOperation.SELECT, SpaceOperation.MERGE} & {*operations})
    verdict, headline = _verdict(found, n_removed, lends)
    reasons = [*_cheap_words(found, n_removed), *_copy_words(found), *_guess_words(found)]
    if found.candidates:
        reasons += [*_skill_words(found), *_distance_words(found), *_relation_words(found)]
    return Outlook(verdict, headline, tuple(reasons))


def cheap_layers(model: ModelFound) -> list[int]:
    """Layers of a model that look cheap: they cost little alone, do nothing, or are copies of earlier ones."""
    return [layer for layer in range(len(model.influence)) if is_cheap(model, layer)]


def is_cheap(model: ModelFound, layer: int) -> bool:
    kept = model.kept(layer)
    alone = kept is not None and kept.share >= CHEAP
    return alone or layer in model.copies or model.influence[layer] < IDENTITY


def relation(cosine: float | None) -> Relation | None:
    """None where one of the two does not differ from the base."""
    if cosine is None:
        return None
    return Relation.AGREE if cosine >= ALIKE else Relation.CONFLICT if cosine <= -ALIKE else Relation.APART


def layers_text(layers: Sequence[int]) -> str:
    """'2, 5-8, 11'; 'none'."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "none"


def _verdict(found: Redundancy, n_removed: int | None, lends: bool) -> tuple[Verdict, str]:
    if not any(model.kept(layer) for model in found.models.values() for layer in range(found.n_layers)):
        why = "every model guesses on the objectives" if found.examples else "no examples were scored"
        return Verdict.UNKNOWN, f"Whether a search is promising cannot be told: {why}."
    most = max(len(cheap_layers(model)) for model in found.models.values())
    ahead = list(_ahead(found))
    if n_removed is None:
        return Verdict.UNKNOWN, f"{most} of {found.n_layers} layers look cheap; how many are to go is not known yet."
    room = f"{most} of {found.n_layers} layers look cheap, and {n_removed} are to go"
    adds = "; a candidate is ahead of the base on an objective" if ahead else "; no candidate is ahead of the base"
    text = f"{room}{adds if lends else ''}."
    if most >= n_removed and (ahead or not lends):
        return Verdict.PROMISING, f"A search looks promising: {text}"
    if most >= n_removed or (ahead and 2 * most >= n_removed):
        return Verdict.MIXED, f"A search may pay: {text}"
    return Verdict.DOUBTFUL, f"A search looks doubtful: {text} Fewer layers to remove would be a better start."


def _cheap_words(found: Redundancy, n_removed: int | None) -> Iterator[str]:
    base = found.models[BASE]
    cheap = cheap_layers(base)
    rule = f"without one of them the objectives keep at least {CHEAP:.0%} above guessing"
    text = f"Cheap in the base: {plural(len(cheap), 'layer')} ({layers_text(cheap)}); {rule}."
    others = [f"{name} {len(cheap_layers(found.models[name]))}" for name in found.candidates]
    yield text + (f" In the candidates: {', '.join(others)}." if others else "")
    costs = sorted(max(0.0, 1 - kept.share) for layer in range(found.n_layers) if (kept := base.kept(layer)))
    noise = _noise(base)
    if noise > 1 - CHEAP:
        yield (
            f"On {found.examples} examples of each objective these shares are known to about ±{noise:.0%}: counts are "
            "rough, and single layers may be misjudged. More examples tell more."
        )
    elif n_removed is not None and len(costs) >= n_removed:
        total = sum(costs[:n_removed])
        yield f"The base's {n_removed} cheapest layers cost {total:.0%} if costs add up; together they may cost more."


def _noise(model: ModelFound) -> float:
    """The usual standard error of what is kept without a layer; 0 where unknown."""
    found = [kept.error for layer in range(len(model.influence)) if (kept := model.kept(layer)) and kept.error]
    return median(found) if found else 0.0


def _copy_words(found: Redundancy) -> Iterator[str]:
    for name, model in found.models.items():
        if model.copies:
            pairs = ", ".join(f"layer {layer} is layer {first}" for layer, first in model.copies.items())
            yield f"Copies in {_called(name)}: {pairs} with the same weights."


def _guess_words(found: Redundancy) -> Iterator[str]:
    guessing: dict[str, list[str]] = {}
    for name, model in found.models.items():
        for objective in model.guesses:
            guessing.setdefault(objective, []).append(_called(name))
    for objective, names in guessing.items():
        who = "all models" if len(names) == len(found.models) else ", ".join(names)
        yield f"Not clearly better than guessing on {objective}: {who}; what their layers cost there is not counted."


def _ahead(found: Redundancy) -> Iterator[tuple[str, str, Kept]]:
    """(candidate, objective, its score in units of the base's), where it is surely better."""
    for name in found.candidates:
        for objective, kept in found.models[name].beside(found.models[BASE]).items():
            if kept.share - 1 > SURE * (kept.error or 0.0):
                yield name, objective, kept


def _skill_words(found: Redundancy) -> Iterator[str]:
    if not found.examples:
        return
    ahead = [f"{name} on {objective} ({kept.share:.2f} x)" for name, objective, kept in _ahead(found)]
    if ahead:
        yield f"Ahead of the base: {'; '.join(ahead)}."
    else:
        yield f"No candidate is surely ahead of the base on {found.examples} examples: there is little to select."


def _distance_words(found: Redundancy) -> Iterator[str]:
    parts = []
    for name in found.candidates:
        distance = found.models[name].distance
        differs = [layer for layer, far in enumerate(distance) if far >= SLIGHT]
        if not differs:
            parts.append(f"{name} nowhere")
            continue
        where = f"in {_layers(differs, found.n_layers)}"
        furthest = max(differs, key=distance.__getitem__)
        parts.append(f"{name} {where}, most in {furthest} (by {distance[furthest]:.1%} of its norm)")
    yield f"Different from the base: {'; '.join(parts)}."


def _relation_words(found: Redundancy) -> Iterator[str]:
    if not found.agreement:
        return
    parts = [part for pair in found.agreement if (part := _pair_words(pair))]
    low, high = _range(found.agreement)
    if parts:
        yield f"{'; '.join(parts)}; elsewhere candidates are unrelated."
    else:
        yield (
            f"Candidates neither agree nor conflict anywhere (cosines {low:.2f} to {high:.2f}): merged, their "
            "differences add up without cancelling."
        )
    if any(relation(cosine) is Relation.CONFLICT for pair in found.agreement for cosine in pair.cosine):
        yield "Where candidates conflict a merge cancels what both learned: selecting one is likely to do better there."


def _pair_words(pair: Agreement) -> str:
    found = {
        kind: [layer for layer, cosine in enumerate(pair.cosine) if relation(cosine) is kind]
        for kind in (Relation.CONFLICT, Relation.AGREE)
    }
    parts = [f"{kind} in {_layers(layers, len(pair.cosine))}" for kind, layers in found.items() if layers]
    return f"{pair.one} and {pair.other} {' and '.join(parts)}" if parts else ""


def _layers(layers: Sequence[int], n: int) -> str:
    return "every layer" if len(layers) == n else f"layer{'s' * (len(layers) > 1)} {layers_text(layers)}"


def _range(pairs: Sequence[Agreement]) -> tuple[float, float]:
    cosines = [cosine for pair in pairs for cosine in pair.cosine if cosine is not None] or [0.0]
    return min(cosines), max(cosines)


def _called(name: str) -> str:
    return "the base" if name == BASE else name
