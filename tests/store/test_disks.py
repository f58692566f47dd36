"""F3, F4, F9: a run's disk is full, read-only or gone, its database broken or held by others, while an engine works."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers import kills
from helpers.store_children import HOLD_OPEN, kill
from helpers.trouble import search_with, small_search, troubled
from helpers.warm_engines import shared

from gptailor.__main__ import main
from gptailor.errors import UserError
from gptailor.launch.engine import LOST, EngineLock, StopResult, is_alive, prepare, resume, stop
from gptailor.launch.process import write_holder
from gptailor.results.story import run_json
from gptailor.spec.run import RunSpec
from gptailor.store.folder import RunFolder
from gptailor.trial import RunStatus


@pytest.fixture(scope="module")
def spec(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    return small_search(tiny_family, tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RunFolder]]:
    """Folders whose engines are ended after the test."""
    monkeypatch.setattr("gptailor.launch.engine.spawn", shared().spawn)
    started: list[RunFolder] = []
    yield started
    for folder in started:
        if folder.path.exists():
            stop(folder, patience=0.1)


@pytest.fixture(scope="module")
def peaceful(spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return troubled(shared(), tmp_path_factory.mktemp("peaceful"), spec, "pass")[0]


TELLS_THAT_IT_WAITS = """
import pathlib
from gptailor.search.loop import Search
wait = Search._wait_for_space
def told(self, problem):
    pathlib.Path({waits!r}).touch()
    return wait(self, problem)
Search._wait_for_space = told
"""


def fill(disk: Path) -> Path:
    """Take all the room there is, to the last byte."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        for size in (65536, 512, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return filler


WRITES_AT_ONCE = "import gptailor.store.writer\ngptailor.store.writer.DATABASE_SHARE = 1e9\n"
"""The database is written at every trial, however much of the time that takes."""


def slowly(root: Path, spec: RunSpec, engines: list[RunFolder], first: str = "") -> tuple[RunFolder, int]:
    """A run whose trials take a moment, four of them done, and its engine's process id. first: code to begin with."""
    folder = prepare(root, spec)
    engines.append(folder)
    pid = shared().start(first + search_with("if begun: threading.Event().wait(0.1)"), folder.lock, folder.log)
    kills.wait_for(lambda: kills.n_stored(folder) >= 4)
    return folder, pid


def ends_as(folder: RunFolder, peaceful: RunFolder) -> None:
    """Nothing of what happened is seen in the run when it has ended."""
    kills.wait_for(lambda: not is_alive(folder), 120)
    assert kills.status_of(folder) == RunStatus.FINISHED, folder.log.read_text()[-3000:]
    assert kills.trials(folder) == kills.trials(peaceful) and kills.scored_twice(folder) == []


def test_a_full_disk_is_waited_for(
    tmp_path: Path, small_disk: Path, spec: RunSpec, peaceful: RunFolder, engines: list[RunFolder]
) -> None:
    waits = tmp_path / "waits"
    folder, _ = slowly(small_disk / "runs", spec, engines, first=TELLS_THAT_IT_WAITS.format(waits=str(waits)))
    filler = fill(small_disk)
    assert folder.trouble() == "its disk is full"
    kills.wait_for(waits.exists, 60)  # what is left of the journal's last page holds a trial or two
    assert is_alive(folder) and kills.n_stored(folder) < 12 and kills.status_of(folder) == RunStatus.RUNNING
    filler.unlink()
    ends_as(folder, peaceful)


def test_stopped_on_a_full_disk(small_disk: Path, spec: RunSpec, peaceful: RunFolder, engines: list[RunFolder]) -> None:
    """No request can be left on it, but a signal can be sent; later the run goes on."""
    folder, _ = slowly(small_disk / "runs", spec, engines)
    filler = fill(small_disk)
    assert stop(folder) in (StopResult.TERMINATED, StopResult.ASKED)
    assert not is_alive(folder) and kills.status_of(folder) in (LOST, RunStatus.STOPPED)
    filler.unlink()
    assert resume(folder)
    ends_as(folder, peaceful)


