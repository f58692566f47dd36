"""Starting, finding and stopping real processes; whoever holds the lock lives, whatever process ids say."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.engine_processes import SPEC, eventually, shell_engine
from helpers.kills import kill_group
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gptailor.errors import UserError
from gptailor.launch import devices, engine
from gptailor.launch.devices import free_devices
from gptailor.launch.engine import (
    LOST,
    EngineLock,
    StopResult,
    asked,
    delete_run,
    is_alive,
    prepare,
    request,
)
from gptailor.launch.jobs import Job, JobStatus, job_state, list_jobs, start_job, stop_job
from gptailor.launch.process import clean_environment, is_held, read_holder, spawn
from gptailor.launch.queue import DeviceQueue, StopAsked, waiting_behind
from gptailor.results.summary import run_summary
from gptailor.spec.files import load_spec
from gptailor.store.folder import RunFolder, run_folders
from gptailor.trial import RunStatus

ROOT = Path(__file__).resolve().parents[2]
PROPER_ENGINE = """
import sys, time
from gptailor.launch.engine import EngineLock, asked
from gptailor.store.folder import RunFolder
folder = RunFolder.of(sys.argv[1], sys.argv[2])
with EngineLock(folder):
    print("up", flush=True)
    while not asked(folder, "stop"):
        time.sleep(0.02)
"""
WAIT_FOR_DEVICE = """
import sys, time
from gptailor.launch.queue import DeviceQueue, StopAsked
from gptailor.store.folder import RunFolder
folder = RunFolder.of(sys.argv[1], sys.argv[2])
try:
    with DeviceQueue(folder, "cuda:0"):
        print("in", flush=True)
        sys.stdin.readline()
