"""Which layer's choice matters for which objective?

A forest learns scores from plans, then each layer's choice is shuffled.

Permutation importance (Breiman 2001) on plans that the forest (scikit-learn's) has not seen. One forest serves all
objectives, at most `SAMPLE` trials teach it, and all shuffled copies are predicted in one go: a run of 40 layers, 14
objectives and 500 trials takes about a second, where a call for every layer and repetition takes ten.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pandas as pd

from gptailor.plan import BASE
from gptailor.results.charts import theme
from gptailor.results.frames.facts import Facts

LEAST_PLANS = 30
SAMPLE = 600
TREES = 50
REPEATS = 4
SECONDS = 4.0
"""After which no further repeat is begun (two are needed for an error)."""
UNSEEN = 0.35
"""Share of the plans that the forest does not see."""


@dataclass(frozen=True)
class Importance:
    """How much of the plans' scores each layer explains.

    rows: objective, layer, importance, error: the drop in explained variance (R2) on unseen plans when the layer is
    shuffled. explained: that R2 by objective; near 0 or below, the rows are noise. trials and plans: how many taught
    and tested it.
    """

    rows: pd.DataFrame
    explained: dict[str, float]
    trials: int
    plans: int

    @property
    def tells(self) -> bool:
        """Whether the forest foretells anything at all, so that shuffling can spoil it."""
        return max(self.explained.values()) >= 0.1


def importance(labelled: pd.DataFrame, table: pd.DataFrame, facts: Facts) -> Importance | None:
    """None where fewer than LEAST_PLANS plans were scored."""
    from sklearn.ensemble import ExtraTreesRegressor

    names = facts.names
    fine = table[(table["status"] == "success") & np.isfinite(table[names].astype(float)).all(axis=1)].tail(SAMPLE)
    fine = fine[fine["config_id"].isin(labelled["config_id"])]
    if not names or fine["config_id"].nunique() < LEAST_PLANS:
        return None
    features = _features(labelled, fine, facts)
    targets = fine[names].to_numpy(float)
    targets = (targets - targets.mean(axis=0)) / np.where(targets.std(axis=0) > 0, targets.std(axis=0), 1.0)
    draw = np.random.default_rng(0)
    configs = draw.permutation(fine["config_id"].unique())
    unseen = fine["config_id"].isin(configs[: int(UNSEEN * len(configs))]).to_numpy()
    forest = ExtraTreesRegressor(TREES, min_samples_leaf=2, max_features=0.5, random_state=0)
    forest.fit(features[~unseen], targets[~unseen] if len(names) > 1 else targets[~unseen].ravel())
    x, y = features[unseen], targets[unseen]
    explained = _r2(y, forest.predict(x).reshape(y.shape))
    drops = explained - _shuffled_r2(forest, x, y, facts.n_layers, draw)  # repeats x layers x objectives
    pieces = []
    for j, name in enumerate(names):
        mean, error = drops[:, :, j].mean(axis=0), drops[:, :, j].std(axis=0, ddof=1) / np.sqrt(len(drops))
        pieces.append(
            pd.DataFrame({"objective": name, "layer": range(facts.n_layers), "importance": mean, "error": error})
        )
    return Importance(
        pd.concat(pieces, ignore_index=True), dict(zip(names, explained.tolist(), strict=True)), len(fine), len(configs)
    )


def _features(labelled: pd.DataFrame, fine: pd.DataFrame, facts: Facts) -> np.ndarray:
    """Trials x 2 layers + 1: whether each layer is removed, which sources it has (a number), and the budget."""
    lent = sorted(set(labelled["choice"]) - {theme.REMOVED, BASE}, key=lambda choice: (choice.count("+"), choice))
    codes = {choice: code for code, choice in enumerate([theme.REMOVED, BASE, *lent])}
    grid = labelled.assign(code=labelled["choice"].map(codes)).pivot(index="config_id", columns="layer", values="code")
    sources = (
        grid.reindex(columns=range(facts.n_layers)).fillna(codes[BASE]).loc[fine["config_id"]].to_numpy(np.float32)
    )
    return np.column_stack([sources == codes[theme.REMOVED], sources, fine["budget"]]).astype(np.float32)


def _shuffled_r2(forest, x: np.ndarray, y: np.ndarray, n_layers: int, draw: np.random.Generator) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Repeats (fewer where time is short) x layers x objectives: R2 with one layer's two columns shuffled together."""
    found: list[np.ndarray] = []
    end = time.monotonic() + SECONDS
    while len(found) < 2 or (len(found) < REPEATS and time.monotonic() < end):
        copies = np.repeat(x[None], n_layers, axis=0)
        order = draw.permutation(len(x))
        for layer in range(n_layers):
            mine = [layer, n_layers + layer]
            copies[layer][:, mine] = x[order][:, mine]
        predicted = forest.predict(copies.reshape(-1, x.shape[1])).reshape(n_layers, *y.shape)
        found.append(np.stack([_r2(y, one) for one in predicted]))
    return np.stack(found)


def _r2(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    spread = ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)
    return 1 - ((truth - predicted) ** 2).sum(axis=0) / np.where(spread > 0, spread, 1.0)