def test_a_disk_that_becomes_read_only(
    small_disk: Path, spec: RunSpec, peaceful: RunFolder, engines: list[RunFolder]
) -> None:
    folder, _ = slowly(small_disk / "runs", spec, engines, first=WRITES_AT_ONCE)
    kills.kill_group(folder)  # a file system with files open for writing cannot be made read-only

    def is_read_only() -> bool:
        return not subprocess.run(["mount", "-o", "remount,ro", small_disk], capture_output=True).returncode

    kills.wait_for(is_read_only, 10)
    assert folder.trouble() == "its disk is read-only"
    assert kills.status_of(folder) == LOST
    with pytest.raises(UserError, match="Read-only"):
        resume(folder)
    with pytest.raises(UserError, match="Read-only"), EngineLock(folder):
        pass
    assert stop(folder) is StopResult.NOT_RUNNING
    assert len(run_json(folder)["trials"]["by_status"]), "readers still read"
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert resume(folder)
    ends_as(folder, peaceful)


def test_a_folder_that_is_removed_ends_its_engine(tmp_path: Path, spec: RunSpec, engines: list[RunFolder]) -> None:
    folder, pid = slowly(tmp_path, spec, engines)

    def is_gone() -> bool:
        shutil.rmtree(folder.path, ignore_errors=True)  # the engine may write a file while others are removed
        return not folder.path.exists()

    kills.wait_for(is_gone, 10)
    kills.wait_for(lambda: not psutil.pid_exists(pid), 30)
    assert not folder.path.exists(), "and nothing of it is made anew"
    assert folder.trouble() == "its folder is gone"


def test_a_database_that_somebody_holds(
    tmp_path: Path, spec: RunSpec, peaceful: RunFolder, engines: list[RunFolder]
) -> None:
    """F9, with a patience of a fifth of a second instead of thirty: trials go on, and reach the database in the end."""
    impatient = WRITES_AT_ONCE + "gptailor.store.writer.WRITER_PATIENCE = 0.2\n"
    folder, _ = slowly(tmp_path, spec, engines, first=impatient)
    holder = None
    while holder is None or holder.stdout is None or not holder.stdout.readline():
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD_OPEN, str(folder.database), "read", "60"], stdout=subprocess.PIPE, text=True
        )
    before = kills.n_stored(folder)
    kills.wait_for(lambda: kills.n_stored(folder) >= min(before + 3, 12))
    told = folder.log.read_text()
    assert "Nothing is lost" in told and is_alive(folder), told
    kill(holder)
    ends_as(folder, peaceful)


def test_a_broken_database_is_told_and_repaired(
    tmp_path: Path, spec: RunSpec, peaceful: RunFolder, engines: list[RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = slowly(tmp_path, spec, engines)
    kills.kill_group(folder)
    stored = kills.n_stored(folder)
    folder.database.write_bytes(b"\x00" * 4096 + folder.database.read_bytes()[4096:])
    folder.wal.unlink(missing_ok=True)
    assert resume(folder)
    kills.wait_for(lambda: not is_alive(folder))
    assert f"python -m gptailor repair {folder.run_id}" in folder.log.read_text()
    assert main(["repair", folder.run_id, "--runs", str(tmp_path)]) == 0
    assert f"{stored} trials" in capsys.readouterr().out or stored < len(kills.trials(folder)) <= stored + 1
    assert resume(folder)
    ends_as(folder, peaceful)


def test_an_export_whose_disk_fills_up_leaves_nothing(
    small_disk: Path, spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptailor.family.models import open_family
    from gptailor.formats import huggingface
    from gptailor.plan import StitchPlan

    family, plan, out = open_family(spec), StitchPlan.without({2, 3}, 6), small_disk / "model"
    with pytest.raises(UserError, match=r"free|MB|GB"):  # refused beforehand where there is too little
        huggingface.export_hf(family, plan, out)
    monkeypatch.setattr(huggingface, "_refuse_small_disk", lambda _folder, _n_bytes: None)  # others take it meanwhile
    with pytest.raises(UserError, match=r"could not be written|No space"):
        huggingface.export_hf(
            family,
            plan,
            out,
            progress=lambda step, _share: fill(small_disk) if step == "writing weights" else None,  # type: ignore[arg-type]
        )
    assert [path.name for path in small_disk.iterdir()] == ["filler"], "nothing half done is left"
    (small_disk / "filler").unlink()
    huggingface.export_hf(family, plan, out)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 4


def test_a_lock_file_is_held_though_nothing_can_be_written_into_it(small_disk: Path, spec: RunSpec) -> None:
    folder = prepare(small_disk / "runs", spec)
    with EngineLock(folder) as lock:
        fill(small_disk)
        write_holder(lock.handle, 1)
        assert is_alive(folder)
