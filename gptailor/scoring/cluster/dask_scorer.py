"""Dask workers as the search's scorer: trials go out to them, some ahead, and come back as they end.

What is left to Dask: which worker gets what, moving what waits from a busy to an idle one, giving the trials of a lost
worker to another (at most twice), workers that join and leave, starting a lost local one again. What is ours: cutting a
trial into pieces where workers would be idle, making scores of items, and waiting for a scheduler that is lost.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from distributed import Client, Future, KilledWorker

from gptailor.errors import UserError
from gptailor.evaluate.benchmarks import OpenBenchmark, reordered
from gptailor.evaluate.evaluator import Stopped
from gptailor.family.models import open_reader
from gptailor.plan import StitchPlan, Texts
from gptailor.scoring.cluster.parts import cut, join
from gptailor.scoring.cluster.start import LOSSES, start
from gptailor.scoring.cluster.worker import Answer, Piece, Run, answer, influence_orders, n_parameters, repair_texts
from gptailor.scoring.cluster.worker_status import WorkerStatuses
from gptailor.scoring.item_cache import Gap, ItemCache, Items, PlanScores
from gptailor.scoring.plan_scorer import OBJECTIVES, SELECTION_EXAMPLES, open_run_benchmarks, run_texts
from gptailor.scoring.provenance import summary_digest
from gptailor.scoring.scorer import Ended, hung_error, last_line
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Reading
from gptailor.stitch.edits.registry import keeps_shapes, repair_edit
from gptailor.store.folder import RunFolder
from gptailor.trial import Digests
from gptailor.versions import installed_versions

log = logging.getLogger("gptailor")

LOOK_SECONDS = 0.2
"""How often a wait looks whether it is to end."""
RETRY_SECONDS = 2.0
"""How often a scheduler that is lost is looked for."""
FETCH_SECONDS = 5.0
NOT_A_TRIAL = -1


class _Lost(Exception):
    """The scheduler is."""


class _NotYet(Exception):
    """The worker that had the answer is lost; the task is at work once more."""


@dataclass
class _Job:
    """A trial under way: what it lacks, and its parts by the key of their task."""

    trial_id: int
    plan: StitchPlan
    budget: int
    on: str
    gaps: list[Gap]
    parts: dict[str, list[Gap]]
    answers: dict[str, Answer] = field(default_factory=dict)


class DaskScorer:
    """Scores on workers. `known` grows as with one worker; the workers know nothing of each other."""

    def __init__(
        self,
        spec: RunSpec,
        folder: RunFolder,
        known: Items,
        digests: Digests,
        should_stop: Callable[[], bool],
        say: Callable[[str], None],
        interrupted: Callable[[str | None], None],
    ) -> None:
        """Reach the workers, and wait for one.

        digests: of the models that they are to have. interrupted: told why nothing can go on, and with None that it
        does. Raises UserError, Stopped.
        """
        self._spec, self._should_stop, self._say, self._interrupted = spec, should_stop, say, interrupted
        reader = open_reader(spec)
        self._preflight = reader.preflight
        self.n_layers = reader.preflight.n_layers
        self.fixed = frozenset(reader.preflight.fixed)
        self._reader = reader
        self._benchmarks = {OBJECTIVES: open_run_benchmarks(reader, spec, spec.objectives, spec.budget.max)}
        self.cache = ItemCache(self.n_layers, known)
        self._texts = run_texts(reader, spec, folder)
        self._repair_texts: Texts | None = None
        self._cluster = start(spec, folder)
        self._workers = WorkerStatuses(folder)
        self._run = Run(
            f"{folder.run_id}/{time.time_ns()}",
            f"gptailor-{folder.run_id}",
            spec,
            installed_versions(),
            self._cluster.threads,
            digests=replace(digests, examples={}),
            examples={OBJECTIVES: tuple(map(summary_digest, self._benchmarks[OBJECTIVES]))},
        )
        self._jobs: dict[int, _Job] = {}
        self._futures: dict[str, Future[Any]] = {}
        self._owners: dict[str, int] = {}
        self._done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self._ready: list[Ended] = []
        self._n_submitted = 0
        self._client: Client | None = None
        try:
            self._connect()
            self._wait_for_a_worker()
        except BaseException:
            self.close()
            raise

    # --- what the search asks for -------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """A trial for each worker, and some that are ready for those that end first."""
        n_workers = max(1, self._workers.n_workers)
        return n_workers + 1 + n_workers // 8 - len(self._jobs) - len(self._ready)

    def begin(self, trial_id: int, plan: StitchPlan, budget: int, others: int) -> None:
        idle = self._workers.n_workers - len(self._futures)
        self._begin(trial_id, plan, budget, OBJECTIVES, idle // (others + 1))

    def wait(self) -> list[Ended]:
        while not self._ready:
            if self._should_stop():
                return self._call_off()
            self._workers.look(self._client)
            self._collect()
        ended, self._ready = self._ready, []
        return ended

    def score(self, plan: StitchPlan, budget: int, on: str = OBJECTIVES) -> PlanScores:
        self.opened(on)
        self._begin(NOT_A_TRIAL, plan, budget, on, self._workers.n_workers)
        (ended,) = self.wait()
        if ended.is_given_up:
            raise Stopped
        if ended.result is None:
            log.error("%s", ended.error)
            raise UserError(f"workers: a model that the search needs cannot be scored: {last_line(ended.error)}")
        return ended.result

    def opened(self, on: str) -> Sequence[OpenBenchmark]:
        if on not in self._benchmarks:
            asked = getattr(self._spec, on)
            self._benchmarks[on] = open_run_benchmarks(self._reader, self._spec, asked, SELECTION_EXAMPLES)
            found = {on: tuple(map(summary_digest, self._benchmarks[on]))}
            self._run = replace(self._run, examples={**self._run.examples, **found})
        return self._benchmarks[on]

    def reorder(self, orders: Mapping[Reading, list[int]]) -> None:
        self._benchmarks[OBJECTIVES] = reordered(self._benchmarks[OBJECTIVES], orders)
        self._run = replace(self._run, orders=orders)

    def n_parameters(self, plan: StitchPlan) -> int:
        if not all(map(keeps_shapes, plan.edits)):  # its tensors are on the workers alone
            found = self._ask_one(n_parameters, plan.to_json())
            if found.n_parameters is None:
                raise UserError(f"workers: an edited plan cannot be counted: {last_line(found.error)}")
            return found.n_parameters
        layers = self._preflight.layer_parameters
        return self._preflight.other_parameters + sum(layers[choice.layer] for choice in plan.kept)

    def influence_orders(self) -> list[tuple[str, list[int]]]:
        found = self._ask_one(influence_orders)
        if found.orders is None:
            raise UserError(f"workers: no model of the family can be looked at: {last_line(found.error)}")
        return found.orders

    def repaired(self, plan: StitchPlan) -> StitchPlan:
        """One worker reads the texts, or writes them, and all are given them."""
        repair = self._spec.repairs
        assert repair is not None
        if self._repair_texts is None:
            found = self._ask_one(repair_texts)
            if found.texts is None:
                raise UserError(f"workers: the texts of the repair cannot be read: {last_line(found.error)}")
            self._repair_texts, tokens = found.texts
            self._texts.keep(self._repair_texts.digest, tokens)
            self._run = replace(self._run, texts={self._repair_texts.digest: tokens})
        return plan.edited(repair_edit(repair, self._repair_texts, self._spec.seed))

    def _ask_one(self, work: Callable[..., Answer], *arguments: Any) -> Answer:
        """What one worker makes of the run. Raises UserError, Stopped."""
        future = self._submit(NOT_A_TRIAL, work, *arguments)
        while True:
            if self._should_stop():
                raise Stopped
            self._workers.look(self._client)
            try:
                self._done.get(timeout=LOOK_SECONDS)
                found = self._answer_of(future)
            except (queue.Empty, _NotYet):
                continue
            except _Lost:
                self._reconnect()
                future = self._submit(NOT_A_TRIAL, work, *arguments)
                continue
            self._futures.pop(str(future.key), None)
            return found

    def publish(self) -> None:
        """Workers, who may be elsewhere, share nothing."""

    def close(self) -> None:
        self._workers.close()
        self._cancel(self._futures.values())
        with suppress(Exception):
            if self._client is not None:
                self._client.close(timeout=FETCH_SECONDS)
        with suppress(Exception):  # what does not end in time dies with this process
            self._cluster.close()

    # --- trials out, answers in ---------------------------------------------------------------------------------------

    def _begin(self, trial_id: int, plan: StitchPlan, budget: int, on: str, n_parts: int) -> None:
        gaps = self.cache.gaps(plan, budget, self._benchmarks[on])
        job = self._jobs[trial_id] = _Job(trial_id, plan, budget, on, gaps, {})
        if not gaps:
            self._end(job)
        for part in cut(gaps, max(1, n_parts), self._spec.budget.rungs) if gaps else ():
            self._send(job, part)

    def _send(self, job: _Job, part: list[Gap]) -> None:
        index = {id(benchmark): place for place, benchmark in enumerate(self._benchmarks[job.on])}
        pieces = [Piece(g.plan.to_json(), job.on, index[id(g.benchmark)], g.first, g.end) for g in part]
        future = self._submit(job.trial_id, answer, job.trial_id, pieces)
        job.parts[str(future.key)] = part

    def _submit(self, owner: int, work: Callable[..., Answer], *arguments: Any) -> Future[Any]:
        assert self._client is not None
        self._n_submitted += 1
        key = f"trial-{self._run.key}-{self._n_submitted}"
        future = self._client.submit(work, self._run, *arguments, key=key, pure=False)
        self._futures[key], self._owners[key] = future, owner
        future.add_done_callback(self._done.put)
        return future

    def _collect(self) -> None:
        """Take what ended, waiting a moment for the first."""
        try:
            ended = [self._done.get(timeout=LOOK_SECONDS)]
        except queue.Empty:
            return
        while True:
            try:
                ended.append(self._done.get_nowait())
            except queue.Empty:
                break
        for future in ended:
            key = str(future.key)
            job = self._jobs.get(self._owners.get(key, NOT_A_TRIAL))
            if job is None or key not in job.parts or key in job.answers:
                continue  # it was called off, or sent anew
            try:
                self._take(job, key, self._answer_of(future))
            except _NotYet:
                continue
            except _Lost:
                self._reconnect()
                return

    def _answer_of(self, future: Future[Any]) -> Answer:
        """What a task gave. Raises UserError, _Lost, _NotYet."""
        try:
            found: Answer = future.result(timeout=FETCH_SECONDS)
        except TimeoutError as error:
            future.add_done_callback(self._done.put)
            raise _NotYet from error
        except (CancelledError, OSError) as error:
            raise _Lost from error
        except KilledWorker as error:
            hung = f", or {hung_error(self._spec)}" if self._spec.trial_walltime else ""
            return Answer(
                str(error.last_worker.name),
                error=f"WorkerLost: {LOSSES + 1} workers that ran it were lost, {error.last_worker.name} the last: "
                f"killed, perhaps by the machine for their memory{hung}",
            )
        except ImportError as error:
            raise UserError(
                f"the workers of {self._cluster.where} lack something of this environment ({error}); start them in the "
                "project's folder, with its Python"
            ) from error
        except Exception as error:  # whatever a worker or the way to it made of the task is this trial's cause
            return Answer("", error=f"{type(error).__name__}: {error}")
        if found.refused is not None:
            raise UserError(f"worker {found.worker}: {found.refused}")
        return found

    def _take(self, job: _Job, key: str, found: Answer) -> None:
        job.answers[key] = found
        self._futures.pop(key, None)
        self._owners.pop(key, None)
        self._workers.did(found)
        if found.items is None and found.error is None:
            found = replace(found, error="WorkerLost: it was called off by the scheduler")
        if found.error is not None or len(job.answers) == len(job.parts):
            self._end(job, found.error)

    def _end(self, job: _Job, error: str | None = None) -> None:
        del self._jobs[job.trial_id]
        names = list(dict.fromkeys(found.worker for found in job.answers.values()))
        worker = " + ".join(names) or None
        if error is not None:
            left = job.parts.keys() - job.answers.keys()
            for key in left:
                self._owners.pop(key, None)
            self._cancel([self._futures.pop(key) for key in left])
            self._ready.append(Ended(job.trial_id, error=error, worker=worker))
            return
        benchmarks = self._benchmarks[job.on]
        pieces = (
            pair for key, part in job.parts.items() for pair in zip(part, job.answers[key].items or [], strict=True)
        )
        fresh = self.cache.enter(job.plan, job.budget, benchmarks, join(job.gaps, pieces))
        scores = self.cache.scores(job.plan, job.budget, benchmarks)
        seconds = [(found.stitch_seconds, found.evaluate_seconds) for found in job.answers.values()] or [(0.0, 0.0)]
        stitch, evaluate = max(seconds, key=sum)  # parts are at work side by side
        self._ready.append(Ended(job.trial_id, PlanScores(scores, stitch, evaluate, tuple(fresh)), worker=worker))

    def _call_off(self) -> list[Ended]:
        ended = [*self._ready, *(Ended(trial_id) for trial_id in self._jobs)]
        self._cancel(self._futures.values())
        self._jobs, self._futures, self._owners, self._ready = {}, {}, {}, []
        return ended

    def _cancel(self, futures: Iterable[Future[Any]]) -> None:
        """Workers that are at them stop at the next pack."""
        with suppress(Exception):  # the scheduler may be gone, and its tasks with it
            if self._client is not None:
                self._client.cancel(list(futures))

    # --- the scheduler ------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Reach the scheduler. Raises UserError where that is not possible from the start."""
        try:
            self._client = self._cluster.connect()
        except (OSError, TimeoutError) as error:
            raise UserError(f"workers: {self._cluster.where} cannot be reached: {_reason(error)}") from error
        self._client.subscribe_topic(self._run.topic, self._workers.heard)

    def _wait_for_a_worker(self) -> None:
        self._workers.look(self._client, now=True)
        if not self._workers.n_workers:
            self._say(f"waiting for workers of {self._cluster.where}")
        while not self._workers.n_workers:
            if self._should_stop():
                raise Stopped
            time.sleep(LOOK_SECONDS)
            self._workers.look(self._client, now=True)
        n = self._workers.n_workers
        self._say(f"{n} worker{'s' * (n > 1)} of {self._cluster.where}")

    def _reconnect(self) -> None:
        """Wait for a scheduler that is lost, and send what was under way once more. Returns early if asked to stop."""
        self._interrupted(f"{self._cluster.where} is lost; the run goes on when it is back")
        while not self._should_stop():
            with suppress(Exception):  # of a connection that is gone
                if self._client is not None:
                    self._client.close(timeout=0.1)
            try:
                self._connect()
                break
            except UserError:
                time.sleep(RETRY_SECONDS)
        else:
            return
        self._futures, self._owners = {}, {}
        self._workers.look(self._client, now=True)
        for job in self._jobs.values():
            left = [part for key, part in job.parts.items() if key not in job.answers]
            job.parts = {key: part for key, part in job.parts.items() if key in job.answers}
            for part in left:
                self._send(job, part)
        self._interrupted(None)


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
