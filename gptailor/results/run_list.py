"""The saved runs as data, for the command line: without pandas, as long as their engines kept their summaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptailor.launch.engine import state
from gptailor.results.summary import list_runs
from gptailor.store.folder import RunFolder


def runs_json(root: str | Path) -> list[dict[str, Any]]:
    """One object a run, newest first."""
    listed = []
    for summary in list_runs(root):
        folder = RunFolder.of(root, summary.run_id)
        listed.append(
            {
                "run_id": summary.run_id,
                "name": summary.name,
                "status": str(state(folder, summary.status)),
                "trials": summary.n_done,
                "trials_asked": summary.n_asked,
                "failed": summary.n_failed,
                "removed": summary.n_removed,
                "removed_from": summary.fewest_removed,
                "layers": summary.n_layers,
                "best_config": summary.best_config,
                "retention": summary.retention,
                "held_out": summary.held_out,
                "created_at": summary.created_at.isoformat() if summary.created_at else None,
                "problem": summary.problem,
            }
        )
    return listed
