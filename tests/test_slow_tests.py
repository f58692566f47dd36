"""The list of slow tests keeps itself (tests/helpers/slow_tests.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.slow_tests import QUICK, SLOW, read, updated, write

TESTS = Path(__file__).resolve().parent
SUITE = """
import time, pytest

@pytest.fixture(scope="module")
def long():
    time.sleep(0.4)

def test_waits(): time.sleep(0.4)
def test_first(long): pass
def test_second(long): pass
@pytest.mark.parametrize("seconds", [0, 0.4])
def test_at_times(seconds): time.sleep(seconds)
def test_fails(): time.sleep(0.4); assert False
def test_plain(): pass
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "test_some.py").write_text(SUITE)
    (tmp_path / "conftest.py").write_text(
        "from helpers import slow_tests\nslow_tests.IMPORTED = ()\n"
        "slow_tests.SLOW, slow_tests.QUICK = 0.3, 0.15\npytest_plugins = ['helpers.slow_tests']\n"
    )
    return tmp_path


def pytest_run(suite: Path, *options: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "--slow-list", "slow.txt", *options]
    environment = os.environ | {"PYTHONPATH": str(TESTS), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=suite, env=environment, capture_output=True, text=True, timeout=60).stdout


def test_what_is_slow_is_found_and_left_out(suite: Path) -> None:
    """A fixture of a module counts for every test that cannot run without it; a test that fails says nothing."""
    write(suite / "slow.txt", ["test_some.py::test_plain", "test_some.py::test_gone", "test_gone.py::test_gone"])
    assert "1 failed, 6 passed" in pytest_run(suite, "--record-slow")
    slow = {f"test_some.py::{name}" for name in ("test_waits", "test_first", "test_second", "test_at_times")}
    assert read(suite / "slow.txt") == slow
    assert "1 failed, 1 passed, 5 deselected" in pytest_run(suite, "--quick")


def test_between_slow_and_quick_nothing_changes(suite: Path) -> None:
    name, between = "test_some.py::test_plain", (SLOW + QUICK) / 2
    for listed in (set[str](), {name}):
        assert updated(listed, {name: between}, suite) == listed
    assert updated(set(), {name: SLOW + 0.1}, suite) == {name}
    assert updated({name}, {name: QUICK - 0.1}, suite) == set()
    assert updated({name}, {}, suite) == {name}, "a run of other tests says nothing of it"
