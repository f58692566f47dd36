"""Trade-offs: what costs what?"""

import streamlit as st

from gptailor import wording
from gptailor.dashboard import judging, pickers, url, widgets
from gptailor.measures import MAX_HYPERVOLUME
from gptailor.results.charts import layers as layer_charts
from gptailor.results.charts import tradeoffs as charts
from gptailor.results.frames import layers as layer_frames
from gptailor.results.frames import tradeoffs as frames
from gptailor.wording import plural

widgets.open_page("Trade-offs")
run = pickers.pick_run()
view = pickers.read(run)
pickers.need_plans(view)
judging.show_choice(view)
facts, plans = view.facts, view.plans
axes = {axis.label: axis for axis in frames.axes(view.tables, plans, facts)}

# --- the whole front --------------------------------------------------------------------------------------------------
on_front = frames.front_of_all(plans, facts)
knee = frames.knee_of_all(plans, facts)
best = view.best_row
assert best is not None  # there are plans
first, second, third, fourth = st.columns(4)
first.metric("Plans judged", wording.count(len(plans)), help=pickers.judged_note(view), border=True)
second.metric(
    "On the front",
    wording.count(int(on_front.sum())),
    help="Plans that no other plan beats in every objective at once.",
    border=True,
)
third.metric(
    f"Best {facts.average_label.lower()}",
    wording.value(best["average"], best["average ±"], percent=facts.average_is_share),
    help=f"Plan {best['config_id']:.0f}, ± one standard error. {pickers.judged_note(view)}",
    border=True,
)
volume = frames.hypervolume_of_all(plans, facts)
fourth.metric(
    "Hypervolume",
    wording.value(volume),
    help="How much of the space of scores the front covers, from the corner 0; 1 is a perfect score everywhere."
    + (" Size is one of its sides: the share of the layers that is gone." if facts.has_range else "")
    if volume is not None
    else f"Told for up to {MAX_HYPERVOLUME} objectives.",
    border=True,
)

# --- two of them ------------------------------------------------------------------------------------------------------
x, y = pickers.pick_axes(axes, frames.first_axes(list(axes.values()), facts))
points = frames.front(plans, x, y)
current = pickers.chosen_plan(view)
event = widgets.show_chart(
    charts.front(points, x, y, current),
    points,
    title=f"{x.label} against {y.label}",
    note=f"{pickers.judged_note(view)} Strong points are not dominated in these two; the diamond is the knee. Bars "
    "are one "
    "standard error: plans whose bars overlap may well be equal. Click a plan to look at it below.",
    alt=f"Scatter plot of {len(points)} plans by {x.label} and {y.label}, with their Pareto front",
    key="front",
    select=True,
)
pickers.adopt_click(event, charts.SELECTION, view)

if facts.has_range:
    widgets.show_table(frames.of_sizes(view.tables, plans, facts), alt="The best plan of each size")
    st.caption(
        "The best plan of each size, as the run chooses its best: by the selection split where that was used, else by "
        "the search's own scores."
    )

# --- all of them ------------------------------------------------------------------------------------------------------
if len(facts.criteria) > 1 and len(plans) > 1:
    st.divider()
    st.markdown("#### What matters to you?")
    weights = pickers.weights(facts.criteria)
    choice = frames.pick_by_weights(plans, facts, weights)
    words, button = st.columns([5, 2], vertical_alignment="center")
    if choice is None:
        words.caption("All weights are 0: nothing to choose by.")
    else:
        words.markdown(f"With these weights: **plan {choice}**" + (", the front's knee." if choice == knee else "."))
        button.button(
            f"Look at plan {choice}",
            icon=":material/near_me:",
            on_click=url.choose,
            args=("config", choice),
            disabled=choice == current,
        )
    lines = frames.parallel(plans, facts, current)
    widgets.show_chart(
        charts.parallel(lines, frames.ends(plans, facts), facts.average_label, facts.average_is_share),
        lines,
        title="All objectives at once",
        note=f"A line a plan ({lines['config_id'].nunique()} of {len(plans)}: the front in full colour, then the best "
        "others, faint); "
        "up is better on every axis. The thick orange line is the plan looked at.",
        alt="Parallel coordinates of plans over all objectives",
        key="parallel",
        percent=facts.average_is_share,
    )

# --- one plan ---------------------------------------------------------------------------------------------------------
st.divider()
st.markdown("#### The plan looked at")
left, _ = st.columns([2, 3])
with left:
    plan = pickers.pick_plan(view)
place = frames.place_of(view.trials, plans, plan)
one = layer_frames.strip(view.layers, plan)
row = plans[plans["config_id"] == plan].iloc[0]
a, b, c, d = st.columns(4)
a.metric(
    "Rank",
    f"{place.rank} of {place.of}",
    help=f"By {facts.average_label.lower()}. {pickers.judged_note(view)}",
    border=True,
)
b.metric(
    facts.average_label,
    wording.value(row["average"], row["average ±"], percent=facts.average_is_share),
    help="± one standard error.",
    border=True,
)
c.metric("Layers · parameters", f"{wording.count(row['kept_layers'])} · {wording.size(row['parameters'])}", border=True)
d.metric(
    "First tried after",
    wording.duration(place.seconds),
    help=f"Suggested by: {place.origin}. Trials spent on it: {place.trials}.",
    border=True,
)

widgets.show_chart(
    layer_charts.strip(one, facts),
    one,
    title=f"Layers of plan {plan}",
    note=f"{len(one)} layers of the base: {int((one['source'] == 'removed').sum())} removed, "
    f"{int((one['source'] == 'base').sum())} kept as they are.",
    alt=f"Source of each layer of plan {plan}",
    key="strip",
)
scores = frames.scores_of(view.trials, facts, plan)
retention = facts.average_is_share
widgets.show_chart(
    charts.scores_at_rungs(scores, facts.rungs, retention),
    scores,
    title=f"Scores of plan {plan} at each rung",
    note=f"{plural(scores['budget'].nunique(), 'rung')} reached; bars are one standard error"
    + (", as a share of the dense model's score." if retention else "."),
    alt=f"Scores of plan {plan} at each rung",
    key="scores",
)
