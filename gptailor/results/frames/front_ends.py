"""Does a front hold distinct trade-offs? How far apart its ends are on held-out examples, in standard errors.

An end is the plan of the front that the search's scores call the best in one objective. On the search's own examples
the ends are apart by choice; on held-out ones of the same benchmarks only if they really differ.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from gptailor.results import scores, statistics
from gptailor.results.frames.compare import CLEAR, Entry
from gptailor.store.queries import Answers
from gptailor.trial import Subject

COLUMNS = ["run", "plans", "benchmark", "end", "score", "other", "other_score", "difference", "error", "apart"]


def table(entry: Entry, answers: Answers) -> pd.DataFrame:
    """A row an objective whose benchmark is held out too, where two ends of the run's front are judged on it.

    Columns: run, plans (on the front), benchmark, end (the plan best in this objective) and its held-out score, other
    (of the other ends the one lowest in it) likewise, difference (positive as the front promises) with its standard
    error on the same examples, apart (the difference in standard errors). Empty where the run aims at no front.
    """
    spec = entry.view.facts.spec
    if spec.get("baselines") or spec.get("aim", "front") != "front" or len(entry.view.facts.objectives) < 2:
        return pd.DataFrame(columns=COLUMNS)
    return pd.DataFrame(_rows(entry, answers), columns=COLUMNS)


def _rows(entry: Entry, answers: Answers) -> Iterator[tuple[object, ...]]:
    tables = entry.view.tables
    found, judged = scores.searched(tables), scores.judged(tables)
    front = found.rising.loc[found.front]
    if front.empty:
        return
    ends = {str(name): int(front[name].idxmax()) for name in front}
    for name, end in ends.items():
        others = [config_id for config_id in ends.values() if config_id != end]
        if not others:
            continue
        other = int(front.loc[others, name].idxmin())
        pair = statistics.paired(judged, answers, Subject.config(end), Subject.config(other))
        for row in pair[pair["benchmark"] == name.rpartition("/")[0]].itertuples():
            both = [_score(judged, config_id, row) for config_id in (end, other)]
            error = float(str(row.high)) - float(str(row.low))
            error /= 2 * CLEAR
            apart = float(str(row.difference)) / error if error else float("nan")
            yield entry.label, len(front), row.benchmark, end, both[0], other, both[1], row.difference, error, apart


def _score(judged: pd.DataFrame, config_id: int, row: object) -> float:
    own = judged[judged["subject"] == str(Subject.config(config_id))]
    for name in scores.BENCHMARK:
        own = own[own[name] == getattr(row, name)]
    return float(own["score"].iloc[0])
