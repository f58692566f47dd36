"""Where did the budget go, and can the cheap rungs be trusted?

Only plans that did well on a rung are scored on the next, so every agreement between rungs is measured on plans that
are already close to each other: it is a hard test, and is said so on the page.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd

from gptailor.results.frames.facts import Facts
from gptailor.results.frames.trials import AVERAGE, successes
from gptailor.wording import duration

PAPER_LOWEST_SHARE = 0.414
"""Share of all evaluations at the lowest rung that the paper reports for its searches."""
LADDER_MARKS = 1000
"""Points that the ladder draws; the plans that climbed highest come first."""
ENOUGH = 10
"""Plans below which a rank correlation says next to nothing."""


def rung_shares(table: pd.DataFrame, facts: Facts) -> pd.DataFrame:
    """A row a rung.

    Columns: budget, trials, failed, examples, hours, plans, and the shares of trials, examples and time (0 to 1).
    """
    ended = table[table["status"] != "running"]
    grouped = ended.groupby("budget")
    frame = pd.DataFrame(
        {
            "trials": grouped.size(),
            "failed": grouped["status"].agg(lambda s: int((s == "crashed").sum())),
            "plans": grouped["config_id"].nunique(),
            "examples": grouped["examples"].sum(),
            "hours": grouped["seconds"].sum() / 3600,
        }
    ).reindex(pd.Index(facts.rungs, name="budget"), fill_value=0)
    for name, column in (("trial_share", "trials"), ("example_share", "examples"), ("time_share", "hours")):
        total = float(frame[column].sum())
        frame[name] = frame[column] / total if total else 0.0
    return frame.reset_index()


def share_rows(shares: pd.DataFrame) -> pd.DataFrame:
    """The shares in long form for drawing: budget, of (trials, examples, time), share, amount (text)."""
    rows = []
    for row in shares.itertuples():
        rows.append((row.budget, "Trials", row.trial_share, f"{row.trials:,.0f}"))
        rows.append((row.budget, "Examples", row.example_share, f"{row.examples:,.0f}"))
        rows.append((row.budget, "Time", row.time_share, duration(3600 * row.hours)))
    return pd.DataFrame(rows, columns=["budget", "of", "share", "amount"])


def ladder(table: pd.DataFrame, facts: Facts) -> pd.DataFrame:
    """A row a plan that succeeded anywhere.

    Columns: config_id, `top` (its highest rung), and its average at each rung (columns = budgets).
    """
    by_rung = {budget: successes(table, budget).set_index("config_id")[AVERAGE] for budget in facts.rungs}
    frame = pd.DataFrame(by_rung)
    frame.index.name = "config_id"
    top = frame.notna().mul(np.asarray(facts.rungs)).max(axis=1) if len(frame) else pd.Series(dtype=float)
    return frame.assign(top=top.astype(int)).reset_index()


def promotions(rungs: pd.DataFrame, facts: Facts) -> pd.DataFrame:
    """How many plans climbed.

    A row for each pair of neighbouring rungs: low, high, scored (at low), promoted, share.
    """
    rows = []
    for low, high in zip(facts.rungs, facts.rungs[1:], strict=False):
        at_low = rungs[low].notna()
        promoted = int((at_low & rungs[high].notna()).sum())
        rows.append((low, high, int(at_low.sum()), promoted, promoted / at_low.sum() if at_low.any() else np.nan))
    return pd.DataFrame(rows, columns=["low", "high", "scored", "promoted", "share"])


def promotion_words(promoted: pd.DataFrame) -> list[str]:
    """'23 of 143 plans climbed from 111 to 333 examples.' for each step."""
    return [
        f"{row.promoted} of {row.scored} plans climbed from {row.low} to {row.high} examples."
        for row in promoted.itertuples()
        if row.scored
    ]


def ladder_rows(rungs: pd.DataFrame, facts: Facts) -> pd.DataFrame:
    """The ladder in long form for drawing: config_id, top, budget, average."""
    long = rungs.melt(["config_id", "top"], list(facts.rungs), "budget", "average").dropna(subset=["average"])
    return long.sort_values("top", ascending=False).head(LADDER_MARKS).astype({"budget": int})


def agreement(table: pd.DataFrame, facts: Facts) -> pd.DataFrame:
    """Rank correlation between every two rungs for each objective and the average.

    Columns: objective, low, high, n, spearman, spearman_low, spearman_high (95 % interval), kendall, flips (share of
    pairs of plans that the two rungs order the other way round). Where fewer than 3 plans were scored at both, NaN.
    """
    at = {budget: successes(table, budget).set_index("config_id") for budget in facts.rungs}
    rows = []
    for low, high in combinations(facts.rungs, 2):
        both = at[low].index.intersection(at[high].index)
        for name in [*facts.names, AVERAGE]:
            a, b = at[low].loc[both, name].to_numpy(float), at[high].loc[both, name].to_numpy(float)
            fine = np.isfinite(a) & np.isfinite(b)
            a, b = a[fine], b[fine]
            rho, tau, flips = rank_correlation(a, b)
            rows.append((name, low, high, len(a), rho, *_interval(rho, len(a)), tau, flips))
    columns = ["objective", "low", "high", "n", "spearman", "spearman_low", "spearman_high", "kendall", "flips"]
    return pd.DataFrame(rows, columns=columns)


def _interval(rho: float, n: int) -> tuple[float, float]:
    """95 % interval of a rank correlation by Fisher's transform with Bonett and Wright's (2000) variance."""
    if n < 4 or not np.isfinite(rho):
        return np.nan, np.nan
    centre, half = np.arctanh(np.clip(rho, -0.999999, 0.999999)), 1.96 * np.sqrt((1 + rho**2 / 2) / (n - 3))
    return float(np.tanh(centre - half)), float(np.tanh(centre + half))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Spearman's rho, Kendall's tau-b, and the share of pairs in opposite order.

    NaN for fewer than 3 points or a constant.

    By hand (tests compare with scipy), because importing scipy's statistics takes longer than the whole page.
    """
    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return np.nan, np.nan, np.nan
    rho = float(np.corrcoef(pd.Series(a).rank(), pd.Series(b).rank())[0, 1])
    i, j = np.triu_indices(len(a), 1)
    da, db = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
    tau = float((da * db).sum() / np.sqrt((da != 0).sum() * (db != 0).sum()))
    return rho, tau, float((da * db < 0).mean())


