"""Other processes that hold, read or write a run's database."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from gptailor.store import queries
from gptailor.store.folder import RunFolder

TESTS = Path(__file__).resolve().parents[1]

TABLES = ("runs", "trials", "scores", "plans", "layers", "evaluations")

WRITE_FOR_EVER = """
import sys
from helpers.store_samples import PLAN, Path, RunFolder, RunWriter, a_trial, success
writer = RunWriter.open(RunFolder(Path(sys.argv[1])))
for trial_id in range(int(sys.argv[2]), 10_000):
    with writer.batch():
        writer.start_trial(a_trial(trial_id, trial_id))
        writer.record_plan(trial_id, PLAN, 1)
        writer.finish_trial(trial_id, success())
    print(trial_id, flush=True)
"""

HOLD_OPEN = """
import duckdb, sys, time
con = duckdb.connect(sys.argv[1], read_only=sys.argv[2] == "read")
con.execute("SELECT count(*) FROM runs").fetchall()
print("open", flush=True)
time.sleep(float(sys.argv[3]))
"""


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def kill(process: subprocess.Popen[str]) -> str:
    process.kill()
    rest = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL
    return rest


def contents(folder: RunFolder) -> dict[str, list[list[str]]]:
    """All rows, as text, without what tells of the moment they were written."""
    tables = queries.read_run(folder)
    frames = {name: getattr(tables, name) for name in TABLES}
    frames["runs"] = frames["runs"].drop(columns=["journal_applied", "heartbeat_at"])
    return {name: frame.map(str).values.tolist() for name, frame in frames.items()}
