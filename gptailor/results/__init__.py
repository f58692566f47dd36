"""What came of a run: scores, the best plan, statistics,
and the tables, charts and reports made of them. No torch, no Streamlit.
"""
