"""Layers: who made this model?"""

import streamlit as st

from gptailor.dashboard import jobs, pickers, readers, redundancy, widgets
from gptailor.results.charts import layers as charts
from gptailor.results.frames import layers as frames
from gptailor.results.frames import tradeoffs
from gptailor.wording import plural, safe

widgets.open_page("Layers")
run = pickers.pick_run()
view = pickers.read(run)
pickers.need_plans(view)
facts, plans = view.facts, view.plans

# --- many plans -------------------------------------------------------------------------------------------------------
left, right = st.columns([2, 3], vertical_alignment="bottom")
with left:
    which = st.segmented_control(
        "Plans", ["The front", "The best"], default="The best", required=True, key="layers.which"
    )
if which == "The front":
    shown = plans[tradeoffs.front_of_all(plans, facts)].head(pickers.ROWS)
    words = f"{plural(len(shown), 'plan')} of the front (not dominated in all objectives), best on top."
else:
    with right:
        count = pickers.how_many(len(plans))
    shown = plans.head(count)
    words = f"The best {plural(len(shown), 'plan') if len(shown) > 1 else 'plan'} by {facts.average_label.lower()}."
grid = frames.origin_grid(view.layers, shown, facts)
widgets.show_chart(
    charts.origins(grid, facts),
    grid.drop(columns=["ink", "deviates", "choice", "row"]),
    title="Where every layer comes from",
    note=f"{words} {pickers.judged_note(view)} × is removed, · is the base's own layer, letters are candidates; hover "
    "for a merge's factor.",
    alt=f"Heatmap of {len(shown)} plans by {facts.n_layers} layers of the base: the source of each layer",
    key="origins",
    percent=facts.average_is_share,
)
often = frames.frequencies(view.layers, shown["config_id"], facts)
widgets.show_chart(
    charts.frequencies(often, facts),
    often,
    title="What these plans do with each layer",
    note=f"Percent of the plans above (n = {len(shown)}) that make each choice. Empty cells are 0 %.",
    alt="Heatmap of how often each layer is removed, kept, merged or taken from each source",
    key="frequencies",
)

# --- one plan ---------------------------------------------------------------------------------------------------------
st.divider()
st.markdown("#### One plan")
narrow, _ = st.columns([2, 3])
with narrow:
    plan = pickers.pick_plan(view, with_kept=True)
name, one = view.name(plan), view.strip(plan)
lanes = frames.strip_sources(one, view.tables.layers, facts)
widgets.show_chart(
    charts.lanes(lanes, facts),
    lanes.drop(columns=["deviates", "choice"]),
    title=f"The build of {name}",
    note="A column a layer of the base, a row a source. Several filled rows in a column are a merge; the number is "
    f"its factor.{frames.fitted_note(one)}",
    alt=f"Grid of sources by layers for {name}",
    key="lanes",
)
left_over = frames.left_of_layers(one)
if len(left_over):
    widgets.show_chart(
        charts.left_of_layers(left_over),
        left_over,
        title=f"What is left of each layer of {name}",
        note="Percent of the layer's query heads, of its MLP's channels, and of all its weights, without those that "
        "are zero. Zeros make a model neither smaller nor faster.",
        alt=f"Heatmap of the share of heads, channels and weights that is left in each layer of {name}",
        key="left",
    )
worth = frames.undo_one(view.layers, view.trials, plan)
if worth["worth"].notna().any():
    known = worth.dropna(subset=["worth"])
    widgets.show_chart(
        charts.undo_one(known, facts),
        worth,
        title="Undo one stitch: what is each deviation from the base worth?",
        note="Mean of the plans that make the same choice at that layer, less that of the plans that keep the base's "
        "own layer there, "
        "each against the mean of its rung; bars are 95 % intervals. The other layers of those plans differ too: read "
        "it as a hint."
        + (
            f" {len(worth) - len(known)} of {len(worth)} deviations were tried too rarely to tell."
            if len(known) < len(worth)
            else ""
        ),
        alt="Estimated worth of each deviation from the base, with intervals",
        key="undo",
        percent=facts.average_is_share,
    )
else:
    widgets.empty("No deviation of this plan was tried often enough, with and without, to tell what it is worth.")

# --- before any search ------------------------------------------------------------------------------------------------
st.divider()
jobs.show_problem()
redundancy.of_saved(view, run)

# --- which layers matter ----------------------------------------------------------------------------------------------
st.divider()
found = readers.importance(run, view)
if found is None:
    widgets.empty("Which layers matter most is told from 30 scored plans on.", ":material/query_stats:")
    st.stop()
forest = f"a random forest that saw {plural(found.trials, 'trial')} of {plural(found.plans, 'plan')} at all rungs"
if not found.tells:
    widgets.empty(
        f"Which layers matter cannot be told yet: {forest} does not foretell the scores of the plans kept from it.",
        ":material/query_stats:",
    )
    st.stop()
widgets.show_chart(
    charts.importance(found.rows, facts.names),
    found.rows,
    title="Which layer's choice matters for which objective?",
    note="How much of the differences between plans can no longer be foretold when a layer's choice is shuffled, in "
    f"percent of the variance, by {forest}.",
    alt="Heatmap of permutation importance by objective and layer",
    key="importance",
)
sure = ", ".join(f"{safe(name, 40)} {max(value, 0):.0%}" for name, value in found.explained.items())
st.caption(f"Differences explained on plans kept from it: {sure}. Rows well below 30 % are mostly noise.")
