"""How large a pool of candidates? By run: its space, what a suggestion takes, how soon a quality is reached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from gptailor.plan import merge_sets
from gptailor.results.frames.compare import Entry
from gptailor.results.frames.trials import AVERAGE
from gptailor.spec.sections import SpaceOperation
from gptailor.store.screening import Screening

COLUMNS = ["run", "candidates", "stay", "plans", "seconds", "best", "examples", "lent"]


def table(runs: Sequence[Entry], screenings: Mapping[str, Screening]) -> pd.DataFrame:
    """A row a search with trials; empty where all that have candidates have as many.

    Columns: run, candidates, stay (after a screening, where there was one), plans (log10 of how many there are, factors
    not counted), seconds (a suggestion's, mean), best (the best average of its trials on the highest rung), examples
    (an objective, the screening's among them, until a trial there reached the least `best` of all runs), lent (names of
    the candidates that lend the run's best plan layers). screenings: by run.
    """
    searches = [entry for entry in runs if len(entry.trials) and not entry.facts.spec.get("baselines")]
    if len({len(entry.facts.candidates) for entry in searches} - {0}) < 2:
        return pd.DataFrame(columns=COLUMNS)
    best = {entry.label: _at_the_top(entry)[AVERAGE].max() for entry in searches}
    target = float(np.nanmin([*map(float, best.values())]))
    rows = []
    for entry in searches:
        screening = screenings.get(entry.label)
        stay = len(screening.kept) if screening else len(entry.facts.candidates)
        spent = _spent(entry.trials) + (screening.examples if screening else 0)
        reached = _at_the_top(entry)[AVERAGE] >= target
        examples = float(spent[reached[reached].index[0]]) if reached.any() else np.nan
        seconds = float(entry.trials["suggest_seconds"].mean())
        row = (
            entry.label,
            len(entry.facts.candidates),
            stay,
            _plans(entry, stay),
            seconds,
            best[entry.label],
            examples,
        )
        rows.append((*row, ", ".join(_lent(entry))))
    return pd.DataFrame(rows, columns=COLUMNS)


def _at_the_top(entry: Entry) -> pd.DataFrame:
    trials = entry.trials[entry.trials["status"] == "success"]
    return trials[trials["budget"] == entry.facts.full_budget]


def _spent(trials: pd.DataFrame) -> pd.Series:
    """Examples an objective scored up to each trial's end: a configuration keeps those of the rungs below."""
    before = trials.groupby("config_id")["budget"].shift(fill_value=0)
    return (trials["budget"] - before).clip(lower=0).cumsum()


def _plans(entry: Entry, candidates: int) -> float:
    operations = entry.facts.spec.get("operations", ())
    names = tuple(map(str, range(candidates)))
    sources = 1 + candidates * (SpaceOperation.SELECT in operations)
    sources += len(merge_sets(names)) * (SpaceOperation.MERGE in operations)
    n, removed = entry.facts.n_layers, entry.facts.n_removed
    return math.log10(math.comb(n, removed)) + (n - removed) * math.log10(sources)


def _lent(entry: Entry) -> list[str]:
    layers = entry.view.tables.layers
    own = layers[layers["config_id"] == entry.best]["sources"]
    return sorted({str(name) for sources in own if sources is not None for name in sources})
