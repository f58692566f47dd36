"""Huge pages are asked for once, where they are given, and a user's own tunables stay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptailor.__main__ import MODEL_WORK, command_parser
from gptailor.heap import HUGE, TUNABLES, begin_in_huge_pages, can_ask, tunables

RESTARTED = """
import json, os, sys
from pathlib import Path
from gptailor.heap import begin_in_huge_pages
open(sys.argv[1], "a").write("began ")
begin_in_huge_pages(Path(sys.argv[2]))
print(json.dumps([sys.argv[3:], os.environ.get("GLIBC_TUNABLES")]))
"""


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("", f"{HUGE}=1"),
        ("glibc.malloc.arena_max=1", f"glibc.malloc.arena_max=1:{HUGE}=1"),
        (f"{HUGE}=0", f"{HUGE}=0"),
    ],
)
def test_a_users_tunables_stay(given: str, wanted: str) -> None:
    assert tunables({TUNABLES: given}) == {TUNABLES: wanted}
    assert tunables({TUNABLES: given} if given else {}) == {TUNABLES: wanted}


needs_glibc = pytest.mark.skipif(not can_ask(), reason="no glibc of 2.35 or newer")


@needs_glibc
@pytest.mark.parametrize(
    ("setting", "set_by_user", "times", "wanted"),
    [
        ("always [madvise] never", None, 2, f"{HUGE}=1"),
        ("[always] madvise never", None, 1, None),
        ("always madvise [never]", None, 1, None),
        (None, None, 1, None),
        ("always [madvise] never", f"{HUGE}=0", 1, f"{HUGE}=0"),
    ],
)
def test_a_process_begins_anew_once_with_its_arguments(
    tmp_path: Path, setting: str | None, set_by_user: str | None, times: int, wanted: str | None
) -> None:
    log, file = tmp_path / "log", tmp_path / "enabled"
    if setting is not None:
        file.write_text(setting + "\n")
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES}
    if set_by_user is not None:
        environment[TUNABLES] = set_by_user
    command = [sys.executable, "-c", RESTARTED, str(log), str(file), "a b", "--c=ü"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert json.loads(found) == [["a b", "--c=ü"], wanted]
    assert log.read_text().split() == ["began"] * times


@needs_glibc
def test_a_process_whose_tunables_are_taken_away_begins_anew_once_only(tmp_path: Path) -> None:
    log, file = tmp_path / "log", tmp_path / "enabled"
    file.write_text("always [madvise] never\n")
    taken_away = f"import os; os.environ.pop({TUNABLES!r}, None)" + RESTARTED
    command = [sys.executable, "-c", taken_away, str(log), str(file)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert json.loads(found) == [[], None] and log.read_text().split() == ["began"] * 2


def test_commands_that_compute_begin_in_huge_pages() -> None:
    commands = next(one for one in command_parser()._actions if isinstance(one.choices, dict)).choices
    assert isinstance(commands, dict) and commands.keys() >= MODEL_WORK
    said = "import sys, gptailor.__main__ as m; m.begin_in_huge_pages = lambda: print('anew'); m.entry()"
    for given, wanted in ((["evaluate", "--help"], True), (["runs", "--help"], False), ([], False)):
        found = subprocess.run([sys.executable, "-c", said, *given], capture_output=True, text=True, check=False)
        assert found.stdout.startswith("anew") is wanted, found.stderr


def test_without_an_interpreters_path_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "enabled"
    file.write_text("always [madvise] never\n")
    monkeypatch.delenv(TUNABLES, raising=False)
    monkeypatch.setattr(sys, "executable", None)
    begin_in_huge_pages(file)
