"""What a saved run asked is read whoever wrote it: every version's stores, today's run files, and what is damaged."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from helpers.tiny_run import tiny_spec

from gptailor.store import queries
from gptailor.store.connection import known_version
from gptailor.store.folder import RunFolder
from gptailor.store.stored_spec import StoredBenchmark, StoredBudget, StoredSpec, read_stored_spec

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@pytest.mark.parametrize("version", range(1, known_version() + 1))
def test_every_version_is_read(tmp_path: Path, version: int) -> None:
    folder = RunFolder.of(tmp_path, "old")
    with zipfile.ZipFile(FIXTURES / f"store-v{version}.zip") as kept:
        kept.extractall(folder.path)
    assert queries.read_run(folder).spec == StoredSpec(trials=5, keys={"trials": 5})


def test_a_run_file_is_read_as_it_was_asked(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, selection=[{"benchmark": "words", "split": "validation[10:]"}], walltime="2h", seed=3)
    for stored in (spec.model_dump(mode="json"), json.dumps(spec.model_dump(mode="json"))):
        found = read_stored_spec(stored)
        for key in ("base_model", "candidates", "remove", "trials", "seed", "walltime", "device", "dtype"):
            assert getattr(found, key) == getattr(spec, key), key
        for key in ("objectives", "held_out", "selection"):
            asked = [(one.benchmark, one.metric, one.split) for one in getattr(spec, key)]
            assert [one.key for one in getattr(found, key)] == asked and asked, key
        assert found.operations == tuple(map(str, spec.operations)) and found.baselines == ()
        assert found.budget == StoredBudget(spec.budget.min, spec.budget.max, spec.budget.eta)
        assert found.keys == spec.model_dump(mode="json")


@pytest.mark.parametrize("stored", [None, "", "{", "[]", float("nan"), 7, {"trials": "many", "objectives": 3}])
def test_what_is_damaged_is_taken_as_a_run_file_without_it(stored: object) -> None:
    found = read_stored_spec(stored)
    assert found == StoredSpec(keys=found.keys)


def test_a_benchmark_that_says_little_is_read_with_what_run_files_mean() -> None:
    one = {"benchmark": "words"}
    found = read_stored_spec({"objectives": [one, "words", {"metric": "acc"}], "held_out": [one], "budget": {"max": 9}})
    assert found.objectives == (StoredBenchmark("words", "acc", "validation"),)
    assert found.held_out == (StoredBenchmark("words", "acc", "test"),) and found.budget == StoredBudget(max=9)
