"""Models: how do I take a model home?"""

import streamlit as st

from gptailor.dashboard import healing, models, pickers, widgets, worth
from gptailor.results.charts import layers as layer_charts
from gptailor.results.frames import layers as layer_frames

widgets.open_page("Models")
run = pickers.pick_run()
view = pickers.read(run)
pickers.need_plans(view)
plan = pickers.pick_plan(view, with_kept=True)
models.facts(view, run, plan)

name, one = view.name(plan), view.strip(plan)
widgets.show_chart(
    layer_charts.strip(one, view.facts),
    one,
    title=f"Layers of {name}",
    note="Where each layer of the base comes from: × is removed, · is the base's own layer, letters are candidates."
    + layer_frames.fitted_note(one),
    alt=f"Source of each layer of {name}",
    key="models.strip",
)
models.show_results(view, run, plan)
worth.show_of_plan(view, run, plan)
st.divider()
models.export(run, plan)
st.divider()
healing.heal(run, plan)
st.divider()
models.try_it(run, view, plan)
