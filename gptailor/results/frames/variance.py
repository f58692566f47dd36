"""Is it the objective or the algorithm? A two-way analysis of variance of what runs keep on what is held out.

Runs that differ in their objectives, in who searches (SMAC, random, a baseline) and in their seed alone make a table:
objectives x algorithms x seeds. Seeds are blocks, as another seed is other examples and another search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import fdtrc

from gptailor.results.frames.compare import Entry
from gptailor.trial import asked_key

ALGORITHM = ("suggester", "baselines", "baselines_on")
"""Keys of a run file that say who searches."""
COLUMNS = ["source", "degrees", "share", "deviation", "F", "p"]


def table(runs: Sequence[Entry]) -> pd.DataFrame:
    """A row a run whose best plan is judged: objective and algorithm (as people read them), seed, average."""
    rows = []
    for entry in runs:
        judged = entry.view.held_out.set_index("subject")["average"]
        subject = str(entry.best_subject)
        if subject in judged:
            asked = entry.view.facts.spec
            rows.append((_objective(asked), _algorithm(asked), int(asked.get("seed", 0)), float(judged[subject])))
    return pd.DataFrame(rows, columns=["objective", "algorithm", "seed", "average"])


def _objective(asked: Mapping[str, Any]) -> str:
    keys = [asked_key(one) for one in asked.get("objectives", [])]
    metrics = dict.fromkeys(key.metric for key in keys)
    return f"{', '.join(metrics)} of {', '.join(dict.fromkeys(key.benchmark for key in keys))}"


def _algorithm(asked: Mapping[str, Any]) -> str:
    if asked.get("baselines"):
        return ", ".join(map(str, asked["baselines"]))
    return "search" if asked.get("suggester", "smac") == "smac" else f"{asked['suggester']} search"


def components(found: pd.DataFrame) -> pd.DataFrame | None:
    """Where the spread of `table`'s averages comes from; None where it is no full table of two by two or more.

    A row a source. Columns: degrees (of freedom), share (of the sum of squares), deviation (the standard deviation that
    the source adds, by the method of moments, Searle, Casella & McCulloch, Variance Components, chapter 4; 0 where the
    mean square is below what it is tested against), F and p (against what is left over; NaN of the last row).
    """
    objectives, algorithms, seeds = (list(dict.fromkeys(found[name])) for name in ("objective", "algorithm", "seed"))
    sizes = (len(objectives), len(algorithms), len(seeds))
    if min(sizes) < 2 or len(found) != np.prod(sizes) or found.duplicated(["objective", "algorithm", "seed"]).any():
        return None
    values = found.set_index(["objective", "algorithm", "seed"])["average"]
    y = np.array([values[key] for key in product(objectives, algorithms, seeds)], dtype=float).reshape(sizes)
    return _analysed(y)


def _analysed(y: NDArray[np.float64]) -> pd.DataFrame:
    """y: objectives x algorithms x seeds."""
    a, b, n = y.shape
    mean = y.mean()
    by_a, by_b, by_seed = (y.mean(axis=axes) - mean for axes in ((1, 2), (0, 2), (0, 1)))
    both = y.mean(axis=2) - mean - by_a[:, None] - by_b[None, :]
    left = y - mean - by_a[:, None, None] - by_b[None, :, None] - both[:, :, None] - by_seed[None, None, :]
    parts = {
        "objective": (a - 1, b * n, by_a),
        "algorithm": (b - 1, a * n, by_b),
        "both together": ((a - 1) * (b - 1), n, both),
        "seed": (n - 1, a * b, by_seed),
        "left over": ((a * b - 1) * (n - 1), 1, left),
    }
    squares = {name: times * float((effect**2).sum()) for name, (_, times, effect) in parts.items()}
    total, (rest, _, _) = sum(squares.values()), parts["left over"]
    noise = squares["left over"] / rest
    rows = []
    for name, (degrees, times, _) in parts.items():
        mean_square = squares[name] / degrees
        is_rest = name == "left over"
        added = noise if is_rest else max(mean_square - noise, 0.0) / times
        f = np.nan if is_rest or not noise else mean_square / noise
        p = np.nan if np.isnan(f) else float(fdtrc(degrees, rest, f))
        rows.append((name, degrees, squares[name] / total if total else np.nan, float(np.sqrt(added)), f, p))
    return pd.DataFrame(rows, columns=COLUMNS)
