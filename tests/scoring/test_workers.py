"""Many devices: a search on Dask workers ends as one in the engine's own process, whatever becomes of the workers."""

from __future__ import annotations

import json
import logging
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shutil import copytree, rmtree
from types import SimpleNamespace
from unittest.mock import Mock

import psutil
import pytest
from helpers import kills
from helpers.changes import change_one_number, correct
from helpers.clusters import Cluster, dies
from helpers.command_line import write_benchmark
from helpers.warm_engines import shared

from gptailor.errors import UserError
from gptailor.launch import engine
from gptailor.launch.engine import StopResult, is_alive, prepare, resume, stop
from gptailor.launch.process import read_holder
from gptailor.plan import Edit, StitchPlan
from gptailor.scoring.cluster import worker
from gptailor.scoring.cluster.dask_scorer import DaskScorer
from gptailor.scoring.cluster.parts import cut, join
from gptailor.scoring.cluster.start import start
from gptailor.scoring.item_cache import ItemCache
from gptailor.scoring.plan_scorer import PlanScorer
from gptailor.scoring.provenance import digests_of
from gptailor.scoring.scorer import Ended
from gptailor.search.example_order import known_orders
from gptailor.spec.files import build_spec, load_spec
from gptailor.spec.run import RunSpec
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.journal import read_journal
from gptailor.trial import RunStatus, TrialStatus

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600
"""Seconds; a machine may be busy."""


@pytest.fixture(scope="module")
def plan_scorer(run_file: Path) -> PlanScorer:
    """One worker in this process, whose scores are those that every other is to give."""
    spec = load_spec(run_file)
    return PlanScorer.open(spec, spec.objectives, max_examples=spec.budget.max)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A scheduler and two workers that somebody else has started."""
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    made.start_worker("left")
    made.start_worker("right")
    yield made
    made.close()


@pytest.fixture(autouse=True)
def quick_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptailor.launch.engine.spawn", shared().spawn)
    monkeypatch.chdir(ROOT)


def begin(root: Path, spec: RunSpec) -> RunFolder:
    folder = prepare(root, spec)
    assert engine.start(folder) is not None
    return folder


def wait_for_end(folder: RunFolder) -> None:
    kills.wait_for(lambda: not is_alive(folder), PATIENCE)
    assert kills.status_of(folder) == RunStatus.FINISHED, folder.log.read_text()[-3000:]


def worker_processes(folder: RunFolder) -> list[psutil.Process]:
    """The local workers of a run's engine: what its process forks from keeps a pipe and does no work."""
    holder = read_holder(folder.lock)
    assert holder is not None
    family = psutil.Process(holder.pid).children(recursive=True)
    return [process for process in family if process.ppid() != holder.pid and not process.children()]


def assert_every_trial_is_scored_once_and_right(folder: RunFolder, plan_scorer: PlanScorer) -> None:
    tables = queries.read_run(folder)
    trials = tables.trials
    assert trials.trial_id.tolist() == list(range(load_spec(folder.spec).trials))
    assert set(trials.status) == {TrialStatus.SUCCESS}, trials.error.dropna().tolist()
    assert sorted(trials.told_as) == trials.trial_id.tolist(), "SMAC was told of each once"
    finished = [event["row"] for event in read_journal(folder.journal).events if event["event"] == "trial_finished"]
    assert len([row for row in finished if row["status"] == TrialStatus.SUCCESS]) == len(trials)
    plans = {row.config_id: StitchPlan.from_json(json.loads(row.plan)) for row in tables.plans.itertuples()}
    stored = tables.scores.set_index(["trial_id", "benchmark"]).score
    dense = StitchPlan.dense(plan_scorer.family.n_layers)
    orders = known_orders(queries.load_examples(folder), dense, plan_scorer.benchmarks)
    assert orders, "the run read first what tells most"
    if orders != plan_scorer.orders:
        plan_scorer.known = {}
        plan_scorer.reorder(orders)
    for trial in trials.itertuples():
        for score in plan_scorer.score(plans[trial.config_id], int(trial.budget)).scores:
            assert stored[trial.trial_id, score.benchmark] == score.score, "not what one worker gives"


