"""Quality against size: what runs attain at each size, alone or several together, and how much that covers.

A run of one size has one point, its best plan; one with a range of sizes has the best plan of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from gptailor.measures import hypervolume
from gptailor.results import scores
from gptailor.store.queries import ScoreTables
from gptailor.trial import Subject

QUALITIES = ("calibration", "held_out")


def attained(tables: ScoreTables) -> pd.DataFrame:
    """A row a size: the run's best plan there. Empty before any was scored at the full budget.

    Columns: kept_layers, gone (share of the base's layers), config_id, calibration (its mean retention by the search's
    own scores), held_out (its held-out average; NaN where it was not judged on all of that).
    """
    best = scores.best_of_sizes(tables)
    if best.empty and (named := scores.best(tables)) is not None and named.config_id is not None:
        best = pd.DataFrame({"config_id": [named.config_id]})
        best = best.assign(kept_layers=best["config_id"].map(tables.kept_layers))
    subjects = [Subject.config(int(config)) for config in best["config_id"]]
    believed, outside = scores.calibration(tables), scores.averages(scores.judged(tables)).set_index("subject")
    n_layers = int(tables.runs["n_layers"].iloc[0])
    return pd.DataFrame(
        {
            "kept_layers": best["kept_layers"].astype(int),
            "gone": 1.0 - best["kept_layers"].astype(float) / n_layers,
            "config_id": best["config_id"].astype(int),
            "calibration": [believed.get(subject, np.nan) for subject in subjects],
            "held_out": [outside["average"].get(str(subject), np.nan) for subject in subjects],
        }
    )


def volume(runs: Sequence[pd.DataFrame], quality: str) -> float | None:
    """The hypervolume of `quality` and `gone` over what these runs attain together, from the corner 0.

    None where a plan's quality is not known, or there is no plan.
    """
    points = pd.concat(runs)[[quality, "gone"]].to_numpy(float) if runs else np.empty((0, 2))
    return hypervolume(points, [0.0, 0.0]) if len(points) and np.isfinite(points).all() else None
