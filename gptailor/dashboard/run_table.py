"""The table of all saved runs: its rows, its columns, and which rows a search of it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from gptailor.dashboard import text
from gptailor.dashboard.readers import Run
from gptailor.store.notes import Notes

STATE_COLOURS = {
    "Queued": "gray",
    "Running": "blue",
    "Paused": "yellow",
    "Finished": "green",
    "Stopped": "gray",
    "Failed": "red",
    "Lost": "orange",
}


def listing(runs: Sequence[Run], notes: Mapping[str, Notes]) -> pd.DataFrame:
    """A row a run, in the given order. state is a list of one; progress and retention are percent; best_scores,
    retention and hypervolume are of the full budget."""
    rows = []
    for run in runs:
        summary, noted = run.summary, notes.get(run.run_id, Notes())
        best = (f"{name} {score:.3f}" for name, score in _short_names(summary.best_scores).items())
        rows.append(
            {
                "run_id": run.run_id,
                "name": text.plain(run.name) + (" (example)" if run.is_demo else ""),
                "state": [run.status.capitalize()],
                "progress": 100 * min(summary.n_done / summary.n_asked, 1.0) if summary.n_asked else 0.0,
                "trials": f"{summary.n_done} of {summary.n_asked}",
                "failed": summary.n_failed or None,
                "left": text.duration(seconds_left(run)) if run.is_active else "",
                "layers": "" if summary.n_removed is None else f"{summary.n_removed} of {summary.n_layers}",
                "retention": None if summary.retention is None else 100 * summary.retention,
                "objectives": " · ".join(best),
                "hypervolume": summary.hypervolume,
                "created_at": summary.created_at,
                "tags": [text.plain(tag) for tag in noted.tags],
                "note": text.plain(noted.note, 200),
            }
        )
    frame = pd.DataFrame(rows, columns=["run_id", *_COLUMNS])
    numbers = dict.fromkeys(("failed", "retention", "hypervolume"), float)
    return frame.astype(numbers).assign(created_at=pd.to_datetime(frame["created_at"], utc=True))


def _short_names(scores: Mapping[str, float]) -> dict[str, float]:
    """Benchmarks without their metric where that tells them apart."""
    benchmarks = [name.rpartition("/")[0] for name in scores]
    if len(set(benchmarks)) == len(benchmarks):
        return {text.plain(name, 40): score for name, score in zip(benchmarks, scores.values(), strict=True)}
    return {text.plain(name, 60): score for name, score in scores.items()}


def seconds_left(run: Run) -> float | None:
    """What the remaining trials take at the pace so far; None before the first trial has ended."""
    summary = run.summary
    if not summary.n_done or summary.started_at is None or summary.last_activity is None:
        return None
    spent = (summary.last_activity - summary.started_at).total_seconds()
    return spent / summary.n_done * max(summary.n_asked - summary.n_done, 0)


def matching(
    runs: Sequence[Run],
    notes: Mapping[str, Notes],
    words: str = "",
    states: Sequence[str] = (),
    tags: Sequence[str] = (),
) -> list[Run]:
    """Runs that hold every word (in name, id, base model, objectives, tags or note), any of the states, all tags."""
    wanted = words.casefold().split()

    def fits(run: Run) -> bool:
        noted, summary = notes.get(run.run_id, Notes()), run.summary
        fields = (run.name, run.run_id, summary.base_model, noted.note, *summary.objectives, *noted.tags)
        whole = "\n".join(fields).casefold()
        return (
            all(word in whole for word in wanted)
            and (not states or run.status in states)
            and set(tags) <= set(noted.tags)
        )

    return [run for run in runs if fits(run)]


def table(runs: Sequence[Run], notes: Mapping[str, Notes]) -> list[Run]:
    """All runs as one table; returns the ticked ones."""
    frame = listing(runs, notes)
    shown = [
        name for name in _COLUMNS if name not in ("failed", "left", "tags", "note") or _says_something(frame[name])
    ]
    event: Any = st.dataframe(
        frame[shown],
        hide_index=True,
        height=min(38 + 35 * max(len(frame), 1), 560),
        on_select="rerun",
        selection_mode="multi-row",
        key=table_key(runs),
        alt="Table of all saved runs",
        placeholder="–",
        column_config=_COLUMNS,
    )
    return [runs[row] for row in event["selection"]["rows"] if row < len(runs)]


def table_key(runs: Sequence[Run]) -> str:
    """Rows are ticked by place, so a table of other runs starts without a tick."""
    return "home.table." + "/".join(run.run_id for run in runs)


def _says_something(column: pd.Series) -> bool:
    return any(len(value) > 0 if isinstance(value, (str, list)) else pd.notna(value) for value in column)


_column = st.column_config
_COLUMNS: dict[str, Any] = {
    "name": _column.TextColumn("Run", width=180),
    "state": _column.MultiselectColumn(
        "State",
        width=88,
        options=list(STATE_COLOURS),
        color=list(STATE_COLOURS.values()),
        help="Lost: says it is running, but no engine holds it.",
    ),
    "progress": _column.ProgressColumn("Progress", format="%.0f %%", min_value=0, max_value=100, width=112),
    "trials": _column.TextColumn("Trials", width=84),
    "failed": _column.NumberColumn("Failed", format="%d", width=64, help="Trials that crashed, of those done."),
    "left": _column.TextColumn("Time left", width=84, help="At the pace so far."),
    "layers": _column.TextColumn("Removed", width=80, help="Layers removed of the base's layers."),
    "retention": _column.NumberColumn(
        "Retention",
        format="%.1f %%",
        width=88,
        help="Mean share of the dense model's scores that the best plan keeps, at the full budget.",
    ),
    "objectives": _column.TextColumn("Objectives of the best plan", width=300, help="At the full budget."),
    "hypervolume": _column.NumberColumn(
        "Hypervolume",
        format="%.4f",
        width=104,
        help="Share of the objectives' space that the front covers; more is better. Only runs with the same objectives "
        "can be compared by it.",
    ),
    "created_at": _column.DatetimeColumn("Age", format="distance", width=104),
    "tags": _column.ListColumn("Tags", width=130),
    "note": _column.TextColumn("Note", width=150),
}
"""Columns of the table, in order."""
