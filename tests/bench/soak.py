"""Everything at once, for a while: `python tests/bench/soak.py --minutes 30` (`make soak`) prints a table.

Four engines search the demo family (in the queue of their device, as engines do), eight browsers poll their pages, and
somebody kills, stops, pauses, resumes, extends and deletes at random. Bars: no trial lost, none scored twice, each as
in a run left in peace; no page with an exception; no process left over; no memory that grows; write wait p99 < 1 s.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import kills

from bench.dashboard import Browsers, server
from gptailor.errors import UserError
from gptailor.launch.engine import delete_run, is_alive, prepare, request, resume, start, stop
from gptailor.launch.extend import extend
from gptailor.launch.process import read_holder, wait_until
from gptailor.spec.files import load_spec
from gptailor.spec.run import RunSpec
from gptailor.store.folder import RunFolder
from gptailor.store.journal import read_journal
from gptailor.trial import RunStatus

ROOT = Path(__file__).resolve().parents[2]
ENGINES, BROWSERS = 4, 8
FIRST, MORE = 12, 6
"""Trials of a run, and how many it is extended by."""
WRITE_BAR = 1.0
LAST_GASP = 5.0
"""Seconds that a process may take to end after it let go of its run."""
SEE_IT_GO = 5.0
"""Seconds in which a browser that polls asks once more."""
STARTING = 400.0
"""Megabytes below which an engine still imports what it needs."""
Row = tuple[str, str, str, bool]


class Slot:
    """One place for a run: it is replaced when it was deleted, with the browsers that look at it."""

    def __init__(self, root: Path, spec: RunSpec, port: int) -> None:
        self._root, self._spec, self._port = root, spec, port
        self.exceptions: list[str] = []
        self.answers = 0
        self._begin()

    def _begin(self) -> None:
        self.folder: RunFolder = prepare(self._root, self._spec)
        start(self.folder)
        self.n_done, self.n_asked = 0, FIRST
        self.browsers = Browsers(self._port, self.folder.run_id, BROWSERS // ENGINES)
        self.browsers.__enter__()

    def leave(self) -> None:
        self.browsers.__exit__(None, None, None)
        self.exceptions += self.browsers.exceptions
        self.answers += self.browsers.answers

    def replace(self) -> None:
        stop(self.folder)
        delete_run(self.folder)
        seen = self.browsers.answers
        wait_until(lambda: self.browsers.answers > seen, SEE_IT_GO)  # those of a run that had ended do not ask again
        self.leave()
        self._begin()


class Soak:
    """The runs, what was done to them, and what came of it."""

    def __init__(self, root: Path, port: int, spec: RunSpec, peaceful: list[Any], seed: int) -> None:
        self._draw = random.Random(seed)
        self._root, self._peaceful = root, peaceful
        self.slots = [Slot(root, spec, port) for _ in range(ENGINES)]
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.waits: list[float] = []
        self.n_trials = 0

    def act(self) -> None:
        """Do something to one of the runs, then look whether all is well."""
        slot = self._draw.choice(self.slots)
        folder, alive = slot.folder, is_alive(slot.folder)
        acts: dict[str, Callable[[], Any]] = {"resume": lambda: resume(folder)}
        if alive:
            acts |= {
                "kill": lambda: kills.kill_group(folder),
                "kill the engine alone": lambda: os.kill(self._pid(folder), 9),
                "stop": lambda: stop(folder),
                "pause": lambda: request(folder, "pause"),
            }
        elif slot.n_done:  # before its first trial, it would begin as a run of more trials begins
            acts["extend"] = lambda: self._extend(slot)
        if slot.n_done >= FIRST // 2:
            acts["delete"] = lambda: (self.check(slot, last=True), slot.replace())  # type: ignore[func-returns-value]
        name = self._draw.choice(sorted(acts))
        try:
            acts[name]()
        except (ProcessLookupError, UserError) as problem:  # it ended, or was started, just now
            name = f"{name}, too late ({type(problem).__name__})"
        self.done[name] += 1
        if slot.folder == folder:
            self.check(slot)
        if self._draw.random() < 0.7:
            resume(slot.folder)

    def check(self, slot: Slot, last: bool = False) -> None:
        """Nothing lost, nothing twice, everything as in a run left in peace."""
        if not slot.folder.exists():
            return
        try:
            trials = [trial for trial in kills.trials(slot.folder) if trial[3] == "success"]
        except UserError as problem:
            self.done[f"a look that found it busy ({type(problem).__name__})"] += 1
            return
        if trials != self._peaceful[: len(trials)]:
            first = next(n for n, (a, b) in enumerate(zip(trials, self._peaceful, strict=False)) if a != b)
            self.wrong.append(f"{slot.folder.run_id}: trial {trials[first]} in peace is {self._peaceful[first]}")
        if len(trials) < slot.n_done:
            self.wrong.append(f"{slot.folder.run_id}: {slot.n_done} trials were done, {len(trials)} are")
        if twice := kills.scored_twice(slot.folder):
            self.wrong.append(f"{slot.folder.run_id}: scored twice: {twice}")
        slot.n_done = len(trials)
        if last:
            self.waits += write_waits(slot.folder)
            self.n_trials += len(trials)

    def end(self) -> None:
        """Let every run go to its end, and look at all of it."""
        for slot in self.slots:
            stop(slot.folder)
        for slot in self.slots:
            resume(slot.folder)
            kills.wait_for(lambda slot=slot: not is_alive(slot.folder), 600)
            if kills.status_of(slot.folder) != RunStatus.FINISHED or slot.n_asked != len(kills.trials(slot.folder)):
                self.wrong.append(f"{slot.folder.run_id}: is {kills.status_of(slot.folder)} in the end")
            self.check(slot, last=True)
            slot.leave()
        wait_until(lambda: not engines_of(self._root), LAST_GASP)
        self.wrong += [f"process {process.pid} is left over" for process in engines_of(self._root)]

    def _extend(self, slot: Slot) -> None:
        asked = min(slot.n_asked + MORE, len(self._peaceful))
        extend(slot.folder, asked, None)
        slot.n_asked = asked

    @staticmethod
    def _pid(folder: RunFolder) -> int:
        holder = read_holder(folder.lock)
        if holder is None:
            raise ProcessLookupError
        return holder.pid


def engines_of(root: Path) -> list[psutil.Process]:
    """Every process that works on a run of this folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if " engine " in line and str(root) in line:
            found.append(process)
    return found


