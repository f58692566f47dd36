"""Who made this model? Every layer of the base, and what each plan did with it, as dense grids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from gptailor.plan import BASE
from gptailor.results.charts import theme
from gptailor.results.frames.facts import Facts
from gptailor.results.frames.trials import AVERAGE

LEFT = {"heads": "Heads", "channels": "MLP channels", "weights": "Weights that are not 0"}
"""Columns of what edits left of a layer, with their names for people."""


def label_layers(layers: pd.DataFrame, facts: Facts) -> pd.DataFrame:
    """The stored rows with names that a person reads, a row for each configuration and layer of the base.

    config_id, layer, position, factor, output_scale, heads, channels, weights (shares that edits left), source (base, a
    candidate, merged, removed), code (what is written into its cell), made_of (all sources in words), choice (what
    tells two choices apart: the set of sources), deviates.
    """
    candidates = list(facts.candidates)
    codes = theme.source_codes(candidates)
    known: dict[tuple[str, ...], tuple[str, str, str]] = {}
    sources, cells, made_of, choices = [], [], [], []
    for operation, lent in zip(layers["operation"], layers["sources"], strict=True):
        names = () if lent is None else tuple(str(name) for name in lent)
        key = (str(operation), *names)
        if key not in known:
            known[key] = _labels(str(operation), names, codes)
        source, code, words = known[key]
        sources.append(source)
        cells.append(code)
        made_of.append(words)
        choices.append("+".join(names) if names else source)
    frame = layers[["config_id", "layer", "position", "factor", "output_scale", *LEFT]].assign(
        source=sources, code=cells, made_of=made_of, choice=choices
    )
    return frame.assign(deviates=frame["source"] != BASE).sort_values(["config_id", "layer"]).reset_index(drop=True)


def _labels(operation: str, names: tuple[str, ...], codes: dict[str, str]) -> tuple[str, str, str]:
    if operation == theme.REMOVED:
        return theme.REMOVED, codes[theme.REMOVED], "removed"
    if not names:
        return BASE, codes[BASE], "the base's own layer"
    if len(names) == 1:
        return names[0], codes.get(names[0], "?"), names[0]
    together = "".join(codes.get(name, "?") for name in names)
    return theme.MERGED, together if len(together) <= 3 else f"m{len(names)}", " + ".join(names)


def origin_grid(labelled: pd.DataFrame, plans: pd.DataFrame, facts: Facts) -> pd.DataFrame:
    """The heatmap's cells for the plans of `plans` (best first).

    The labelled layers with row (0 = top), plan (the row's name), average and ink (colour of the code).
    """
    colours = theme.source_colours(facts.candidates)
    rows = plans[["config_id", AVERAGE]].reset_index(drop=True)
    rows = rows.assign(row=rows.index, plan=[plan_name(c, a, facts) for c, a in rows.to_numpy()])
    grid = rows.merge(labelled, on="config_id", how="inner")
    grid["ink"] = (
        grid["source"].map({name: theme.ink_on(colour) for name, colour in colours.items()}).fillna(theme.DARK_INK)
    )
    return grid.sort_values(["row", "layer"]).reset_index(drop=True)


def plan_name(config_id: float, average: float, facts: Facts, name: str | None = None) -> str:
    """'Plan 17 · 95.1 %', the row's name on heatmaps and in select boxes. name: another than its number's."""
    name = name or f"Plan {config_id:.0f}"
    if not np.isfinite(average):
        return name
    return f"{name} · {100 * average:.1f} %" if facts.average_is_share else f"{name} · {average:.3f}"


def strip(labelled: pd.DataFrame, config_id: int) -> pd.DataFrame:
    """One plan's layers in the order of the base."""
    return labelled[labelled["config_id"] == config_id].sort_values("layer").reset_index(drop=True)


def fitted_note(one: pd.DataFrame) -> str:
    """What frames around cells of a strip say, to stand behind a note; nothing where there are none."""
    words = list(dict.fromkeys(filter(None, one["fitted"])))
    return f" Framed: weights that were {' or '.join(words)}." if words else ""


def strip_sources(one: pd.DataFrame, layers: pd.DataFrame, facts: Facts) -> pd.DataFrame:
    """One plan as a grid of sources x layers: a row wherever a source has a part in a layer.

    layer, position, lane (base, a candidate, removed), text (the merge's factor, the removed cross, else nothing),
    factor, output_scale, made_of. `layers` are the stored rows (they hold the sources of merges).
    """
    lanes: list[tuple[int, str]] = []
    config_id = one["config_id"].iloc[0] if len(one) else None
    mine = layers[layers["config_id"] == config_id]
    for layer, operation, lent in zip(mine["layer"], mine["operation"], mine["sources"], strict=True):
        names = [] if lent is None else [str(name) for name in lent]
        lanes += [(layer, name) for name in names or [theme.REMOVED if operation == theme.REMOVED else BASE]]
    frame = pd.DataFrame(lanes, columns=["layer", "lane"]).merge(one, on="layer", how="left")
    factor = frame["factor"].map(lambda f: f"{f:.2f}".lstrip("0") or "0", na_action="ignore").astype(object).fillna("")
    frame["text"] = np.where(frame["lane"] == theme.REMOVED, theme.source_codes([])[theme.REMOVED], factor)
    order = {name: index for index, name in enumerate((BASE, *facts.candidates, theme.REMOVED))}
    return frame.sort_values(["lane", "layer"], key=lambda s: s.map(order) if s.name == "lane" else s).reset_index(
        drop=True
    )


def left_of_layers(one: pd.DataFrame) -> pd.DataFrame:
    """What edits left of each layer of one plan: layer, part (heads, channels, weights), share. None where all is."""
    kept = one.dropna(subset=list(LEFT))[["layer", *LEFT]].rename(columns=LEFT)
    return kept.melt("layer", var_name="part", value_name="share")


def zeros(layers: pd.DataFrame, config_id: int) -> float:
    """The share of the weights of a plan's layers that edits made zero, layers alike; 0 where they made none.

    Layers that got narrower have no zeros: what went is not there.
    """
    mine = layers[(layers["config_id"] == config_id) & layers["weights"].notna()]
    sparse = mine[(mine["heads"] == 1) & (mine["channels"] == 1)]
    return float((1 - sparse["weights"]).mean()) if len(mine) and len(sparse) == len(mine) else 0.0


def frequencies(labelled: pd.DataFrame, config_ids: Sequence[int], facts: Facts) -> pd.DataFrame:
    """Over the given plans, how often each layer is removed, kept, merged or taken from each source: a dense grid.

    layer, source (also "kept": not removed), plans, of, share.
    """
    mine = labelled[labelled["config_id"].isin(list(config_ids))]
    rows = (theme.REMOVED, "kept", BASE, *facts.candidates, theme.MERGED)
    counted = mine.groupby(["source", "layer"]).size().unstack(fill_value=0)
    counted = counted.reindex(
        index=pd.Index(rows, name="source"), columns=pd.RangeIndex(facts.n_layers, name="layer"), fill_value=0
    )
    n = mine["config_id"].nunique()
    counted.loc["kept"] = n - counted.loc[theme.REMOVED]
    frame = counted.stack().rename("plans").reset_index()
    return frame.assign(of=n, share=frame["plans"] / n if n else 0.0)


def undo_one(labelled: pd.DataFrame, table: pd.DataFrame, config_id: int) -> pd.DataFrame:
    """What each of a plan's deviations from the base is worth: a row a deviating layer.

    worth: mean average of the plans that make the same choice at that layer, less that of the plans that keep the
    base's own layer there, both taken against the mean of their budget; error: Welch's standard error of that
    difference; n_same, n_base: plans on either side (NaN worth below two). Others' choices differ as well, so this is
    an estimate from what the search happened to try, not an experiment.
    """
    fine = table[(table["status"] == "success") & np.isfinite(table[AVERAGE])]
    fine = fine.sort_values("budget").drop_duplicates("config_id", keep="last")
    level = fine[AVERAGE] - fine.groupby("budget")[AVERAGE].transform("mean")
    fitness = pd.Series(level.to_numpy(), index=fine["config_id"])
    mine = strip(labelled, config_id)
    rows = []
    others = labelled[labelled["config_id"].isin(fitness.index)].assign(fitness=lambda f: f["config_id"].map(fitness))
    at_layer = dict(list(others.groupby("layer")))
    for row in mine[mine["deviates"]].itertuples():
        here = at_layer.get(row.layer, others.iloc[:0])
        same = here.loc[here["choice"] == row.choice, "fitness"].to_numpy()
        base = here.loc[here["choice"] == BASE, "fitness"].to_numpy()
        worth = error = np.nan
        if len(same) > 1 and len(base) > 1:
            worth = same.mean() - base.mean()
            error = float(np.sqrt(same.var(ddof=1) / len(same) + base.var(ddof=1) / len(base)))
        rows.append((row.layer, row.source, row.made_of, worth, error, len(same), len(base)))
    frame = pd.DataFrame(rows, columns=["layer", "source", "made_of", "worth", "error", "n_same", "n_base"])
    return frame.assign(low=frame["worth"] - 1.96 * frame["error"], high=frame["worth"] + 1.96 * frame["error"])
