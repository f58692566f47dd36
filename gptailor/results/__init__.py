"""What came of a run: scores, the best plan, statistics, tables, charts and reports.

No torch, no Streamlit.
"""
