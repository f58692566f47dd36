"""What of a family is redundant, as tables: by layer and model, by two candidates, by two states."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd

from gptailor.results.outlook import is_cheap, relation
from gptailor.results.redundancy import Agreement, Redundancy

Measure = Literal["cosine", "cka"]
MOST_PAIRS, MOST_COLUMNS = 21, 6
"""Pairs of candidates in a chart (all of seven candidates), and in a terminal's table (all of four)."""


def by_layer(found: Redundancy) -> pd.DataFrame:
    """A row a model and layer.

    model, layer, kept (share of the objectives, above guessing, without it; NaN where unknown), kept ± (standard
    error), influence (Block Influence), distance (from the base's layer, in units of its norm; NaN for the base),
    cheap, copy_of (an earlier layer with the same weights; NaN where it is none).
    """
    rows = []
    for name, model in found.models.items():
        for layer in range(found.n_layers):
            kept = model.kept(layer)
            rows.append(
                {
                    "model": name,
                    "layer": layer,
                    "kept": np.nan if kept is None else kept.share,
                    "kept ±": np.nan if kept is None or kept.error is None else kept.error,
                    "influence": model.influence[layer],
                    "distance": model.distance[layer] if model.distance else np.nan,
                    "cheap": is_cheap(model, layer),
                    "copy_of": model.copies.get(layer, np.nan),
                }
            )
    return pd.DataFrame(rows)


def agreement(found: Redundancy) -> pd.DataFrame:
    """A row two candidates and layer: pair, layer, cosine, relation (agree, unrelated, conflict).

    Without layers in which one of them does not differ from the base. Of many pairs the MOST_PAIRS that agree or
    conflict most.
    """
    pairs = found.agreement
    if len(pairs) > MOST_PAIRS:
        pairs = sorted(pairs, key=lambda pair: -max((abs(c) for c in pair.cosine if c is not None), default=0.0))
    rows = [
        (f"{pair.one} and {pair.other}", layer, cosine, str(relation(cosine)))
        for pair in pairs[:MOST_PAIRS]
        for layer, cosine in enumerate(pair.cosine)
        if cosine is not None
    ]
    return pd.DataFrame(rows, columns=["pair", "layer", "cosine", "relation"])


def blocks(found: Redundancy, n: int) -> pd.DataFrame:
    """A row a model and block of n layers in a row: model, layer (its first), angular (distance it travels, 0 to 1)."""
    rows = [
        (name, start, model.angular[start][start + n])
        for name, model in found.models.items()
        for start in range(found.n_layers - n + 1)
    ]
    return pd.DataFrame(rows, columns=["model", "layer", "angular"])


def similarity(found: Redundancy, model: str, measure: Measure) -> pd.DataFrame:
    """A row two states of a model: row, column (0 enters the first layer, i + 1 leaves layer i), similarity."""
    matrix = np.asarray(getattr(found.models[model], measure), dtype=float)
    row, column = np.indices(matrix.shape)
    return pd.DataFrame({"row": row.ravel(), "column": column.ravel(), "similarity": matrix.ravel()})


def text(found: Redundancy) -> list[tuple[str, ...]]:
    """By layer, for a terminal: the heading, and a row a layer; of more pairs than fit, none."""
    pairs = found.agreement if len(found.agreement) <= MOST_COLUMNS else []
    scored = [name for name, model in found.models.items() if any(map(model.kept, range(found.n_layers)))]
    heading = [f"kept {name}" for name in scored] + [f"BI {name}" for name in found.models]
    heading += [f"far {name}" for name in found.candidates] + [f"{pair.one}~{pair.other}" for pair in pairs]
    return [("layer", *heading), *(_row(found, scored, pairs, layer) for layer in range(found.n_layers))]


def _row(found: Redundancy, scored: list[str], pairs: list[Agreement], layer: int) -> tuple[str, ...]:
    kept = [found.models[name].kept(layer) for name in scored]
    cells = ["–" if one is None else f"{one.share:.1%}" for one in kept]
    cells += [f"{model.influence[layer]:.3f}" for model in found.models.values()]
    cells += [f"{found.models[name].distance[layer]:.2%}" for name in found.candidates]
    cosines = [pair.cosine[layer] for pair in pairs]
    return (str(layer), *cells, *("–" if cosine is None else f"{cosine:.2f}" for cosine in cosines))
