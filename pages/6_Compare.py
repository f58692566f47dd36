"""Compare: which run is better, and why?"""

import streamlit as st

from gptailor import wording
from gptailor.dashboard import judging, pickers, widgets
from gptailor.results.charts import compare as charts
from gptailor.results.charts import layers as layer_charts
from gptailor.results.charts import progress as progress_charts
from gptailor.results.charts import tradeoffs as front_charts
from gptailor.results.frames import compare as frames
from gptailor.results.frames import tradeoffs
from gptailor.wording import plural

widgets.open_page("Compare")
named = pickers.pick_runs()
runs = frames.entries([(run.name, pickers.read_quietly(run)) for run in named])
labels = [entry.label for entry in runs]
facts = runs[0].facts
percent = facts.average_is_share


def show_scores() -> None:
    """Who is ahead: the best plan of each run, score by score."""
    st.info(wording.safe(frames.verdict(runs), 600), icon=":material/balance:")
    judged = "; ".join(f"{e.label}: {plural(len(e.plans), 'plan')} at {e.top_budget} examples" for e in runs)
    st.caption(wording.safe(f"{frames.meaning(runs)} Judged so far: {judged}.", 1200))
    scores, outside = frames.best_scores(runs), frames.held_out_scores(runs)
    st.markdown("**Scores of the best plans**")
    widgets.show_table(frames.score_table(scores, labels), alt="Scores of each run's best plan", height=560)
    if percent:
        st.markdown("**Retention: share of the dense model's score**")
        table = frames.score_table(scores, labels, retention=True)
        widgets.show_table(table, alt="Retention of each run's best plan", height=560)
    if len(outside):
        st.markdown("**Held-out results**, not seen by the search")
        widgets.show_table(frames.score_table(outside, labels), alt="Held-out scores of the best plans", height=560)
    else:
        st.caption("No held-out result of these plans is stored yet.")
    of_sizes = frames.of_sizes(runs)
    if len(of_sizes):
        st.markdown(f"**{facts.average_label} of the best plan of each size**")
        widgets.show_table(of_sizes, alt="The best plan of each size in every run", height=560)
    judging.show_of_runs(runs)


def show_curves() -> None:
    by = pickers.by_trials_or_hours()
    curves = frames.curves(runs)
    widgets.show_chart(
        progress_charts.best_of_runs(curves, by, facts.average_label, percent, labels),
        curves,
        title=f"Best {facts.average_label.lower()} so far",
        note="Of the plans judged at each run's highest rung, as above. Runs differ in colour and in dash.",
        alt="Best plan so far of every run",
        key="curves",
        percent=percent,
    )


def show_fronts() -> None:
    axes = {axis.label: axis for axis in frames.shared_axes(runs)}
    if len(axes) < 2:
        return
    first = frames.first_axes(runs) or tradeoffs.first_axes(list(axes.values()), facts)
    x, y = pickers.pick_axes(axes, first)
    points = frames.fronts(runs, x, y)
    widgets.show_chart(
        front_charts.fronts_of_runs(points, x, y, labels),
        points,
        title=f"Fronts: {x.label} against {y.label}",
        note=f"{plural(len(points), 'plan')} judged as above; each run's front is strong and joined by a line.",
        alt="Pareto fronts of the runs over one another",
        key="fronts",
        percent=percent,
    )


def show_layers() -> None:
    origins, everybody = frames.best_origins(runs)
    if origins.empty:
        return
    st.divider()
    widgets.show_chart(
        layer_charts.origins(origins, everybody),
        origins.drop(columns=["ink", "deviates", "choice", "row"]),
        title="The best plans, layer by layer",
        note="Each run's best plan over the layers of its base. × is removed, · is the base's own layer, letters are "
        "candidates.",
        alt="Source of each layer of every run's best plan",
        key="best-origins",
    )
    overlap = frames.removed_overlap(runs)
    left, _ = st.columns([3, 2])
    with left:
        widgets.show_chart(
            charts.overlap(overlap, labels),
            overlap,
            title="Do they remove the same layers?",
            note="Jaccard overlap of the removed layers of the best plans: layers removed by both, of those removed by "
            "either. – where the bases differ in their number of layers.",
            alt="Overlap of removed layers between runs",
            key="overlap",
        )


def show_settings() -> None:
    st.divider()
    st.markdown("#### What was asked")
    everything = st.toggle("Show equal settings too", key="compare.everything")
    settings = frames.settings(runs, only_different=not everything)
    if settings.empty:
        widgets.empty("These runs were asked for the very same thing.", ":material/drag_handle:")
    else:
        widgets.show_table(settings, alt="Settings of the runs", height=420)


if not frames.share_objectives(runs):
    widgets.empty(
        "These runs share no objective (benchmark and metric), so their scores cannot be set side by side. "
        "Their layers and their settings can.",
        ":material/compare_arrows:",
    )
elif all(entry.best is None for entry in runs):
    widgets.empty("None of these runs has scored a plan yet.", ":material/hourglass_empty:")
else:
    show_scores()
    judging.show_ratios(runs, named)
    st.divider()
    show_curves()
    st.divider()
    show_fronts()
show_layers()
show_settings()
