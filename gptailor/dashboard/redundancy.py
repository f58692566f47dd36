"""The redundancy of a family, on pages: the verdict, what it rests on, and layer by layer how alike things are."""

from __future__ import annotations

from collections.abc import Iterable

import streamlit as st

from gptailor import wording
from gptailor.dashboard import actions, jobs, readers, widgets
from gptailor.dashboard.readers import Run
from gptailor.results.frames.view import View
from gptailor.results.outlook import Outlook, Verdict, outlook
from gptailor.results.redundancy import Redundancy, of_run, read, shared_file
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Removal

LABEL, ICON = "Measure the redundancy", ":material/layers_clear:"
HELP = "Which layers look cheap, and where candidates conflict. Minutes, on the run's device."
ICONS = {
    Verdict.PROMISING: ":material/thumb_up:",
    Verdict.MIXED: ":material/balance:",
    Verdict.DOUBTFUL: ":material/thumb_down:",
    Verdict.UNKNOWN: ":material/help:",
}


def of_saved(view: View, run: Run) -> None:
    """A saved run's, or how to measure it."""
    st.markdown("#### The family, before any search")
    found = of_run(run.folder)
    if found is None:
        widgets.empty(
            "How redundant the family's layers are, and where its candidates conflict, was not measured for this run."
        )
    else:
        show_verdict(found, view.facts.n_removed, view.tables.spec.operations)
        _show_charts(found, view.facts.n_removed)
    jobs.offer(
        run,
        "redundancy",
        ["redundancy"],
        doing="Measuring the redundancy",
        label=LABEL,
        icon=ICON,
        help=HELP,
        wanted=found is None,
    )


def before_start(spec: RunSpec, fits: bool) -> None:
    """What is known of the family that a search is asked for, or how to measure it. fits: whether the models do."""
    found = known(spec)
    if found is not None and fits:
        show_verdict(found, _n_removed(spec, found), spec.operations, folded=True)
    elif fits:
        st.caption("Is a search promising? Minutes of measuring tell, before it spends a night.")
    jobs.offer_work(
        actions.family_job(spec),
        lambda: actions.measure_family(spec),
        doing="Measuring the redundancy",
        label="Measure again" if found else LABEL,
        icon=ICON,
        help="Nothing is computed where nothing has changed." if found else HELP,
        wanted=fits,
    )


def show_family(spec: RunSpec, fits: bool) -> None:
    """Layer by layer what was measured of the family that a search is asked for; nothing where nothing was."""
    if not fits or (found := known(spec)) is None:
        return
    st.divider()
    st.markdown("#### The family, layer by layer")
    _show_charts(found, _n_removed(spec, found) or 1)


def known(spec: RunSpec) -> Redundancy | None:
    return read(shared_file(readers.runs_root(), spec))


def _n_removed(spec: RunSpec, found: Redundancy) -> int | None:
    """Layers that go; where `remove` says another measure, as the check has found, if it has."""
    if not isinstance(spec.remove, Removal):
        return spec.n_removed(found.n_layers)
    answer = actions.check(spec)
    family = answer.result().facts.get("family") if answer.done() else None
    return family["n_removed"] if family else None


def _show_charts(found: Redundancy, n_removed: int) -> None:
    from gptailor.dashboard.redundancy_charts import show_charts  # brings altair

    show_charts(found, n_removed)


def show_verdict(found: Redundancy, n_removed: int | None, operations: Iterable[str], *, folded: bool = False) -> None:
    """What to expect of the search, and why; folded: the reasons are one click away."""
    seen = outlook(found, n_removed, operations)
    _box(seen)
    with st.expander("What this rests on", icon=":material/rule:") if folded else st.container():
        st.markdown("\n".join(f"- {wording.safe(reason, 600)}" for reason in seen.reasons))
        st.caption(
            f"Measured {wording.moment(found.when)} on {found.n_texts} texts of the objectives "
            f"({wording.count(found.n_tokens)} tokens) and {found.examples} examples of each. A rule of thumb: one "
            "layer at a time."
        )


def _box(seen: Outlook) -> None:
    show = {Verdict.PROMISING: st.success, Verdict.MIXED: st.info, Verdict.DOUBTFUL: st.warning}.get(
        seen.verdict, st.info
    )
    show(wording.safe(seen.headline, 600), icon=ICONS[seen.verdict])
