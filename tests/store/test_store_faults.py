"""What breaks in real life, broken for real: kills, locks, torn files, flipped bytes, full and read-only disks."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers.make_runs import make_run
from helpers.store_children import HOLD_OPEN, TABLES, WRITE_FOR_EVER, child, contents, kill
from helpers.store_samples import PLAN, a_trial, new_writer, scores, success

from gptailor.results.summary import run_summary
from gptailor.store import queries, writer
from gptailor.store.connection import StoreBusy, StoreDamaged, StoreFull, StoreMissing, StoreUnwritable, open_writer
from gptailor.store.folder import RunFolder
from gptailor.store.journal import append, read_journal
from gptailor.store.repair import rebuild
from gptailor.store.writer import RunWriter
from gptailor.trial import ItemKey


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "runs", n_trials=12, n_layers=8, n_removed=2)


def test_a_killed_writer_loses_nothing_it_acknowledged(tmp_path: Path) -> None:
    folder = new_writer(tmp_path).folder
    done = 0
    for moment in (0.02, 0.11, 0.17):
        process = child(WRITE_FOR_EVER, folder.path, done)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moment)
        acknowledged = 1 + int(re.findall(r"\d+", f"{done} {kill(process)}")[-1])
        RunWriter.open(folder)
        tables = queries.read_run(folder)
        done = len(tables.trials)
        assert done >= acknowledged
        assert tables.trials.trial_id.tolist() == list(range(done))
        assert len(tables.scores) == 2 * done and len(tables.layers) == 5 * done, (
            "a trial is there whole, or not at all"
        )
        assert not read_journal(folder.journal).damaged


def test_a_writer_waits_for_a_reader(tmp_path: Path) -> None:
    writer_ = new_writer(tmp_path)
    reader = child(HOLD_OPEN, writer_.folder.database, "read", 1)
    assert reader.stdout is not None and reader.stdout.readline() == "open\n"
    writer_.finish_trial(0, success())
    assert writer_.behind == 0 and len(queries.read_run(writer_.folder).trials) == 1
    reader.communicate()


def test_a_locked_database_delays_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writer, "WRITER_PATIENCE", 0.2)
    writer_ = new_writer(tmp_path)
    other = child(HOLD_OPEN, writer_.folder.database, "write", 60)
    assert other.stdout is not None and other.stdout.readline() == "open\n"
    with writer_.batch():
        writer_.start_trial(a_trial())
        writer_.finish_trial(0, success())
    assert writer_.behind == 2 and f"PID {other.pid}" in caplog.text and "Nothing is lost" in caplog.text
    with pytest.raises(StoreBusy, match=f"PID {other.pid}"):
        queries.read_run(writer_.folder, patience=0.1)
    listed = run_summary(writer_.folder, patience=0.1)
    assert listed.name == "test", "the last summary is shown"
    kill(other)
    writer_.heartbeat()
    assert writer_.behind == 0 and len(queries.read_run(writer_.folder).trials) == 1
    assert "up to date again" in caplog.text


def test_readers_and_a_writer_at_once(tmp_path: Path) -> None:
    """F9 and the starvation of finding 10: each side gets in, within its patience."""
    folder = new_writer(tmp_path).folder
    process = child(WRITE_FOR_EVER, folder.path, 0)
    assert process.stdout is not None
    process.stdout.readline()
    seen: list[float] = []
    end = time.monotonic() + 60
    while time.monotonic() < end and (len(seen) < 8 or seen[-1] < seen[0] + 3):
        seen.append(len(queries.read_run(folder, patience=10).trials))
    done = len(kill(process).split())
    assert seen == sorted(seen) and seen[-1] >= seen[0] + 3 and done >= 3


def test_a_torn_last_line_is_tolerated(run: RunFolder) -> None:
    whole = run.journal.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    events = read_journal(run.journal).events
    for cut in (last + 1, (last + len(whole)) // 2, len(whole) - 1):
        run.journal.write_bytes(whole[:cut])
        found = read_journal(run.journal)
        assert (len(found.events), found.damaged) == (len(events) - 1, [])
    before = contents(run)
    writer_ = RunWriter.open(run)  # the database holds the torn event: the journal is made whole from it
    writer_.finish_trial(99, success())
    rebuild(run)
    after = contents(run)
    assert after["trials"][:-1] == before["trials"] and len(after["trials"]) == len(before["trials"]) + 1


def test_a_flipped_byte_in_the_journal_costs_one_event_at_most(run: RunFolder) -> None:
    before, whole = contents(run), run.journal.read_bytes()
    events = read_journal(run.journal).events
    for position in random.Random(0).sample(range(len(whole)), 40):
        run.journal.write_bytes(whole[:position] + bytes([whole[position] ^ 0x04]) + whole[position + 1 :])
        found = read_journal(run.journal)
        lost = [event for event in events if event not in found.events]
        assert len(lost) <= 2 and all(event in events for event in found.events), "nothing false is read"
        assert found.damaged or found.events == events or not whole[position:].startswith(b'"')
    RunWriter.open(run)  # with a healthy database the journal is made whole again
    assert not read_journal(run.journal).damaged
    rebuild(run)
    assert contents(run) == before


def test_a_lost_first_line_is_made_up_from_the_run_file(run: RunFolder) -> None:
    before = contents(run)
    first, rest = run.journal.read_bytes().split(b"\n", 1)
    run.journal.write_bytes(b"x" * len(first) + b"\n" + rest)
    found = rebuild(run)
    assert found.damaged == (1,) and found.n_trials == 12
    after = contents(run)
    assert {name: after[name] for name in TABLES if name != "runs"} == {n: before[n] for n in TABLES if n != "runs"}
    summary = run_summary(run)
    assert (summary.name, summary.n_layers, summary.n_removed, summary.n_asked) == ("smollm2-27pct", 8, 2, 12)


@pytest.mark.parametrize("where", [0.0, 0.02, 0.3, 0.6, 0.9])
def test_a_flipped_byte_in_the_database(run: RunFolder, where: float) -> None:
    before = contents(run)
    data = bytearray(run.database.read_bytes())
    used = [i for i in range(len(data)) if data[i]]
    data[used[int(where * len(used))]] ^= 0xFF
    run.database.write_bytes(data)
    run.summary.unlink()
    n_trials = 12
    try:
        assert contents(run) == before, "what can be read is right"
    except StoreDamaged as error:
        assert "repair" in str(error)
        assert "repair" in (run_summary(run).problem or "")
        writer_ = RunWriter.open(run)  # the engine goes on, its events are in the journal whatever the database takes
        writer_.finish_trial(99, success())
        n_trials = 13
    rebuild(run)
    after = contents(run)
    assert (
        len(after["trials"]) == n_trials
        and after["trials"][:12] == before["trials"]
        and after["layers"] == before["layers"]
    )


@pytest.mark.parametrize("rubbish", [b"", b"x" * 5000], ids=["empty", "rubbish"])
def test_rubbish_for_a_database(run: RunFolder, rubbish: bytes) -> None:
    before = contents(run)
    run.database.write_bytes(rubbish)
    with pytest.raises(StoreDamaged, match="not a valid DuckDB"):
        queries.read_run(run)
    found = rebuild(run)
    assert contents(run) == before and found.n_trials == 12 and not found.damaged


def test_a_deleted_write_ahead_log(tmp_path: Path) -> None:
    """DuckDB opens such a file without a word and has lost what was not checkpointed; the journal has not."""
    folder = new_writer(tmp_path).folder
    code = WRITE_FOR_EVER.replace(
        "for trial_id", "import gptailor.store.writer as w\nfrom die import apply as a\nw.apply = a\nfor trial_id"
    )
    (tmp_path / "die.py").write_text(
        "import os\nfrom gptailor.store.tables import apply as real\n"
        "def apply(*args):\n    real(*args)\n    os.kill(os.getpid(), 9)\n"  # between the commit and the checkpoint
    )
    process = child(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}", folder.path, 0)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and folder.wal.stat().st_size > 0
    shutil.copytree(folder.path, tmp_path / "kept")
    assert len(queries.read_run(RunFolder(tmp_path / "kept")).trials) == 1, "with its log, the commit is there"
    folder.wal.unlink()
    assert queries.read_run(folder).trials.empty
    RunWriter.open(folder)
    assert len(queries.read_run(folder).trials) == 1 and len(queries.read_run(folder).layers) == 5


def test_either_file_is_enough(run: RunFolder) -> None:
    before = contents(run)
    run.database.unlink()
    with pytest.raises(StoreMissing):
        queries.read_run(run)
    RunWriter.open(run)
    assert contents(run) == before
    run.journal.unlink()
    RunWriter.open(run)
    run.database.unlink()
    rebuild(run)
    assert contents(run) == before
    run.database.unlink()
    run.journal.unlink()
    with pytest.raises(StoreMissing):
        RunWriter.open(run)
    with pytest.raises(StoreMissing):
        rebuild(run)


@pytest.mark.parametrize("back_to", [None, 3])
def test_a_database_that_is_removed_or_set_back_under_way(tmp_path: Path, back_to: int | None) -> None:
    writer_ = new_writer(tmp_path)
    for trial_id in range(6):
        writer_.finish_trial(trial_id, success())
        if trial_id + 1 == back_to:
            shutil.copy(writer_.folder.database, tmp_path / "earlier")
    writer_.folder.database.unlink()
    if back_to:
        shutil.copy(tmp_path / "earlier", writer_.folder.database)
    writer_.finish_trial(6, success())
    tables = queries.read_run(writer_.folder)
    assert tables.trials.trial_id.tolist() == list(range(7)) and tables.runs["name"][0] == "test"


def test_a_removed_folder_is_told(run: RunFolder) -> None:
    writer_ = RunWriter.open(run)
    shutil.rmtree(run.path)
    with pytest.raises(StoreUnwritable, match="No such file"):
        writer_.finish_trial(99, success())
    writer_.heartbeat()  # a sign of life never ends the engine
    assert writer_.behind == 1


# Disks


def test_a_full_disk_pauses_and_loses_nothing(small_disk: Path) -> None:
    writer_ = new_writer(small_disk / "runs")
    filler = small_disk / "filler"
    done = 0
    for trial_id in range(3):
        writer_.finish_trial(trial_id, success())
        done += 1
    with open(filler, "wb") as file, pytest.raises(OSError):
        while True:
            file.write(b"x" * 65536)
            file.flush()
    with pytest.raises(StoreFull, match="free some space"):
        for trial_id in range(done, 500):
            done = trial_id + 1
            writer_.record_examples(PLAN.hash, "piqa", "acc", "validation", trial_id * 100, [0.5] * 100)
            writer_.finish_trial(trial_id, success())
    told: list[str] = []
    writer_.retry = lambda error: told.append(str(error)) or len(told) < 3  # type: ignore[func-returns-value]  # waits, then gives up
    with pytest.raises(StoreFull):
        writer_.flush()
    assert len(told) == 3
    assert len(queries.read_run(writer_.folder).trials) >= 3, "readers still read"
    writer_.retry = lambda _error: filler.unlink() or True  # type: ignore[func-returns-value]  # waits until somebody makes room
    writer_.flush()
    assert writer_.behind == 0
    assert queries.read_run(writer_.folder).trials.trial_id.tolist() == list(range(done))
    rebuild(writer_.folder)
    assert queries.read_run(writer_.folder).trials.trial_id.tolist() == list(range(done))


def test_a_read_only_disk(small_disk: Path) -> None:
    writer_ = new_writer(small_disk / "runs")
    writer_.finish_trial(0, success())
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StoreUnwritable, match="Read-only"):
        writer_.finish_trial(1, success())
    assert len(queries.read_run(writer_.folder).trials) == 1
    assert run_summary(writer_.folder).n_done == 1
    with pytest.raises(StoreUnwritable):
        new_writer(small_disk / "runs")
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    writer_.flush()
    assert len(queries.read_run(writer_.folder).trials) == 2


def test_a_file_size_limit(tmp_path: Path) -> None:
    """Where no tmpfs can be mounted: the same refusal (EFBIG) in a child that may write 300 KB a file."""
    folder = new_writer(tmp_path).folder
    code = WRITE_FOR_EVER.replace(
        "for trial_id",
        "import resource, signal\nfrom gptailor.store.connection import StoreFull\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "try:\n    writer.record_examples(PLAN.hash, 'b', 'm', 's', 0, [0.5] * 20_000)\n"
        "except StoreFull:\n    print('full', flush=True)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "writer.flush()\nprint('behind', writer.behind)\nsys.exit()\nfor trial_id",
        1,
    )
    output = child(code, folder.path, 0).communicate()[0]
    assert output == "full\nbehind 0\n"
    assert len(queries.load_examples(folder)[ItemKey(PLAN.hash, "b", "m", "s")]) == 20_000
    assert not read_journal(folder.journal).damaged


def test_half_a_batch_is_taken_back(tmp_path: Path) -> None:
    """The bytes that fitted before the disk was full must not spoil the next line."""
    folder = new_writer(tmp_path).folder
    before = folder.journal.read_bytes()
    code = (
        "import resource, sys, pathlib\nfrom gptailor.store.journal import append\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))\n"
        "try:\n    append(pathlib.Path(sys.argv[1]), [{'v': 1, 'n': 2, 'event': 'x' * 5000}])\n"
        "except Exception as e:\n    print(type(e).__name__)\n"
    )
    assert child(code, folder.journal, len(before) + 100).communicate()[0] == "StoreFull\n"
    assert folder.journal.read_bytes() == before
    append(folder.journal, [{"v": 1, "n": 2, "event": "y"}])
    assert [event["n"] for event in read_journal(folder.journal).events] == [1, 2]


def test_writing_is_idempotent_after_a_lost_acknowledgement(tmp_path: Path) -> None:
    """The commit succeeded, but the engine was told otherwise (F9): applying again changes nothing."""
    writer_ = new_writer(tmp_path)
    with writer_.batch():
        writer_.start_trial(a_trial())
        writer_.record_plan(0, PLAN, 1)
        writer_.finish_trial(0, success(*scores()))
    before = contents(writer_.folder)
    with open_writer(writer_.folder) as con:
        con.execute("UPDATE runs SET journal_applied = 1")
    RunWriter.open(writer_.folder)
    assert contents(writer_.folder) == before
