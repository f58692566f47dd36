"""Which tests are slow is measured, not remembered: a pytest plugin, and the list that it keeps, tests/slow_tests.txt.

`--quick` leaves out the tests of the list (`make quick`). `--record-slow` brings the list up to date with what has just
run: a test that took longer than SLOW seconds is added, one that took less than QUICK leaves it. In between nothing
changes, so that a busy machine does not move the list to and fro.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

LIST = Path(__file__).resolve().parents[1] / "slow_tests.txt"
HEAD = "# Tests that `make quick` leaves out. Written by `make quick` and `make test` (tests/helpers/slow_tests.py).\n"
SLOW, QUICK = 1.5, 0.7
"""Seconds."""
SHARED = 5.0
"""Seconds from which a fixture of the whole session counts for every test that uses it; below, all share it."""
IMPORTED = ("lm_eval.tasks", "smac", "streamlit.testing.v1", "torch", "transformers")
"""What takes long to import, once a process: no test is slow for being the first to do so."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("slow tests")
    group.addoption("--quick", action="store_true", help="leave out the tests of the list")
    group.addoption("--record-slow", action="store_true", help="bring the list up to date with this run")
    group.addoption("--slow-list", type=Path, default=LIST, help=f"the list (default: {LIST.name})")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-slow"):
        config.pluginmanager.register(_Recorder(config), "slow-test-recorder")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # the longest first: processes end together
    if not config.getoption("--quick"):
        return
    slow = read(config.getoption("--slow-list"))
    left_out = [item for item in items if name_of(item.nodeid) in slow]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if name_of(item.nodeid) not in slow]


def name_of(node_id: str) -> str:
    """A test function, whatever its parameters."""
    return node_id.partition("[")[0]


def read(path: Path) -> set[str]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line for line in lines if line and not line.startswith("#")}


def write(path: Path, names: Iterable[str]) -> None:
    text = HEAD + "".join(f"{name}\n" for name in sorted(names))
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def updated(listed: set[str], seconds: Mapping[str, float], root: Path) -> set[str]:
    """The list after a run in which tests took so long. Tests that are no more leave it."""
    slow = {name for name, took in seconds.items() if took > SLOW}
    quick = {name for name, took in seconds.items() if took < QUICK}
    return {name for name in (listed | slow) - quick if _is_there(name, root)}


def _is_there(name: str, root: Path) -> bool:
    file, _, function = name.partition("::")
    path = root / file
    return path.is_file() and f"def {function.rpartition('::')[2]}(" in path.read_text(encoding="utf-8")


class _Recorder:
    """Measures each test: its own phases, and the fixtures of a module or session that it cannot run without."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.fixtures: dict[int, float] = {}  # identity of a FixtureDef that outlives a test -> seconds
        self.own: dict[str, float] = {}
        self.running = ""
        self.without_answer: set[str] = set()
        self.seconds: dict[str, float] = {}  # on the process that reports: a test function -> its slowest case

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running = nodeid
        self.own[nodeid] = 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        started = time.perf_counter()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                took = time.perf_counter() - started
                self.fixtures[id(fixturedef)] = max(took, self.fixtures.get(id(fixturedef), 0.0))
                self.own[self.running] = self.own.get(self.running, 0.0) - took

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        report = yield
        self.own[item.nodeid] = self.own.get(item.nodeid, 0.0) + call.duration
        if call.when == "teardown":
            report.user_properties.append(("seconds", self.own.pop(item.nodeid) + self._of_fixtures(item)))
        return report

    def _of_fixtures(self, item: Any) -> float:
        used = [found[-1] for found in item._fixtureinfo.name2fixturedefs.values()]
        taken = [(fixture.scope, self.fixtures.get(id(fixture), 0.0)) for fixture in used]
        return sum(took for scope, took in taken if scope != "session" or took > SHARED)

    def pytest_sessionstart(self, session: pytest.Session) -> None:  # noqa: ARG002 (pytest's signature)
        if not _is_controller(self.config) or not self.config.getoption("numprocesses", None):
            for library in IMPORTED:
                import_module(library)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:  # it ended early, or late
            self.without_answer.add(report.nodeid)
        took = dict(report.user_properties).get("seconds")
        if report.nodeid not in self.without_answer and isinstance(took, float):
            name = name_of(report.nodeid)
            self.seconds[name] = max(took, self.seconds.get(name, 0.0))

    def pytest_sessionfinish(self) -> None:
        if _is_controller(self.config) and self.seconds:
            path = self.config.getoption("--slow-list")
            write(path, updated(read(path), self.seconds, self.config.rootpath))


def _is_controller(config: pytest.Config) -> bool:
    """Not one of pytest-xdist's workers, which report to another process."""
    return not hasattr(config, "workerinput")
