"""What a reader picks on several pages: a run, runs, a plan, axes, weights; and how a picked run is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import pandas as pd
import streamlit as st

from gptailor import wording
from gptailor.dashboard import actions, readers
from gptailor.dashboard.url import choose, chosen, select, told_apart
from gptailor.dashboard.widgets import empty, status_badge
from gptailor.results import scores
from gptailor.results.frames import tradeoffs
from gptailor.results.frames.facts import KEPT_LAYERS
from gptailor.results.frames.layers import plan_name
from gptailor.results.frames.tradeoffs import Axis
from gptailor.results.frames.trials import AVERAGE
from gptailor.results.frames.view import View
from gptailor.store.connection import StoreBusy, StoreError, StoreMissing
from gptailor.wording import plain
from gptailor.wording import safe as text_safe

ROWS = 50
"""Most plans that a heatmap has rows for."""
MOST_RUNS = 6
"""Runs that can be compared at once: as many as there are colours that everybody tells apart."""


def pick_run() -> readers.Run:
    """The run that the page is about, with its state and what it is.

    Stops the page, saying why, where there is none.
    """
    runs = readers.runs()
    if not runs:
        empty("No run is saved here yet. Start one on the Launch page.")
        st.page_link("pages/1_Launch.py", label="Launch a run", icon=":material/rocket_launch:")
        st.stop()
    by_id = {run.run_id: run for run in runs}
    asked = st.query_params.get("run")
    newest = next((run.run_id for run in runs if run.is_active), runs[0].run_id)
    left, right = st.columns([5, 2], vertical_alignment="bottom")
    with left:
        run = by_id[select("run", "Run", list(by_id), lambda run_id: _run_label(by_id[run_id]), newest)]
    with right:
        status_badge(run.status)
    if st.session_state.get("config.run") != run.run_id and "config" not in st.query_params:
        choose("config", None)  # a plan remembered from another run has nothing to do with this one's
    st.session_state["config.run"] = run.run_id
    if asked and asked not in by_id:
        actions.notice_link(asked)
        st.warning(f"The link asks for the run {text_safe(asked)}, which is not saved here. This is another one.")
    return run


def _run_label(run: readers.Run) -> str:
    return f"{plain(run.name)}  ·  {run.run_id[:15] if run.run_id[:8].isdigit() else plain(run.run_id, 32)}"


def pick_runs() -> list[readers.Run]:
    """Two to MOST_RUNS runs, in the order they were picked, kept in the URL; stops the page where there are fewer."""
    by_id = {run.run_id: run for run in readers.runs()}
    if len(by_id) < 2:
        empty(
            "Comparing takes two saved runs. There " + ("is one so far." if by_id else "is none so far."),
            ":material/balance:",
        )
        st.page_link("pages/1_Launch.py", label="Launch a run", icon=":material/rocket_launch:")
        st.stop()
    asked = list(dict.fromkeys(run_id for run_id in (chosen("runs") or "").split(",") if run_id in by_id))
    key = "select.runs"
    st.session_state[key] = asked[:MOST_RUNS] or _comparable(by_id)

    def adopt() -> None:
        choose("runs", ",".join(st.session_state[key]))

    picked = st.multiselect(
        f"Runs (2 to {MOST_RUNS})",
        list(by_id),
        format_func=told_apart(list(by_id), lambda run_id: _run_label(by_id[run_id])),
        key=key,
        max_selections=MOST_RUNS,
        on_change=adopt,
    )
    choose("runs", ",".join(picked))
    if len(picked) < 2:
        empty("Pick at least two runs.", ":material/balance:")
        st.stop()
    return [by_id[run_id] for run_id in picked]


def _comparable(by_id: Mapping[str, readers.Run]) -> list[str]:
    """The run looked at last, else the newest, and the newest other one (sharing an objective, if one does)."""
    first = by_id.get(chosen("run") or "", next(iter(by_id.values())))
    others = [run for run in by_id.values() if run.run_id != first.run_id]
    mine = set(first.summary.objectives)
    second = next((run for run in others if mine & set(run.summary.objectives)), others[0])
    return [first.run_id, second.run_id]


def read_quietly(run: readers.Run) -> View:
    """Like `read`, without the line on what the run is."""
    try:
        view = readers.read(run)
        view.facts  # noqa: B018  (derived here, so that a run without a row of its own is refused here)
    except (StoreError, ValueError) as error:
        st.info(
            f"{text_safe(run.name)} cannot be compared yet: {text_safe(error, 600)}", icon=":material/hourglass_empty:"
        )
        st.stop()
    return view


def by_trials_or_hours() -> str:
    """Whether curves run over trials or over time (hours)."""
    names = {"trials": "By trials", "hours": "By time"}
    return str(
        st.segmented_control(
            "Curves",
            list(names),
            format_func=names.__getitem__,
            default="trials",
            required=True,
            key="by",
            persist_state="session",
            label_visibility="collapsed",
        )
    )


def read(run: readers.Run) -> View:
    """The run's tables, with a line on what it is; stops the page, saying why, where they cannot be read."""
    try:
        view = readers.read(run)
        about = _about(view)
    except (StoreMissing, StoreBusy) as error:
        waiting = "The run waits for its device; nothing has been written yet."
        empty(waiting if run.status == "queued" else text_safe(error, 600), ":material/hourglass_empty:")
        st.stop()
    except (StoreError, ValueError) as error:
        st.error(f"This run cannot be shown: {text_safe(error, 600)}", icon=":material/error:")
        st.stop()
    st.caption(about)
    if view.tables.notice:
        st.warning(text_safe(view.tables.notice, 600))
    return view


