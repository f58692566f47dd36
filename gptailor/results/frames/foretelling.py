"""Does what is measured of a base before a search foretell what the search keeps? Over runs that differ in their base.

The measures are single numbers of the base alone: how many of its layers look cheap, and what its cheapest cut looks
like to each measure. Rank correlations with what is kept on held-out benchmarks are turned so that +1 always says: the
more redundant a base looks, the more of it is kept.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import pandas as pd

from gptailor.plan import BASE
from gptailor.results.frames.compare import Entry
from gptailor.results.frames.ratios import series_names
from gptailor.results.outlook import cheap_layers
from gptailor.results.redundancy import ModelFound, Redundancy
from gptailor.trial import DENSE

MEASURES = {"cheap": +1, "lost": -1, "influence": -1, "angular": -1}
"""+1: more of it is more redundancy. cheap: layers that look cheap. lost: what the objectives lose above guessing
without each of the n cheapest layers, added up. influence: of the n layers with the least Block Influence, added up.
angular: of the block of n layers that turns its states least. n: the layers to go."""
KEPT = ("retention", "above_chance")
ASIDE = ("name", "base_model", "candidates", "seed")
"""Keys of a run file in which runs that are compared with each other differ."""
COLUMNS = ["run", "family", "series", "seed", *MEASURES, "dense", "average", *KEPT]


def table(runs: Sequence[Entry], found: Mapping[str, Redundancy]) -> pd.DataFrame:
    """A row a run whose best plan is judged and whose base was measured; empty where all have one base.

    found: by run; runs of the same base and seed share theirs. Columns: see COLUMNS. family and series: what the labels
    of runs with one base, and of runs alike but for their base and seed, have in common; dense: the base's average on
    the held-out benchmarks; average, retention and above_chance: the best plan's.
    """
    measured = {_base(entry): found[entry.label] for entry in runs if entry.label in found}
    rows = [row for entry in runs for row in _row(entry, measured.get(_base(entry)))]
    frame = pd.DataFrame(rows, columns=COLUMNS)
    if frame["family"].nunique() < 2:
        return frame.head(0)
    return frame.assign(**{key: frame[key].map(series_names(frame, runs, key)) for key in ("family", "series")})


def measures(model: ModelFound, n: int) -> dict[str, float]:
    """MEASURES of a model that is to lose n layers; `lost` is NaN where too few layers were scored."""
    kept = [model.kept(layer) for layer in range(len(model.influence))]
    costs = sorted(max(0.0, 1 - one.share) for one in kept if one is not None)
    blocks = [model.angular[start][start + n] for start in range(len(model.influence) - n + 1)]
    return {
        "cheap": float(len(cheap_layers(model))),
        "lost": sum(costs[:n]) if len(costs) >= n else np.nan,
        "influence": sum(sorted(model.influence)[:n]),
        "angular": min(blocks),
    }


def by_family(found: pd.DataFrame) -> pd.DataFrame:
    """A row a family of `table`, in its order: means over seeds of the measures, and of KEPT by series.

    Columns: family, dense, MEASURES, and (kept, series) for each of both.
    """
    of_base = found.drop_duplicates(["family", "seed"]).groupby("family", sort=False)[["dense", *MEASURES]].mean()
    kept = found.pivot_table(index="family", columns="series", values=list(KEPT), sort=False)
    return of_base.join(kept.set_axis(kept.columns.to_flat_index(), axis=1)).reset_index()


def correlations(found: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of each measure with what is kept: a row a series and measure.

    Columns: series, measure, families and runs (how many), and for each of KEPT (kept, "families"), of means over
    seeds, and (kept, "runs"), every seed by itself. NaN where fewer than three are known, or all are alike.
    """
    rows = []
    for series, own in found.groupby("series", sort=False):
        means = own.groupby("family", sort=False)[[*MEASURES, *KEPT]].mean()
        frames = {"families": means, "runs": own}
        for measure, sign in MEASURES.items():
            row: dict[Hashable, object] = {"series": series, "measure": measure}
            for over, frame in frames.items():
                row[over] = len(frame)
                row |= {(kept, over): sign * _spearman(frame[measure], frame[kept]) for kept in KEPT}
            rows.append(row)
    return pd.DataFrame(rows)


def _spearman(one: pd.Series, other: pd.Series) -> float:
    known = one.notna() & other.notna()
    ranks = one[known].rank(), other[known].rank()
    enough = known.sum() > 2 and all(rank.nunique() > 1 for rank in ranks)
    return float(ranks[0].corr(ranks[1])) if enough else np.nan


def _base(entry: Entry) -> tuple[str, int]:
    return str(entry.facts.spec.get("base_model")), int(entry.facts.spec.get("seed", 0))


def _row(entry: Entry, redundancy: Redundancy | None) -> list[tuple[object, ...]]:
    if entry.best is None or redundancy is None:
        return []
    judged = entry.view.held_out.set_index("subject")
    subject = str(entry.best_subject)
    if subject not in judged.index:
        return []
    asked = {key: wish for key, wish in entry.facts.spec.items() if key not in ASIDE}
    base, seed = _base(entry)
    series = (json.dumps(asked, sort_keys=True, default=str), "")
    own = judged.loc[subject]
    dense = float(judged["average"].get(str(DENSE), np.nan))
    seen = measures(redundancy.models[BASE], entry.facts.n_removed)
    kept = (float(own[key]) for key in ("average", *KEPT))
    return [(entry.label, (base, ""), series, seed, *(seen[name] for name in MEASURES), dense, *kept)]
