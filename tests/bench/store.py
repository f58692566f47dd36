"""How long the engine waits for its store: `python tests/bench/store.py [TRIALS] [READERS]`.

Writes a run of 14 benchmarks and 40 layers as the engine does (a start, then plan, examples and scores in one batch),
while READERS processes read the whole run once a second each, as a dashboard does. Wall and processor time of a write.
"""

from __future__ import annotations

import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from multiprocessing.synchronize import Event
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gptailor.plan import LayerChoice, StitchPlan
from gptailor.results.summary import summarise
from gptailor.spec.files import build_spec
from gptailor.store import queries
from gptailor.store.connection import StoreBusy
from gptailor.store.folder import RunFolder, new_run_id
from gptailor.store.writer import RunWriter
from gptailor.trial import Origin, Outcome, RunRecord, Score, Trial, TrialStatus

N_LAYERS, N_REMOVED, N_BENCHMARKS = 40, 10, 14
RUNGS = (111, 111, 111, 333, 333, 1000)


def read_until(ended: Event, path: Path) -> None:
    """A reader that looks once a second, as a page does."""
    while not ended.wait(1):
        with suppress(StoreBusy):
            queries.read_run(RunFolder(path))


def main(n_trials: int = 500, n_readers: int = 0) -> None:
    draw = random.Random(0)
    benchmarks = [f"benchmark_{i}" for i in range(N_BENCHMARKS)]
    spec = build_spec(
        {
            "name": "bench",
            "base_model": "x",
            "remove": N_REMOVED,
            "operations": ["remove"],
            "objectives": [{"benchmark": name} for name in benchmarks],
        }
    )
    with tempfile.TemporaryDirectory() as root:
        folder = RunFolder.of(root, new_run_id("bench"))
        record = RunRecord(
            folder.run_id, "bench", spec.model_dump(mode="json"), "x", N_LAYERS, N_REMOVED, 0, datetime.now(UTC)
        )
        writer = RunWriter.create(folder, record, spec.to_yaml(), summarise=summarise)
        ended = multiprocessing.Event()
        readers = [multiprocessing.Process(target=read_until, args=(ended, folder.path)) for _ in range(n_readers)]
        for reader in readers:
            reader.start()
        starts, ends = _Times(), _Times()
        for trial_id in range(n_trials):
            gone = set(draw.sample(range(N_LAYERS), N_REMOVED))
            kept = (layer for layer in range(N_LAYERS) if layer not in gone)
            plan = StitchPlan(
                N_LAYERS, tuple(LayerChoice(i, ("a", "b"), "task_arithmetic", draw.random()) for i in kept)
            )
            n = draw.choice(RUNGS)
            configuration = {f"layer_{i}": draw.random() for i in range(3 * N_LAYERS)}
            trial = Trial(trial_id, trial_id, n, 0, Origin.MODEL, configuration, datetime.now(UTC), 0.1)
            starts.time(lambda trial=trial: writer.start_trial(trial))  # type: ignore[misc]
            scores = tuple(Score(name, "acc", draw.random(), 0.01, n, True) for name in benchmarks)
            items = {name: [float(draw.random() < 0.5) for _ in range(n)] for name in benchmarks}

            def record_end(trial_id=trial_id, plan=plan, items=items, scores=scores) -> None:
                with writer.batch():
                    writer.record_plan(trial_id, plan, 10**9)
                    for name, values in items.items():
                        writer.record_examples(plan.hash, name, "acc", "validation", 0, values)
                    writer.finish_trial(trial_id, Outcome(TrialStatus.SUCCESS, datetime.now(UTC), scores, 0.1, 1.0))

            ends.time(record_end)
        ended.set()
        for reader in readers:
            reader.join()
        before = time.perf_counter()
        queries.read_run(folder)
        print(f"{n_trials} trials, {n_readers} readers")
        print(f"trial's start  {starts}\ntrial's end    {ends}\nread it all    {time.perf_counter() - before:.3f} s")
        for file in (folder.database, folder.journal):
            print(f"{file.name:14} {file.stat().st_size / 1024**2:.1f} MB")
        print(f"memory         {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


class _Times:
    def __init__(self) -> None:
        self.wall: list[float] = []
        self.processor: list[float] = []

    def time(self, act: Callable[[], None]) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        act()
        self.wall.append(1000 * (time.perf_counter() - wall))
        self.processor.append(1000 * (time.process_time() - processor))

    def __str__(self) -> str:
        wall, processor = sorted(self.wall), sorted(self.processor)
        n = len(wall)
        return (
            f"p50 {wall[n // 2]:.0f} ms, p95 {wall[n * 95 // 100]:.0f} ms, worst {wall[-1]:.0f} ms, "
            f"processor p50 {processor[n // 2]:.0f} ms"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
