"""What was found of a family's redundancy before any search, as it is kept: one small JSON file.

It is measured once for a family and its objectives (`python -m gptailor redundancy`) and kept in a hidden folder beside
the runs, by what it was asked of: base, candidates, objectives, seed and what else says what is read. How much is to be
removed is no part of that, so that searches of several ratios share one. A run that begins later takes a copy along.
It holds the digests of the models' files, and is not shown for a run whose models have others.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from gptailor.errors import UserError
from gptailor.measures import retention
from gptailor.spec.files import load_spec
from gptailor.spec.run import RunSpec
from gptailor.store import queries
from gptailor.store.folder import RunFolder, write_atomically
from gptailor.trial import averaged_together

FORMAT = 1
FILE, PLACE = "redundancy.json", ".redundancy"
DIGITS = 5
SURE = 2.0
"""Standard errors from which on a difference is one."""
MAX_BYTES = 64 << 20
_ASKED = ("base_model", "candidates", "dtype", "objectives", "include_path", "chat_template", "chat_template_args")
Matrix = list[list[float]]


@dataclass(frozen=True)
class Kept:
    """A share of what was there before, and its standard error where known."""

    share: float
    error: float | None


@dataclass(frozen=True)
class Without:
    """One objective's score without one layer, and the standard error of its difference from the dense model's.

    Of the same examples; None where it is no mean of examples.
    """

    score: float
    error: float | None


@dataclass(frozen=True)
class Scored:
    """One model's scores on one objective.

    metric: choice_prob where the objective's task is multiple choice, because it sees more of few examples than right
    or wrong. dense: the whole model's; stderr: its standard error, None where unknown; chance: what guessing scores,
    where that is a number. error: of its difference from the base's, on the same examples. without: less each layer;
    None where that was not possible.
    """

    metric: str
    higher_is_better: bool
    chance: float | None
    dense: float
    stderr: float | None
    error: float | None
    without: list[Without | None]

    @property
    def is_guessing(self) -> bool:
        """Whether the dense model is not clearly better than guessing, so that no layer of it can be told to matter."""
        return self.chance is not None and self.dense - self.chance <= SURE * (self.stderr or 0.0)

    def kept(self, less: Without) -> Kept | None:
        """What a lesser model keeps of the dense one's score, above guessing; None where a ratio says nothing."""
        if self.is_guessing:
            return None
        return _share(less.score - (self.chance or 0.0), self.dense - (self.chance or 0.0), less.error, self)


@dataclass(frozen=True)
class ModelFound:
    """One model's part: the base's or a candidate's. Lists have an entry for each of its L layers.

    influence: Block Influence. angular, cosine, cka: between every two of its L + 1 states, as in redundancy/states.py.
    scores: objective -> its scores; none where they were left out. copies: layer -> an earlier layer with the same
    weights. distance: from the base's layer, in units of its norm; empty for the base.
    """

    influence: list[float]
    angular: Matrix
    cosine: Matrix
    cka: Matrix
    scores: dict[str, Scored] = field(default_factory=dict)
    copies: dict[int, int] = field(default_factory=dict)
    distance: list[float] = field(default_factory=list)

    def kept(self, layer: int) -> Kept | None:
        """What the model keeps without a layer, above guessing: the mean over the objectives that are averaged.

        Those on which it guesses are left out. None where nothing is left, or it was not scored without that layer.
        """
        found = []
        for one in self._averaged():
            less = one.without[layer]
            if less is None:
                return None
            found.append(one.kept(less))
        return _mean([kept for kept in found if kept is not None])

    def beside(self, base: ModelFound) -> dict[str, Kept]:
        """The dense model's score on each objective in units of the base's."""
        found = {name: _share(one.dense, base.scores[name].dense, one.error, one) for name, one in self.scores.items()}
        return {name: kept for name, kept in found.items() if kept is not None}

    @property
    def guesses(self) -> list[str]:
        """Objectives on which the dense model is not clearly better than guessing."""
        return [name for name, one in self.scores.items() if one.is_guessing]

    def _averaged(self) -> list[Scored]:
        found = list(self.scores.values())
        return [found[place] for place in averaged_together([(one.metric, one.higher_is_better) for one in found])]


def _share(score: float, whole: float, error: float | None, of: Scored) -> Kept | None:
    """error: of the difference of the two scores. None where a ratio says nothing."""
    higher = of.higher_is_better
    share = max(0.0, score) / whole if higher and whole > 0 else retention(score, whole, higher)
    unit = whole if higher else score  # what the share is divided by
    if share is None or not unit:
        return None
    return Kept(share, None if error is None else error / unit * (1.0 if higher else share))


