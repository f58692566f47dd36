"""Home's parts: what this is, and what can be done with runs: find, name, note, tag, compare, import, delete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import streamlit as st

from gptailor import wording
from gptailor.dashboard import access, actions, jobs, pickers, readers, run_table, widgets
from gptailor.dashboard.polling import poll
from gptailor.dashboard.readers import Run
from gptailor.errors import UserError
from gptailor.store.notes import MAX_NAME, MAX_NOTE, MAX_TAGS, Notes, read_notes

POLL_SECONDS = 4
DIALOG = "home.dialog"
"""In the session: whether a dialog is open."""
MAX_UPLOAD_MB = 200

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
    left, middle, right = st.columns([3, 4, 3])
    words = left.text_input("Find", placeholder="Name, model, benchmark, note …", key="home.find", max_chars=200)
    chosen = middle.pills(
        "State", states, selection_mode="multi", format_func=str.capitalize, key="home.states", disabled=len(states) < 2
    )
    tagged = right.multiselect(
        "Tags",
        tags,
        format_func=wording.plain,
        key="home.tags",
        disabled=not tags,
        placeholder="Any" if tags else "None yet",
    )
    return run_table.matching(runs, notes, words, chosen or (), tagged)


def offer(ticked: Sequence[Run]) -> None:
    """What can be done with the ticked runs."""
    if not ticked:
        st.caption("Tick runs at the left of the table to open, compare, name, download or delete them.")
        return
    one = ticked[0] if len(ticked) == 1 else None
    not_you = access.why_not()
    with st.container(horizontal=True, vertical_alignment="center"):
        if one:
            if st.button("Open", type="primary", icon=":material/timeline:", help="See how it went, page by page."):
                st.switch_page("pages/2_Progress.py", query_params={"run": one.run_id})
        else:
            too_many = len(ticked) > pickers.MOST_RUNS
            why = f"Up to {pickers.MOST_RUNS} runs can be compared at once." if too_many else None
            if st.button("Compare", type="primary", icon=":material/balance:", disabled=too_many, help=why):
                st.switch_page("pages/6_Compare.py", query_params={"runs": ",".join(run.run_id for run in ticked)})
        only_one = None if one else "Tick a single run for this."
        own = not_you if one is None or not one.is_demo else actions.DEMO_STAYS
        if st.button(
            "Name, note, tags …",
            icon=":material/edit:",
            disabled=not one or own is not None,
            help=own or only_one,
        ):
            _describe(ticked[0])
        st.download_button(
            "Download",
            partial(actions.take, ticked[0]),
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
            disabled=not one or own is not None or one.is_active,
            help=own or active or only_one,
        ):
            _delete(ticked[0])
        st.caption(f"{wording.plural(len(ticked), 'run')} ticked")
    if one:
        _about(one)
    if one and one.summary.problem:
        st.warning(wording.safe(one.summary.problem, 600), icon=":material/warning:")
    if one and one.summary.error:
        st.error(wording.safe(one.summary.error, 600), icon=":material/error:")


def _about(run: Run) -> None:
    """What the table has no room for."""
    summary = run.summary
    failed = f" ({wording.count(summary.n_failed)} failed)" if summary.n_failed else ""
    st.caption(
        f"{wording.count(summary.n_done)} of {wording.plural(summary.n_asked, 'trial')} done{failed}  ·  "
        f"base {wording.safe(summary.base_model)}  ·  {wording.gigabytes(summary.size)}  ·  {wording.safe(run.run_id)}"
    )
    if note := read_notes(run.folder).note:
        st.caption(f":material/sticky_note_2: {wording.safe(note, 600)}")


def bring_in() -> None:
    """Import a run from a zip."""
    with st.expander("Import a run", icon=":material/upload:", type="compact"):
        st.caption(
            "A zip as Download gives it, from any machine. Nothing in it is trusted: names, tables and values are "
            "checked, and the rows are written into a new database."
        )
        if not_you := access.why_not():
            st.caption(wording.safe(not_you, 600))
            return
        access.expect_upload()
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
            folder = actions.bring_in(file.getbuffer())
        except UserError as error:
            st.error(wording.safe(error, 600), icon=":material/error:")
            return
        st.session_state["home.imports"] = attempt + 1  # an empty uploader
        st.toast(f"Imported as {wording.safe(folder.run_id)}", icon=":material/check:")
        st.rerun()


def follow(runs: Sequence[Run]) -> None:
    """Keep the table up to date while a run is active: look often, draw again only when something has changed."""
    if not any(run.is_active for run in runs):
        return
    seen = _moving_parts(runs)

    @poll(POLL_SECONDS)
    def watch() -> None:
        if not st.session_state.get(DIALOG) and _moving_parts(readers.runs()) != seen:  # which would close the dialog
            st.rerun()

    watch()


def _moving_parts(runs: Sequence[Run]) -> list[tuple[Any, ...]]:
    return [(run.run_id, run.status, run.summary.n_done, run.summary.best_config) for run in runs]


# --- the actions ------------------------------------------------------------------------------------------------------


def _closed() -> None:
    st.session_state.pop(DIALOG, None)


@st.dialog("Name, note, tags", on_dismiss=_closed)
def _describe(run: Run) -> None:
    st.session_state[DIALOG] = True
    noted = read_notes(run.folder)
    name = st.text_input("Name", noted.name, max_chars=MAX_NAME, placeholder=wording.plain(run.summary.name))
    tags = st.multiselect(
        "Tags",
        noted.tags,
        noted.tags,
        format_func=wording.plain,
        accept_new_options=True,
        max_selections=MAX_TAGS,
        placeholder="Type a tag and press Enter",
    )
    note = st.text_area("Note", noted.note, max_chars=MAX_NOTE, height=160)
    if st.button("Save", type="primary"):
        try:
            actions.describe(run, Notes(name.strip(), note, tuple(tag.strip() for tag in tags)))
        except UserError as error:
            st.error(wording.safe(error, 300))
        else:
            _closed()
            st.rerun()


@st.dialog("Delete this run?", on_dismiss=_closed)
def _delete(run: Run) -> None:
    st.session_state[DIALOG] = True
    shown = wording.plain(run.name)
    st.markdown(
        f"**{wording.safe(run.name)}** with its {wording.plural(run.summary.n_done, 'trial')} is deleted for good "
        f"({wording.gigabytes(run.summary.size)}). Download it first if in doubt."
    )
    typed = st.text_input("Type the run's name to confirm", placeholder=shown, key=f"home.delete.{run.run_id}")
    if st.button("Delete for good", icon=":material/delete:", type="primary", disabled=wording.plain(typed) != shown):
        try:
            actions.delete(run, jobs.place(run))
        except UserError as error:
            st.error(wording.safe(error, 300))
        else:
            _closed()
            st.rerun()