@pytest.mark.alone
def test_two_local_workers(run_file: Path, plan_scorer: PlanScorer, tmp_path: Path) -> None:
    """Killed in its midst and gone on with: trials that were under way are run again, nothing is scored twice."""
    spec = load_spec(run_file, ["workers.local=2", "selection=[{benchmark: first_words, split: test}]"])
    folder = begin(tmp_path, spec)
    kills.wait_for(lambda: kills.n_stored(folder) >= 9, PATIENCE)
    workers = worker_processes(folder)
    assert len(workers) == 2
    glance = json.loads(folder.workers.read_text())["workers"]
    assert {worker["name"] for worker in glance} == {"cpu-1", "cpu-2"} and all(w["memory"] for w in glance)
    listening = [c.laddr.ip for p in workers for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"] * 2, "one port each, on loopback"
    kills.kill_group(folder)
    kills.wait_for(lambda: not any(process.is_running() for process in workers), 10)

    assert resume(folder) is not None
    wait_for_end(folder)
    log = folder.log.read_text()
    assert "trials are stored and will not be run again" in log and "warm start" not in log
    assert "is best on the selection split" in log and "Traceback" not in log
    assert_every_trial_is_scored_once_and_right(folder, plan_scorer)
    assert kills.scored_twice(folder) == []
    trials = queries.read_run(folder).trials
    names = {name for shared in trials.worker.dropna() for name in shared.split(" + ")}
    assert names and names <= {"cpu-1", "cpu-2"}
    assert (trials.asked_after < trials.trial_id).any(), "asked for while others were under way"
    assert not folder.workers.exists() and not (folder.path / "scratch").exists(), "nothing is left behind"


@pytest.mark.alone
def test_workers_that_are_killed_at_random(run_file: Path, plan_scorer: PlanScorer, tmp_path: Path) -> None:
    folder = begin(tmp_path, load_spec(run_file, ["workers.local=2"]))
    for moment in (3, 8, 13, 18):
        kills.wait_for(lambda moment=moment: kills.n_stored(folder) >= moment or not is_alive(folder), PATIENCE)
        if is_alive(folder) and (workers := worker_processes(folder)):
            random.choice(workers).send_signal(signal.SIGKILL)
    wait_for_end(folder)
    assert_every_trial_is_scored_once_and_right(folder, plan_scorer)
    assert kills.scored_twice(folder) == [] and "Traceback" not in folder.log.read_text()


@pytest.mark.alone
def test_a_scheduler_by_its_address(run_file: Path, plan_scorer: PlanScorer, cluster: Cluster, tmp_path: Path) -> None:
    """It is lost and comes back, with another worker: the run pauses, says why, and goes on."""
    folder = begin(tmp_path, load_spec(run_file, [f"workers.scheduler={cluster.address}", "trials=15"]))
    kills.wait_for(lambda: kills.n_stored(folder) >= 6, PATIENCE)
    cluster.close()
    kills.wait_for(lambda: kills.status_of(folder) == RunStatus.PAUSED, PATIENCE)
    assert cluster.address in queries.read_run(folder).runs.iloc[0].error
    cluster.start_scheduler()
    cluster.start_worker("left")
    wait_for_end(folder)
    assert_every_trial_is_scored_once_and_right(folder, plan_scorer)
    assert "Traceback" not in folder.log.read_text()


@pytest.mark.alone
def test_a_client_that_gives_up_its_scheduler_says_nothing(run_file: Path, tmp_path: Path) -> None:
    """Dask logs what it meets while it looks for a scheduler that is lost; the run's log has our words for it."""
    lost = Cluster(tmp_path)
    started = start(load_spec(run_file, [f"workers.scheduler={lost.address}"]), RunFolder(tmp_path / "run"))
    client = started.connect()
    heard: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = heard.append  # type: ignore[assignment, method-assign]
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        lost.close()
        kills.wait_for(lambda: client.status == "connecting" and client._connecting_to_scheduler, PATIENCE)
        with suppress(Exception):
            client.close(timeout=0.1)
        kills.wait_for(lambda: client.status == "closed", PATIENCE)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert heard == []


@pytest.mark.alone
def test_stop_is_quick_and_tidy(run_file: Path, cluster: Cluster, tmp_path: Path) -> None:
    folder = begin(tmp_path, load_spec(run_file, [f"workers.scheduler={cluster.address}", "trials=500"]))
    kills.wait_for(lambda: kills.n_stored(folder) >= 4, PATIENCE)
    asked = time.monotonic()
    assert stop(folder) is StopResult.ASKED
    assert time.monotonic() - asked < 10
    trials = queries.read_run(folder).trials
    assert kills.status_of(folder) == RunStatus.STOPPED and TrialStatus.RUNNING not in set(trials.status)
    assert not folder.workers.exists()


@pytest.mark.alone
def test_a_narrower_plan_is_counted_where_its_tensors_are(
    run_file: Path, plan_scorer: PlanScorer, cluster: Cluster, tmp_path: Path
) -> None:
    spec = load_spec(run_file, [f"workers.scheduler={cluster.address}"])
    narrow = Edit("llm_pruner", (("ratio", 0.25),), plan_scorer.baseline_texts(500))
    plans = [StitchPlan.without({2}, 6), StitchPlan.dense(6).edited(narrow)]
    folder, digests = prepare(tmp_path, spec), digests_of(spec)
    scorer = DaskScorer(spec, folder, {}, digests, lambda: False, lambda _text: None, lambda _cause: None)
    try:
        counted = [scorer.n_parameters(plan) for plan in plans]
    finally:
        scorer.close()
    assert counted == [plan_scorer.stitcher.n_parameters(plan) for plan in plans]


@pytest.mark.alone
def test_a_trial_that_costs_three_workers_is_a_crash(
    run_file: Path, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptailor.scoring.cluster.dask_scorer.answer", dies)
    spec = load_spec(run_file, [f"workers.scheduler={cluster.address}"])
    folder, digests = prepare(tmp_path, spec), digests_of(spec)
    scorer = DaskScorer(spec, folder, {}, digests, lambda: False, lambda _text: None, lambda _cause: None)
    try:
        scorer.begin(0, StitchPlan.dense(6), 6, 0)
        (ended,) = scorer.wait()
    finally:
        scorer.close()
    assert isinstance(ended, Ended) and ended.result is None
    assert (ended.error or "").startswith("WorkerLost: 3 workers that ran it were lost, ")


@pytest.mark.alone
def test_workers_of_other_models_or_rows_are_refused(tiny_family: Path, cluster: Cluster, tmp_path: Path) -> None:
    """A worker finds other files where the engine found its own."""
    for name in ("base", "math"):
        copytree(tiny_family / name, tmp_path / name)
    write_benchmark(tmp_path, "learnt", 12, 0)
    asked = {
        "name": "other files",
        "operations": ["remove", "select"],
        "base_model": str(tmp_path / "base"),
        "candidates": {"math": str(tmp_path / "math")},
        "remove": 2,
        "objectives": [{"benchmark": "learnt"}],
        "include_path": [str(tmp_path)],
        "budget": {"min": 6, "max": 6},
        "device": "cpu",
        "workers": {"scheduler": cluster.address},
    }
    spec = build_spec(asked)
    folder, digests, dense = prepare(tmp_path / "runs", spec), digests_of(spec), StitchPlan.dense(6)

    def score() -> Ended:
        scorer.begin(0, dense, 6, 0)
        (ended,) = scorer.wait()
        return ended

    scorer = DaskScorer(spec, folder, {}, digests, lambda: False, lambda _text: None, lambda _cause: None)
    try:
        correct(tmp_path, "learnt")
        with pytest.raises(
            UserError, match=r"^worker \w+: benchmark learnt \(validation\): its examples are not the eng"
        ):
            score()
        correct(tmp_path, "learnt")
        correct(tmp_path, "learnt")
        change_one_number(tmp_path / "math" / "model.safetensors")
        with pytest.raises(UserError, match=r"those of the engine:\ncandidates.math: model.safetensors is not what"):
            score()
        rmtree(tmp_path / "math")
        copytree(tiny_family / "math", tmp_path / "math")
        assert score().result is not None, "with the engine's it works"
    finally:
        scorer.close()


def test_a_file_that_a_worker_may_not_read_is_no_lost_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask would raise its OSError in the engine, which takes that for the connection's, and sends the task again."""
    said = SimpleNamespace(address="tcp://left", name="left", log_event=lambda *_: None)
    monkeypatch.setattr(worker, "get_worker", lambda: said)
    monkeypatch.setattr(worker, "_is_called_off", lambda: lambda: False)
    monkeypatch.setattr(worker, "_open", Mock(side_effect=PermissionError(13, "Permission denied", "models/base")))
    found = worker.influence_orders(SimpleNamespace(topic="run", key="run"))  # type: ignore[arg-type]
    assert found.refused == "PermissionError: [Errno 13] Permission denied: 'models/base'"


def test_a_trial_is_cut_where_examples_are_never_computed_together(plan_scorer: PlanScorer) -> None:
    plan = StitchPlan.without({2, 4}, 6)
    gaps = ItemCache(6).gaps(plan, 54, plan_scorer.benchmarks)  # of which nothing is known
    parts = cut(gaps, 4, (6, 18, 54))
    assert len(parts) == 4 and cut(gaps, 1, (6, 18, 54)) == [gaps]
    whole, _ = plan_scorer.answers(gaps)
    pieces = [pair for part in reversed(parts) for pair in zip(part, plan_scorer.answers(part)[0], strict=True)]
    assert len(pieces) == 6, "two benchmarks on three rungs"
    assert join(gaps, pieces) == list(zip(gaps, whole, strict=True))


def test_metrics_of_one_benchmark_are_not_cut_apart(plan_scorer: PlanScorer) -> None:
    one, other = plan_scorer.benchmarks
    likely = replace(one, metric="choice_prob", spec=one.spec.model_copy(update={"metric": "choice_prob"}))
    gaps = ItemCache(6).gaps(StitchPlan.without({2, 4}, 6), 18, [one, other, likely])
    parts = cut(gaps, 4, (6, 18))
    assert len(parts) == 4 and sum(map(len, parts)) == 6, "two benchmarks on two rungs, one by two metrics"
    for part in parts:
        pieces = {(piece.benchmark.spec.benchmark, piece.first) for piece in part}
        assert len(pieces) == 1 and len(part) == (1 if part[0].benchmark is other else 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("workers={}", "must say one of local, scheduler or slurm"),
        ("workers={local: 2, scheduler: 'tcp://a:1'}", "must say one of local, scheduler or slurm"),
        ("workers.local=0", "workers.local: must be auto, or a number of processes"),
        ("workers.scheduler=somewhere", "must be the address of a Dask scheduler such as tcp://host:8786"),
        ("workers={slurm: {jobs: 4, memory: much}}", "workers.slurm.memory"),
        ("workers={slurm: {jobs: 4, walltime: long}}", "must be a duration"),
        ("workers={slurm: {}}", "workers.slurm.jobs: is required"),
        ("workers={locale: 2}", "did you mean 'local'?"),
    ],
)
def test_mistakes_are_named(run_file: Path, change: str, message: str) -> None:
    with pytest.raises(UserError, match="workers") as told:
        load_spec(run_file, [change])
    assert message in str(told.value)


def test_a_scheduler_that_is_not_there(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptailor.scoring.cluster.start.CONNECT_SECONDS", 1.0)
    spec = load_spec(run_file, ["workers.scheduler=tcp://127.0.0.1:9"])
    with pytest.raises(UserError, match=r"workers: the scheduler tcp://127.0.0.1:9 cannot be reached"):
        folder, digests = prepare(tmp_path, spec), digests_of(spec)
        DaskScorer(spec, folder, {}, digests, lambda: False, lambda _text: None, lambda _cause: None)


def test_slurm_jobs_stand_where_the_engine_stands(run_file: Path, tmp_path: Path) -> None:
    from dask_jobqueue.slurm import SLURMJob

    from gptailor.scoring.cluster.start import slurm_options

    spec = load_spec(run_file, ["workers={slurm: {jobs: 8, cores: 6, queue: gpu, walltime: 90m, gpus: 2}}"])
    assert spec.workers is not None and spec.workers.slurm is not None
    options = slurm_options(spec.workers.slurm, RunFolder.of(tmp_path, "a-run"))
    for name in ("scheduler_options", "security", "shared_temp_directory"):  # of the cluster, not of a job
        del options[name]
    script = SLURMJob("tcp://head:8786", name="a", **options).job_script()
    for line in ("-p gpu", "-t 01:30:00", "--gres=gpu:2", "--cpus-per-task=6", f"cd {ROOT}", "--nthreads 1"):
        assert line in script, script
