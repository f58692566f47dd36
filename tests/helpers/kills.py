"""A search that is killed again and again, beside one that is not: what they must have in common.

`python tests/helpers/kills.py` is the whole proof: the demo search, killed 20 times, with engines as the
product starts them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gptailor.launch.engine import LOST, is_alive, prepare, resume, start, state
from gptailor.launch.process import read_holder
from gptailor.results.story import run_json
from gptailor.results.summary import run_summary
from gptailor.spec.files import load_spec
from gptailor.spec.run import RunSpec
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.journal import read_journal
from gptailor.trial import RunStatus, TrialStatus

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "data" / "presets" / "demo.yaml"


def wait_for(condition: Callable[[], bool], seconds: float = 1800.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def kill_group(folder: RunFolder) -> None:
    """SIGKILL to the engine and to what stands beside it, as a power cut would. None may be left."""
    holder = read_holder(folder.lock)
    assert holder is not None
    group = os.getpgid(holder.pid)  # led by the engine, or by its supervisor
    assert group != os.getpgrp(), "an engine has a group of its own"
    os.killpg(group, signal.SIGKILL)
    wait_for(lambda: not is_alive(folder), 10)


def status_of(folder: RunFolder) -> str:
    return state(folder, run_summary(folder).status)


def n_started(folder: RunFolder) -> int:
    """Trials begun, those begun again counted again."""
    return folder.journal.read_bytes().count(b'"event":"trial_started"') if folder.journal.exists() else 0


def n_stored(folder: RunFolder) -> int:
    return folder.journal.read_bytes().count(b'"event":"trial_finished"') if folder.journal.exists() else 0


def search(root: Path, spec: RunSpec, kills: int = 0, seed: int = 0) -> RunFolder:
    """A finished run of `spec`, killed at random moments: while engines start, replay, score and write."""
    draw = random.Random(seed)
    folder = prepare(root, spec)
    start(folder)
    for moment in sorted(draw.uniform(0, spec.trials) for _ in range(kills)):
        wait_for(lambda moment=moment: n_stored(folder) >= int(moment) or not is_alive(folder))  # type: ignore[misc]
        time.sleep(draw.uniform(0, 0.4))
        if not is_alive(folder):  # it was quicker
            break
        kill_group(folder)
        assert status_of(folder) in (LOST, RunStatus.FINISHED)
        assert resume(folder) is not None
    wait_for(lambda: not is_alive(folder), 1200)
    assert status_of(folder) == RunStatus.FINISHED, folder.log.read_text()[-3000:]
    return folder


def trials(folder: RunFolder) -> list[tuple[Any, ...]]:
    """(number, plan, budget, status, scores) of every trial: what must not depend on interruptions."""
    tables = queries.read_run(folder)
    hashes = dict(zip(tables.plans.config_id, tables.plans.plan_hash, strict=True))
    scores = tables.scores.sort_values(["trial_id", "benchmark", "metric"]).groupby("trial_id").score.agg(tuple)
    return [
        (int(t.trial_id), hashes[t.config_id], int(t.budget), t.status, scores.get(t.trial_id, ()))
        for t in tables.trials.itertuples()
    ]


def front(folder: RunFolder) -> list[Any]:
    return [(plan["config_id"], plan["scores"]) for plan in run_json(folder)["front"]]


def scored_twice(folder: RunFolder) -> list[Any]:
    """Trials that ended twice (one that was cancelled is to be run again), and examples that were computed twice."""
    events = read_journal(folder.journal).events
    finished = [event["row"] for event in events if event["event"] == "trial_finished"]
    ended = Counter(row["trial_id"] for row in finished if row["status"] != TrialStatus.CANCELLED)
    keys = ("plan_hash", "benchmark", "metric", "split", "first")
    computed = Counter(tuple(event["row"][key] for key in keys) for event in events if event["event"] == "examples")
    return [what for counts in (ended, computed) for what, count in counts.items() if count > 1]


def main(kills: int = 20) -> int:
    spec = load_spec(DEMO)
    with tempfile.TemporaryDirectory(prefix="gptailor-kills-") as scratch:
        began = time.monotonic()
        whole = search(Path(scratch) / "whole", spec)
        between = time.monotonic()
        killed = search(Path(scratch) / "killed", spec, kills)
        begun = n_started(killed)
        n_kills = killed.log.read_text().count("trials are stored and will not be run again")
        rows = {
            "trials": (len(trials(whole)), len(trials(killed))),
            "trials begun": (n_started(whole), begun),
            "seconds": (round(between - began), round(time.monotonic() - between)),
            "plans on the front": (len(front(whole)), len(front(killed))),
        }
        equal = trials(whole) == trials(killed) and front(whole) == front(killed)
        twice = scored_twice(killed)
    print(f"{'':<22} {'never killed':>12} {f'{kills} kills':>12}")
    for name, (left, right) in rows.items():
        print(f"{name:<22} {left:>12} {right:>12}")
    print(f"engines that found trials stored: {n_kills}")
    print(f"trials, scores and front equal: {equal}; scored twice: {json.dumps(twice)}")
    return 0 if equal and not twice else 1


if __name__ == "__main__":
    sys.exit(main())