def _about(view: View) -> str:
    facts = view.facts
    rungs = " / ".join(map(str, facts.rungs))
    parts = [
        f"Base {text_safe(facts.base_model, 60)}",
        f"{facts.n_layers} → {wording.span(facts.n_layers - facts.n_removed, facts.n_layers - facts.fewest_removed)} "
        "layers",
        wording.plural(len(facts.candidates), "candidate") if facts.candidates else "no candidates",
        wording.plural(len(facts.objectives), "objective"),
        f"rungs of {rungs} examples",
        f"read at {clock(view.tables.as_of)}",
    ]
    return "  ·  ".join(parts)


def clock(moment: datetime) -> str:
    """Hours, minutes and seconds where the reader is, else in UTC."""
    try:
        return moment.astimezone(ZoneInfo(st.context.timezone or "")).strftime("%H:%M:%S")
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return moment.strftime("%H:%M:%S UTC")


def need_plans(view: View) -> None:
    """Stop the page with a sentence where no trial has succeeded."""
    if len(view.plans):
        return
    ended = scores.ended(view.trials)
    if ended.empty:
        empty(
            "No trial has ended yet. This page fills as soon as the first plan is scored.", ":material/hourglass_empty:"
        )
    else:
        empty(
            f"All {wording.plural(len(ended), 'trial')} so far failed; the Progress page lists the causes.",
            ":material/error:",
        )
    st.stop()


def judged_note(view: View) -> str:
    """What "best" means here: n and the budget it is judged at."""
    n = wording.plural(len(view.plans), "plan")
    if view.judged_in_full:
        chosen = (
            f" The selection split chose {scores.plan_name(view.choice.subject)} as the best." if view.choice else ""
        )
        return f"{n} scored at the full budget of {view.top_budget} examples a benchmark.{chosen}"
    full = f"(the full budget is {view.facts.full_budget})"
    return f"{n} scored at {view.top_budget} examples a benchmark, the highest rung reached so far {full}."


def chosen_plan(view: View) -> int:
    """config_id of the plan that is looked at: the one in the URL where it was judged, else the run's best.

    For pages that need plans.
    """
    asked, judged = chosen("config"), view.plans["config_id"].astype(int).tolist()
    if asked and asked.isdecimal() and len(asked) < 10 and int(asked) in judged:
        return int(asked)
    assert view.best is not None  # there are plans
    return view.best


def pick_plan(view: View, label: str = "Plan", with_kept: bool = False) -> int:
    """A select box of the judged plans, best first, on the plan that is looked at. Returns its config_id.

    with_kept: then those that are stored beside the search, which were repaired or healed, or are one-shot cuts.
    """
    names = {
        int(c): plan_name(c, a, view.facts, view.subjects[int(c)].label)
        for c, a in zip(view.plans["config_id"], view.plans[AVERAGE], strict=True)
    }
    if view.facts.has_range:
        of_sizes = set(view.best_of_sizes["config_id"])
        for config_id, kept in zip(view.plans["config_id"], view.plans[KEPT_LAYERS], strict=True):
            names[int(config_id)] += f", {kept:.0f} layers" + (", the best of them" if config_id in of_sizes else "")
    names |= _kept_names(view) if with_kept else {}
    assert view.best is not None  # there are plans
    by_selection = view.choice.subject.config_id if view.choice else None
    best = by_selection if by_selection in names else view.best
    if by_selection in (None, best):
        names[best] += " (best, chosen by the selection)" if view.choice else " (best)"
    return int(select("config", label, list(names), lambda config_id: plain(names[config_id], 160), best))


def _kept_names(view: View) -> dict[int, str]:
    """Of the plans that are stored beside the search: who they are, and their held-out averages where they have any."""
    averages = dict(zip(view.held_out["subject"], view.held_out["average"], strict=True))
    known = {config_id: averages.get(str(subject)) for config_id, subject in view.kept.items()}
    return {
        config_id: subject.label + ("" if pd.isna(known[config_id]) else f" · {known[config_id]:.3f} held out")
        for config_id, subject in view.kept.items()
    }


def adopt_click(event: Any, selection: str, view: View) -> None:
    """Make the plan that was clicked in a chart the plan that is looked at."""
    points = (event or {}).get("selection", {}).get(selection, [])
    clicked = points[0].get("config_id") if points else None
    judged = set(view.plans["config_id"].astype(int))
    last = st.session_state.get("clicked")
    st.session_state["clicked"] = clicked
    if clicked is not None and clicked != last and clicked in judged:
        choose("config", int(clicked))
        st.rerun()


def pick_axes(axes: Mapping[str, Axis], first: tuple[Axis, Axis]) -> tuple[Axis, Axis]:
    """Two of the things that plans can be compared by, to begin with `first`."""
    labels = list(axes)
    left, right, _ = st.columns([3, 3, 2])
    with left:
        x = axes[select("x", "Across", labels, plain, first[0].label)]
    with right:
        y = axes[select("y", "Up", labels, plain, first[1].label)]
    return x, y


def how_many(available: int) -> int:
    """How many of the best plans to show."""
    most = min(available, ROWS)
    if most <= 5:
        return most
    return st.slider("How many", 5, most, min(20, most), key="how_many", width=320)


def weights(names: Sequence[str]) -> dict[str, float]:
    """A slider from 0 to 1 for each criterion, three in a row."""
    found = {}
    box = st.container() if len(names) <= 6 else st.expander("Weights", icon=":material/tune:")
    for start in range(0, len(names), 3):
        for column, (index, name) in zip(
            box.columns(3, gap="medium"), list(enumerate(names))[start : start + 3], strict=False
        ):
            shown = text_safe(tradeoffs.label(name), 40)
            found[name] = column.slider(shown, 0.0, 1.0, 1.0, 0.05, key=f"weight.{index}")
    return found
