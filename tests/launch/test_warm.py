"""Engines forked from a process that has imported all they need: alone like any other, and one for each run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers.engine_processes import SPEC, eventually

from gptailor.launch import warm
from gptailor.launch.engine import is_alive, prepare, stop
from gptailor.launch.warm import COMMAND, WarmEngines
from gptailor.store.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
HOST = f"""
import os, socket, sys, time
from pathlib import Path
from gptailor.launch import warm
from gptailor.launch.engine import EngineLock, asked
from gptailor.launch.supervisor import is_child, supervise
from gptailor.store.folder import RunFolder

def run(command):
    folder = RunFolder(Path(command[3]) / command[1])
    if not is_child():
        return supervise(folder, run)
    with EngineLock(folder):
        n = len(list(folder.path.glob("start-*")))
        (folder.path / f"start-{{n}}").write_text(f"{{os.getpid()}} {{os.getppid()}} {{'colorsys' in sys.modules}}")
        print("up", flush=True)
        while not asked(folder, "stop"):
            time.sleep(0.02)
    return 0

warm.IDLE_SECONDS = float(os.environ.get("GPTAILOR_IDLE", 600))
ask = sys.argv[1:]
sys.exit(warm.serve(socket.socket(fileno=int(ask[1])), ["colorsys"], run) if ask[0] == {COMMAND!r} else run(ask))
"""
"""A host and an engine in small; the real ones import for ten seconds."""


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[WarmEngines]:
    for module in (warm, sys.modules["gptailor.launch.engine"]):
        monkeypatch.setattr(module, "python", lambda *words: [sys.executable, "-c", HOST, *words])
    found = WarmEngines()
    yield found
    found.close()


def start(engines: WarmEngines, folder: RunFolder) -> int | None:
    from gptailor.launch import engine

    return engine.start(folder, engines.spawn)


def up(folder: RunFolder, n: int = 1) -> tuple[int, int, bool]:
    """Process ids of the run's engine and of its supervisor, and whether what the host imports was there."""
    assert eventually(lambda: len(list(folder.path.glob("start-*"))) == n), folder.log.read_text()
    text = folder.path / f"start-{n - 1}"
    assert eventually(lambda: len(text.read_text().split()) == 3)
    child, parent, imported = text.read_text().split()
    return int(child), int(parent), imported == "True"


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[list[RunFolder]]:
    found = [prepare(tmp_path / "runs", SPEC, token) for token in "abc"]
    yield found
    for folder in found:
        stop(folder, patience=1.0)


def test_engines_are_forked_alone_and_outlive_their_host(engines: WarmEngines, runs: list[RunFolder]) -> None:
    first, second, third = runs
    host = start(engines, first)
    assert host is not None
    child, parent, imported = up(first)
    assert imported and len({host, child, parent}) == 3
    pid = start(engines, second)
    child_2, parent_2, imported_2 = up(second)
    assert imported_2 and pid == parent_2 and psutil.Process(parent_2).ppid() == host
    assert [os.getsid(one) for one in (host, parent, parent_2)] == [host, parent, parent_2], "sessions of their own"
    assert start(engines, second) is None, "it has an engine"
    assert (first.log.read_text(), second.log.read_text()) == ("up\n", "up\n")

    os.kill(child_2, signal.SIGKILL)
    assert up(second, 2)[1:] == (parent_2, True), "what dies is forked anew"
    os.killpg(parent_2, signal.SIGKILL)
    assert eventually(lambda: not is_alive(second) and not psutil.pid_exists(parent_2)), "with its child, and no zombie"
    assert is_alive(first)
    engines.close()
    assert eventually(lambda: not psutil.pid_exists(host)) and is_alive(first)
    assert stop(first) == "stopped when asked"
    assert start(engines, third) != host and up(third)[2]


def test_an_engine_comes_though_its_server_ended_while_the_host_imported(
    engines: WarmEngines, runs: list[RunFolder]
) -> None:
    host = start(engines, runs[0])
    engines.close()
    assert host is not None and up(runs[0])[2]
    assert eventually(lambda: not psutil.pid_exists(host)) and is_alive(runs[0])


def test_a_host_goes_when_it_is_idle_or_its_surroundings_change(
    engines: WarmEngines, runs: list[RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = runs
    host = start(engines, first)
    assert host is not None and up(first)
    monkeypatch.setenv("GPTAILOR_IDLE", "0.3")
    other = start(engines, second)
    assert other not in (None, host) and up(second)
    assert eventually(lambda: not psutil.pid_exists(host)), "its environment is an old one"
    assert other is not None and eventually(lambda: not psutil.pid_exists(other)), "nothing was asked of it any more"
    assert start(engines, third) not in (None, host, other) and up(third)
    assert all(map(is_alive, runs))


def test_what_is_forked_too_late_is_no_second_engine(
    engines: WarmEngines, runs: list[RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = start(engines, runs[0])
    assert host is not None and up(runs[0])
    os.kill(host, signal.SIGSTOP)
    monkeypatch.setattr(warm, "PATIENCE", 0.1)
    pid = start(engines, runs[1])
    _, parent, imported = up(runs[1])
    assert pid == parent and not imported, "it was started as ever"
    os.kill(host, signal.SIGCONT)
    assert eventually(lambda: not psutil.pid_exists(host)), "it is asked no more"
    assert len(list(runs[1].path.glob("start-*"))) == 1 and is_alive(runs[1])


def test_a_host_that_cannot_import_says_why_in_the_log(
    engines: WarmEngines, runs: list[RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = HOST.replace('["colorsys"]', '["no_such_module"]')
    monkeypatch.setattr(warm, "python", lambda *words: [sys.executable, "-c", broken, *words])
    start(engines, runs[0])
    assert eventually(lambda: not is_alive(runs[0])), "the run is lost, not forgotten"
    assert "No module named 'no_such_module'" in runs[0].log.read_text()


def test_imports_leave_the_collector_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "looks.py").write_text("import gc\nseen = gc.isenabled()\n")
    (tmp_path / "fails.py").write_text("1 / 0\n")
    code = """
import contextlib, gc
from gptailor.launch.warm import import_all
with contextlib.suppress(ZeroDivisionError):
    import_all(["fails"])
print(gc.isenabled(), gc.get_freeze_count() > 0)
import_all(["looks"])
import looks
print(looks.seen, gc.isenabled(), gc.get_freeze_count() > 0)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
    )
    assert done.stdout.split() == ["True", "False", "False", "True", "True"]
