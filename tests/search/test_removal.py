"""How much goes, in other measures than layers: of real sizes, or of a measured speed; and what the run keeps of it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gptailor.commands.check import check
from gptailor.errors import UserError
from gptailor.evaluate.evaluator import Stopped
from gptailor.family.preflight import preflight
from gptailor.family.removal import Sizes, counted
from gptailor.launch.engine import prepare
from gptailor.scoring.removal_speed import _measured, answer_of, counted_here, known_ratios, next_to_try
from gptailor.search.engine import run_engine
from gptailor.search.progress import Report
from gptailor.spec.files import load_spec
from gptailor.spec.run import RunSpec
from gptailor.store import queries
from gptailor.store.asked import spec_of
from gptailor.trial import RunStatus

UNEVEN = Sizes(layers=(10, 30, 20, 40), others=100, width=2)  # 200 parameters, 400 bytes


def test_a_measurement_is_left_when_the_run_is_to_stop(make_spec: Callable[..., RunSpec], tiny_family: Path) -> None:
    spec = make_spec(tiny_family, remove={"speed": 1.01})
    with pytest.raises(Stopped):
        _measured(spec, {}, lambda _text: None, lambda: True)
    assert not [child for child in psutil.Process().children() if "removal_speed" in " ".join(child.cmdline())]


@pytest.mark.parametrize(
    ("remove", "expected"),
    [
        ({"parameters": 0.05}, 1),
        ({"parameters": "14%"}, 2),  # 28: the smallest layer has 10, the two smallest 30
        ({"parameters": 0.30}, 3),
        ({"memory": "0.00038MB"}, 1),  # 380 bytes: 10 parameters less
        ({"memory": "0.00034MB"}, 2),
        ({"memory": "0.00028MB"}, 3),
    ],
)
def test_whichever_layers_go_the_measure_is_reached(
    make_spec: Callable[..., RunSpec], tiny_family: Path, remove: object, expected: int
) -> None:
    assert counted(make_spec(tiny_family, remove=remove), UNEVEN).remove == expected


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ({"parameters": "40%"}, r"remove\.parameters: 40\.0% of the parameters cannot go: .*, 30\.0% are gone"),
        ({"memory": "9GB"}, r"remove\.memory: the dense base takes .*, which is within 9GB already"),
        ({"memory": "0.0002MB"}, r"remove\.memory: 0\.0002MB cannot be reached: one layer and the rest take"),
    ],
)
def test_what_cannot_be_reached_is_refused(
    make_spec: Callable[..., RunSpec], tiny_family: Path, remove: object, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        counted(make_spec(tiny_family, remove=remove), UNEVEN)


def test_a_share_of_the_parameters_is_of_the_real_tensors(make_spec: Callable[..., RunSpec], tiny_family: Path) -> None:
    plain = preflight(make_spec(tiny_family))
    two = 2 * plain.layer_parameters[0] / plain.n_parameters
    assert preflight(make_spec(tiny_family, remove={"parameters": two - 1e-6})).n_removed == 2
    assert preflight(make_spec(tiny_family, remove={"parameters": two + 1e-6})).n_removed == 3
    assert counted_here(make_spec(tiny_family, remove={"parameters": two - 1e-6})).remove == 2
    width = 4 * (plain.n_parameters - 2 * plain.layer_parameters[0]) / 1e6
    assert preflight(make_spec(tiny_family, remove={"memory": f"{width:.6f}MB"})).n_removed == 2
    with pytest.raises(UserError, match=r"base_model: remove\.parameters: 99\.0% of the parameters cannot go"):
        preflight(make_spec(tiny_family, remove={"parameters": "99%"}))


@pytest.mark.parametrize("asked", [1.01, 1.3, 1.62, 4.0])
def test_halving_finds_the_fewest_layers(asked: float) -> None:
    """Of 30 layers each a thirtieth of the time, in at most six measurements."""
    truth = {gone: 1 / (1 - gone / 31) for gone in range(1, 30)}
    found: dict[int, float] = {}
    while (number := next_to_try(found, asked, 29)) is not None:
        assert number not in found
        found[number] = truth[number]
    assert answer_of(found, asked) == min(gone for gone, ratio in truth.items() if ratio >= asked) and len(found) <= 6
    assert next_to_try({29: 3.0}, 99.0, 29) is None


def test_a_speed_is_measured_once(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the check, which keeps it for the run; and the run keeps the number for those who go on with it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = load_spec(run_file, ["remove={speed: 1.1}", "trials=1", "budget.min=6", "budget.max=6", "device=cpu"])
    found = check(asked)
    assert found.problems == () and found.family is not None and found.family.n_removed is not None
    ratios, number = known_ratios(asked), found.family.n_removed
    assert ratios[number] >= 1.1 and (number == 1 or ratios[number - 1] < 1.1)
    assert found.family.removal.startswith(f"1.1 times the speed: {number} of 6 layers go, ")

    folder = prepare(tmp_path / "runs", asked)
    assert run_engine(folder, Report(io.StringIO())) is RunStatus.FINISHED
    tables = queries.read_run(folder)
    assert int(tables.runs["n_removed"].iloc[0]) == number
    assert (tables.layers.groupby("config_id")["operation"].agg(lambda row: (row == "removed").sum()) == number).all()
    assert spec_of(folder) == asked.removing(number), "those who go on with it measure nothing"
