"""A worker with other packages than the engine's is refused by name, before it opens a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed import Client

from gptailor.scoring.cluster.worker import SAME_EVERYWHERE, Run, answer
from gptailor.spec.files import build_spec
from gptailor.versions import installed_versions


@pytest.fixture(scope="module")
def client():
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        yield client


@pytest.mark.parametrize("package", SAME_EVERYWHERE)
def test_a_worker_of_another_version_is_refused(client: Client, package: str, tmp_path: Path) -> None:
    asked = {
        "name": "x",
        "base_model": str(tmp_path / "none"),
        "remove": 1,
        "operations": ["remove"],
        "objectives": [{"benchmark": "words"}],
    }
    engines = installed_versions() | {package: "0.0.1"}
    run = Run("run", "topic", build_spec(asked), engines, None)
    refused = client.submit(answer, run, 0, [], pure=False).result(timeout=60).refused
    mine = installed_versions()[package]
    assert f"it has {package} {mine}, the engine 0.0.1; install the same" in refused  # type: ignore[operator]


def test_a_worker_of_the_same_versions_goes_on_to_the_models(client: Client, tmp_path: Path) -> None:
    asked = {
        "name": "x",
        "base_model": str(tmp_path / "none"),
        "remove": 1,
        "operations": ["remove"],
        "objectives": [{"benchmark": "words"}],
    }
    run = Run("run", "topic", build_spec(asked), installed_versions(), None)
    refused = client.submit(answer, run, 0, [], pure=False).result(timeout=60).refused
    assert "base_model" in refused and "install the same" not in refused  # type: ignore[operator]
