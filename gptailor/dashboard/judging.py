"""Held-out averages on pages: the chart of all subjects, the plan against the strongest one-shot cut, the report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import streamlit as st

from gptailor import wording
from gptailor.dashboard import actions, widgets
from gptailor.dashboard.readers import Run
from gptailor.results import scores, statistics
from gptailor.results.frames import held_out as frames
from gptailor.results.frames import ratios
from gptailor.results.frames.compare import Entry, averages_of_runs
from gptailor.results.frames.view import View
from gptailor.results.redundancy import of_run
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.trial import Subject, SubjectKind

NOTE = (
    "Mean over the held-out benchmarks whose scores are shares of examples (perplexities, F1 and BLEU have units of "
    "their own); only subjects that were judged on every benchmark. Bars are one standard error. Compare with the "
    "candidates and the one-shot cuts, not with the dense base alone."
)

RATIOS = (
    "Each run's best plan, and the same repaired or healed where it was judged. Runs that differ in their seed alone "
    "are one point; bars are 95 % intervals. A ring is the limit: the first ratio whose interval touches guessing."
)


def show_of_plan(view: View, run: Run, config_id: int) -> None:
    """Where the plan stands among everybody who was judged on the held-out benchmarks; nothing before there are two."""
    show_choice(view)
    table = view.held_out
    if len(table) < 2:
        return
    from gptailor.results.charts import held_out as charts

    subject = view.subjects[config_id]
    if len(table.dropna(subset=["average"])) > 1:
        widgets.show_chart(
            charts.averages(table, str(subject)),
            frames.shown(table),
            title="Held-out averages",
            note=NOTE,
            alt="Held-out averages of the dense models, one-shot cuts and plans",
            key="models.held-out",
        )
    for rival in dict.fromkeys([subject.before, scores.strongest(table, SubjectKind.BASELINE)]):
        if rival not in (None, subject) and {str(subject), str(rival)} <= set(table["subject"]):
            _show_test(view, run, subject, rival)


def _show_test(view: View, run: Run, one: Subject, other: Subject) -> None:
    """Is the difference between two that were judged more than noise?"""
    frame = scores.judged(view.tables)
    both = frame[frame["subject"].isin([str(one), str(other)])]
    hashes = tuple(sorted(set(both["plan_hash"].dropna())))
    answers = _answers(str(run.folder.path.resolve()), view.tables.version, hashes)
    tests = statistics.paired(frame, answers, one, other)
    st.info(wording.safe(frames.verdict(tests, one, other), 600), icon=":material/balance:")


def show_choice(view: View) -> None:
    """What the selection split chose, and by how much the search's own scores flatter."""
    if view.choice is not None:
        st.info(wording.safe(scores.choice_text(view.choice), 600), icon=":material/how_to_vote:")


def show_of_runs(runs: Sequence[Entry]) -> None:
    """Everybody's held-out averages in one chart, baselines beside the fronts."""
    table = averages_of_runs(runs)
    if len(table) < 2 or len(table.dropna(subset=["average"])) < 2:
        return
    from gptailor.results.charts import held_out as charts

    widgets.show_chart(
        charts.averages(table),
        frames.shown(table),
        title="Held-out averages of every run",
        note=NOTE + " Averages compare only where runs hold out the same benchmarks.",
        alt="Held-out averages of all subjects of the compared runs",
        key="compare.held-out",
    )


def show_ratios(runs: Sequence[Entry], stored: Sequence[Run]) -> None:
    """Quality against layers removed, and the limit of each series; nothing where all runs remove as much."""
    points = ratios.points(runs)
    if points.empty:
        return
    from gptailor.results.charts import ratios as charts

    curve = ratios.curve(points)
    answers = {
        entry.label: _answers(
            str(run.folder.path.resolve()), entry.view.tables.version, ratios.hashes(points, entry.label)
        )
        for entry, run in zip(runs, stored, strict=True)
    }
    st.divider()
    widgets.show_chart(
        charts.by_ratio(curve),
        curve,
        title="How far can it be cut?",
        note=RATIOS,
        alt="Held-out average against the share of layers removed, between the dense base and guessing",
        key="compare.ratios",
    )
    for limit in ratios.limits(points, answers):
        st.caption(wording.safe(limit.text, 400))


def report_button(view: View, run: Run) -> None:
    """The run as one HTML page, made when it is asked for."""
    st.download_button(
        "Report (HTML)",
        partial(actions.report, run, partial(_report, view, run)),
        f"{run.run_id}.html",
        "text/html",
        key="models.report",
        on_click="ignore",
        icon=":material/description:",
        help="One page with what the run asked, found and proves, to send to a colleague. It needs no network.",
    )


def _report(view: View, run: Run) -> bytes:
    from gptailor.results.report import html

    hashes = tuple(sorted(set(scores.judged(view.tables)["plan_hash"].dropna())))
    answers = _answers(str(run.folder.path.resolve()), view.tables.version, hashes)
    return html(view, answers, of_run(run.folder)).encode()


@st.cache_data(max_entries=16, show_spinner="Reading what each example gave …")
def _answers(path: str, version: tuple[int, ...], hashes: tuple[str, ...]) -> queries.Answers:  # noqa: ARG001 (a part of the cache's key)
    return queries.answers_of(RunFolder(Path(path)), hashes)
