"""Many devices, the long forms: what a second worker is worth, and how busy 64 of them stay.

    PYTHONPATH=. python tests/bench/workers.py pair --family DIR       # two local workers of one thread against one
    PYTHONPATH=. python tests/bench/workers.py simulated               # 64 workers, trials of 20 s, no model
    PYTHONPATH=. python tests/bench/workers.py kills                   # a worker is killed every 20 s

pair: the family's search (DIR holds `base` and its candidates), 60 trials on PIQA and CommonsenseQA, from the first
trial to the last; bar 0.75. Scores of both are compared plan by plan. simulated: times drawn from a real run's; bar
95 %. kills: the demo search; every trial is scored once, and the front is that of the same plans scored in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gptailor.launch.engine import is_alive, prepare, start
from gptailor.launch.process import read_holder
from gptailor.plan import StitchPlan
from gptailor.results.story import run_json
from gptailor.results.summary import run_summary
from gptailor.scoring.plan_scorer import PlanScorer
from gptailor.spec.files import build_spec, load_spec
from gptailor.spec.run import RunSpec
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.trial import TrialStatus

ROOT = Path(__file__).resolve().parents[2]
PAIR_BAR, BUSY_BAR = 0.75, 0.95
SECONDS_BETWEEN_KILLS = 20.0
Scores = dict[tuple[str, int], tuple[float, ...]]


def run(root: Path, spec: RunSpec, meanwhile: Callable[[RunFolder], None] = lambda _folder: None) -> RunFolder:
    folder = prepare(root, spec)
    start(folder)
    while is_alive(folder):
        meanwhile(folder)
        time.sleep(0.2)
    status = run_summary(folder).status
    if status != "finished":
        raise SystemExit(f"the run is {status}:\n{folder.log.read_text()[-3000:]}")
    return folder


def seconds_of(folder: RunFolder) -> float:
    """From when the first trial was begun to when the last one ended."""
    trials = queries.read_run(folder).trials
    return float((trials.ended_at.max() - trials.started_at.min()).total_seconds())


def scores_of(folder: RunFolder) -> Scores:
    """(plan, budget) -> scores."""
    tables = queries.read_run(folder)
    hashes = dict(zip(tables.plans.config_id, tables.plans.plan_hash, strict=True))
    ordered = tables.scores.sort_values(["trial_id", "benchmark", "metric"])
    scores = ordered.groupby("trial_id").score.agg(tuple)
    return {(hashes[t.config_id], int(t.budget)): scores.get(t.trial_id, ()) for t in tables.trials.itertuples()}


def pair(arguments: argparse.Namespace) -> int:
    family = Path(arguments.family)
    changes = [f"trials={arguments.trials}", "selection=[]", "held_out=[]", "budget={min: 27, max: 243}"]
    one = load_spec(ROOT / "data" / "experiments" / "families" / "smollm2.yaml", changes)
    one = one.model_copy(update={"objectives": one.objectives[:2]})
    models = {"base_model": str(family / "base"), "workers": None}
    models |= {"candidates": {p.name: str(p) for p in sorted(family.iterdir()) if p.is_dir() and p.name != "base"}}  # type: ignore[dict-item]
    single = build_spec(one.model_dump(mode="json") | models)
    double = build_spec(single.model_dump(mode="json") | {"workers": {"local": 2}})
    with tempfile.TemporaryDirectory(prefix="gptailor-workers-") as scratch:
        os.environ["OMP_NUM_THREADS"] = "1"
        alone = run(Path(scratch) / "one", single)
        # Local workers divide the threads that their engine has among them: two, one each.
        os.environ["OMP_NUM_THREADS"] = "2"
        together = run(Path(scratch) / "two", double)
        before, after = seconds_of(alone), seconds_of(together)
        left, right = scores_of(alone), scores_of(together)
        shared = left.keys() & right.keys()
        equal = all(left[key] == right[key] for key in shared)
    print(f"one worker {before:.1f} s, two workers {after:.1f} s: {after / before:.2f} of the time (bar {PAIR_BAR})")
    print(f"plans and rungs in both: {len(shared)} of {len(left)}; scores equal: {equal}")
    return 0 if after <= PAIR_BAR * before and equal and shared else 1


def simulated(arguments: argparse.Namespace) -> int:
    from helpers.simulated import busy, run_search, simulated_workers

    with tempfile.TemporaryDirectory(prefix="gptailor-workers-") as scratch:
        folder = Path(scratch)
        with simulated_workers(folder, arguments.workers, arguments.seconds) as (cluster, done):
            changes = [f"workers.scheduler={cluster.address}", f"trials={arguments.trials}", "selection=[]"]
            made = prepare(folder / "runs", load_spec(ROOT / "data" / "presets" / "demo.yaml", changes))
            run_search(made)
            share = busy(done, arguments.workers)
        trials = queries.read_run(made).trials
    asked = trials.suggest_seconds
    print(f"{arguments.workers} workers, {len(trials)} trials of {arguments.seconds:g} s")
    print(f"busy {share:.1%} (bar {BUSY_BAR:.0%}); asking took {asked.mean():.3f} s, {asked.max():.3f} s at most")
    return 0 if share >= BUSY_BAR else 1


def kills(arguments: argparse.Namespace) -> int:
    spec = load_spec(ROOT / "data" / "presets" / "demo.yaml", ["workers.local=2", "selection=[]"])
    last, n_killed = time.monotonic(), 0

    def kill_one(folder: RunFolder) -> None:
        nonlocal last, n_killed
        holder = read_holder(folder.lock)
        if time.monotonic() - last < arguments.every or holder is None:
            return
        last = time.monotonic()
        workers: list[psutil.Process] = []
        try:
            workers = [p for p in psutil.Process(holder.pid).children(recursive=True) if _is_worker(p)]
        except psutil.NoSuchProcess:
            return
        if workers:
            random.choice(workers).send_signal(signal.SIGKILL)
            n_killed += 1

    with tempfile.TemporaryDirectory(prefix="gptailor-workers-") as scratch:
        folder = run(Path(scratch), spec, kill_one)
        tables = queries.read_run(folder)
        bench = PlanScorer.open(spec, spec.objectives, max_examples=spec.budget.max)
        calm = calm_scores(tables, bench)
        same = calm == scores_of(folder)
        once = sorted(tables.trials.told_as) == list(range(spec.trials))
        ended = set(tables.trials.status) == {TrialStatus.SUCCESS}
        fronts = len(run_json(folder)["front"])
    print(f"{n_killed} workers killed; {len(tables.trials)} trials, each told once: {once}, all scored: {ended}")
    print(f"scores equal those of one worker in peace: {same}, and so does the front of {fronts} plans")
    return 0 if same and once and ended else 1


def _is_worker(process: psutil.Process) -> bool:
    """A process that was forked from the one that has imported everything."""
    parent = process.parent()
    return parent is not None and "forkserver" in " ".join(parent.cmdline()) and not process.children()


def calm_scores(tables: Any, bench: PlanScorer) -> Scores:
    plans = {row.config_id: StitchPlan.from_json(json.loads(row.plan)) for row in tables.plans.itertuples()}
    found: Scores = {}
    for trial in tables.trials.sort_values("budget").itertuples():
        plan = plans[trial.config_id]
        scores = sorted(bench.score(plan, int(trial.budget)).scores, key=lambda score: (score.benchmark, score.metric))
        found[plan.hash, int(trial.budget)] = tuple(score.score for score in scores)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ways = parser.add_subparsers(required=True)
    two = ways.add_parser("pair")
    two.add_argument("--family", required=True)
    two.add_argument("--trials", type=int, default=60)
    two.set_defaults(function=pair)
    many = ways.add_parser("simulated")
    many.add_argument("--workers", type=int, default=64)
    many.add_argument("--seconds", type=float, default=20.0)
    many.add_argument("--trials", type=int, default=640)
    many.set_defaults(function=simulated)
    killed = ways.add_parser("kills")
    killed.add_argument("--every", type=float, default=SECONDS_BETWEEN_KILLS)
    killed.set_defaults(function=kills)
    arguments = parser.parse_args()
    status: int = arguments.function(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
