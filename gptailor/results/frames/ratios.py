"""How far can a model be cut? Held-out quality against layers removed, over runs, and where it meets guessing.

Runs that differ in how much they remove, and in their seed, are one series; others are series of their own. The
*limit* of a series is the first ratio at which the lower bound of its held-out average touches the score of guessing.
How sure that is comes from a bootstrap: the examples are drawn anew (the same ones for all plans of a seed, which
answered the same), and the seeds of each ratio.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gptailor.results import scores
from gptailor.results.frames.compare import CLEAR, Entry
from gptailor.store.queries import Answers
from gptailor.trial import DENSE, BenchmarkKey, ItemKey, Subject, SubjectKind
from gptailor.wording import plain

DRAWS = 2000
SAME = 1e-6
"""Averages that differ by less are of the same examples."""
ASIDE = ("name", "remove", "seed")
"""Keys of a run file in which the runs of one series differ."""
POINTS = ["run", "series", "seed", "removed", "ratio", "subject", "plan_hash"]
POINTS += ["average", "stderr", "dense", "chance", "averaged"]
CURVE = ["series", "removed", "ratio", "runs", "average", "error", "low", "high", "dense", "chance", "retention"]


def points(runs: Sequence[Entry]) -> pd.DataFrame:
    """A row a judged plan: each run's best, and the same repaired or healed where that was judged too.

    Columns: see POINTS; removed and ratio of layers, average held-out score and its standard error, the dense base's on
    the same benchmarks, guessing's (NaN where that is not known), and the keys of the benchmarks that are averaged.
    Empty where runs differ in what they hold out or in the number of layers, and where all remove as much.
    """
    rows = [row for entry in runs for row in _points_of(entry)]
    frame = pd.DataFrame(rows, columns=POINTS)
    judges = {json.dumps(entry.facts.spec.get("held_out"), sort_keys=True) for entry in runs}
    sizes = {entry.facts.n_layers for entry in runs if entry.best is not None}
    if len(judges) > 1 or len(sizes) > 1 or frame["removed"].nunique() < 2:
        return frame.head(0)
    return frame.assign(series=frame["series"].map(series_names(frame, runs)))


def hashes(found: pd.DataFrame, run: str) -> tuple[str, ...]:
    """The plans of a run among `points`, whose answers `limits` reads."""
    own = found.loc[found["run"] == run, "plan_hash"].dropna()
    return tuple(sorted({*own.astype(str)}))


def _points_of(entry: Entry) -> list[tuple[object, ...]]:
    if entry.best is None or entry.best_subject is None:
        return []
    judged, table = scores.judged(entry.view.tables), entry.view.held_out.set_index("subject")
    asked = {key: wish for key, wish in entry.facts.spec.items() if key not in ASIDE}
    shares = judged[judged["share"] & (judged["subject"] == str(entry.best_subject))]
    chance = float(shares["chance"].mean(skipna=False)) if len(shares) else np.nan
    keys = tuple(BenchmarkKey(*key) for key in shares[scores.BENCHMARK].itertuples(index=False))
    dense = float(table["average"].get(str(DENSE), np.nan))
    rows: list[tuple[object, ...]] = []
    for subject, remark in _subjects(entry.best_subject, Subject.config(entry.best), table.index):
        config_id = table.at[str(subject), "config_id"]
        removed = _removed(entry, entry.best if subject.kind is SubjectKind.HEALED else int(config_id))
        own = table.loc[str(subject)]
        series = (json.dumps(asked, sort_keys=True, default=str), remark)
        found = (str(subject), own["plan_hash"], float(own["average"]), float(own["stderr"]), dense, chance, keys)
        share = removed / entry.facts.n_layers
        rows.append((entry.label, series, int(entry.facts.spec.get("seed", 0)), removed, share, *found))
    return rows


def _subjects(best: Subject, before: Subject, judged: Sequence[str]) -> list[tuple[Subject, str]]:
    """Who of a run is drawn, and what is said beside the series' name. before: the best plan unrepaired."""
    subjects = sorted(map(Subject.parse, judged), key=lambda one: list(SubjectKind).index(one.kind))
    changed = [(one, _remark(one, before)) for one in subjects if one.before in (best, before)]
    return [*([(before, "")] if str(before) in judged else []), *changed]


