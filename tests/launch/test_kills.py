"""The bar of resuming: a search that is killed again and again ends as one that never was."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from helpers import kills
from helpers.warm_engines import WarmEngines, shared

from gptailor.launch.engine import EngineLock, is_alive, resume
from gptailor.spec.files import load_spec
from gptailor.store import queries
from gptailor.store.writer import RunWriter
from gptailor.trial import RunStatus


@pytest.fixture(scope="module")
def warm() -> WarmEngines:
    return shared()


@pytest.fixture(autouse=True)
def quick_engines(warm: WarmEngines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptailor.launch.engine.spawn", warm.spawn)
    monkeypatch.chdir(kills.ROOT)  # the demo's paths count from there


@pytest.mark.slow
def test_killed_at_random_moments_ends_the_same(tmp_path: Path) -> None:
    """F1. `python tests/helpers/kills.py` is the whole demo search with 20 kills; its first 18 trials, with 6."""
    spec = load_spec(kills.DEMO, ["trials=18", "selection=[]"])
    whole = kills.search(tmp_path / "whole", spec)
    killed = kills.search(tmp_path / "killed", spec, kills=6, seed=random.randrange(10**6))
    assert len(kills.trials(whole)) == 18 and kills.n_started(whole) == 18
    assert kills.trials(killed) == kills.trials(whole) and kills.front(killed) == kills.front(whole)
    assert kills.scored_twice(killed) == [] and kills.scored_twice(whole) == []


@pytest.mark.slow
def test_a_replay_that_departs_goes_on_as_a_warm_start(tmp_path: Path) -> None:
    """F20: the search would ask for other trials than those stored (here: drawn at random, not by SMAC)."""
    folder = kills.search(tmp_path, load_spec(kills.DEMO, ["trials=14"]))
    before = kills.trials(folder)
    assert "warm start" not in folder.log.read_text()
    changed = load_spec(kills.DEMO, ["trials=20", "suggester=random"])
    with EngineLock(folder):
        writer = RunWriter.open(folder)
        writer.change_spec(changed.model_dump(mode="json"), changed.to_yaml())
        writer.record_run({"versions": {"smac": "2.3.0", "duckdb": "2.0.0"}})
    resume(folder)
    kills.wait_for(lambda: not is_alive(folder))
    told = folder.log.read_text()
    assert kills.status_of(folder) == RunStatus.FINISHED, told[-3000:]
    assert "smac 2.3.0 is " in told and "goes on from the 14 stored trials as a warm start" in told
    after = kills.trials(folder)
    assert after[:14] == before and len(after) == 20
    assert len({(plan, budget) for _, plan, budget, *_ in after}) == 20, "what is stored is not asked for again"
    assert kills.scored_twice(folder) == []
    plans = queries.read_run(folder).plans
    assert plans.config_id.is_unique and plans.plan_hash.is_unique

    # And once more from there: the replay departs again, and again nothing is scored twice.
    longer = load_spec(kills.DEMO, ["trials=23", "suggester=random"])
    with EngineLock(folder):
        RunWriter.open(folder).change_spec(longer.model_dump(mode="json"), longer.to_yaml())
    resume(folder)
    kills.wait_for(lambda: not is_alive(folder))
    assert kills.trials(folder)[:20] == after and len(kills.trials(folder)) == 23
    assert kills.scored_twice(folder) == []
