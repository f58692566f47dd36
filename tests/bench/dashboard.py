"""How fast is the dashboard, and whom does it slow down? `python tests/bench/dashboard.py` measures and prints a table.

100 saved runs of 500 trials, 14 benchmarks and 40 layers. Pages are opened as the server opens them (AppTest). The
browsers on a live run are connections that speak Streamlit's protocol and poll as a browser does, because ten real ones
on the machine that is measured would take its processors; one real Chromium tells whether its memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from multiprocessing import get_context
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.make_runs import OTHER_PARAMETERS, make_run

from gptailor.launch.engine import EngineLock
from gptailor.plan import StitchPlan
from gptailor.store import queries
from gptailor.store.folder import RunFolder, run_folders
from gptailor.store.writer import RunWriter
from gptailor.trial import Origin, Outcome, RunStatus, Score, Trial, TrialStatus

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    "piqa",
    "csqa",
    "arc_easy",
    "winogrande",
    "boolq",
    "openbookqa",
    "mmlu",
    "hellaswag",
    "sciq",
    "copa",
    "rte",
    "wsc",
    "cb",
]
BENCHMARKS = (*NAMES, "wikitext/word_perplexity")
SHAPE: dict[str, Any] = {"n_layers": 40, "n_removed": 10, "benchmarks": BENCHMARKS}
PAGES = ("Progress", "Fidelity", "Trade-offs", "Layers", "Compare", "Models", "Launch")
WRITE_EVERY = 0.5
WRITES = 80
BROWSERS = 10
HASTE, TRIAL_EVERY = 4, 6
"""While memory is watched, browsers poll and trials (one in TRIAL_EVERY seconds) end as in an hour, up to HASTE times
as quickly where fewer minutes are given."""
HEAP_EVERY, FRESH_LOOKS = 10, 8
"""Trials between two looks at the browser's memory, and how many looks at a new one. Vega forgets what a chart no
longer shows from the ten-thousandth row on, so that a live chart's memory goes up and down."""

# --- what is measured on ----------------------------------------------------------------------------------------------


def saved_runs(root: Path, count: int, different: int = 10) -> None:
    """`count` runs; as many as `different` are made, the others are copies of them."""
    if len(run_folders(root)) >= count:
        return
    made = [make_run(root, f"large-{seed}", n_trials=500, seed=seed, **SHAPE) for seed in range(different)]
    for index in range(different, count):
        source = made[index % different]
        shutil.copytree(source.path, root / f"{source.run_id[:-4]}{index:04d}")


class Engine:
    """A live run that writes a trial every WRITE_EVERY seconds, as the search does; how long each write took."""

    def __init__(self, root: Path) -> None:
        self.folder: RunFolder = make_run(
            root, "live", n_trials=750, status=RunStatus.RUNNING, started=datetime.now(UTC), **SHAPE
        )
        last = queries.read_run(self.folder).trials.trial_id.max()
        self._next, self._lock = int(last) + 1, EngineLock(self.folder)
        self._lock.__enter__()
        self._writer = RunWriter.open(self.folder)

    def write(self, count: int, every: float = WRITE_EVERY) -> list[float]:
        """Seconds of `count` trials' writes, one in `every` seconds: start and end together."""
        took = []
        for _ in range(count):
            started = time.monotonic()
            number, self._next = self._next, self._next + 1
            now = datetime.now(UTC)
            plan = StitchPlan.without([(number + k) % 40 for k in range(10)], 40)
            scores = tuple(Score(name, "acc_norm", 0.5, 0.02, 111, True) for name in NAMES)
            with self._writer.batch():
                self._writer.record_plan(number, plan, OTHER_PARAMETERS)
                self._writer.start_trial(Trial(number, number, 111, 0, Origin.MODEL, {}, now, 0.1))
            self._writer.finish_trial(number, Outcome(TrialStatus.SUCCESS, now, scores, 0.1, 1.0))
            took.append(time.monotonic() - started)
            time.sleep(max(0.0, every - took[-1]))
        return took

    def run_id(self) -> str:
        return self.folder.run_id

    def close(self) -> None:
        self._lock.__exit__(None, None, None)


class Apart(BaseManager):
    """Keeps the engine in a process of its own, as it is: browsers and engine share processors, but no interpreter."""


Apart.register("Engine", Engine, exposed=("write", "run_id", "close"))


