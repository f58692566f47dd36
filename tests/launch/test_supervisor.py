"""F7: an engine whose process dies is started again; one that dies again and again at a trial is told so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers.engine_processes import SPEC, eventually

from gptailor.launch.engine import StopResult, is_alive, prepare, stop
from gptailor.launch.process import read_holder
from gptailor.store.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
SUPERVISE = """
import sys
import gptailor.launch.supervisor as supervisor
from gptailor.store.folder import RunFolder
folder = RunFolder.of(sys.argv[1], sys.argv[2])
supervisor.python = lambda *_: [sys.executable, "-c", sys.argv[3], str(folder.path)]
sys.exit(supervisor.supervise(folder))
"""
# An engine in small: it adopts the lock, says that it is up, and does what the test is about.
ENGINE = """
import os, signal, sys
from pathlib import Path
from gptailor.launch.engine import EngineLock, request
from gptailor.launch.supervisor import DEATHS, START_ME_AGAIN, is_child
from gptailor.store.folder import RunFolder
assert is_child()
folder = RunFolder(Path(sys.argv[1]))
with EngineLock(folder):
    n = len(list(folder.path.glob("start-*")))
    (folder.path / f"start-{n}").write_text(os.environ.get(DEATHS, ""))
    %s
"""
DIE = "os.kill(os.getpid(), signal.SIGKILL)"
WORK = "signal.pause()"  # until somebody ends it


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return prepare(tmp_path / "runs", SPEC)


@pytest.fixture
def supervisors() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def supervise(folder: RunFolder, what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SUPERVISE, str(folder.root), folder.run_id, ENGINE % what]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def starts(folder: RunFolder) -> list[str]:
    return [path.read_text() for path in sorted(folder.path.glob("start-*"))]


def engine_pid(folder: RunFolder) -> int:
    holder = read_holder(folder.lock)
    assert holder is not None
    return holder.pid


@pytest.mark.parametrize(
    ("what", "code", "n_starts"),
    [
        ("sys.exit(0)", 0, 1),
        ("sys.exit(1)", 1, 1),
        ("if n < 2: " + DIE, 0, 3),
        ("if n < 1: os._exit(START_ME_AGAIN)", 0, 2),
        ("if n < 1: os.kill(os.getpid(), signal.SIGSEGV)", 0, 2),
        ("request(folder, 'stop'); " + DIE, 137, 1),
        ("signal.signal(signal.SIGHUP, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGHUP)", 129, 1),
    ],
)
def test_started_again_after_a_crash_alone(folder: RunFolder, what: str, code: int, n_starts: int) -> None:
    process = supervise(folder, what)
    output = process.communicate(timeout=60)[0]
    assert (process.returncode, len(starts(folder))) == (code, n_starts), output
    assert output.count("it is started again") == n_starts - 1
    assert not is_alive(folder)


def test_who_dies_at_one_place_is_told_and_at_last_left(folder: RunFolder) -> None:
    process = supervise(folder, DIE)
    process.communicate(timeout=60)
    *first, last = starts(folder)
    assert process.returncode == 137 and first == ["", "", ""] and last.startswith("SIGKILL")


def test_who_ends_trials_in_between_is_started_for_ever(folder: RunFolder) -> None:
    progress = """open(folder.journal, "a").write('{"event":"trial_finished"}')"""
    process = supervise(folder, f"if n < 7: {progress}; {DIE}")
    assert process.communicate(timeout=60)[0].count("it is started again") == 7
    assert process.returncode == 0 and set(starts(folder)) == {""}


def test_the_run_is_alive_while_its_engine_is_started_again(
    folder: RunFolder, supervisors: list[subprocess.Popen[str]]
) -> None:
    supervisors.append(supervise(folder, WORK))
    for n in (1, 2):
        assert eventually(lambda n=n: len(starts(folder)) == n)
        os.kill(engine_pid(folder), signal.SIGKILL)
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            assert is_alive(folder), "nobody else may start it meanwhile"
    assert eventually(lambda: len(starts(folder)) == 3)
    assert stop(folder, patience=0.2) is StopResult.TERMINATED
    assert supervisors[0].wait(10) == 143 and len(starts(folder)) == 3


def test_stop_goes_as_far_as_it_must_through_the_supervisor(
    folder: RunFolder, supervisors: list[subprocess.Popen[str]]
) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); (folder.path / 'deaf').touch(); signal.pause()"
    supervisors.append(supervise(folder, deaf))
    assert eventually((folder.path / "deaf").exists)
    assert stop(folder, patience=0.2) is StopResult.KILLED
    assert supervisors[0].wait(10) == 137 and len(starts(folder)) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_the_supervisor_is_told_reaches_the_engine(
    folder: RunFolder, supervisors: list[subprocess.Popen[str]], number: signal.Signals
) -> None:
    supervisors.append(supervise(folder, WORK))
    assert eventually(lambda: len(starts(folder)) == 1)
    supervisors[0].send_signal(number)
    assert supervisors[0].wait(10) in (1, 130, 143) and not is_alive(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_no_engine_without_its_supervisor(folder: RunFolder, supervisors: list[subprocess.Popen[str]]) -> None:
    supervisors.append(supervise(folder, WORK))
    assert eventually(lambda: len(starts(folder)) == 1)
    pid = engine_pid(folder)
    supervisors[0].kill()
    assert eventually(lambda: not is_alive(folder))
    assert eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_one_supervisor_a_run(folder: RunFolder, supervisors: list[subprocess.Popen[str]]) -> None:
    supervisors.append(supervise(folder, WORK))
    assert eventually(lambda: len(starts(folder)) == 1)
    second = supervise(folder, WORK)
    assert "is running it already" in second.communicate(timeout=60)[0] and second.returncode
    assert len(starts(folder)) == 1
