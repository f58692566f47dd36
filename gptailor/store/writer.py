"""The engine's one writer: a line in the journal first, a row in the database second.

An event that is in the journal is never lost: if the database is locked, damaged or its disk is full, the event waits
(`behind` counts) and is applied together with the next. Only a journal that cannot be written stops the engine: what
was recorded stays in memory, `retry` is asked whether to wait and try again, and if not, StoreUnwritable is raised. One
process at a time may have a run open for writing; the engine's lock file (launch.engine.EngineLock) sees to that.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from gptailor.plan import LayerShares, StitchPlan
from gptailor.stopwatch import Part, Stopwatch
from gptailor.store.connection import (
    WRITER_PATIENCE,
    StoreError,
    StoreMissing,
    StoreNewer,
    StoreUnwritable,
    open_reader,
    open_writer,
)
from gptailor.store.folder import RunFolder, write_atomically
from gptailor.store.journal import FORMAT, Event, JournalContents, append, cut_torn_line, read_journal, write_journal
from gptailor.store.queries import ScoreTables, score_tables
from gptailor.store.summary import RunSummary, write_summary
from gptailor.store.tables import applied, apply, snapshot
from gptailor.trial import (
    BenchmarkKey,
    Digests,
    Evaluation,
    Measurement,
    Outcome,
    RunRecord,
    RunStatus,
    Score,
    Trial,
    TrialStatus,
    now,
)

log = logging.getLogger(__name__)
CHUNK = 5000
"""Events applied in one transaction when a long journal is caught up with."""
_NUMBERS = {int, float, bool, type(None)}
Clock = Callable[[], datetime]
Summarise = Callable[[ScoreTables, RunFolder], RunSummary]
_UNSUMMARISED = {"trial_started", "plan", "examples", "digests", "example_digests", "resamples", "seconds"}
"""Events that change nothing in the table of runs but the time of the last activity."""
_FREQUENT = _UNSUMMARISED | {"trial_finished"}
"""Events that a summary need not follow at once; every other one it does."""
DATABASE_SHARE = 0.05
"""Of the engine's time, that transactions of trials may take at most (see is_due): of short trials not each has one."""
SUMMARY_SHARE = 0.05
"""Of the engine's time, that summaries may take at most: of trials of half a second not each has one."""
_ENDED = {RunStatus.FINISHED, RunStatus.STOPPED, RunStatus.FAILED}