def _remark(changed: Subject, before: Subject) -> str:
    """`repaired`, `repaired (refit-base)`, `healed`, `repaired and healed`. before: the plan unrepaired."""
    if changed.kind is SubjectKind.HEALED:
        return "healed" if changed.before == before else "repaired and healed"
    return f"repaired ({changed.name})" if changed.name else "repaired"


def _removed(entry: Entry, config_id: int) -> int:
    """Layers that a plan leaves out; of a narrower one, those that its run asked for, of which it has the size."""
    own = entry.view.tables.layers
    return int((own[own["config_id"] == config_id]["operation"] == "removed").sum()) or entry.facts.n_removed


def series_names(frame: pd.DataFrame, runs: Sequence[Entry], column: str = "series") -> dict[Hashable, str]:
    """What the names of a series' runs have in common, and not with those of all others.

    `one-shot` of `10 %, one-shot, seed 0` and `20 %, one-shot, seed 1`. frame: `run`, and a column of what tells series
    apart: a key and a remark.
    """
    names_of = {entry.label: entry.name for entry in runs}
    series = frame.assign(run=frame["run"].map(names_of)).groupby(column, sort=False)["run"]
    words = {key: set.intersection(*({*_words(label)} for label in labels)) for key, labels in series}
    everywhere = set.intersection(*words.values()) if len(words) > 1 else set()
    names: dict[Hashable, str] = {}
    for key, labels in series:
        said = [word for word in _words(labels.iloc[0]) if word in words[key] - everywhere]
        name = ", ".join([*said, *filter(None, [key[1]])]) or "search"
        names[key] = plain(name if name not in names.values() else f"{name} ({len(names) + 1})", 48)
    return names


def _words(label: str) -> list[str]:
    words = (word.strip() for word in label.replace(":", ",").split(","))
    return [word for word in words if not word.startswith("seed ")]


def curve(found: pd.DataFrame) -> pd.DataFrame:
    """A row a series and ratio of `points`: the mean over runs, and what it says of the limit.

    Columns: see CURVE, and limit. error: see _error; low, high: the 95 % interval. retention: of the dense base. limit:
    whether this is the series' first ratio whose lower bound touches guessing.
    """
    rows = []
    for (series, removed), own in found.groupby(["series", "removed"], sort=False):
        mean, error = float(own["average"].mean()), _error(own)
        dense, chance = float(own["dense"].mean()), float(own["chance"].mean(skipna=False))
        kept = mean / dense if dense > 0 else np.nan
        low, high = mean - CLEAR * error, mean + CLEAR * error
        rows.append((series, int(removed), own["ratio"].iloc[0], len(own), mean, error, low, high, dense, chance, kept))
    frame = pd.DataFrame(rows, columns=CURVE)
    frame = frame.sort_values("removed", kind="stable").sort_values("series", key=_in_order(frame), kind="stable")
    touches = frame["low"] <= frame["chance"]
    first = touches & ~touches.groupby(frame["series"]).shift(fill_value=False).groupby(frame["series"]).cummax()
    return frame.assign(limit=first.astype(bool)).reset_index(drop=True)


def _error(own: pd.DataFrame) -> float:
    """Standard error of the mean of several seeds' averages.

    Where all seeds answered the same examples, a further seed does not take away these examples' error; where a part of
    a split judges, every seed has examples of its own.
    """
    of_examples = float((own["stderr"].astype(float) ** 2).mean())
    of_runs = float(own["average"].var(ddof=1)) / len(own) if len(own) > 1 else 0.0
    if any("[" in key.split for key in own["averaged"].iloc[0]):
        return float(np.sqrt(max(of_examples / len(own), of_runs)))
    return float(np.sqrt(of_examples + of_runs))


def _in_order(frame: pd.DataFrame) -> Callable[[pd.Series], pd.Series]:
    order = {name: place for place, name in enumerate(dict.fromkeys(frame["series"]))}
    return lambda names: names.map(order)