except StopAsked:
    print("stopped", flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return prepare(tmp_path / "runs", SPEC)


@pytest.fixture
def engines() -> Iterator[list[RunFolder]]:
    """Folders whose engines are ended after the test."""
    started: list[RunFolder] = []
    yield started
    for folder in started:
        engine.stop(folder, patience=0.1)


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# Launch


def test_a_prepared_run(folder: RunFolder) -> None:
    assert load_spec(folder.spec) == SPEC and "tiny-su" in folder.run_id
    assert not folder.exists() and run_folders(folder.root) == [folder]
    assert engine.state(folder, RunStatus.QUEUED) is RunStatus.QUEUED, "its engine may be on its way"
    os.utime(folder.spec, (0, 0))
    assert engine.state(folder, RunStatus.QUEUED) == LOST
    assert prepare(folder.root, SPEC) != folder
    assert folder.started_in == Path.cwd(), "where relative paths of its run file start"


def test_one_whose_engine_died_before_it_wrote_a_word_is_lost_at_once(folder: RunFolder) -> None:
    shell_engine(folder, "exec sleep 60")
    assert engine.state(folder, RunStatus.QUEUED) is RunStatus.QUEUED
    kill_group(folder)
    assert engine.state(folder, RunStatus.QUEUED) == LOST


def test_one_token_is_one_run(tmp_path: Path) -> None:
    """A double click, a reload, two people, two servers (F10)."""
    code = (
        "import sys; from gptailor.launch.engine import prepare; from gptailor.spec.files import load_spec\n"
        "print(prepare(sys.argv[1], load_spec(sys.argv[2]), 'the token').run_id)"
    )
    (tmp_path / "run.yaml").write_text(SPEC.to_yaml())
    others = [python(code, tmp_path / "runs", tmp_path / "run.yaml") for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        mine = list(pool.map(lambda _: prepare(tmp_path / "runs", SPEC, "the token").run_id, range(16)))
    ids = {*mine, *(other.communicate()[0].strip() for other in others)}
    assert len(ids) == 1 and len(run_folders(tmp_path / "runs")) == 1
    assert prepare(tmp_path / "runs", SPEC, "another").run_id not in ids


def test_one_run_has_one_engine(folder: RunFolder, engines: list[RunFolder]) -> None:
    engines.append(folder)
    with ThreadPoolExecutor(8) as pool:
        started = list(pool.map(lambda _: shell_engine(folder, "sleep 60"), range(16)))
    assert len([pid for pid in started if pid]) == 1
    with (
        pytest.raises(UserError, match=f"process {max(filter(None, started))} on {socket.gethostname()} is running it"),
        EngineLock(folder),
    ):
        pass


def test_an_engine_is_seen_from_the_moment_it_is_started(folder: RunFolder, engines: list[RunFolder]) -> None:
    engines.append(folder)
    for _ in range(5):
        shell_engine(folder, "exec sleep 60")
        assert is_alive(folder)
        assert engine.stop(folder, patience=0.0) in (StopResult.TERMINATED, StopResult.KILLED)
        assert not is_alive(folder)


def test_the_engine_adopts_the_lock_it_is_handed(folder: RunFolder, engines: list[RunFolder]) -> None:
    engines.append(folder)
    pid = spawn([sys.executable, "-c", PROPER_ENGINE, str(folder.root), folder.run_id], folder.lock, folder.log)
    assert eventually(lambda: "up" in folder.log.read_text()), folder.log.read_text()
    holder = read_holder(folder.lock)
    assert holder is not None and holder.pid == pid and is_alive(folder)
    assert engine.stop(folder) is StopResult.ASKED
    assert not is_alive(folder) and not asked(folder, "stop") and not asked(folder, "pause"), "a clean state is left"


def test_an_engine_outlives_who_started_it(folder: RunFolder, engines: list[RunFolder]) -> None:
    """F2: the server is killed, and Ctrl-C in its terminal reaches its own group alone."""
    engines.append(folder)
    code = (
        "import sys, pathlib; from gptailor.launch.process import spawn\n"
        "f = pathlib.Path(sys.argv[1])\n"
        "print(spawn(['/bin/sleep', '60'], f / 'engine.lock', f / 'engine.log'), flush=True)\n"
        "sys.stdin.readline()"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code, folder.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    pid = int(line(server))
    os.killpg(server.pid, signal.SIGINT)
    server.kill()
    server.communicate()
    assert is_alive(folder) and os.getsid(pid) == pid
    assert engine.state(folder, RunStatus.RUNNING) is RunStatus.RUNNING


def test_no_zombie_is_left(folder: RunFolder) -> None:
    pid = shell_engine(folder, "exit 0")
    assert eventually(lambda: not Path(f"/proc/{pid}").exists())


def test_the_engine_gets_none_of_the_servers_secrets(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "GPTAILOR_COOKIE_SECRET",
        "GPTAILOR_OIDC_CLIENT",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "STREAMLIT_AUTH",
        "DB_PASSWORD",
    ):
        monkeypatch.setenv(name, "secret value")
    for name in ("HF_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LC_ALL", "GPTAILOR_READ_ONLY", "PYTHONPATH"):
        monkeypatch.setenv(name, "kept value")
    shell_engine(folder, "env; pwd; echo end")
    assert eventually(lambda: "end" in folder.log.read_text())
    seen = folder.log.read_text()
    assert "secret value" not in seen and seen.count("kept value") == 6
    assert "PYTHONHASHSEED=0" in seen and f"\n{ROOT}\n" in seen
    assert clean_environment({"PATH": "/bin", "TOKEN": "x", "HOMEPAGE": "x"}).keys() & {"TOKEN", "HOMEPAGE"} == set()


def test_the_engine_gets_a_token_only_by_name() -> None:
    found = {"HF_TOKEN": "t", "HF_TOKEN_PATH": "p", "DB_URL": "d", "PYTHON_KEYRING_BACKEND": "k", "HF_HOME": "h"}
    assert clean_environment(found).keys() & found.keys() == {"HF_HOME"}
    handed = clean_environment(found | {"GPTAILOR_ENGINE_ENV": "HF_TOKEN, DB_URL,,MISSING"})
    assert handed.keys() & {*found, "MISSING"} == {"HF_HOME", "HF_TOKEN", "DB_URL"}
    assert clean_environment({"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"


def test_only_the_lock_is_handed_over(folder: RunFolder) -> None:
    with open(folder.path / "server's own", "w") as file:
        os.set_inheritable(file.fileno(), True)
        shell_engine(folder, "ls -l /proc/self/fd; echo end")
        assert eventually(lambda: "end" in folder.log.read_text())
    assert "engine.lock" in folder.log.read_text() and "own" not in folder.log.read_text()


# Life


def test_killed_is_lost_at_once(folder: RunFolder, engines: list[RunFolder]) -> None:
    engines.append(folder)
    pid = shell_engine(folder, "exec sleep 60")
    assert pid is not None
    states = [engine.state(folder, status) for status in (RunStatus.RUNNING, RunStatus.PAUSED)]
    assert states == [RunStatus.RUNNING, RunStatus.PAUSED]
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: engine.state(folder, RunStatus.RUNNING) == LOST, 2.0)
    assert engine.state(folder, RunStatus.PAUSED) == LOST
    assert engine.state(folder, RunStatus.FINISHED) is RunStatus.FINISHED
    assert engine.stop(folder) is StopResult.NOT_RUNNING
    assert shell_engine(folder, "exec sleep 60"), "and it can be started again"


def test_a_process_id_used_again_means_nothing(folder: RunFolder) -> None:
    """F18: the lock file names a living process that is not the engine. It is not taken for one, nor signalled."""
    stranger = subprocess.Popen(["/bin/sleep", "60"], start_new_session=True)
    folder.lock.write_text(
        json.dumps({"pid": stranger.pid, "host": socket.gethostname(), "started_at": "2026-11-01T00:00:00+00:00"})
    )
    assert not is_alive(folder) and engine.state(folder, RunStatus.RUNNING) == LOST
    assert engine.stop(folder) is StopResult.NOT_RUNNING
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_looking_does_not_get_in_the_way(folder: RunFolder) -> None:
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            is_alive(folder)

    lookers = [threading.Thread(target=look) for _ in range(4)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(30):
            with EngineLock(folder):
                assert is_alive(folder)
    finally:
        over.set()
        for looker in lookers:
            looker.join()


# Stop, pause, resume


def test_stopping_goes_as_far_as_it_must(folder: RunFolder, engines: list[RunFolder]) -> None:
    engines.append(folder)
    shell_engine(folder, "until [ -e control/stop ] || [ -e '%s' ]; do sleep 0.02; done" % (folder.control / "stop"))
    assert engine.stop(folder, patience=5) is StopResult.ASKED
    shell_engine(folder, "sleep 60; true")
    assert engine.stop(folder, patience=0.2) is StopResult.TERMINATED
    shell_engine(folder, "trap '' TERM; while true; do sleep 60; done")
    time.sleep(0.1)
    assert engine.stop(folder, patience=0.2) is StopResult.KILLED
    assert not is_held(folder.lock), "nobody of its group is left"
    assert engine.stop(folder) is StopResult.NOT_RUNNING


def test_control_files(folder: RunFolder) -> None:
    assert not asked(folder, "stop") and not asked(folder, "pause")
    for _ in range(2):
        request(folder, "pause")
    request(folder, "stop")
    assert asked(folder, "stop") and asked(folder, "pause")
    request(folder, "resume")
    assert asked(folder, "stop") and not asked(folder, "pause")


def test_an_engine_is_not_stopped_by_what_was_asked_of_the_one_before(folder: RunFolder) -> None:
    request(folder, "stop")
    request(folder, "pause")
    with EngineLock(folder):
        assert not asked(folder, "stop") and not asked(folder, "pause")
        request(folder, "stop")
        assert asked(folder, "stop")


class EngineLife(RuleBasedStateMachine):
    """F21: whatever people press, in whatever order and however often, there is one engine or none, and it is known."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = tempfile.TemporaryDirectory()
        self.folder = prepare(self.scratch.name, SPEC)
        self.pids: list[int] = []
        self.alive = False

    def teardown(self) -> None:
        engine.stop(self.folder, patience=0.05)
        self.scratch.cleanup()

    @rule()
    def start(self) -> None:
        stop = self.folder.control / "stop"
        pid = shell_engine(self.folder, f"until [ -e {str(stop)!r} ]; do sleep 0.01; done")
        assert (pid is None) == self.alive
        if pid is not None:
            self.pids.append(pid)
            self.alive = True

    @rule()
    def pause(self) -> None:
        request(self.folder, "pause")

    @rule()
    def lift(self) -> None:
        request(self.folder, "resume")
        assert not asked(self.folder, "pause")

    @rule()
    def stop(self) -> None:
        result = engine.stop(self.folder, patience=5)
        assert result is (StopResult.ASKED if self.alive else StopResult.NOT_RUNNING)
        self.alive = False

    @precondition(lambda self: self.alive)
    @rule(number=st.sampled_from([signal.SIGKILL, signal.SIGTERM]))
    def kill(self, number: signal.Signals) -> None:
        os.killpg(self.pids[-1], number)
        assert eventually(lambda: not is_alive(self.folder))
        self.alive = False

    @rule()
    def delete_refused_while_alive(self) -> None:
        if self.alive:
            with pytest.raises(UserError):
                delete_run(self.folder)

    @invariant()
    def one_engine_or_none(self) -> None:
        assert is_alive(self.folder) is self.alive
        expected = RunStatus.RUNNING if self.alive else LOST
        assert engine.state(self.folder, RunStatus.RUNNING) == expected
        assert eventually(
            lambda: not any(Path(f"/proc/{pid}").exists() for pid in self.pids[: -1 if self.alive else None])
        )


EngineLife.TestCase.settings = settings(max_examples=10, stateful_step_count=10, deadline=None)
TestEngineLife = EngineLife.TestCase


def test_delete(folder: RunFolder, engines: list[RunFolder]) -> None:
    engines.append(folder)
    shell_engine(folder, "exec sleep 60")
    with pytest.raises(UserError, match="stop it before"):
        delete_run(folder)
    engine.stop(folder, patience=0.1)
    job = start_job(folder, ["runs", "--runs", str(folder.root)], "listing")
    if job_state(job).status is JobStatus.RUNNING:
        with pytest.raises(UserError, match="stop that first"):
            delete_run(folder)
    assert stop_job(job)
    delete_run(folder)
    assert not folder.path.exists() and run_folders(folder.root) == [] and not list(folder.root.glob(".deleted*"))
    with pytest.raises(UserError, match="cannot be deleted"):
        delete_run(folder)


def test_a_job_that_is_deaf_is_killed(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell around it ends of SIGTERM, and what it started holds the lock."""
    deaf = (
        "import signal; signal.signal(15, signal.SIG_IGN); signal.alarm(60); print('deaf', flush=True); signal.pause()"
    )
    monkeypatch.setattr("gptailor.launch.jobs.python", lambda *_: [sys.executable, "-c", deaf])
    job = start_job(folder, ["heal"], "deaf")
    assert eventually(lambda: "deaf" in job_state(job).output)
    assert stop_job(job, patience=1) and job_state(job).status is JobStatus.LOST


# Devices


def test_a_device_is_taken_in_order_of_arrival(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    folders = [prepare(root, SPEC.model_copy(update={"name": name})) for name in ("one", "two", "three", "four")]
    ids = [folder.run_id for folder in folders]
    processes = []
    for index, folder in enumerate(folders):
        processes.append(python(WAIT_FOR_DEVICE, root, folder.run_id))
        if index == 0:
            assert line(processes[0]) == "in"
        else:
            assert eventually(lambda index=index: waiting_behind(root, ids[index]) == ids[:index])
    assert waiting_behind(root, ids[0]) == []
    processes[0].kill()  # a killed run's place is free
    assert line(processes[1]) == "in"
    request(folders[2], "stop")  # one that is stopped while it waits leaves the queue
    assert line(processes[2]) == "stopped"
    assert waiting_behind(root, ids[3]) == [ids[1]]
    processes[1].communicate("done\n")
    assert line(processes[3]) == "in"
    processes[3].communicate("done\n")
    for process in (processes[0], processes[2]):
        process.communicate()
    assert waiting_behind(root, ids[3]) == []
    with DeviceQueue(folders[0], "cuda:0"), DeviceQueue(folders[1], "cpu"):
        assert waiting_behind(root, ids[1]) == [], "another device is another queue"
        process = python(WAIT_FOR_DEVICE, root, ids[1])
        assert eventually(lambda: waiting_behind(root, ids[1]) == ids[:1]), "for one of its two devices"
        process.kill()
        process.communicate()


def test_who_waits_for_a_device_says_for_whom(tmp_path: Path) -> None:
    first, second = (prepare(tmp_path / "runs", SPEC) for _ in range(2))
    said: list[str] = []
    request(second, "stop")
    with (
        DeviceQueue(first, "cuda:0", said.append),
        pytest.raises(StopAsked),
        DeviceQueue(second, "cuda:0", said.append),
    ):
        pytest.fail("the device is taken")
    assert said == [f"waiting for cuda:0: run {first.run_id} has it"]


def test_a_signal_is_heard_while_a_device_is_waited_for(tmp_path: Path) -> None:
    first, second = (prepare(tmp_path / "runs", SPEC) for _ in range(2))
    signalled = threading.Event()
    threading.Timer(0.3, signalled.set).start()
    with (
        DeviceQueue(first, "cpu"),
        pytest.raises(StopAsked),
        DeviceQueue(second, "cpu", should_stop=signalled.is_set),
    ):
        pytest.fail("the device is taken")
    assert waiting_behind(tmp_path / "runs", second.run_id) == []


def test_a_gpu_has_one_queue_by_whatever_number_it_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cards, as a driver tells of them; CUDA_VISIBLE_DEVICES says which of them a run sees, and in which order."""
    monkeypatch.setattr(devices.pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(devices.pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(devices.pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(devices.pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(devices.pynvml, "nvmlDeviceGetUUID", lambda handle: f"GPU-{handle}")
    first, second, third = (prepare(tmp_path / "runs", SPEC) for _ in range(3))
    request(third, "stop")
    with DeviceQueue(first, "cuda:1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        with DeviceQueue(second, "cuda:0"):
            assert waiting_behind(tmp_path / "runs", second.run_id) == []
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        with pytest.raises(StopAsked), DeviceQueue(third, "cuda:0"):
            pytest.fail("it is the first run's card")
    assert [devices.card(name) for name in ("cuda:0", "cuda:1", "cpu")] == ["GPU-1", "cuda:1", "cpu"]


def test_devices_are_counted_without_a_driver() -> None:
    last = free_devices()[-1]
    assert last.name == "cpu" and 0 < last.free <= last.total


# Jobs


def test_jobs(folder: RunFolder) -> None:
    done = start_job(folder, ["--version"], "say-version")
    failed = start_job(folder.path / "place", ["show", "no-such-run; echo hacked $(id)"], "show")
    for job in (done, failed):
        assert eventually(lambda job=job: job_state(job).status is not JobStatus.RUNNING, 30)
    state = job_state(done)
    assert (state.status, state.exit_code, state.arguments) == (JobStatus.DONE, 0, ("--version",))
    assert state.output.startswith("gptailor ") and list_jobs(folder) == [done]
    state = job_state(failed)
    assert state.status is JobStatus.FAILED and state.exit_code == 2 and "run id" in state.output
    assert "uid=" not in state.output, "arguments are data, not shell"


def test_a_job_runs_once_and_is_missed_when_killed(tmp_path: Path) -> None:
    lasting = ["check", str(ROOT / "data/presets/demo.yaml")]
    with ThreadPoolExecutor(4) as pool:
        jobs = list(pool.map(lambda _: start_job(tmp_path, lasting, "look"), range(4)))
    assert len(set(jobs)) == 1
    holder = read_holder(jobs[0].lock)
    assert holder is not None
    os.killpg(holder.pid, signal.SIGKILL)
    assert eventually(lambda: job_state(jobs[0]).status is JobStatus.LOST)
    with pytest.raises(UserError, match="there is none"):
        job_state(Job(tmp_path / "jobs" / "nothing"))
    with pytest.raises(UserError, match="job name"):
        start_job(tmp_path, [], "../x")


# The real thing


@pytest.mark.slow
def test_the_real_engine_is_started_and_says_why_it_failed(tmp_path: Path) -> None:
    folder, is_new = engine.launch(tmp_path / "runs", SPEC, "click")
    again, is_new_again = engine.launch(tmp_path / "runs", SPEC, "click")
    assert (is_new, is_new_again) == (True, False) and folder == again
    assert engine.state(folder, run_summary(folder).status) is RunStatus.QUEUED
    assert eventually(lambda: not is_alive(folder), 300)
    summary = run_summary(folder)
    assert summary.status is RunStatus.FAILED and "no/such/model" in (summary.error or ""), folder.log.read_text()


def test_a_read_only_root_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="no run can be made"):
        prepare(tmp_path / "file", SPEC)
    with pytest.raises(UserError, match="there is none"):
        engine.start(RunFolder.of(tmp_path, "nobody"))