def write_waits(folder: RunFolder) -> list[float]:
    """Seconds that the engine spent neither suggesting nor scoring: what it waited for its store.

    Between a trial's start, its end and the next start. Where it paused or was started in between, nothing is known.
    """
    waits: list[float] = []
    before: dict[str, Any] | None = None
    for event in read_journal(folder.journal).events:
        kind, row = event["event"], event.get("row", {})
        if kind in ("status", "run"):
            before = None
        elif kind == "trial_started":
            if before is not None:
                between = datetime.fromisoformat(row["started_at"]) - datetime.fromisoformat(before["ended_at"])
                waits.append(between.total_seconds() - row["suggest_seconds"])
            before = row
        elif kind == "trial_finished":
            if before is not None and before["trial_id"] == row["trial_id"] and row["status"] == "success":
                took = datetime.fromisoformat(row["ended_at"]) - datetime.fromisoformat(before["started_at"])
                waits.append(took.total_seconds() - row["stitch_seconds"] - row["evaluate_seconds"])
            before = row
    return waits


def soak(minutes: float, seed: int = 0, pause: float = 2.0) -> list[Row]:
    """The table: (what, figure, note, whether it is within its bar)."""
    spec = load_spec(ROOT / "data" / "presets" / "demo.yaml", [f"trials={FIRST}", "budget.max=90"])
    with tempfile.TemporaryDirectory(prefix="gptailor-soak-") as scratch:
        root = Path(scratch) / "runs"
        peaceful = kills.search(Path(scratch) / "peaceful", spec)
        extend(peaceful, FIRST + 4 * MORE, None)
        kills.wait_for(lambda: not is_alive(peaceful), 600)
        root.mkdir()
        of_server: list[float] = []
        of_engines: list[float] = []
        with server(root) as (process, port):
            soaked = Soak(root, port, spec, kills.trials(peaceful), seed)
            try:
                end = time.monotonic() + 60 * minutes
                while time.monotonic() < end:
                    time.sleep(pause)
                    soaked.act()
                    of_server.append(process.memory_info().rss / 1e6)
                    largest = max(memory_of(slot.folder) for slot in soaked.slots)
                    if largest > STARTING:
                        of_engines.append(largest)
                soaked.end()
            finally:
                for slot in soaked.slots:
                    stop(slot.folder, patience=0.5)
    acts = ", ".join(f"{count} x {name}" for name, count in sorted(soaked.done.items()))
    exceptions = [text for slot in soaked.slots for text in slot.exceptions]
    p99 = sorted(soaked.waits)[int(0.99 * len(soaked.waits))] if soaked.waits else 0.0
    return [
        (f"{minutes:g} min, {sum(soaked.done.values())} acts", f"{soaked.n_trials} trials", acts, True),
        ("trials lost, changed, scored twice", str(len(soaked.wrong)), "; ".join(soaked.wrong[:3]), not soaked.wrong),
        (
            f"answers to {BROWSERS} browsers",
            str(sum(slot.answers for slot in soaked.slots)),
            f"{len(exceptions)} pages with an exception {exceptions[:2] or ''}",
            not exceptions,
        ),
        (
            "write wait",
            f"p99 {1000 * p99:.0f} ms",
            f"of {len(soaked.waits)}; max {1000 * max(soaked.waits, default=0):.0f} ms; bar {WRITE_BAR:g} s",
            p99 < WRITE_BAR,
        ),
        _grown("server memory", of_server, minutes),
        _grown("largest engine's memory", of_engines, minutes),
    ]


def memory_of(folder: RunFolder) -> float:
    """Megabytes of the process that holds the run; 0 where none does."""
    holder = read_holder(folder.lock)
    try:
        return psutil.Process(holder.pid).memory_info().rss / 1e6 if holder and is_alive(folder) else 0.0
    except psutil.NoSuchProcess:
        return 0.0


def _grown(what: str, megabytes: list[float], minutes: float) -> Row:
    """Judged from ten minutes on: before, the server still imports what its pages need."""
    megabytes = megabytes or [0.0]
    third = max(1, len(megabytes) // 3)
    first, last = statistics.median(megabytes[:third]), statistics.median(megabytes[-third:])
    note = f"medians of the first and the last third; highest {max(megabytes):.0f} MB"
    return what, f"{first:.0f} to {last:.0f} MB", note, minutes < 10 or last < 1.1 * first + 20


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rows = soak(asked.minutes, asked.seed)
    for what, value, note, fine in rows:
        print(f"{'ok ' if fine else 'BAD'}  {what:<36} {value:>16}   {note}")
    return 0 if all(row[3] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