@dataclass(frozen=True)
class Limit:
    """Where a series meets guessing: the ratio, None where it does not within the `last` one that was tried.

    low, high: 95 % of the resamples meet it between these; None for beyond the last ratio. share: of the resamples that
    meet it at all.
    """

    series: str
    ratio: float | None
    low: float | None
    high: float | None
    share: float
    last: float
    chance: float

    @property
    def text(self) -> str:
        """One sentence for people."""
        if not np.isfinite(self.chance):
            return f"{self.series}: no limit can be told, as the score of guessing is not known on these benchmarks"
        resampled = f"{self.share:.0%} of {DRAWS} resamples meet it"
        if self.ratio is None:
            return f"{self.series}: no limit up to {self.last:.0%} removed; {resampled}"
        ends = " to ".join("beyond" if end is None else f"{end:.0%}" for end in (self.low, self.high))
        return (
            f"{self.series}: the limit is {self.ratio:.0%} removed, where the average is no longer clearly above "
            f"guessing ({self.chance:.3f}); 95 % of {DRAWS} resamples meet it at {ends}"
        )


def limits(found: pd.DataFrame, answers: Mapping[str, Answers]) -> list[Limit]:
    """The limit of each series of `points`. answers: by run; without them examples are drawn as normal errors."""
    rng = np.random.default_rng(0)
    drawn = _drawn(found, answers, rng)
    shown = curve(found)
    return [_limit(own, found, drawn, rng) for _, own in shown.groupby("series", sort=False)]


def _limit(own: pd.DataFrame, found: pd.DataFrame, drawn: NDArray[np.float64], rng: np.random.Generator) -> Limit:
    """own: the rows of `curve` of one series, ascending. drawn: see _drawn."""
    series, ratios, chance = str(own["series"].iloc[0]), own["ratio"].to_numpy(float), float(own["chance"].mean())
    touches = np.zeros((DRAWS, len(own)), dtype=bool)
    for place, row in enumerate(own.itertuples()):
        here = np.flatnonzero((found["series"] == series) & (found["removed"] == row.removed))
        seeds = rng.choice(here, size=(DRAWS, len(here)))
        means = drawn[np.arange(DRAWS)[:, None], seeds].mean(axis=1)
        touches[:, place] = means - CLEAR * float(str(row.error)) <= float(str(row.chance))
    first = np.where(touches.any(axis=1), touches.argmax(axis=1), len(ratios))
    low, high = np.quantile(first, [0.025, 0.975], method="nearest")
    met = own[own["limit"]]["ratio"]
    at = [None if place == len(ratios) else float(ratios[place]) for place in (int(low), int(high))]
    ratio = float(met.iloc[0]) if len(met) else None
    return Limit(series, ratio, at[0], at[1], float(touches.any(axis=1).mean()), float(ratios[-1]), chance)


def _drawn(found: pd.DataFrame, answers: Mapping[str, Answers], rng: np.random.Generator) -> NDArray[np.float64]:
    """draws x points: averages on examples drawn anew, the same for all plans that read the same ones."""
    drawn = np.empty((DRAWS, len(found)))
    weights: dict[tuple[object, ...], NDArray[np.float64]] = {}
    for place, row in enumerate(found.itertuples()):
        known = answers.get(str(row.run), Answers()).items
        items = {key: _numbers(known.get(ItemKey(str(row.plan_hash), *key), ())) for key in row.averaged}
        means = []
        for key, own in items.items() if all(map(len, items.values())) else ():
            counted = (row.seed, *key, len(own))  # another seed is another order of the examples
            if counted not in weights:
                weights[counted] = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=DRAWS) / len(own)
            means.append(weights[counted] @ own)
        average = float(str(row.average))
        errors = 0.0 if np.isnan(float(str(row.stderr))) else float(str(row.stderr))
        whole = np.mean(means, axis=0) if means else None
        is_known = whole is not None and abs(np.mean([own.mean() for own in items.values()]) - average) < SAME
        drawn[:, place] = whole if is_known else average + errors * rng.standard_normal(DRAWS)
    return drawn


def _numbers(items: Sequence[Any]) -> NDArray[np.float64]:
    """What examples gave; empty where they gave no numbers."""
    return np.array(items if all(isinstance(item, (int, float)) for item in items) else (), dtype=float)