class RunWriter:
    """Records one run. Every method is idempotent: recording the same thing twice leaves one row of it."""

    def __init__(
        self, folder: RunFolder, last: int, pending: list[Event], clock: Clock, summarise: Summarise | None
    ) -> None:
        """Use `create` or `open`.

        last: number of the journal's last event; pending: not yet in the database. summarise: what works out the run's
        summary, to be kept beside the database (results.summary.summarise); without it, readers work it out themselves.
        """
        self.folder = folder
        self.watch = Stopwatch()
        """Of the process that writes; `record_seconds` keeps what it says."""
        self.retry: Callable[[StoreUnwritable], bool] = lambda _error: False
        """Called where the journal cannot be written (a full disk): wait a little and return True to try again."""
        self._clock, self._summarise = clock, summarise
        self._last = last
        self._unwritten: list[Event] = []  # not yet in the journal
        self._pending = pending  # in the journal, not yet in the database
        self._gate = threading.RLock()
        self._in_batch = 0
        self._started: datetime | None = None
        self._warned = ""
        self._plans: dict[int, StitchPlan] = {}  # recorded since this writer was made
        self._summary: RunSummary | None = None
        self._due = 0.0
        self._is_stale, self._summary_due = True, 0.0  # whether the database has moved on since; when to look again

    @classmethod
    def create(
        cls,
        folder: RunFolder,
        record: RunRecord,
        spec_yaml: str,
        clock: Clock = now,
        summarise: Summarise | None = None,
    ) -> RunWriter:
        """A new run: run file, journal and database. Raises FileExistsError where one is there, StoreUnwritable."""
        row = {key: value for key, value in dataclasses.asdict(record).items() if key != "run_id"}
        queued = {"event": "run", "row": row | {"status": RunStatus.QUEUED}}
        return cls.restore(folder, [queued], spec_yaml, clock, summarise)

    @classmethod
    def restore(
        cls,
        folder: RunFolder,
        events: Iterable[Event],
        spec_yaml: str,
        clock: Clock = now,
        summarise: Summarise | None = None,
    ) -> RunWriter:
        """A run made of events without numbers, such as another run's snapshot. Raises like `create`."""
        writer = cls(folder, 0, [], clock, summarise)
        for event in events:
            writer._queue(event)
        _write_spec(folder, spec_yaml)
        write_journal(folder.journal, writer._unwritten)
        writer._pending, writer._unwritten = writer._unwritten, []
        writer.flush()
        return writer

    @classmethod
    def open(cls, folder: RunFolder, clock: Clock = now, summarise: Summarise | None = None) -> RunWriter:
        """An existing run, to go on with it.

        What the database lacks is applied from the journal, and a journal that lacks events is written anew from the
        database. A damaged or locked database does not stop it.

        Raises StoreMissing, StoreNewer, StoreUnwritable.
        """
        if not folder.exists():
            raise StoreMissing(f"run {folder.run_id}: it has neither a database nor a journal")
        contents = read_journal(folder.journal) if folder.journal.exists() else JournalContents(damaged=[0])
        cut_torn_line(folder.journal, contents)
        held = None
        try:
            with open_writer(folder) as con:
                held = applied(con)
        except StoreNewer:
            raise
        except StoreError as error:
            log.warning("%s", error)
        pending = [event for event in contents.events if event["n"] > (held or 0)]
        writer = cls(folder, max(held or 0, contents.last), pending, clock, summarise)
        writer._started = _first_start(contents.events)
        writer.flush()
        if held is not None and (contents.damaged or held > contents.last) and not writer.behind:
            writer._renew_journal()
        return writer

    @property
    def behind(self) -> int:
        """Events that are safe in the journal (or, while it cannot be written, in memory) but not in the database."""
        return len(self._pending) + len(self._unwritten)

    @property
    def is_due(self) -> bool:
        """Whether the database was left alone for long enough to be written without taking much of the time."""
        return time.monotonic() >= self._due

    @contextmanager
    def batch(self, journal_only: bool = False) -> Iterator[None]:
        """Everything recorded inside becomes one fsync and one transaction at its end, even if an error leaves it.

        journal_only: the database gets it with what is recorded next, or with a heartbeat.
        """
        with self._gate:
            self._in_batch += 1
            try:
                yield
            finally:
                self._in_batch -= 1
                if not self._in_batch:
                    self.flush(journal_only)

    def set_status(self, status: RunStatus, error: str | None = None) -> None:
        """State of the run; running notes who runs it, an end notes when. Raises StoreUnwritable."""
        at = self._clock()
        row: dict[str, Any] = {"status": status, "error": error, "ended_at": at if status in _ENDED else None}
        if status is RunStatus.RUNNING:
            self._started = self._started or at
            row |= {"started_at": self._started, "engine_pid": os.getpid(), "engine_host": socket.gethostname()}
        self._record({"event": "status", "row": row})

    def note_stopped(self) -> None:
        """What an engine that was killed could not write: the run is stopped, its trial given up.

        Nothing for a run that had ended. Raises StoreError.
        """
        with open_reader(self.folder, WRITER_PATIENCE) as con:
            ended = con.execute("SELECT status IN ('finished', 'stopped', 'failed') FROM runs").fetchone() == (True,)
            left = con.execute("SELECT trial_id FROM trials WHERE status = 'running'").fetchall()
        with self.batch():
            for (trial_id,) in left:
                error = "stopped while it ran"
                self.finish_trial(trial_id, Outcome(TrialStatus.CANCELLED, self._clock(), error=error))
            if not ended:
                self.set_status(RunStatus.STOPPED)

    def change_spec(self, spec: dict[str, Any], spec_yaml: str) -> None:
        """The run was extended: more trials or hours. Nothing else of a run file may change. Raises StoreUnwritable."""
        _write_spec(self.folder, spec_yaml)
        self.record_run({"spec": spec})

    def record_run(self, row: dict[str, Any]) -> None:
        """Columns of `runs` that became known, or known better, after the run was created. Raises StoreUnwritable."""
        self._record({"event": "run", "row": row})

    def heartbeat(self) -> None:
        """A sign of life without a write to the database: the lock file's mtime. Also catches up what is behind."""
        with suppress(OSError):  # the file is gone or its disk is: the next record will say so
            os.utime(self.folder.lock)
        if self.behind and self._gate.acquire(blocking=False):  # not while another thread is in a batch
            try:
                if not self._in_batch:
                    self.flush()
            except StoreUnwritable:
                pass  # whoever records next is told
            finally:
                self._gate.release()

    def start_trial(self, trial: Trial) -> None:
        row = dataclasses.asdict(trial)
        self._record({"event": "trial_started", "row": row | {"status": "running", "ended_at": None, "error": None}})

    def finish_trial(self, trial_id: int, outcome: Outcome) -> None:
        """How a trial ended, with its scores. Raises ValueError for a score that is not finite: that is a crash."""
        row = {key: value for key, value in dataclasses.asdict(outcome).items() if key != "scores"}
        scores = [_score_row(score) for score in outcome.scores]
        self._record({"event": "trial_finished", "row": {"trial_id": trial_id} | row, "scores": scores})

    def record_plan(
        self, config_id: int, plan: StitchPlan, n_parameters: int, shares: Sequence[LayerShares] = ()
    ) -> None:
        """A decoded configuration: one row of `plans`, and one of `layers` for every layer of the base.

        shares: what edits left of each kept layer, where they leave anything out.
        """
        if self._plans.get(config_id) != plan:  # a promoted configuration's is known already
            self._plans[config_id] = plan
            row = {"config_id": config_id, "plan": plan.to_json(), "n_parameters": n_parameters}
            if shares:
                row["shares"] = [dataclasses.asdict(one) for one in shares]
            self._record({"event": "plan", **row})

    def record_examples(
        self, plan_hash: str, benchmark: str, metric: str, split: str, first: int, items: Sequence[Any]
    ) -> None:
        """What examples [first, first + len(items)) of a benchmark's nested order gave."""
        row = {"plan_hash": plan_hash, "benchmark": benchmark, "metric": metric, "split": split, "first": first}
        self._record({"event": "examples", "row": row | {"items": list(items)}})

    def record_evaluation(self, evaluation: Evaluation) -> None:
        """A score outside the search. Raises ValueError for a score that is not finite."""
        row = {key: value for key, value in dataclasses.asdict(evaluation).items() if key not in ("score", "resampled")}
        row["subject"] = str(evaluation.subject)
        score = _score_row(evaluation.score)
        del score["is_objective"]
        self._record({"event": "evaluation", "row": row | score})
        if evaluation.resampled is not None:
            key = {name: score[name] for name in ("benchmark", "metric", "n_samples")} | {"split": evaluation.split}
            drawn = [score if math.isfinite(score) else None for score in evaluation.resampled]
            of = {"plan_hash": evaluation.plan_hash, "scores": drawn}
            self._record({"event": "resamples", "row": key | of})

    def record_digests(self, digests: Digests) -> None:
        """What the run's numbers are computed from; its examples are recorded by themselves."""
        rows = [{"kind": "weights", "name": n, "part": part, "digest": d} for (n, part), d in digests.weights.items()]
        for kind, found in (("setting", digests.settings), ("revision", digests.revisions)):
            rows += [{"kind": kind, "name": name, "part": "", "digest": text} for name, text in found.items()]
        self._record({"event": "digests", "rows": rows})

    def record_example_digests(self, key: BenchmarkKey, first: int, digests: Sequence[str]) -> None:
        """Of examples [first, first + len(digests)) of a benchmark's seeded order."""
        row = dict(zip(("benchmark", "metric", "split"), key, strict=True)) | {"first": first}
        self._record({"event": "example_digests", "row": row | {"digests": list(digests)}})

    def forget(self, keys: Sequence[BenchmarkKey]) -> None:
        """Take what was answered to benchmarks, and their scores outside the search, out of the tables.

        They were other benchmarks. The journal keeps it.
        """
        self._record({"event": "forgotten", "keys": [list(key) for key in keys]})

    def record_measurement(self, measurement: Measurement) -> None:
        """What a plan is worth in use."""
        row = dataclasses.asdict(measurement) | {"subject": str(measurement.subject)}
        self._record({"event": "measurement", "row": row})

    def record_seconds(self) -> None:
        """Where this process's seconds went so far. Raises StoreUnwritable."""
        at = self.watch.began_at
        rows = [{"began_at": at, "part": part, "seconds": spent} for part, spent in self.watch.seconds().items()]
        self._record({"event": "seconds", "rows": rows})

    def flush(self, journal_only: bool = False) -> None:
        """Journal what is in memory, then apply what waits. Raises StoreUnwritable; a database in trouble is logged."""
        with self._gate, self.watch.of(Part.STORE):
            while self._unwritten:
                try:
                    append(self.folder.journal, self._unwritten)
                except StoreUnwritable as error:
                    if not self.retry(error):
                        raise
                    continue
                self._pending += self._unwritten
                self._unwritten = []
            if self._pending and not journal_only:
                self._apply()

    def _record(self, event: Event) -> None:
        with self._gate:
            self._queue(event)
            if not self._in_batch:
                self.flush()

    def _queue(self, event: Event) -> None:
        self._last += 1
        head = {"v": FORMAT, "n": self._last, "at": self._clock()}
        self._unwritten.append(_cleaned(head | event))

    def _renew_journal(self) -> None:
        log.warning("run %s: its journal lacks events and is written anew from the database", self.folder.run_id)
        try:
            with open_reader(self.folder, WRITER_PATIENCE) as con:
                events = list(snapshot(con))
        except StoreError as error:
            log.warning("%s", error)
            return
        for event in events:
            self._queue(event)
        write_journal(self.folder.journal, self._unwritten, replace=True)
        self._pending, self._unwritten = self._unwritten, []
        self.flush()

    def _apply(self) -> None:
        began = time.monotonic()
        try:
            self._apply_pending()
        finally:
            self._due = time.monotonic() + (time.monotonic() - began) / DATABASE_SHARE

    def _apply_pending(self) -> None:
        # Having waited in vain once, the engine does not wait as long again for every trial.
        patience = 1.0 if self._warned else WRITER_PATIENCE
        try:
            with open_writer(self.folder, patience) as con:
                held = applied(con)
                if held < self._pending[0]["n"] - 1:  # the file was removed or set back while the run went on
                    self._pending = [event for event in read_journal(self.folder.journal).events if event["n"] > held]
                while self._pending:
                    chunk = self._pending[:CHUNK]
                    apply(con, self.folder.run_id, chunk)
                    del self._pending[:CHUNK]
                    self._is_stale |= any(event["event"] not in _UNSUMMARISED for event in chunk)
                    if any(event["event"] not in _FREQUENT for event in chunk):
                        self._summary_due = 0.0
                if self._summarise is not None and self._is_stale and time.monotonic() >= self._summary_due:
                    began = time.monotonic()
                    self._summary, self._is_stale = self._summarise(score_tables(con), self.folder), False
                    self._summary_due = began + (time.monotonic() - began) / SUMMARY_SHARE
        except StoreError as error:
            if str(error) != self._warned:
                log.warning("%s. Nothing is lost: %d events wait in the journal", error, len(self._pending))
            self._warned = str(error)
            return
        if self._warned:
            log.warning("run %s: the database is up to date again", self.folder.run_id)
            self._warned = ""
        if self._summary is None or self._is_stale:  # an old one beside the database is seen to be old
            return
        with suppress(OSError):  # readers compute it from the database where it is missing or old
            write_summary(self.folder, replace(self._summary, last_activity=self._clock()))


