"""Is it going well? Best so far, hypervolume, timeline, failures, and how long it will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd

from gptailor.measures import MAX_HYPERVOLUME, covered, hypervolume, pareto_front
from gptailor.results import scores
from gptailor.results.frames.facts import Facts
from gptailor.results.frames.trials import AVERAGE, AVERAGE_ERROR, gains, successes, top_budget

TIMELINE_MARKS = 1500
RECENT = 100
"""Trials that the rate is taken over."""


@dataclass(frozen=True)
class Numbers:
    """The head of the page. seconds_left and rate (trials an hour) are None where they cannot be told yet."""

    done: int
    asked: int
    failed: int
    rate: float | None
    seconds_left: float | None
    elapsed: float | None
    budget: int | None
    config_id: int | None
    trial_id: int | None


def numbers(table: pd.DataFrame, facts: Facts, now: datetime) -> Numbers:
    """`budget`, `config_id` and `trial_id` are of the trial that is running, else of the last one.

    now: up to when `elapsed` counts. A time limit is on what the trials took, so that a resumed run goes on where it
    stopped.
    """
    ended = scores.ended(table)
    running = table[table["status"] == "running"]
    current = running if len(running) else table
    last = current.iloc[-1] if len(current) else None
    rate = _rate(ended)
    left = None
    if rate:
        left = max(facts.trials_asked - len(ended), 0) / rate * 3600
    elapsed = (now - facts.started_at).total_seconds() if facts.started_at else None
    if facts.walltime:
        rest = max(facts.walltime - _took(table[table["status"] != "running"]), 0.0)
        left = rest if left is None else min(left, rest)
    return Numbers(
        done=len(ended),
        asked=facts.trials_asked,
        failed=int((ended["status"] == "crashed").sum()),
        rate=rate,
        seconds_left=left,
        elapsed=elapsed,
        budget=None if last is None else int(last["budget"]),
        config_id=None if last is None else int(last["config_id"]),
        trial_id=None if last is None else int(last["trial_id"]),
    )


def _rate(ended: pd.DataFrame) -> float | None:
    """Trials an hour over the last trials, by the time they took (pauses and restarts do not count)."""
    took = _took(ended.tail(RECENT))
    return 3600 * min(len(ended), RECENT) / took if took > 0 else None


def _took(trials: pd.DataFrame) -> float:
    """Seconds in which trials were asked for or at work; where several overlap, they count once."""
    end = trials["hours"].fillna(trials["start_hours"]).to_numpy(float) * 3600
    start = end - trials["seconds"].fillna(0).to_numpy(float) - trials["suggest_seconds"].fillna(0).to_numpy(float)
    return covered(start, end)


def best_so_far(table: pd.DataFrame, facts: Facts) -> pd.DataFrame:
    """A row a plan judged at the top budget, in time.

    Columns: trials (ended by then, at any budget), hours, config_id, its average and error, the best average so far,
    whether it is a new best, and the hypervolume so far.

    Hypervolume is taken over the scores from the corner 0 (1 / score where lower is better): 1 is all accuracies at 100
    %. NaN beyond measures.MAX_HYPERVOLUME objectives.
    """
    ended = table[table["ended_at"].notna()].sort_values("ended_at")
    order = pd.Series(np.arange(1, len(ended) + 1), index=ended["trial_id"])
    plans = successes(table, top_budget(table, facts))
    frame = pd.DataFrame(
        {
            "trials": order.reindex(plans["trial_id"]).to_numpy(),
            "hours": plans["hours"].to_numpy(),
            "config_id": plans["config_id"].to_numpy(),
            "average": plans[AVERAGE].to_numpy(),
            "error": plans[AVERAGE_ERROR].to_numpy(),
        }
    )
    frame["best"] = frame["average"].cummax()
    frame["is_best"] = frame["average"].eq(frame["best"]) & ~frame["best"].duplicated()
    frame["hypervolume"] = _hypervolumes(gains(plans, facts))
    return frame


def _hypervolumes(points: np.ndarray) -> np.ndarray:
    """Hypervolume after each row; computed anew only when the front moves."""
    n, m = points.shape
    values = np.full(n, np.nan)
    if not n or not 1 <= m <= MAX_HYPERVOLUME:
        return values
    front, current = np.empty((0, m)), 0.0
    for index, point in enumerate(points):
        if np.isfinite(point).all() and not (front >= point).all(axis=1).any():
            together = np.vstack([front, point])
            front = together[pareto_front(together)]
            current = hypervolume(front, np.zeros(m)) or 0.0
        values[index] = current
    return values


def timeline(table: pd.DataFrame, now_hours: float | None) -> pd.DataFrame:
    """A bar a trial: trial_id, config_id, budget, status, start and end in hours; the latest ones where there are many.

    now_hours: where a running trial's bar ends (hours since the start); trials that never ended otherwise get no
    length.
    """
    frame = table[["trial_id", "config_id", "budget", "status", "start_hours", "hours", "seconds"]].tail(TIMELINE_MARKS)
    end = frame["hours"].fillna(frame["start_hours"] if now_hours is None else max(now_hours, 0.0))
    return frame.assign(end_hours=np.maximum(end, frame["start_hours"])).drop(columns="hours").reset_index(drop=True)


def worker_lanes(table: pd.DataFrame) -> pd.DataFrame:
    """Like `timeline`, with `worker`: a bar for each worker that had a part in a trial; of runs with several alone."""
    frame = table[table["worker"].notna()]
    names = [str(worker).split(" + ") for worker in frame["worker"].tail(TIMELINE_MARKS)]
    bars = timeline(frame, None).assign(worker=pd.Series(names, dtype=object))
    return bars.explode("worker", ignore_index=True)


def workers(glance: Sequence[Mapping[str, Any]], at: float) -> pd.DataFrame:
    """Who the workers are and what they do, from what the engine wrote at that time.

    Times in seconds since 1970. Columns: worker, host, device, doing, trial_id, for_seconds (it does so), trials (that
    it scored), time_share (of its time, at work), gigabytes (of memory, its process).
    """
    rows = [
        {
            "worker": one["name"],
            "host": one["host"],
            "device": one["device"] or "–",
            "doing": {"opening": "opening the models", "scoring": "scoring"}.get(one["state"], "waiting"),
            "trial_id": one["trial_id"] if one["trial_id"] is not None and one["trial_id"] >= 0 else None,
            "for_seconds": round(max(at - one["since"], 0.0)) if one["since"] else None,
            "trials": one["done"],
            "time_share": min(one["seconds"] / max(at - one["joined"], 1e-9), 1.0),
            "gigabytes": one["memory"] / 1e9,
        }
        for one in sorted(glance, key=lambda one: str(one["name"]))
    ]
    columns = ["worker", "host", "device", "doing", "trial_id", "for_seconds", "trials", "time_share", "gigabytes"]
    return pd.DataFrame(rows, columns=columns).astype(
        {"trial_id": "Int64", "for_seconds": "Int64", "time_share": float, "gigabytes": float}
    )


def failures(table: pd.DataFrame) -> pd.DataFrame:
    """Crashed trials, the latest first.

    Columns: trial_id, config_id, budget, hours, cause (the traceback's last line), error.
    """
    frame = table[table["status"] == "crashed"].iloc[::-1]
    error = frame["error"].fillna("").astype(str)
    cause = error.str.strip().str.rsplit("\n", n=1).str[-1].replace("", "no cause was recorded")
    return frame[["trial_id", "config_id", "budget", "hours"]].assign(cause=cause, error=error).reset_index(drop=True)


def causes(failed: pd.DataFrame) -> pd.DataFrame:
    """How often each cause: cause, trials, most frequent first. Numbers in the text are taken together."""
    kind = failed["cause"].str.replace(r"\d+(\.\d+)?", "N", regex=True)
    grouped = failed.assign(kind=kind).groupby("kind", sort=False)
    frame = grouped.agg(cause=("cause", "first"), trials=("trial_id", "size"))
    return frame.sort_values("trials", ascending=False, kind="stable").reset_index(drop=True)