def rank_moves(table: pd.DataFrame, low: int, high: int, limit: int = 40) -> pd.DataFrame:
    """Ranks (1 = best) by average of the plans scored at both rungs, long.

    Columns: config_id, budget, rank, average, moved, kind.

    moved: places gained (+) or lost (-) from low to high; kind: steady, up or down. The best `limit` at the high rung.
    """
    a, b = (successes(table, budget).set_index("config_id")[AVERAGE] for budget in (low, high))
    both = a.index.intersection(b.index)
    ranks = pd.DataFrame(
        {low: a[both].rank(ascending=False, method="first"), high: b[both].rank(ascending=False, method="first")}
    )
    moved = (ranks[low] - ranks[high]).astype(int)
    kind = np.select([moved > 0, moved < 0], ["up", "down"], "steady")
    kept = ranks.assign(moved=moved, kind=kind).nsmallest(limit, high)
    long = kept.reset_index(names="config_id").melt(["config_id", "moved", "kind"], [low, high], "budget", "rank")
    scores = pd.concat(
        [a.rename("average").to_frame().assign(budget=low), b.rename("average").to_frame().assign(budget=high)]
    )
    long = long.merge(scores.reset_index(), on=["config_id", "budget"], how="left")
    return long.astype({"rank": int, "budget": int})


def verdict(agreed: pd.DataFrame, moves: pd.DataFrame, facts: Facts) -> str:
    """One plain sentence: may the lowest rung be trusted to find what the highest one would choose?"""
    if len(facts.rungs) < 2:
        return "This run has a single rung: every plan is judged on the same examples, so there is nothing to compare."
    mine = agreed[agreed["objective"] == AVERAGE].sort_values(["high", "low"])
    told = mine[mine["n"] >= 3].dropna(subset=["spearman"])
    if told.empty:
        return "Too few plans were scored on two rungs to say whether the cheap rungs can be trusted."
    row = told[told["high"] == told["high"].max()].iloc[0]
    if not np.isfinite(row["spearman_low"]) or (row["spearman_low"] <= 0 and row["spearman_high"] > 0.5):
        words = "cannot be judged yet"
    elif row["spearman_low"] > 0.5 or (row["spearman"] >= 0.8 and row["spearman_low"] > 0):
        words = "can be trusted"
    else:
        words = "can be trusted roughly" if row["spearman_low"] > 0 else "cannot be trusted"
    few = " That is few plans; read it with care." if row["n"] < ENOUGH else ""
    text = (
        f"Ranks at {row['low']:.0f} examples {words}: they agree with those at {row['high']:.0f} "
        f"with ρ = {row['spearman']:.2f} (n = {row['n']:.0f} plans), and {100 * row['flips']:.0f} % of pairs change "
        f"order.{few}"
    )
    best = moves[(moves["budget"] == row["high"]) & (moves["rank"] == 1)]
    if len(best):
        before = 1 + int(best["moved"].iloc[0])
        place = "also the best" if before == 1 else f"number {before}"
        text += f" The best plan at {row['high']:.0f} was {place} of these at {row['low']:.0f}."
    return text
