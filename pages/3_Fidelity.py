"""Fidelity: where did the budget go, and can the cheap rungs be trusted?"""

import streamlit as st

from gptailor.dashboard import pickers, widgets
from gptailor.results.charts import fidelity as charts
from gptailor.results.frames import fidelity as frames
from gptailor.wording import plural

widgets.open_page("Fidelity")
run = pickers.pick_run()
view = pickers.read(run)
facts, trials = view.facts, view.trials
low, high = facts.rungs[0], facts.rungs[-1]

if trials.empty:
    widgets.empty("No trial has ended yet, so nothing was spent.", ":material/hourglass_empty:")
    st.stop()

shares = frames.rung_shares(trials, facts)
ended = int(shares["trials"].sum())
widgets.show_chart(
    charts.shares(frames.share_rows(shares), facts.rungs),
    shares,
    title="Where the budget went",
    note=f"{plural(ended, 'trial')} that ended, by rung; failed ones count. "
    f"At the lowest rung: {shares['trial_share'].iloc[0]:.1%} of the trials (the paper reports "
    f"{frames.PAPER_LOWEST_SHARE:.1%}).",
    alt=f"Share of trials, examples and time at each of {len(facts.rungs)} rungs",
    key="shares",
)

pickers.need_plans(view)
st.divider()
agreed = frames.agreement(trials, facts)
moves = frames.rank_moves(trials, low, high)
st.markdown("#### Can the cheap rungs be trusted?")
st.info(frames.verdict(agreed, moves, facts), icon=":material/verified:")
if len(facts.rungs) < 2:
    st.stop()

left, right = st.columns([3, 2], gap="large")
with left:
    widgets.show_chart(
        charts.agreement(agreed, facts.names, facts.average_label),
        agreed,
        title="Do two rungs rank plans alike?",
        note="Spearman's rank correlation over the plans scored on both rungs: 1 is the same order, 0 is no relation. "
        "Only "
        "promoted plans are scored twice, and they are close to each other, so this is a hard test.",
        alt="Rank correlation between rungs for each objective",
        key="agreement",
    )
with right:
    if len(moves):
        n = len(moves) // 2
        widgets.show_chart(
            charts.rank_moves(moves, low, high),
            moves,
            title=f"Who changes places between {low} and {high} examples?",
            note=f"Ranks by {facts.average_label.lower()} of the {plural(n, 'plan')} scored on both rungs. Crossing "
            "lines are rank flips.",
            alt=f"Ranks of {n} plans at {low} and at {high} examples",
            key="moves",
            percent=facts.average_is_share,
        )
    else:
        widgets.empty(f"No plan has been scored on both {low} and {high} examples.", ":material/stairs:")

st.divider()
ladder = frames.ladder(trials, facts)
rungs_long = frames.ladder_rows(ladder, facts)
widgets.show_chart(
    charts.ladder(rungs_long, facts.rungs, facts.average_label, facts.average_is_share),
    ladder,
    title="Which plans were promoted?",
    note=f"Plans that were scored at least once (n = {len(ladder)}), a line each; a line ends where the plan was "
    "not promoted. Lower rungs read the examples on which plans differ most, so plans lie further apart there. "
    + " ".join(frames.promotion_words(frames.promotions(ladder, facts))),
    alt="Average at each rung for every plan",
    key="ladder",
)
