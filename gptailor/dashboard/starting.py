"""Before a search starts: what it will take, and one start however often it is asked for."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import pandas as pd
import streamlit as st

from gptailor import wording
from gptailor.dashboard import access, actions, form, launching, readers, widgets
from gptailor.dashboard.checking import Answer
from gptailor.dashboard.form import Preset
from gptailor.dashboard.polling import poll
from gptailor.errors import UserError
from gptailor.launch.queue import waiting_behind
from gptailor.schedule import n_examples, schedule
from gptailor.spec.run import RunSpec
from gptailor.store.folder import RunFolder
from gptailor.wording import gigabytes

POLL_SECONDS = 1.0
FOLLOW_SECONDS = 3.0

# --- what it will take ------------------------------------------------------------------------------------------------


def outlook(spec: RunSpec) -> bool:
    """What the search takes and whether it can run, as far as that is known yet. Returns whether it may be started."""
    refused = access.why_not()
    pending = None if refused else actions.check(spec)
    answer = pending.result() if pending and pending.done() else None
    facts = answer.facts if answer else {}
    memory, estimate = facts.get("memory"), facts.get("estimate")
    unknown = "…" if pending and not answer else "–"
    trials, examples = st.columns(2)
    trials.metric("Trials", wording.count(spec.trials), border=True)
    examples.metric(
        "Examples",
        wording.count(n_examples(spec)),
        border=True,
        help="Scored in all, over all benchmarks, at most: one with fewer examples ends at its size.",
    )
    room, time = st.columns(2)
    room.metric(
        "Memory",
        gigabytes(memory["needed"]) if memory else unknown,
        border=True,
        help=_memory_help(memory) if memory else "Predicted, on the run's device.",
    )
    time.metric(
        "Time",
        wording.duration(estimate["seconds"]) if estimate else unknown,
        border=True,
        help=f"An estimate: {wording.safe(estimate['how'], 400)}." if estimate else "An estimate for the whole search.",
    )
    widgets.show_table(rungs(spec), alt="Trials and examples on each rung")
    st.caption(
        "Computed: examples of each benchmark that are scored anew. A plan that climbs keeps what it scored below."
    )
    if pending is None:
        widgets.empty(wording.safe(refused, 600), ":material/lock:")
        return False
    if answer is None:
        _await(pending)
        return False
    return _verdict(spec, answer)


def rungs(spec: RunSpec) -> pd.DataFrame:
    """A row a rung: examples per benchmark, trials, their share, and the examples computed for each benchmark."""
    rows = schedule(spec.budget, spec.trials)
    return pd.DataFrame(
        {
            "Rung": [f"{rung.budget} examples" for rung in rows],
            "Trials": [rung.trials for rung in rows],
            "share": [rung.trials / spec.trials for rung in rows],
            "Computed": [rung.examples for rung in rows],
        }
    )


def _memory_help(memory: Mapping[str, Any]) -> str:
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in memory["parts"].items())
    where = f"{len(memory['split'])} GPUs" if memory.get("split") else wording.safe(memory["device"])
    return f"Predicted from above, on {where}: {parts}."


def _await(pending: Future[Answer]) -> None:
    @poll(POLL_SECONDS)
    def look() -> None:
        st.info("Checking whether the models fit together …", icon=":material/hourglass_empty:")
        if pending.done():
            st.rerun()

    look()


def _verdict(spec: RunSpec, answer: Answer) -> bool:
    facts = answer.facts
    problems = [answer.problem] if answer.problem else facts["problems"]
    if problems:
        lines = "\n".join(f"- {wording.safe(line, 600)}" for line in problems)
        st.error(f"This search cannot run yet.\n\n{lines}", icon=":material/error:")
    else:
        family, memory = facts["family"], facts["memory"]
        st.success(
            wording.safe(
                f"The models fit together: {family['architecture']}, {wording.size(family['n_parameters'])} "
                f"parameters in {family['dtype']}. {family['removal']}.",
                400,
            ),
            icon=":material/check_circle:",
        )
        too_large = memory.get("is_refused") or (memory["free"] is not None and memory["needed"] > memory["free"])
        say = st.warning if too_large else st.caption
        say(wording.safe(f"Memory: {memory['verdict']}.", 400))
        for note in facts["notes"]:
            st.caption(wording.safe(f"Note: {note}", 400))
    if st.button("Check again", icon=":material/refresh:", type="tertiary"):
        actions.check(spec, again=True)
        st.rerun()
    return not problems


# --- the start --------------------------------------------------------------------------------------------------------


def start_button(preset: Preset, spec: RunSpec | None, ready: bool) -> None:
    """Start, once: a second click, a second tab or a second person is led to the run that is there."""
    runs = readers.runs()
    twin = next((run for run in runs if spec and run.is_active and _asks_for(run.folder, spec)), None)
    if problem := st.session_state.pop("launch.problem", None):
        st.error(wording.safe(problem, 600), icon=":material/error:")
    if twin is not None:
        _is_there(twin)
        return
    form_token = st.session_state.setdefault("launch.form", secrets.token_hex(8))
    ahead = [run for run in runs if spec and run.is_active and _same_device(run.summary.device, spec.device)]
    if ahead:
        names = ", ".join(wording.safe(run.name, 40) for run in reversed(ahead))
        st.info(f"The device is taken: this run will queue behind {names}.", icon=":material/hourglass_empty:")
    st.button(
        "Start the search",
        type="primary",
        icon=":material/rocket_launch:",
        width="stretch",
        disabled=spec is None or not ready,
        on_click=_start,
        args=(preset, spec, form_token),
        help=access.why_not() or (None if ready else "Possible once the fields are right and the models are checked."),
    )


def _start(preset: Preset, spec: RunSpec | None, form_token: str) -> None:
    if spec is None or st.session_state.get("launch.form") != form_token:
        return  # an event that no button of ours sent, or a second click on a form that was sent
    if launching.read(preset)[1].spec != spec:  # a field was left by this very click
        st.session_state["launch.problem"] = "The form changed as you clicked: look at it once more, then start."
        return
    try:
        actions.start(spec)
    except UserError as error:
        st.session_state["launch.problem"] = str(error)
    else:
        st.session_state["launch.form"] = secrets.token_hex(8)


def _asks_for(folder: RunFolder, spec: RunSpec) -> bool:
    try:
        return folder.spec.read_text(encoding="utf-8") == spec.to_yaml()
    except OSError:
        return False


def _is_there(run: readers.Run) -> None:
    """The run that asks for what the form asks for: its state, behind whom it waits, and the way to it."""

    @poll(FOLLOW_SECONDS)
    def look() -> None:
        runs = {other.run_id: other for other in readers.runs()}
        if run.run_id not in runs or not runs[run.run_id].is_active:
            st.rerun()
            return
        said = f"**{wording.safe(run.name)}** is {runs[run.run_id].status}."
        if behind := waiting_behind(readers.runs_root(), run.run_id):
            names = (runs[other].name if other in runs else other for other in behind)
            said += f" It waits for its device behind {', '.join(wording.safe(name, 40) for name in names)}."
        st.success(said, icon=":material/rocket_launch:")

    look()
    st.page_link("pages/2_Progress.py", label="Watch it", icon=":material/timeline:", query_params={"run": run.run_id})
    st.caption("Change anything, such as the seed, to launch another one.")


def _same_device(one: str, other: str) -> bool:
    return "auto" in (one, other) or one == other or {one, other} == {"cuda", "cuda:0"}


# --- the same elsewhere -----------------------------------------------------------------------------------------------


def in_other_words(spec: RunSpec, preset: Preset) -> None:
    """The same search as a run file and as a command, to copy."""
    command, run_file = st.tabs(["As a command", "As a run file"])
    command.code(form.command_line(spec, preset, readers.runs_root()), language="bash", wrap_lines=True)
    run_file.code(form.run_file(spec), language="yaml")
