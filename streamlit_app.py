"""Home: which runs are there? The dashboard's entry: `streamlit run streamlit_app.py`."""

from gptailor.dashboard import home, readers, run_table, widgets

widgets.open_page("Home")
runs = readers.runs()
notes = home.saved_notes(runs)
home.welcome(runs)
shown = home.find(runs, notes)
if shown:
    ticked = run_table.table(shown, notes)
    home.actions(ticked)
elif runs:
    widgets.empty("No run matches these filters.", ":material/filter_alt_off:")
else:
    widgets.empty("No run is saved here yet.")
home.bring_in()
home.follow(runs)
