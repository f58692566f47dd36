"""What the runs of an experiment say together, as tables for people: limits, ends of fronts, where spread comes from.

Each is said where the runs allow it: how far a model can be cut where they remove more and less, where the spread comes
from where objectives and algorithms are crossed, how far apart the ends of a front are where fronts were judged, what
a base's redundancy foretells where bases differ and were measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from gptailor.results import redundancy
from gptailor.results.frames import compare, foretelling, front_ends, pools, ratios, variance
from gptailor.results.frames.view import View
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.screening import read_screening
from gptailor.trial import Subject
from gptailor.wording import as_table, count, value


def findings(folders: Mapping[str, RunFolder]) -> Iterator[str]:
    """Texts, each a table or a few lines, of the runs that are there."""
    begun = {label: folder for label, folder in folders.items() if folder.exists()}
    runs = compare.entries([(label, View(queries.read_run(folder))) for label, folder in begun.items()])
    answers = compare.answers_of(runs, list(begun.values()))
    points = ratios.points(runs)
    if len(points):
        yield as_table(_by_ratio(ratios.curve(points)))
        yield "\n".join(limit.text for limit in ratios.limits(points, answers))
    pairs = list(zip(runs, begun.values(), strict=True))
    screenings = {entry.label: found for entry, folder in pairs if (found := read_screening(folder))}
    pool = pools.table(runs, screenings)
    if len(pool):
        yield as_table(_pools(pool))
    averages = variance.table(runs)
    parts = variance.components(averages)
    if parts is not None:
        yield as_table(_means(averages))
        yield as_table(_components(parts))
    seen = {entry.label: known for entry, folder in pairs if (known := redundancy.of_run(folder))}
    foretold = foretelling.table(runs, seen)
    if len(foretold):
        yield as_table(_families(foretelling.by_family(foretold)))
        yield as_table(_correlations(foretelling.correlations(foretold)))
    ends = [front_ends.table(entry, answers[entry.label]) for entry in runs]
    if any(map(len, ends)):
        yield as_table(_ends(pd.concat([one for one in ends if len(one)])))


def _by_ratio(curve: pd.DataFrame) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("series", "removed", "runs", "held-out average", "retention", "guessing", "")]
    for row in curve.to_dict("records"):
        kept, chance = value(row["retention"], percent=True), value(row["chance"])
        removed, limit = f"{row['ratio']:.0%} ({row['removed']} layers)", "limit" if row["limit"] else ""
        average = value(row["average"], row["error"])
        rows.append((row["series"], removed, str(row["runs"]), average, kept, chance, limit))
    return rows


def _pools(pool: pd.DataFrame) -> list[tuple[str, ...]]:
    head = ("pool", "candidates", "stay", "plans", "a suggestion", "best", "examples to the worst best", "lent by")
    rows: list[tuple[str, ...]] = [head]
    for row in pool.to_dict("records"):
        numbers = (f"10^{row['plans']:.0f}", f"{row['seconds']:.3f} s", value(row["best"], percent=True))
        rows.append(
            (row["run"], str(row["candidates"]), str(row["stay"]), *numbers, count(row["examples"]), row["lent"])
        )
    return rows


MEASURES = {
    "cheap": ("cheap layers", "{:.1f}"),
    "lost": ("lost by the cheapest", "{:.1%}"),
    "influence": ("Block Influence", "{:.3f}"),
    "angular": ("angular distance", "{:.3f}"),
}
KEPT = {"retention": "retention", "above_chance": "above guessing"}


def _families(families: pd.DataFrame) -> list[tuple[str, ...]]:
    """Of each family its base, what was measured of it, and what its searches keep: means over seeds."""
    kept = [column for column in families if isinstance(column, tuple)]
    names = [f"{series}: {KEPT[key]}" for key, series in kept]
    rows = [("family", "dense base", *(name for name, _ in MEASURES.values()), *names)]
    for row in families.to_dict("records"):
        measured = (form.format(row[key]) for key, (_, form) in MEASURES.items())
        shares = (value(row[column], percent=True) for column in kept)
        rows.append((row["family"], value(row["dense"]), *measured, *shares))
    return rows


def _correlations(found: pd.DataFrame) -> list[tuple[str, ...]]:
    """Rank correlations of measures with what is kept."""
    over = [column for column in found if isinstance(column, tuple)]
    names = [f"{KEPT[kept]}, {found[each].max()} {each}" for kept, each in over]
    rows = (
        (row["series"], MEASURES[row["measure"]][0], *(value(row[column]) for column in over))
        for row in found.to_dict("records")
    )
    return [("rank correlation", "of", *names), *rows]


def _means(averages: pd.DataFrame) -> list[tuple[str, ...]]:
    wide = averages.pivot_table(index="algorithm", columns="objective", values="average", sort=False)
    rows = [("held-out average", *map(str, wide.columns))]
    named = zip(map(str, wide.index), wide.to_numpy(), strict=True)
    return [*rows, *((name, *(value(float(cell)) for cell in row)) for name, row in named)]


def _components(parts: pd.DataFrame) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("spread from", "degrees of freedom", "of the squares", "deviation", "F", "p")]
    for row in parts.to_dict("records"):
        tested = ("", "") if pd.isna(row["F"]) else (f"{row['F']:.2f}", f"{row['p']:.2g}")
        share, deviation = f"{row['share']:.1%}", f"{row['deviation']:.4f}"
        rows.append((row["source"], str(row["degrees"]), share, deviation, *tested))
    return rows


def _ends(ends: pd.DataFrame) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("front of", "plans", "held out", "its end", "other end", "apart", "in errors")]
    for row in ends.to_dict("records"):
        one, other = (
            f"{Subject.config(int(row[key])).label} {value(row[score])}"
            for key, score in (("end", "score"), ("other", "other_score"))
        )
        apart = f"{row['difference']:+.3f} ± {row['error']:.3f}"
        rows.append((row["run"], str(row["plans"]), row["benchmark"], one, other, apart, f"{row['apart']:.1f}"))
    return rows
