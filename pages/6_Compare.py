"""Compare: which run is better, and why?"""

import streamlit as st

from gptailor.dashboard import text, widgets
from gptailor.dashboard.charts import compare as charts
from gptailor.dashboard.charts import layers as layer_charts
from gptailor.dashboard.charts import progress as progress_charts
from gptailor.dashboard.charts import tradeoffs as front_charts
from gptailor.dashboard.frames import compare as frames
from gptailor.dashboard.text import plural

widgets.open_page("Compare")
named = widgets.pick_runs()
runs = frames.entries([(run.name, widgets.read_quietly(run)) for run in named])
labels = [entry.label for entry in runs]
shared = frames.share_objectives(runs)
facts = runs[0].facts
percent = facts.average_is_share

# --- settings -----------------------------------------------------------------------------------------------------------------
st.markdown("#### What was asked")
everything = st.toggle("Show equal settings too", key="compare.everything")
settings = frames.settings(runs, only_different=not everything)
if settings.empty:
    widgets.empty("These runs were asked for the very same thing.", ":material/drag_handle:")
else:
    widgets.show_table(settings, alt="Settings of the runs", height=420)

if not shared:
    widgets.empty(
        "These runs share no objective (benchmark and metric), so their scores cannot be set side by side. What they removed can.",
        ":material/compare_arrows:",
    )
elif all(entry.best is None for entry in runs):
    widgets.empty("None of these runs has scored a plan yet.", ":material/hourglass_empty:")
else:
    judged = "; ".join(
        f"{entry.label}: {plural(len(entry.plans), 'plan')} at {entry.top_budget} examples" for entry in runs
    )
    note = f"Judged by the {plural(len(facts.objectives), 'shared objective')}, at each run's highest rung so far. {judged}."

    # --- who is ahead ---------------------------------------------------------------------------------------------------------
    st.divider()
    st.markdown("#### The best plan of each run")
    scores = frames.best_scores(runs)
    st.caption(
        text.safe(
            f"{note} ± is one standard error. ★ is better than every other run by more than chance explains, ☆ is ahead by no more than chance.",
            900,
        )
    )
    tables = [("Scores", False), ("Retention of the dense model's scores", True)] if percent else [("Scores", False)]
    for column, (heading, retention) in zip(st.columns(len(tables)), tables, strict=True):
        with column:
            st.markdown(f"**{heading}**")
            widgets.show_table(
                frames.score_table(scores, labels, retention), alt=f"{heading} of each run's best plan", height=560
            )
    outside = frames.held_out_scores(runs)
    if len(outside):
        st.markdown("**Held-out results** (not seen by the search)")
        widgets.show_table(
            frames.score_table(outside, labels), alt="Held-out scores of each run's best plan", height=560
        )
    else:
        st.caption("No held-out result of these plans is stored.")

    # --- how they got there ---------------------------------------------------------------------------------------------------
    st.divider()
    by = widgets.by_trials_or_hours()
    curves = frames.curves(runs)
    widgets.show_chart(
        progress_charts.best_of_runs(curves, by, facts.average_label, percent, labels),
        curves,
        title=f"Best {facts.average_label.lower()} so far",
        note=note,
        alt="Best plan so far of every run",
        key="curves",
        percent=percent,
    )
    axes = {axis.label: axis for axis in frames.shared_axes(runs)}
    if len(axes) > 1:
        st.divider()
        names = list(axes)
        scored = [name for name in names if axes[name].column in facts.names]
        default_x, default_y = (scored[0], scored[1]) if len(scored) > 1 else ("Layers kept", names[0])
        pick_x, pick_y, _ = st.columns([2, 2, 3])
        with pick_x:
            x = axes[widgets.select("x", "Across", names, text.plain, default_x)]
        with pick_y:
            y = axes[widgets.select("y", "Up", names, text.plain, default_y)]
        points = frames.fronts(runs, x, y)
        widgets.show_chart(
            front_charts.fronts_of_runs(points, x, y, labels),
            points,
            title=f"Fronts: {x.label} against {y.label}",
            note=f"{note} Strong points are their run's front.",
            alt="Pareto fronts of the runs over one another",
            key="fronts",
            percent=percent,
        )

# --- what they removed ------------------------------------------------------------------------------------------------------------
origins, everybody = frames.best_origins(runs)
if len(origins):
    st.divider()
    widgets.show_chart(
        layer_charts.origins(origins, everybody),
        origins.drop(columns=["ink", "deviates", "choice", "row"]),
        title="The best plans, layer by layer",
        note="Each run's best plan over the layers of its base. × is removed, · is the base's own layer, letters are candidates.",
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
            note="Jaccard overlap of the removed layers of the best plans: layers removed by both, of those removed by either. "
            "– where the bases differ in their number of layers.",
            alt="Overlap of removed layers between runs",
            key="overlap",
        )
