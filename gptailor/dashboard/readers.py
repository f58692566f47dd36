"""Reading runs, once for everybody.

One shared answer for each run and version, and the last one while the file is busy.

A run's version is its database's modification time, so an unchanged file is never opened; and however many browsers
watch a live run, its file is opened at most once in `LEAST_SECONDS`, or in `REST` times what the last reading took, so
that readers do not stand in the engine's way.
Answers are held by reference and shared: frames are read, never changed. Only the newest version of a run is kept.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st

from gptailor import shipped
from gptailor.launch.engine import state
from gptailor.results.frames.importance import Importance
from gptailor.results.frames.view import View
from gptailor.results.summary import run_summary
from gptailor.store import queries
from gptailor.store.connection import StoreBusy
from gptailor.store.folder import RunFolder, run_folders, runs_root
from gptailor.store.notes import read_notes
from gptailor.store.summary import RunSummary

DEMO = shipped.ROOT / "data" / "demo"
"""A small finished run that is shipped, so that a fresh clone has something to look at. Its folder is `run`.
Read-only."""
ACTIVE = ("queued", "running", "paused")
"""States in which an engine lives, or will."""
LEAST_SECONDS, REST = 1.0, 10
KEPT_RUNS = 24


@dataclass(frozen=True)
class Run:
    """A run that can be chosen.

    Where it is, its summary, the name a person gave it, and its state (lost told from running).
    """

    folder: RunFolder
    summary: RunSummary
    name: str
    status: str

    @property
    def run_id(self) -> str:
        return self.folder.run_id

    @property
    def is_active(self) -> bool:
        return self.status in ACTIVE

    @property
    def is_demo(self) -> bool:
        return self.folder.root == DEMO


def runs() -> list[Run]:
    """Every saved run, newest first, and the shipped demo last."""
    found = []
    for folder in (*reversed(run_folders(runs_root())), *run_folders(DEMO)):
        try:
            found.append(_run(folder))
        except FileNotFoundError:  # deleted while we looked
            continue
    return found


def _run(folder: RunFolder) -> Run:
    summary = _summary(folder)
    name = read_notes(folder).name or summary.name
    return Run(folder, summary, name, str(state(folder, summary.status)))


def status(folder: RunFolder) -> str:
    """A run's state now: queued, running, paused, finished, stopped, failed, lost, or deleted."""
    try:
        return _run(folder).status
    except FileNotFoundError:
        return "deleted"


def _summary_version(folder: RunFolder) -> tuple[int, ...]:
    try:
        return (*folder.version(), folder.summary.stat().st_mtime_ns)
    except OSError:
        return folder.version()


_summaries: dict[Path, tuple[tuple[int, ...], RunSummary]] = {}


def _summary(folder: RunFolder) -> RunSummary:
    """The newest one of each run is kept: small, and Home shows all."""
    version = _summary_version(folder)
    known = _summaries.get(folder.path)
    if known is None or known[0] != version:
        known = _summaries[folder.path] = (version, run_summary(folder))
    return known[1]


# --- one run's tables -------------------------------------------------------------------------------------------------


@dataclass
class _Shelf:
    """One run's last answer, and the lock that lets one reader at a time fetch a new one."""

    lock: threading.Lock
    view: View | None = None
    read_at: float = 0.0
    took: float = 0.0


_shelves: OrderedDict[str, _Shelf] = OrderedDict()
_shelves_lock = threading.Lock()


def read(run: Run) -> View:
    """The run's tables and what is derived from them. `view.tables.as_of` says when they were read.

    Raises StoreMissing, StoreDamaged and, where there is no earlier answer either, StoreBusy: each says what to do.
    """
    shelf = _shelf(str(run.folder.path.resolve()))
    with shelf.lock:
        view = shelf.view
        if view is not None:
            fresh = time.monotonic() - shelf.read_at < max(LEAST_SECONDS, REST * shelf.took)
            if view.tables.version == run.folder.version() or (fresh and run.is_active):
                return view
        started = time.monotonic()
        try:
            shelf.view = View(queries.read_run(run.folder))
        except StoreBusy:
            if view is None:
                raise
            return view
        shelf.read_at = time.monotonic()
        shelf.took = shelf.read_at - started
        return shelf.view


def _shelf(path: str) -> _Shelf:
    with _shelves_lock:
        shelf = _shelves.pop(path, None) or _Shelf(threading.Lock())
        _shelves[path] = shelf  # the most recently used one is last
        while len(_shelves) > KEPT_RUNS:
            _shelves.popitem(last=False)
        return shelf


def log_tail(run: Run, lines: int = 200) -> str:
    """The end of the engine's log; empty where there is none."""
    try:
        with run.folder.log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - 200 * lines, 0))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def workers(run: Run) -> tuple[list[dict[str, Any]], float]:
    """What the workers of a running engine do, and when it wrote that (seconds since 1970); none where it has none."""
    try:
        glance = json.loads(run.folder.workers.read_text())
        return list(glance["workers"]), float(glance["at"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not from an engine of ours
        return [], 0.0


# --- answers that take a moment ---------------------------------------------------------------------------------------

IMPORTANCE_STEP = 10
"""Trials by which a live run must have grown before importances are worked out anew."""


def importance(run: Run, view: View) -> Importance | None:
    """Importances of the run's layers, worked out once for everybody."""
    grown = len(view.trials) // IMPORTANCE_STEP if run.is_active else view.tables.version
    return _importance(str(run.folder.path.resolve()), str(grown), view)


@st.cache_data(max_entries=32, show_spinner="Working out which layers matter …")
def _importance(path: str, grown: str, _view: View) -> Importance | None:  # noqa: ARG001 (parts of the cache's key)
    from gptailor.results.frames.importance import importance

    return importance(_view.layers, _view.trials, _view.facts)
