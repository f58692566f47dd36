"""The table of runs and what can be done with them: find, name, note, tag, compare, import, download, delete."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from gptailor import launch
from gptailor.dashboard import readers, text, widgets
from gptailor.dashboard.readers import Run
from gptailor.errors import UserError
from gptailor.store import RunFolder
from gptailor.store.imports import import_run
from gptailor.store.notes import MAX_NAME, MAX_NOTE, MAX_TAGS, Notes, read_notes, write_notes
from gptailor.store.sharing import copy_run

POLL_SECONDS = 4
MAX_UPLOAD_MB = 200
STATE_COLOURS = {
    "Queued": "gray",
    "Running": "blue",
    "Paused": "yellow",
    "Finished": "green",
    "Stopped": "gray",
    "Failed": "red",
    "Lost": "orange",
}

# --- the table: data --------------------------------------------------------------------------------------------------


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


# --- the page, from top to bottom -------------------------------------------------------------------------------------


def welcome(runs: Sequence[Run]) -> None:
    """What this is, in three steps: open for a newcomer, folded away for who has runs."""
    if all(run.is_demo for run in runs):
        _three_steps(next(iter(runs), None))
    else:
        with st.expander("What is this?", icon=":material/help:", type="compact"):
            _three_steps(next((run for run in runs if run.is_demo), runs[0]))


def saved_notes(runs: Sequence[Run]) -> dict[str, Notes]:
    """What people noted, by run id."""
    return {run.run_id: read_notes(run.folder) for run in runs}


def _three_steps(example: Run | None) -> None:
    st.markdown(
        "gptailor makes a language model **shorter**: it removes whole layers and lets fine-tunes of the same model "
        "stand in for what is lost. A *run* searches for the cut that keeps most of the model's abilities."
    )
    look, search, take = st.columns(3)
    carried = {"run": example.run_id} if example else None
    with look.container(border=True, height="stretch"):
        st.markdown("**1 · Look at a run**")
        st.caption("Tick one in the table, or see what was traded for what in this one.")
        if example:
            st.page_link(
                "pages/4_Trade-offs.py",
                label="See its trade-offs",
                icon=":material/scatter_plot:",
                query_params=carried,
            )
    with search.container(border=True, height="stretch"):
        st.markdown("**2 · Start your own**")
        st.caption("The demo search takes about three minutes on two CPU cores and downloads nothing.")
        st.page_link("pages/1_Launch.py", label="Launch a run", icon=":material/rocket_launch:")
    with take.container(border=True, height="stretch"):
        st.markdown("**3 · Take a model home**")
        st.caption("Try the best plan beside the full model, then export it as a plain Hugging Face folder.")
        if example:
            st.page_link(
                "pages/7_Models.py", label="See its models", icon=":material/deployed_code:", query_params=carried
            )


def find(runs: Sequence[Run], notes: Mapping[str, Notes]) -> list[Run]:
    """The filter bar; returns the runs that are left."""
    tags = sorted({tag for noted in notes.values() for tag in noted.tags})
    states = [state for state in widgets.STATUS_LOOK if any(run.status == state for run in runs)]
    left, middle, right = st.columns([3, 4, 3], vertical_alignment="bottom")
    words = left.text_input("Find", placeholder="Name, model, benchmark, note …", key="home.find", max_chars=200)
    chosen = middle.pills(
        "State", states, selection_mode="multi", format_func=str.capitalize, key="home.states", disabled=len(states) < 2
    )
    tagged = right.multiselect(
        "Tags",
        tags,
        format_func=text.plain,
        key="home.tags",
        disabled=not tags,
        placeholder="Any" if tags else "None yet",
    )
    return matching(runs, notes, words, chosen or (), tagged)


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
    "objectives": _column.TextColumn("Objectives of the best plan", width=280, help="At the full budget."),
    "hypervolume": _column.NumberColumn(
        "Hypervolume",
        format="%.4f",
        width=104,
        help="Share of the objectives' space that the front covers; more is better. Only runs with the same objectives "
        "can be compared by it.",
    ),
    "created_at": _column.DatetimeColumn("Age", format="distance", width=104),
    "tags": _column.ListColumn("Tags", width=130),
    "note": _column.TextColumn("Note", width=170),
}
"""Columns of the table, in order."""


def actions(ticked: Sequence[Run]) -> None:
    """What can be done with the ticked runs."""
    if not ticked:
        st.caption("Tick runs at the left of the table to open, compare, name, download or delete them.")
        return
    one = ticked[0] if len(ticked) == 1 else None
    with st.container(horizontal=True, vertical_alignment="center"):
        if one:
            if st.button("Open", type="primary", icon=":material/timeline:", help="See how it went, page by page."):
                st.switch_page("pages/2_Progress.py", query_params={"run": one.run_id})
        else:
            too_many = len(ticked) > widgets.MOST_RUNS
            why = f"Up to {widgets.MOST_RUNS} runs can be compared at once." if too_many else None
            if st.button("Compare", type="primary", icon=":material/balance:", disabled=too_many, help=why):
                st.switch_page("pages/6_Compare.py", query_params={"runs": ",".join(run.run_id for run in ticked)})
        only_one = None if one else "Tick a single run for this."
        own = None if one is None or not one.is_demo else "The shipped example stays as it is."
        if st.button(
            "Name, note, tags …", icon=":material/edit:", disabled=not one or one.is_demo, help=own or only_one
        ):
            _describe(ticked[0])
        st.download_button(
            "Download",
            partial(_zipped, ticked[0].folder),
            f"{ticked[0].run_id}.zip",
            "application/zip",
            icon=":material/download:",
            on_click="ignore",
            disabled=not one,
            help=only_one or "The run's folder as a zip, which Import takes.",
        )
        active = "Stop it first: its engine is alive." if one and one.is_active else None
        if st.button(
            "Delete …",
            icon=":material/delete:",
            disabled=not one or one.is_demo or one.is_active,
            help=own or active or only_one,
        ):
            _delete(ticked[0])
        st.caption(f"{text.plural(len(ticked), 'run')} ticked")
    if one and one.summary.problem:
        st.warning(text.safe(one.summary.problem, 600), icon=":material/warning:")
    if one and one.summary.error:
        st.error(text.safe(one.summary.error, 600), icon=":material/error:")


def bring_in() -> None:
    """Import a run from a zip."""
    with st.expander("Import a run", icon=":material/upload:", type="compact"):
        st.caption(
            "A zip as Download gives it, from any machine. Nothing in it is trusted: names, tables and values are "
            "checked, and the rows are written into a new database."
        )
        attempt = st.session_state.setdefault("home.imports", 0)
        file = st.file_uploader(
            "Zip file",
            type="zip",
            key=f"home.zip.{attempt}",
            max_upload_size=MAX_UPLOAD_MB,
            label_visibility="collapsed",
        )
        if file is None:
            return
        try:
            with tempfile.TemporaryDirectory(prefix="gptailor-upload-") as scratch:
                archive = Path(scratch) / "upload.zip"
                archive.write_bytes(file.getbuffer())
                folder = import_run(archive, readers.runs_root())
        except UserError as error:
            st.error(text.safe(error, 600), icon=":material/error:")
            return
        st.session_state["home.imports"] = attempt + 1  # an empty uploader
        st.toast(f"Imported as {text.safe(folder.run_id)}", icon=":material/check:")
        st.rerun()


def follow(runs: Sequence[Run]) -> None:
    """Keep the table up to date while a run is active: look often, draw again only when something has changed."""
    if not any(run.is_active for run in runs):
        return
    seen = _moving_parts(runs)

    @st.fragment(run_every=POLL_SECONDS)
    def watch() -> None:
        if _moving_parts(readers.runs()) != seen:
            st.rerun()

    watch()


def _moving_parts(runs: Sequence[Run]) -> list[tuple[Any, ...]]:
    return [(run.run_id, run.status, run.summary.n_done, run.summary.best_config) for run in runs]


# --- the actions ------------------------------------------------------------------------------------------------------


def _zipped(folder: RunFolder) -> bytes:
    with tempfile.TemporaryDirectory(prefix="gptailor-download-") as scratch:
        return copy_run(folder, Path(scratch) / "run.zip").read_bytes()


@st.dialog("Name, note, tags")
def _describe(run: Run) -> None:
    noted = read_notes(run.folder)
    name = st.text_input("Name", noted.name, max_chars=MAX_NAME, placeholder=text.plain(run.summary.name))
    tags = st.multiselect(
        "Tags",
        noted.tags,
        noted.tags,
        format_func=text.plain,
        accept_new_options=True,
        max_selections=MAX_TAGS,
        placeholder="Type a tag and press Enter",
    )
    note = st.text_area("Note", noted.note, max_chars=MAX_NOTE, height=160)
    if st.button("Save", type="primary"):
        try:
            write_notes(run.folder, Notes(name.strip(), note, tuple(tag.strip() for tag in tags)))
        except UserError as error:
            st.error(text.safe(error, 300))
        else:
            st.rerun()


@st.dialog("Delete this run?")
def _delete(run: Run) -> None:
    shown = text.plain(run.name)
    st.markdown(
        f"**{text.safe(run.name)}** with its {text.plural(run.summary.n_done, 'trial')} is deleted for good "
        f"({run.summary.size / 1e6:.1f} MB). Download it first if in doubt."
    )
    typed = st.text_input("Type the run's name to confirm", placeholder=shown, key=f"home.delete.{run.run_id}")
    if st.button("Delete for good", icon=":material/delete:", type="primary", disabled=text.plain(typed) != shown):
        try:
            launch.delete_run(run.folder)
        except UserError as error:
            st.error(text.safe(error, 300))
        else:
            st.rerun()
