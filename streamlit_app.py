"""Home: which runs are there? The dashboard's entry: `streamlit run streamlit_app.py`.

Streamlit reads this file twice: imported, it gives the web server; as a script, it is the page.
"""

import streamlit as st

if __name__ != "__main__":
    from gptailor.dashboard import serving

    app = st.App(__file__, **serving.OPTIONS)
else:
    from gptailor.dashboard import home, readers, run_table, widgets

    widgets.open_page("Home")
    runs = readers.runs()
    notes = home.saved_notes(runs)
    home.welcome(runs)
    shown = home.find(runs, notes)
    if shown:
        ticked = run_table.table(shown, notes)
        home.offer(ticked)
    elif runs:
        widgets.empty("No run matches these filters.", ":material/filter_alt_off:")
    else:
        widgets.empty("No run is saved here yet.")
    home.bring_in()
    home.follow(runs)
