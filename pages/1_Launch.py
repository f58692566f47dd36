"""Launch: what should be searched, and what will it take?"""

import streamlit as st

from gptailor.dashboard import jobs, launching, redundancy, starting, widgets

widgets.open_page("Launch")
left, right = st.columns([3, 2], gap="large")
with left:
    preset = launching.pick_preset()
    values, draft = launching.read(preset)
    launching.fields(preset, values, draft)
with right:
    st.markdown("#### Before it starts")
    ready = False
    if draft.spec is None:
        widgets.empty("Some fields need a change before this can be judged: see the red lines.", ":material/edit:")
    else:
        ready = starting.outlook(draft.spec)
        jobs.show_problem()
        redundancy.before_start(draft.spec, ready)
    starting.start_button(preset, draft.spec, ready)
    if draft.spec is not None:
        starting.in_other_words(draft.spec, preset)
if draft.spec is not None:
    redundancy.show_family(draft.spec, ready)