def _mean(found: list[Kept]) -> Kept | None:
    if not found:
        return None
    errors = [one.error for one in found if one.error is not None]
    error = math.sqrt(sum(e * e for e in errors)) / len(found) if len(errors) == len(found) else None
    return Kept(sum(one.share for one in found) / len(found), error)


@dataclass(frozen=True)
class Agreement:
    """Two candidates, and by layer the cosine between what they differ from the base by (None: one does not)."""

    one: str
    other: str
    cosine: list[float | None]


@dataclass(frozen=True)
class Redundancy:
    """All that was found. models: the base first, then the candidates in the run file's order.

    weights: 'model/file' -> digest. texts: digest of the texts' tokens. n_texts, n_tokens: what was read; n_sampled:
    tokens whose states were compared. examples: scored of each objective; 0: none.
    """

    models: dict[str, ModelFound]
    agreement: list[Agreement]
    weights: dict[str, str]
    texts: str
    n_texts: int
    n_tokens: int
    n_sampled: int
    examples: int
    seconds: float
    made_at: str

    @property
    def n_layers(self) -> int:
        return len(next(iter(self.models.values())).influence)

    @property
    def candidates(self) -> list[str]:
        return list(self.models)[1:]

    @property
    def when(self) -> datetime:
        return datetime.fromisoformat(self.made_at)

    def is_of(self, weights: Mapping[tuple[str, str], str]) -> bool:
        """Whether it was measured on the models whose files have these digests."""
        return self.weights == named(weights)


def named(weights: Mapping[tuple[str, str], str]) -> dict[str, str]:
    return {f"{model}/{file}": digest for (model, file), digest in sorted(weights.items())}


def shared_file(runs: str | Path, spec: RunSpec) -> Path:
    """Where the family's redundancy is kept beside the runs of a folder."""
    asked = spec.model_dump(mode="json", include={*_ASKED, "seed"})
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return Path(runs) / PLACE / f"{digest[:24]}.json"


def own_file(folder: RunFolder) -> Path:
    return folder.path / FILE


def write(found: Redundancy, file: Path) -> None:
    """Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(to_json(found), separators=(",", ":"), allow_nan=False), durable=False)


def read(file: Path) -> Redundancy | None:
    """What a file holds; None where there is none, or one that this version does not understand."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        if file.stat().st_size <= MAX_BYTES:
            return _from_json(json.loads(file.read_text(encoding="utf-8")))
    return None


def of_run(folder: RunFolder) -> Redundancy | None:
    """That of a run: its own, else what is kept beside the runs for its family and objectives; None where none is."""
    if (found := read(own_file(folder))) is not None:
        return found
    try:
        shared = read(shared_file(folder.root, load_spec(folder.spec)))
        weights = queries.load_digests(folder).weights if shared is not None and folder.exists() else {}
    except UserError:  # a run file or a store that this version cannot read: it has none
        return None
    return shared if shared is not None and (not weights or shared.is_of(weights)) else None


def adopt(folder: RunFolder) -> None:
    """Put a copy of what is known into a run's folder, so that it goes where the folder goes."""
    if not own_file(folder).exists() and (found := of_run(folder)) is not None:
        with suppress(OSError):  # the run does without it
            write(found, own_file(folder))


def to_json(found: Redundancy) -> dict[str, Any]:
    return {"format": FORMAT, **_rounded(asdict(found))}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def _from_json(data: dict[str, Any]) -> Redundancy:
    """Raises ValueError and the like for what is not as it should be."""
    if data.pop("format") != FORMAT:
        raise ValueError
    models = {str(name): _model(one) for name, one in data.pop("models").items()}
    agreement = [Agreement(**one) for one in data.pop("agreement")]
    found = Redundancy(models, agreement, **data)
    n = found.n_layers
    lists = [one.cosine for one in agreement] + [some for m in models.values() for some in _lists(m)]
    matrices = [some for m in models.values() for some in (m.angular, m.cosine, m.cka)]
    is_square = all(len(some) == n + 1 and all(len(row) == n + 1 for row in some) for some in matrices)
    if not is_square or not all(len(some) == n for some in lists):
        raise ValueError
    return found


def _lists(model: ModelFound) -> list[list[Any]]:
    return [model.influence, *(one.without for one in model.scores.values()), *filter(None, [model.distance])]


def _model(data: dict[str, Any]) -> ModelFound:
    scores = {str(name): _scored(one) for name, one in data.pop("scores").items()}
    copies = {int(layer): int(first) for layer, first in data.pop("copies").items()}
    return ModelFound(**data, scores=scores, copies=copies)


def _scored(data: dict[str, Any]) -> Scored:
    return Scored(**data | {"without": [None if one is None else Without(**one) for one in data["without"]]})