@contextmanager
def server(runs: Path) -> Iterator[tuple[psutil.Process, int]]:
    import socket
    import urllib.request

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "streamlit_app.py", "--server.port", str(port)]
    command += ["--server.headless", "true", "--server.fileWatcherType", "none"]
    environment = {**os.environ, "GPTAILOR_RUNS": str(runs)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield psutil.Process(process.pid), port
    finally:
        process.terminate()
        process.wait()


# --- pages ------------------------------------------------------------------------------------------------------------


def open_pages(runs: Path) -> dict[str, list[tuple[float, float]]]:
    """Seconds by the clock and of processor time, of the first and second opening of each page.

    Home and every page, in a process of its own. On a busy machine the processor time is what a quiet one would take,
    at most.
    """
    code = f"""
import json, os, sys, time
from pathlib import Path
os.environ["GPTAILOR_RUNS"] = {str(runs)!r}
sys.path.insert(0, {str(ROOT)!r})
from streamlit.testing.v1 import AppTest
from gptailor.store.folder import run_folders
pages = {{path.stem.partition("_")[2]: f"pages/{{path.name}}" for path in Path("pages").glob("*.py")}}
ids = [f.run_id for f in run_folders({str(runs)!r})]
took = {{}}
def timed(app, name):
    seconds = []
    for _ in range(2):
        started = time.perf_counter(), time.process_time()
        app.run()
        seconds.append((time.perf_counter() - started[0], time.process_time() - started[1]))
        assert not app.exception, (name, app.exception)
    took[name] = seconds
app = AppTest.from_file({str(ROOT / "streamlit_app.py")!r}, default_timeout=120)
timed(app, "Home")
for page in {PAGES!r}:
    app.switch_page(pages[page])
    app.query_params["run"] = ids[3]
    app.query_params["runs"] = ",".join(ids[3:6])
    timed(app, page)
print(json.dumps(took))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return {name: [tuple(one) for one in seconds] for name, seconds in json.loads(done.stdout).items()}


# --- browsers on a live run -------------------------------------------------------------------------------------------


class Browsers:
    """Connections that open the live run's Progress page and poll it as a browser does."""

    def __init__(self, port: int, run_id: str, count: int) -> None:
        self._port, self._query, self._count = port, f"run={run_id}", count
        self.answers = 0
        self.problem: object = None
        self.exceptions: list[str] = []
        self.haste = 1.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._all(),), daemon=True)

    def __enter__(self) -> Browsers:
        self._stop = asyncio.Event()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        if self.problem is not None:
            raise SystemExit(f"the browsers broke off: {self.problem!r}")

    async def _all(self) -> None:
        tabs = [asyncio.create_task(self._one()) for _ in range(self._count)]
        stop = asyncio.create_task(self._stop.wait())
        ended, _ = await asyncio.wait([stop, *tabs], return_when=asyncio.FIRST_COMPLETED)
        for tab in (stop, *tabs):
            tab.cancel()
        await asyncio.gather(stop, *tabs, return_exceptions=True)
        self.problem = next((tab.exception() or "a browser was sent away" for tab in ended - {stop}), None)

    async def _one(self) -> None:
        from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
        from websockets.asyncio.client import connect

        address = f"ws://127.0.0.1:{self._port}/_stcore/stream"
        async with (
            connect(address, subprotocols=["streamlit"], max_size=None) as socket,  # type: ignore[list-item]
            asyncio.TaskGroup() as tasks,
        ):
            await socket.send(self._ask("", ""))
            page, polls = "", dict[str, asyncio.Task[None]]()

            async def poll(fragment: str, interval: float) -> None:
                while True:
                    await asyncio.sleep(interval / self.haste)
                    await socket.send(self._ask(page, fragment))

            async for data in socket:
                message = ForwardMsg.FromString(data)
                kind = message.WhichOneof("type")
                if kind == "delta" and message.delta.new_element.WhichOneof("type") == "exception":
                    self.exceptions.append(message.delta.new_element.exception.message)
                if kind == "new_session":
                    page = message.new_session.page_script_hash
                elif kind == "stop_auto_rerun":
                    for task in polls.values():
                        task.cancel()
                    polls.clear()
                elif kind == "auto_rerun" and message.auto_rerun.fragment_id not in polls:
                    fragment = message.auto_rerun.fragment_id
                    polls[fragment] = tasks.create_task(poll(fragment, message.auto_rerun.interval))
                elif kind == "script_finished":
                    self.answers += 1

    def _ask(self, page: str, fragment: str) -> bytes:
        from streamlit.proto.BackMsg_pb2 import BackMsg

        message = BackMsg()
        state = message.rerun_script
        state.query_string, state.page_name, state.page_script_hash = self._query, "Progress", page
        state.fragment_id, state.is_auto_rerun = fragment, bool(fragment)
        return bytes(message.SerializeToString())


class Chromium:
    """One real browser on the live run, whose memory is read after a collection."""

    def __init__(self, port: int, run_id: str) -> None:
        from playwright.sync_api import sync_playwright

        self._driver = sync_playwright().start()
        self._browser = self._driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        self._page = self._browser.new_page()
        self._page.goto(f"http://127.0.0.1:{port}/Progress?run={run_id}")
        self._page.wait_for_selector('[data-testid="stVegaLiteChart"]', timeout=120_000)
        self._tools = self._page.context.new_cdp_session(self._page)
        self._tools.send("Performance.enable")

    def heap(self) -> float:
        """Megabytes of live JavaScript objects."""
        self._tools.send("HeapProfiler.collectGarbage")
        found = {metric["name"]: metric["value"] for metric in self._tools.send("Performance.getMetrics")["metrics"]}
        return float(found["JSHeapUsedSize"]) / 1e6

    def close(self) -> None:
        self._browser.close()
        self._driver.stop()


