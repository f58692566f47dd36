"""Held-out results for people: every subject's average, benchmark by benchmark, and who beats whom on equal examples.

What the figures mean is worked out in gptailor/results/scores.py; here they get names and columns.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from gptailor.results import scores
from gptailor.results.statistics import AVERAGE, SIGNIFICANT, paired
from gptailor.store.queries import Answers, RunTables
from gptailor.trial import Subject, SubjectKind
from gptailor.wording import plain

KINDS = {
    SubjectKind.DENSE: "dense base",
    SubjectKind.CANDIDATE: "candidate",
    SubjectKind.BASELINE: "one-shot cut",
    SubjectKind.CONFIG: "plan of the search",
    SubjectKind.REPAIRED: "repaired",
    SubjectKind.HEALED: "healed",
}

LABEL = 48
"""Characters of a subject's label."""


def label(subject: str) -> str:
    """A stored subject's text as a person reads it, of a length that a chart has room for."""
    return plain(Subject.parse(subject).label, LABEL)


def averages(tables: RunTables) -> pd.DataFrame:
    """scores.averages with label, kind (in words), low and high (one standard error); the best average first.

    before: of a repaired or healed plan, the average of what it was.
    """
    table = scores.averages(scores.judged(tables), scores.calibration(tables))
    known = dict(zip(table["subject"], table["average"], strict=True))
    before = [known.get(str(Subject.parse(str(subject)).before)) for subject in table["subject"]]
    table = table.assign(
        label=table["subject"].map(label).astype(object),
        kind=scores.kinds(table["subject"]).map(KINDS),
        before=pd.Series(before, index=table.index, dtype=float),
        low=table["average"] - table["stderr"],
        high=table["average"] + table["stderr"],
    )
    return table.sort_values(["average", "retention"], ascending=False, kind="stable").reset_index(drop=True)


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """`averages` as a table for reading. Columns that nobody has a value of are left out."""
    frame = pd.DataFrame(
        {
            "Subject": table["label"],
            "Kind": table["kind"],
            "Average": table["average"],
            "±": table["stderr"],
            "Before": table["before"],
            "Without calibration": table["without_calibration"],
            "retention": table["retention"],
            "above_chance": table["above_chance"],
            "gap": table["gap"],
        }
    )
    return frame.loc[:, [not frame[name].isna().all() for name in frame]]


def changes(tables: RunTables, answers: Answers) -> list[str]:
    """Of every repaired or healed plan that was judged beside what it was before, a sentence on the difference."""
    frame = scores.judged(tables)
    known = dict.fromkeys(map(str, frame["subject"]))
    return [
        beside_before(tables, answers, one)
        for one in map(Subject.parse, known)
        if one.before and str(one.before) in known
    ]


def beside_before(tables: RunTables, answers: Answers, one: Subject) -> str:
    """A sentence on the difference between a repaired or healed subject and what it was."""
    assert one.before is not None
    return verdict(paired(scores.judged(tables), answers, one, one.before), one, one.before)


def by_benchmark(tables: RunTables) -> pd.DataFrame:
    """A row a benchmark, a column a subject: `0.512 ± 0.014`."""
    frame = scores.judged(tables)
    if frame.empty:
        return pd.DataFrame()
    cells = frame.assign(
        row=[plain(f"{r.benchmark} / {r.metric} ({r.split}, {r.n})", 80) for r in frame.itertuples()],
        column=frame["subject"].map(label),
        cell=[
            f"{r.score:.3f}" + (f" ± {r.stderr:.3f}" if np.isfinite(float(str(r.stderr))) else "")
            for r in frame.itertuples()
        ],
    )
    wide = cells.drop_duplicates(["row", "column"]).pivot(index="row", columns="column", values="cell")
    wide = wide.reindex(columns=list(dict.fromkeys(cells["column"]))).fillna("–")
    return wide.rename_axis(index="Benchmark", columns=None).reset_index()


def verdict(tests: pd.DataFrame, one: Subject, other: Subject) -> str:
    """One plain sentence on the paired test over all benchmarks: is the difference more than noise?

    A sentence a benchmark, where their scores make no average.
    """
    first, second = plain(one.label, LABEL), plain(other.label, LABEL)
    if tests.empty:
        return f"{first} and {second} have no examples in common to be compared on."
    average = tests[tests["benchmark"] == AVERAGE]
    told = average if len(average) else tests
    return " ".join(_sentence(row, first, second) for _, row in told.iterrows())


def _sentence(row: pd.Series, first: str, second: str) -> str:
    where = "on average" if row["benchmark"] == AVERAGE else f"in {plain(row['metric'])} on {plain(row['benchmark'])}"
    way = "ahead of" if row["difference"] >= 0 else "behind"
    noise = "more than noise explains" if row["p"] < SIGNIFICANT else "no more than noise explains"
    spread = f"95 % interval {row['low']:+.3f} to {row['high']:+.3f}, p = {row['p']:.2g}, {row['n']:,} examples"
    return f"{first} is {way} {second} by {abs(row['difference']):.3f} {where} ({spread}): {noise}."
