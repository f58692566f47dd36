"""From command to first trial, and from output to output: `PYTHONPATH=. python tests/bench/start.py`.

    command    `gptailor search` of the demo, without shared references and with them
    click      three demo searches one after another from one server, whose engines are forked from a host
    --help, runs, show    seconds until they end, the median of seven, in turns

A first trial begins when the journal says so. Seconds by part of the work are the store's.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from gptailor.launch import engine, warm
from gptailor.launch.process import clean_environment, python
from gptailor.results.frames.seconds import seconds
from gptailor.spec.files import load_spec
from gptailor.store import queries
from gptailor.store.folder import RunFolder, run_folders
from gptailor.wording import as_table

RUN_FILE, FEW = "data/presets/demo.yaml", ["trials=2"]
SEARCHES, ROUNDS = 3, 7
PATIENCE = 600.0


def first_trial(root: Path, known: set[str], began: float) -> tuple[RunFolder, float]:
    """The run that is not known yet, and the seconds until its first trial. Raises SystemExit after long."""
    while time.monotonic() < began + PATIENCE:
        for folder in run_folders(root):
            if folder.run_id not in known and folder.journal.exists() and "trial_started" in folder.journal.read_text():
                return folder, time.monotonic() - began
        time.sleep(0.02)
    raise SystemExit(f"no trial began within {PATIENCE:.0f} s")


def row(name: str, folder: RunFolder, took: float) -> tuple[str, ...]:
    while engine.is_alive(folder):
        time.sleep(0.1)
    parts = seconds(queries.read_run(folder).seconds).set_index("part").seconds
    return name, f"{took:.2f}", *(f"{parts.get(part, 0.0):.2f}" for part in ("start", "loading", "references", "store"))


def by_command(root: Path) -> list[tuple[str, ...]]:
    rows = []
    for name in ("command", "command, references shared"):
        known, began = {folder.run_id for folder in run_folders(root)}, time.monotonic()
        command = python("search", RUN_FILE, "--runs", str(root), "--set", FEW[0])
        with subprocess.Popen(command, env=clean_environment(), stdout=subprocess.DEVNULL):
            found = first_trial(root, known, began)
        rows.append(row(name, *found))
    return rows


def by_click(root: Path) -> list[tuple[str, ...]]:
    engines, rows = warm.WarmEngines(), []
    for number in range(1, SEARCHES + 1):
        known, began = {folder.run_id for folder in run_folders(root)}, time.monotonic()
        engine.launch(root, load_spec(RUN_FILE, FEW), f"click {number} {began}", engines.spawn)
        rows.append(row(f"click {number}", *first_trial(root, known, began)))
    engines.close()
    return rows


def outputs(root: Path) -> list[tuple[str, ...]]:
    asked = {
        "--help": python("--help"),
        "runs": python("runs", "--runs", str(root)),
        "show": python("show", run_folders(root)[0].run_id, "--runs", str(root)),
    }
    took: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(ROUNDS):
        for name, command in asked.items():
            began = time.monotonic()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            took[name].append(time.monotonic() - began)
    return [(name, f"{statistics.median(found):.2f}", "", "", "", "") for name, found in took.items()]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        commands, clicks = Path(folder) / "commands", Path(folder) / "clicks"
        rows = [*by_command(commands), *by_click(clicks), *outputs(commands)]
    print(as_table([("", "seconds", "start", "loading", "references", "store"), *rows]))


if __name__ == "__main__":
    main()
