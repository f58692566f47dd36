"""SMAC's own folder of a run, read the way DeepCAVE 1.4 reads it (deepcave/runs/converters/smac3v2.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ConfigSpace import ConfigurationSpace
from helpers.suggestions import costs_of, make_spec

from gptailor.search.space import build_space, initial_design
from gptailor.search.suggest import Suggester

ENTRY = [
    "config_id",
    "instance",
    "seed",
    "budget",
    "cost",
    "time",
    "cpu_time",
    "status",
    "starttime",
    "endtime",
    "additional_info",
]
SUCCESS, CRASHED = 1, 2


@pytest.mark.parametrize("n_objectives", [1, 2])
def test_deepcave_finds_what_it_reads(tmp_path: Path, n_objectives: int) -> None:
    spec = make_spec(n_objectives, trials=8)
    space = build_space(spec, 16)
    suggester = Suggester(spec, space, initial_design(space, [("base", list(range(16)))])[:4], tmp_path)
    told = []
    for index in range(6):
        suggestion = suggester.ask()
        assert suggestion is not None
        told.append(suggestion)
        suggester.tell(
            suggestion,
            None if index == 2 else costs_of(suggestion.plan, n_objectives),
            (10.0 * index, 10.0 * index + 1.5),
        )
    suggester.save()
    (folder,) = [path.parent for path in tmp_path.rglob("runhistory.json")]
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("scenario", "runhistory")}
    assert ConfigurationSpace.from_json(folder / "configspace.json") == space.configspace
    objectives = read["scenario"]["objectives"]
    assert (objectives if isinstance(objectives, list) else [objectives]) == [o.name for o in spec.objectives]
    assert "seed" in read["scenario"]
    history = read["runhistory"]
    assert len(history["data"]) == 6 and list(history["data"][0]) == ENTRY, "DeepCAVE takes them by their order"
    for entry, suggestion in zip(history["data"], told, strict=True):
        values = history["configs"][str(entry["config_id"])]
        assert space.decode(values) == suggestion.plan
        assert round(entry["budget"], 2) == suggestion.budget
        assert entry["instance"] is None, "DeepCAVE takes no instances"
        costs = entry["cost"] if n_objectives > 1 else [entry["cost"]]
        assert len(costs) == n_objectives
    assert [entry["status"] for entry in history["data"]] == [SUCCESS] * 2 + [CRASHED] + [SUCCESS] * 3
    spans = [(entry["starttime"], entry["endtime"], entry["time"]) for entry in history["data"]]
    assert spans == [(10.0 * index, 10.0 * index + 1.5, 1.5) for index in range(6)]
    assert set(history["config_origins"]) == set(history["configs"])
