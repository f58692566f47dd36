"""Workers without a model: they take as long as a real run's trials did, and answer by the toss of a coin.

The loop, the suggester, the store, Dask's scheduler and its workers are the real ones. `Simulation` runs one search.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distributed import get_worker

from gptailor.scoring.cluster import dask_scorer
from gptailor.scoring.cluster.worker import Answer, Piece, Run
from gptailor.search.engine import run_engine
from gptailor.search.progress import Report
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.trial import RunStatus
from helpers.clusters import Cluster

SECONDS, DONE = "SIMULATED_SECONDS", "SIMULATED_DONE"
"""Environment variables of the workers: their trials' mean seconds, and the file that says who was at work when."""
_gate = threading.Lock()


def answer(run: Run, trial_id: int, pieces: list[Piece]) -> Answer:  # noqa: ARG001 (the worker's signature)
    """Takes the time that a trial of so many examples took, as the shipped demo run's did relative to their mean."""
    began = time.time()
    draw = random.Random(f"{pieces[0].plan}/{pieces[0].end}")
    seconds = float(os.environ[SECONDS]) * draw.choice(shares()) if trial_id >= 0 else 0.0
    time.sleep(seconds)
    items: list[list[Any]] = [[draw.randint(0, 1) for _ in range(piece.first, piece.end)] for piece in pieces]
    name = str(get_worker().name)
    if trial_id >= 0:
        with _gate, open(os.environ[DONE], "a") as file:
            file.write(json.dumps([name, began, time.time()]) + "\n")
    return Answer(name, "simulated", items, stitch_seconds=0.001, evaluate_seconds=seconds)


def influence_orders(run: Run) -> Answer:  # noqa: ARG001 (the worker's signature)
    return Answer(str(get_worker().name), orders=[("base", list(range(6)))])


def shares() -> list[float]:
    """Seconds of the demo run's trials, their mean being 1."""
    if not _SHARES:
        folder = RunFolder(Path(__file__).resolve().parents[2] / "data" / "demo" / "run")
        trials = queries.read_run(folder).trials
        seconds = (trials.stitch_seconds + trials.evaluate_seconds).dropna()
        _SHARES.extend((seconds / seconds.mean()).tolist())
    return _SHARES


_SHARES: list[float] = []


@contextmanager
def simulated_workers(folder: Path, n: int, seconds: float) -> Iterator[tuple[Cluster, Path]]:
    """A cluster of n of them, and the file that they write to."""
    done = folder / "done.jsonl"
    os.environ |= {SECONDS: str(seconds), DONE: str(done)}
    cluster = Cluster(folder)
    asked = dask_scorer.answer, dask_scorer.influence_orders
    dask_scorer.answer, dask_scorer.influence_orders = answer, influence_orders
    try:
        cluster.start_simulated(n)
        yield cluster, done
    finally:
        dask_scorer.answer, dask_scorer.influence_orders = asked
        cluster.close()


def run_search(folder: RunFolder) -> None:
    with open(folder.path / "told.txt", "w") as stream:
        assert run_engine(folder, Report(stream)) is RunStatus.FINISHED, (folder.path / "told.txt").read_text()[-3000:]


def busy(done: Path, n: int) -> float:
    """Share of their time that n workers were at work, from when all had begun until the last trial was handed out."""
    spans: dict[str, list[tuple[float, float]]] = {}
    for line in done.read_text().splitlines():
        name, began, ended = json.loads(line)
        spans.setdefault(name, []).append((began, ended))
    assert len(spans) == n, f"{len(spans)} of {n} workers had anything to do"
    since = max(min(span)[0] for span in spans.values())
    until = max(began for worker in spans.values() for began, _ in worker)
    assert until > since, "too few trials to tell"
    at_work = sum(max(0.0, min(end, until) - max(begin, since)) for worker in spans.values() for begin, end in worker)
    return at_work / (n * (until - since))
