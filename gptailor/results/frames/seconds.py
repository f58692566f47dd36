"""Where did the time go? A run's seconds by part of the work."""

from __future__ import annotations

import pandas as pd

from gptailor.stopwatch import Part


def seconds(kept: pd.DataFrame) -> pd.DataFrame:
    """Where the run's seconds went, over all processes that worked on it, in the order of a run's life.

    kept: RunTables.seconds. Columns: part, seconds, share (of them all). Empty of runs made before it was kept.
    """
    spent = kept.groupby("part")["seconds"].sum()
    rows = [(str(part), float(spent[part])) for part in Part if part in spent.index]
    frame = pd.DataFrame(rows, columns=["part", "seconds"])
    return frame.assign(share=frame["seconds"] / (frame["seconds"].sum() or 1.0))
