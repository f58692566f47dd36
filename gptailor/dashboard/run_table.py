"""The table of all saved runs: its rows, its columns, and which rows a search of it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from gptailor import wording
from gptailor.dashboard.readers import Run
from gptailor.measures import MAX_HYPERVOLUME
from gptailor.store.notes import Notes
from gptailor.store.summary import RunSummary

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
    """A row a run, in the given order, inert: people can download the table.

    state is a list of one; progress, retention and held_out are percent; best_scores, retention and hypervolume are of
    the full budget.
    """
    rows = []
    for run in runs:
        summary, noted = run.summary, notes.get(run.run_id, Notes())
        rows.append(
            {
                "run_id": run.run_id,
                "name": wording.csv_safe(wording.plain(run.name)) + (" (example)" if run.is_demo else ""),
                "state": [run.status.capitalize()],
                "progress": 100 * min(summary.n_done / summary.n_asked, 1.0) if summary.n_asked else 0.0,
                "left": wording.duration(seconds_left(run)) if run.is_active else "",
                "layers": removed_text(summary),
                "retention": None if summary.retention is None else 100 * summary.retention,
                "held_out": None if summary.held_out is None else 100 * summary.held_out,
                "objectives": best_scores(summary.best_scores),
                "hypervolume": summary.hypervolume,
                "created_at": summary.created_at,
                "tags": [wording.csv_safe(wording.plain(tag)) for tag in noted.tags],
            }
        )
    frame = pd.DataFrame(rows, columns=["run_id", *_COLUMNS])
    numbers = dict.fromkeys(("retention", "held_out", "hypervolume"), float)
    return frame.astype(numbers).assign(created_at=pd.to_datetime(frame["created_at"], utc=True))


def removed_text(summary: RunSummary) -> str:
    """`8 of 30`, `4 to 12 of 30`; '' where it is not known yet."""
    if summary.n_removed is None:
        return ""
    fewest = summary.n_removed if summary.fewest_removed is None else summary.fewest_removed
    return f"{wording.span(fewest, summary.n_removed)} of {summary.n_layers}"


def best_scores(scores: Mapping[str, float]) -> str:
    """Each objective with its score, in the room that a narrow window has: at most three, names cut."""
    benchmarks = [name.rpartition("/")[0] for name in scores]
    names = benchmarks if len(set(benchmarks)) == len(benchmarks) else list(scores)
    few = len(names) <= 2
    pairs = zip(names[: 2 if few else 3], scores.values(), strict=False)
    words = [f"{wording.plain(name, 12 if few else 5)} {score:{'.3f' if few else '.3g'}}" for name, score in pairs]
    return " · ".join(words + [f"+{len(names) - 3}"] * (len(names) > 3))


def only_numbers(scores: Mapping[str, float]) -> str:
    """The same where there is no room for names, which show when a run is ticked."""
    shown = [f"{score:.3f}" if abs(score) < 10 else f"{score:.3g}" for score in list(scores.values())[:2]]
    return " · ".join(shown + [f"+{len(scores) - 2}"] * (len(scores) > 2))


def seconds_left(run: Run) -> float | None:
    """What the remaining trials take at the pace so far, pauses aside; None before the first trial has ended."""
    summary = run.summary
    if not summary.n_done or not summary.worked:
        return None
    return summary.worked / summary.n_done * max(summary.n_asked - summary.n_done, 0)


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
    shown = [name for name in _COLUMNS if name not in OPTIONAL or _says_something(frame[name])]
    room = WIDTH - sum(_COLUMNS[name]["width"] for name in shown if name != "objectives")
    if room < _COLUMNS["objectives"]["width"]:
        frame["objectives"] = [only_numbers(run.summary.best_scores) for run in runs]
    event: Any = st.dataframe(
        frame[shown],
        hide_index=True,
        height=min(38 + 35 * max(len(frame), 1), 560),
        on_select="rerun",
        selection_mode="multi-row",
        key=table_key(runs),
        alt="Table of all saved runs",
        placeholder="–",
        column_config=_COLUMNS | {"objectives": _COLUMNS["objectives"] | {"width": max(room, 120)}},
    )
    return [runs[row] for row in event["selection"]["rows"] if row < len(runs)]


def table_key(runs: Sequence[Run]) -> str:
    """Rows are ticked by place, so a table of other runs starts without a tick."""
    return "home.table." + "/".join(run.run_id for run in runs)


def _says_something(column: pd.Series) -> bool:
    return any(len(value) > 0 if isinstance(value, (str, list)) else pd.notna(value) for value in column)


_column = st.column_config
OPTIONAL = ("left", "held_out", "tags")
"""Columns that are there where a run has something to say in them."""
WIDTH = 956
"""Pixels for columns in a window of 1280."""
_COLUMNS: dict[str, Any] = {
    "name": _column.TextColumn("Run", width=150),
    "state": _column.MultiselectColumn(
        "State",
        width=88,
        options=list(STATE_COLOURS),
        color=list(STATE_COLOURS.values()),
        help="Lost: says it is running, but no engine holds it.",
    ),
    "progress": _column.ProgressColumn(
        "Progress", format="%.0f %%", min_value=0, max_value=100, width=98, help="Share of the trials that are done."
    ),
    "left": _column.TextColumn("Time left", width=88, help="At the pace so far."),
    "layers": _column.TextColumn("Removed", width=80, help="Layers removed of the base's layers."),
    "retention": _column.NumberColumn(
        "Retention",
        format="%.1f %%",
        width=86,
        help="Mean share of the dense model's scores that the best plan keeps, at the full budget. The selection split "
        "names the best plan, where the run has one.",
    ),
    "held_out": _column.NumberColumn(
        "Held out",
        format="%.1f %%",
        width=86,
        help="The same plan's mean retention on the held-out benchmarks, which the search never saw.",
    ),
    "objectives": _column.TextColumn(
        "Best plan's scores", width=240, help="The objectives (the first three) at the full budget."
    ),
    "hypervolume": _column.NumberColumn(
        "Hypervolume",
        format="%.4f",
        width=106,
        help="Share of the objectives' space that the front covers; more is better. Only runs with the same objectives "
        f"can be compared by it, and it is told for up to {MAX_HYPERVOLUME} objectives.",
    ),
    "created_at": _column.DatetimeColumn("Age", format="distance", width=100),
    "tags": _column.ListColumn("Tags", width=110),
}
"""Columns of the table, in order."""