def live(runs: Path, minutes: float) -> list[tuple[str, str, str, bool]]:
    apart = Apart(ctx=get_context("spawn"))
    apart.start()
    engine: Any = apart.Engine(runs)  # type: ignore[attr-defined]
    run_id = engine.run_id()
    try:
        engine.write(10)
        alone = engine.write(WRITES)
        with server(runs) as (process, port), Browsers(port, run_id, BROWSERS) as browsers:
            engine.write(20)
            watched = engine.write(WRITES)
            real = Chromium(port, run_id)
            engine.write(20)
            beside = engine.write(WRITES)
            memory, heap, polled = [process.memory_info().rss / 1e6], [real.heap()], browsers.answers
            browsers.haste = min(max(60 / minutes, 1.0), HASTE)
            end = time.monotonic() + 60 * minutes
            while time.monotonic() < end:
                engine.write(1, TRIAL_EVERY / browsers.haste)
                memory.append(process.memory_info().rss / 1e6)
                if len(memory) % HEAP_EVERY == 0:
                    heap.append(real.heap())
                    print(f"{memory[-1]:.0f}, browser {heap[-1]:.1f} MB", file=sys.stderr, flush=True)
            heap.append(real.heap())
            polled = browsers.answers - polled
            real.close()
        # The run has grown meanwhile, and what it takes with it: a new server and a new browser show what it takes now.
        with server(runs) as (process, port), Browsers(port, run_id, BROWSERS):
            real = Chromium(port, run_id)
            fresh = []
            for _ in range(FRESH_LOOKS):
                engine.write(HEAP_EVERY, TRIAL_EVERY / HASTE)
                fresh.append(real.heap())
            new = process.memory_info().rss / 1e6
            real.close()
    finally:
        engine.close()
        apart.shutdown()
    slower = 1000 * (statistics.median(watched) - statistics.median(alone))
    old = statistics.mean(memory[-HEAP_EVERY:])
    return [
        ("write, nobody looks", f"{1000 * statistics.median(alone):.0f} ms", f"max {1000 * max(alone):.0f} ms", True),
        (
            f"write, {BROWSERS} browsers",
            f"{1000 * statistics.median(watched):.0f} ms",
            f"{slower:+.0f} ms at the median (bar +50), max {1000 * max(watched):.0f} ms",
            slower <= 50,
        ),
        (
            "write, and a Chromium that draws beside it",
            f"{1000 * statistics.median(beside):.0f} ms",
            "on the engine's own two processors, where nobody's browser is: no bar",
            True,
        ),
        (
            f"server memory, {BROWSERS} browsers polling",
            f"{memory[0]:.0f} to {memory[-1]:.0f} MB",
            f"after {minutes:g} min and {polled} answers {old:.0f} MB, a new server {new:.0f} MB",
            old < 1.15 * new,
        ),
        (
            "browser memory while polling",
            f"{heap[0]:.1f} to {heap[-1]:.1f} MB",
            f"live JavaScript objects; highest {max(heap):.1f} MB, of a new browser {max(fresh):.1f} MB",
            max(heap) < 1.15 * max(fresh),
        ),
    ]


# --- the table --------------------------------------------------------------------------------------------------------


def pages(runs: Path, repeats: int) -> list[tuple[str, str, str, bool]]:
    found = [open_pages(runs) for _ in range(repeats)]
    rows = []
    for name in found[0]:
        (cold, cold_work), (warm, warm_work) = (
            [statistics.median(times[name][which][kind] for times in found) for kind in (0, 1)] for which in (0, 1)
        )
        bars = (1.5, 0.3) if name == "Home" else (None, 1.0)
        fine = (bars[0] is None or min(cold, cold_work) < bars[0]) and min(warm, warm_work) < bars[1]
        note = f"bar {bars[1]} s warm; {warm_work:.2f} s of processor; cold {cold:.2f} s"
        note += f" (bar {bars[0]} s; {cold_work:.2f} s of processor)" if bars[0] else ""
        rows.append((f"{name} opens", f"{warm:.2f} s", note, fine))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="where the runs are made and kept for the next time")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=5.0, help="of polling (60 for the whole hour)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("pages", "live"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gptailor-bench-") as scratch:
        folder = asked.folder or Path(scratch)
        saved_runs(folder / "runs", asked.runs)
        parts: dict[str, Callable[[], list[tuple[str, str, str, bool]]]] = {
            "pages": lambda: pages(folder / "runs", asked.repeats),
            "live": lambda: live(Path(scratch) / "live", asked.minutes),
        }
        rows = [row for name, part in parts.items() if asked.only in (None, name) for row in part()]
    for what, value, note, fine in rows:
        print(f"{'ok ' if fine else 'BAD'}  {what:<40} {value:>18}   {note}")
    return 0 if all(row[3] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