def _write_spec(folder: RunFolder, spec_yaml: str) -> None:
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_atomically(folder.spec, spec_yaml)
    except OSError as error:
        raise StoreUnwritable(f"run {folder.run_id}: its run file cannot be written: {error}") from error


def _first_start(events: list[Event]) -> datetime | None:
    for event in events:
        for row in [event["row"]] if "row" in event else event.get("rows", ()):
            if found := row.get("started_at") if "trial_id" not in row else None:
                return datetime.fromisoformat(found)
    return None


def _score_row(score: Score) -> dict[str, Any]:
    if not math.isfinite(score.score):
        raise ValueError(f"{score.name}: {score.score} is no score; record the trial as crashed, with the cause")
    stderr = score.stderr if score.stderr is not None and math.isfinite(score.stderr) else None
    return dataclasses.asdict(score) | {"stderr": stderr}


def _cleaned(value: Any) -> Any:
    """JSON's own types: datetimes as UTC text, and no character that JSON or DuckDB cannot hold."""
    if isinstance(value, str):
        return value.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if _NUMBERS.issuperset(map(type, value)):  # thousands of items a trial
            return value
        return [_cleaned(item) for item in value]
    if hasattr(value, "tolist"):  # numpy's scalars and arrays, without importing numpy
        return value.tolist()
    return value
