"""F21: pause, resume, stop, extend and kill, in any order and however often, as one state machine of real engines.

The states and what leads from one to another are in docs/faults.md. Whatever is pressed: at most one engine, none that
nobody knows of, no trial lost, none scored twice, and the trials are those of a run that was left in peace.

No rule has a precondition, since whether an engine lives changes by itself: where one is needed, it is started. A
failure can then be drawn again, and is told as it was.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from helpers import kills
from helpers.command_line import write_benchmark
from helpers.warm_engines import shared
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from gptailor.errors import UserError
from gptailor.launch import engine
from gptailor.launch.engine import LOST, StopResult, asked, is_alive, request
from gptailor.launch.extend import extend
from gptailor.launch.process import signal_holder
from gptailor.spec.files import load_spec
from gptailor.spec.run import RunSpec
from gptailor.trial import RunStatus

FIRST, MOST = 6, 20
ENDED = {RunStatus.STOPPED, RunStatus.FINISHED}


class Life(RuleBasedStateMachine):
    """One run from its preparation to whatever becomes of it."""

    spec: RunSpec
    peaceful: list[tuple[Any, ...]]

    @initialize()
    def prepare(self) -> None:
        self.scratch = tempfile.TemporaryDirectory()
        self.folder = engine.prepare(self.scratch.name, self.spec)
        self.pids: set[int] = set()
        self.n_asked, self.n_done = FIRST, 0
        self.is_paused = False

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            engine.stop(self.folder, patience=1)
            assert kills.scored_twice(self.folder) == [] if self.folder.journal.exists() else True
            self.scratch.cleanup()

    # --- what people press ---

    @rule(times=st.sampled_from([1, 2]))
    def resume(self, times: int) -> None:
        was_alive = is_alive(self.folder)
        with ThreadPoolExecutor(times) as people:
            started = [pid for pid in people.map(lambda _: engine.resume(self.folder), range(times)) if pid]
        assert len(started) <= 1 or (not was_alive and not is_alive(self.folder)), "two never start one run"
        assert started or was_alive
        self.pids.update(started)
        self.is_paused = False

    @rule()
    def pause(self) -> None:
        if is_alive(self.folder):
            request(self.folder, "pause")
            self.is_paused = True

    @rule(seconds=st.floats(0, 1.5))
    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    @rule(times=st.sampled_from([1, 1, 2]))
    def stop(self, times: int) -> None:
        was_alive, began = is_alive(self.folder), time.monotonic()
        with ThreadPoolExecutor(times) as people:
            results = set(people.map(lambda _: engine.stop(self.folder), range(times)))
        self._has_stopped(was_alive, results, began)

    @rule(after=st.floats(0, 0.5))
    def sigterm_during_a_stop(self, after: float) -> None:
        is_new = self._at_work()
        began = time.monotonic()
        impatient = threading.Timer(after, signal_holder, [self.folder.lock, signal.SIGTERM])
        impatient.start()
        result = engine.stop(self.folder)
        impatient.cancel()
        self._has_stopped(True, {result}, began, {LOST} if is_new else set())  # before it listens, a signal kills it

    def _at_work(self) -> bool:
        """An engine has the run now; whether it was started for that."""
        if is_new := not is_alive(self.folder):
            self.resume(1)
        return is_new

    def _has_stopped(
        self, was_alive: bool, results: set[StopResult], began: float, or_else: Set[str] = frozenset()
    ) -> None:
        assert not is_alive(self.folder)
        if was_alive:
            quick = time.monotonic() - began < 10
            assert quick or results & {StopResult.TERMINATED, StopResult.KILLED}, "or it says why not"
            if self.folder.exists():
                assert kills.status_of(self.folder) in ENDED | or_else, self._told()
        else:
            assert results == {StopResult.NOT_RUNNING}
        assert not asked(self.folder, "stop") and not asked(self.folder, "pause")
        self.is_paused = False

    @rule()
    def kill(self) -> None:
        self._at_work()
        try:
            kills.kill_group(self.folder)
        except ProcessLookupError:  # it ended by itself just now
            kills.wait_for(lambda: not is_alive(self.folder), 5)
        assert kills.status_of(self.folder) in {LOST, *ENDED}, "also where it was killed before it wrote a word"
        self.is_paused = False

    @rule(more=st.integers(1, 4))
    def extend(self, more: int) -> None:
        asked = min(self.n_asked + more, MOST)
        if not self.folder.exists():
            return
        was_alive = is_alive(self.folder)
        try:
            extend(self.folder, asked, None)
        except UserError as problem:
            assert was_alive and "is running it already" in str(problem)
        else:
            self.n_asked, self.is_paused = asked, False

    @rule()
    def let_it_end(self) -> None:
        if not is_alive(self.folder) or self.is_paused:
            self.resume(1)
        kills.wait_for(lambda: not is_alive(self.folder), 60)
        assert kills.status_of(self.folder) == RunStatus.FINISHED, self._told()
        assert len(kills.trials(self.folder)) == self.n_asked

    # --- what always holds ---

    @invariant()
    def nothing_is_lost_and_nobody_forgotten(self) -> None:
        if not hasattr(self, "folder"):
            return
        if self.folder.exists():
            stored = kills.trials(self.folder) if self.folder.database.exists() else []  # killed before it was made
            done = [trial for trial in stored if trial[3] == "success"]
            assert done == self.peaceful[: len(done)] and len(done) >= self.n_done
            self.n_done = len(done)
        if not is_alive(self.folder):
            assert not [pid for pid in self.pids if psutil.pid_exists(pid)], "a process that nobody knows of"

    def _told(self) -> str:
        return self.folder.log.read_text()[-3000:]


@pytest.mark.slow
def test_whatever_people_press(tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, offset in (("some_words", 0), ("few_words", 5)):  # not in alphabetical order
        write_benchmark(tmp_path, name, 60, offset)
    asked = {
        "name": "life",
        "base_model": str(tiny_family / "base"),
        "candidates": {name: str(tiny_family / name) for name in ("math", "code")},
        "remove": 2,
        "objectives": [{"benchmark": name, "metric": "acc"} for name in ("some_words", "few_words")],
        "include_path": [str(tmp_path)],
        "budget": {"min": 6, "max": 54},
        "trials": FIRST,
        "device": "cpu",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(asked))
    monkeypatch.setattr("gptailor.launch.engine.spawn", shared().spawn)
    Life.spec = load_spec(tmp_path / "run.yaml")
    peaceful = kills.search(tmp_path / "peaceful", Life.spec)
    extend(peaceful, MOST, None)
    kills.wait_for(lambda: not is_alive(peaceful))
    Life.peaceful = kills.trials(peaceful)
    assert len(Life.peaceful) == MOST
    examples = int(os.environ.get("GPTAILOR_TEST_EXAMPLES", 5))
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=examples, stateful_step_count=9, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
