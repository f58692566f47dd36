"""The check before a run, asked of a process of its own: it opens family and benchmarks, with torch and lm-eval.

Answers are shared by everybody who looks at the same run file, and kept for as long as "free memory" means anything.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st

from gptailor.launch.process import clean_environment, python
from gptailor.spec.run import RunSpec

KEPT = 32
FRESH_SECONDS = 120.0
PATIENCE_SECONDS = 600.0
"""Data sets that are not here yet are downloaded."""
AT_ONCE = 2


@dataclass(frozen=True)
class Answer:
    """facts: as `gptailor check --json` prints them. problem: why there are none."""

    facts: Mapping[str, Any]
    problem: str | None = None


class Desk:
    """Where checks are asked for, and answered a few at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="check")
        self._asked: OrderedDict[str, tuple[float, Future[Answer]]] = OrderedDict()
        self._lock = threading.Lock()

    def ask(self, spec: RunSpec, runs: Path, again: bool = False) -> Future[Answer]:
        """The answer on its way, or the one that is there.

        again: do not take one that is there. A run's name changes nothing in the answer, so typing one asks for
        nothing.
        """
        text = spec.model_copy(update={"name": "check"}).to_yaml()
        with self._lock:
            at, found = self._asked.get(text, (0.0, None))
            if found is None or (found.done() and (again or time.monotonic() - at > FRESH_SECONDS)):
                found = self._pool.submit(_check, text, runs)
                self._asked[text] = (time.monotonic(), found)
            self._asked.move_to_end(text)
            while len(self._asked) > KEPT:
                self._asked.popitem(last=False)[1][1].cancel()
            return found


@st.cache_resource(show_spinner=False)
def desk() -> Desk:
    return Desk()


def _check(text: str, runs: Path) -> Answer:
    with tempfile.TemporaryDirectory(prefix="gptailor-check-") as scratch:
        file = Path(scratch) / "run.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            done = subprocess.run(
                python("check", str(file), "--json", "--runs", str(runs.resolve())),
                env=clean_environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PATIENCE_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return Answer({}, f"the check gave no answer within {PATIENCE_SECONDS:.0f} s")
    try:
        return Answer(json.loads(done.stdout))
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Answer({}, f"the check ended without an answer: {last}")
