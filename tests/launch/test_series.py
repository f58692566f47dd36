"""Commands one after another, each forked from a process that has imported what engines need."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers.command_line import only_run, write_benchmark
from helpers.kills import n_stored, status_of, wait_for

from gptailor.launch import series
from gptailor.launch.engine import is_alive
from gptailor.launch.process import python
from gptailor.launch.series import Series
from gptailor.trial import RunStatus

ASKED = """
import sys
from gptailor.launch import series

def run(command):
    print(command, len(sys.argv), "colorsys" in sys.modules, flush=True)
    return 3

import socket
series.serve(socket.socket(fileno=int(sys.argv[1])), ["colorsys"], run)
"""


@pytest.fixture
def with_interrupts() -> Iterator[None]:
    """Tests that run in the background ignore SIGINT, and so would whatever they start."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def test_each_command_has_what_was_imported(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "python", lambda _, channel: [*python()[:1], "-c", ASKED, channel])
    with Series() as commands:
        commands.run("one", "two words")
        commands.run("three")
        process = commands._process
    assert capfd.readouterr().out.splitlines() == ["['one', 'two words'] 2 True", "['three'] 2 True"]
    assert process is not None and process.poll() == 0, "it ends with the series"


def test_where_a_gpu_was_looked_at_a_command_is_not_forked(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = "sys.modules['torch'] = type(sys)('torch')\nsys.modules['torch'].cuda = type(sys)('cuda')\n"
    torch += "sys.modules['torch'].cuda._is_in_bad_fork = lambda: True\n"
    after = ASKED.replace("import socket\n", f"import socket\n{torch}")
    monkeypatch.setattr(series, "python", lambda _, channel: [*python()[:1], "-c", after, channel])
    with Series() as commands:
        commands.run("runs", "--runs", str(tmp_path))
    assert capfd.readouterr().out.startswith(f"No runs in {tmp_path}")


def test_other_code_or_another_environment_has_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "python", lambda _, channel: [*python()[:1], "-c", ASKED, channel])
    with Series() as commands:
        commands.run("one")
        first = commands._process
        commands.run("two")
        assert commands._process is first
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        commands.run("three")
        assert commands._process is not first and first is not None and first.poll() == 0


@pytest.mark.usefixtures("with_interrupts")
def test_a_command_that_is_interrupted_before_it_begins_is_not_begun(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its process still imports; the next command of the series is begun."""
    slow = ASKED.replace("import socket", "import os, signal, socket\nimport gptailor.launch.series as s").replace(
        "series.serve(", "s.import_all = lambda _: os.kill(os.getpid(), signal.SIGINT)\nseries.serve("
    )
    monkeypatch.setattr(series, "python", lambda _, channel: [*python()[:1], "-c", slow, channel])
    with Series() as commands:
        commands.run("one")
        commands.run("two")
    assert capfd.readouterr().out.splitlines() == ["['two'] 2 False"]


def test_without_that_process_a_command_runs_all_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(series, "COMMAND", "no-such-command")  # so that it ends at once
    with Series() as commands:
        for _ in range(2):
            commands.run("runs", "--runs", str(tmp_path))
    said = capfd.readouterr()
    assert said.out.count(f"No runs in {tmp_path}") == 2 and "no-such-command" in said.err


@pytest.mark.slow
@pytest.mark.usefixtures("with_interrupts")
def test_an_experiment_is_interrupted_with_its_engine(tiny_family: Path, tmp_path: Path) -> None:
    write_benchmark(tmp_path, "first_words", 60, 0)
    run = {
        "name": "x",
        "base_model": str(tiny_family / "base"),
        "operations": ["remove"],
        "remove": 2,
        "objectives": [{"benchmark": "first_words", "metric": "acc"}],
        "include_path": [str(tmp_path)],
        "budget": {"min": 6, "max": 54},
        "trials": 5000,
        "device": "cpu",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    file, runs = tmp_path / "small.yaml", tmp_path / "runs"
    file.write_text(yaml.safe_dump({"run": str(tmp_path / "run.yaml"), "runs": {"a": {}, "b": {}}}))
    command = python("experiment", str(file), "--runs", str(runs))
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) as experiment:
        wait_for(lambda: runs.is_dir() and bool([p for p in runs.iterdir() if p.name[0] != "."]), 60)
        folder = only_run(runs)
        wait_for(lambda: n_stored(folder) > 2, 120)
        os.killpg(experiment.pid, signal.SIGINT)
        assert experiment.wait(60) == 130
    assert not is_alive(folder) and status_of(folder) == RunStatus.STOPPED
    assert only_run(runs).run_id == folder.run_id, "the next run is not begun"
