"""A dashboard over two finished runs, and a visitor, for the tests that drive a browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from helpers.browser import Server, Visitor
from helpers.make_runs import make_run

from gptailor.launch.engine import stop
from gptailor.store.folder import run_folders


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A dashboard over two finished runs."""
    runs = tmp_path_factory.mktemp("dashboard") / "runs"
    make_run(runs, "first", n_trials=80, seed=1)
    make_run(runs, "second", n_trials=60, seed=2)
    started = Server(runs)
    started.start()
    yield started
    started.kill()
    for folder in run_folders(runs):
        stop(folder, patience=1.0)


@pytest.fixture
def visitor(browser: Any, server: Server) -> Iterator[Visitor]:
    made = Visitor(browser, server.url)
    yield made
    made.close()
