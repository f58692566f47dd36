"""The redundancy of a family: what was planted is named, measured once, kept, and told in one sentence."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.planted import family_with_differences, write_own_answers
from helpers.redundant import family_of, model_of
from safetensors.torch import load_file, save_file

from gptailor.__main__ import main
from gptailor.commands import redundancy as command
from gptailor.commands.check import check
from gptailor.launch.engine import prepare
from gptailor.launch.events import read_events
from gptailor.results import redundancy as kept
from gptailor.results.outlook import Verdict, cheap_layers, outlook
from gptailor.results.redundancy import Redundancy, Scored, Without
from gptailor.scoring import provenance
from gptailor.spec.files import load_spec
from gptailor.spec.run import RunSpec
from gptailor.store import queries
from gptailor.trial import Digests


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file over the planted family, and an objective that its base is always right on."""
    folder = tmp_path_factory.mktemp("redundancy")
    family_with_differences(folder / "models")
    write_own_answers(folder, "own_answers", folder / "models" / "base")
    asked = {
        "name": "planted",
        "base_model": str(folder / "models" / "base"),
        "candidates": {name: str(folder / "models" / name) for name in ("one", "two", "three")},
        "remove": 2,
        "objectives": [{"benchmark": "own_answers", "metric": "acc"}],
        "include_path": [str(folder)],
        "budget": {"min": 6, "max": 18},
        "device": "cpu",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(asked, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def spec(home: Path) -> RunSpec:
    return load_spec(home / "run.yaml")


@pytest.fixture(scope="module")
def found(home: Path, spec: RunSpec) -> Redundancy:
    return command.redundancy(spec, lambda _event: None, home / "runs", examples=24)


def test_planted_redundancy_is_named(found: Redundancy, spec: RunSpec) -> None:
    base = found.models["base"]
    assert {3, 5} <= set(cheap_layers(base)) and 0 not in cheap_layers(base)
    nothing = base.kept(3)
    assert nothing is not None and nothing.share == pytest.approx(1) and nothing.error == pytest.approx(0)
    assert base.influence[3] < 1e-6 < min(base.influence[:3]) and base.copies == {5: 4}
    assert base.scores["own_answers/acc"].metric == "choice_prob" and not base.guesses
    said = outlook(found, 2, spec.operations).text
    assert "Copies in the base: layer 5 is layer 4 with the same weights." in said


def test_the_check_tells_the_verdict_as_long_as_the_models_are_those(
    home: Path, found: Redundancy, spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(spec, home / "runs").redundancy == outlook(found, 2, spec.operations).headline
    monkeypatch.setattr(provenance, "digests_of", lambda _spec: Digests({("base", "model.safetensors"): "another"}))
    assert check(spec, home / "runs").redundancy.startswith("measured of models that have changed since; ")


def test_planted_conflict_and_agreement_are_named(home: Path, found: Redundancy, spec: RunSpec) -> None:
    said = outlook(found, 2, spec.operations).text
    assert "one and two conflict in layer 1; one and three agree in layer 2; elsewhere candidates are unrelated" in said
    assert "Where candidates conflict a merge cancels" in said
    assert "two in layer 1, most in 1" in said and "three in layer 2" in said
    weights = {name: load_file(home / "models" / name / "model.safetensors") for name in ("base", "three")}
    mine = [key for key in weights["base"] if key.startswith("model.layers.2.")]
    flat = {name: np.concatenate([w[key].numpy().ravel() for key in mine]) for name, w in weights.items()}
    far = np.linalg.norm(flat["three"] - flat["base"]) / np.linalg.norm(flat["base"])
    assert found.models["three"].distance == pytest.approx([0, 0, far, 0, 0, 0], rel=1e-4)
    pairs = {(pair.one, pair.other): pair.cosine for pair in found.agreement}
    assert pairs["one", "two"] == [None, pytest.approx(-1, abs=1e-4), None, None, None, None]
    assert pairs["one", "three"][2] == pytest.approx(1, abs=1e-4) and pairs["two", "three"] == [None] * 6


def test_nothing_is_measured_twice_until_something_changes(
    home: Path, found: Redundancy, spec: RunSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured: list[int] = []

    def measure(_scorer: object, _batches: object, examples: int, _say: object) -> Redundancy:
        measured.append(examples)
        return found

    monkeypatch.setattr(command, "_measured", measure)
    runs = tmp_path / "runs"
    kept.write(found, kept.shared_file(runs, spec))
    other_ratio = spec.model_copy(update={"remove": 3, "name": "deeper"})
    assert command.redundancy(other_ratio, lambda _event: None, runs, examples=10).models == _rounded(found).models
    assert measured == []
    command.redundancy(spec, lambda _event: None, runs, examples=25)
    assert measured == [25]
    file = home / "models" / "two" / "model.safetensors"
    before = file.read_bytes()
    weights = load_file(file)
    weights["model.layers.0.mlp.up_proj.weight"] += 0.5
    save_file(weights, file, metadata={"format": "pt"})
    try:
        command.redundancy(spec, lambda _event: None, runs, examples=10)
    finally:
        file.write_bytes(before)
    assert measured == [25, 10]


def test_a_run_keeps_its_own_copy(
    home: Path, found: Redundancy, spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare(tmp_path / "runs", spec)
    assert kept.of_run(folder) is None
    command.redundancy(spec, lambda _event: None, home / "runs", 10, folder)
    asked_otherwise = spec.model_copy(update={"seed": spec.seed + 1})
    assert command.redundancy(asked_otherwise, lambda _event: None, home / "runs", 0, folder).texts != found.texts
    moved = type(folder)(Path(shutil.copytree(folder.path, tmp_path / "elsewhere" / folder.run_id)))
    assert kept.of_run(moved) == _rounded(found)
    second = prepare(home / "runs", spec)
    monkeypatch.setattr(type(second), "exists", lambda _folder: True)
    monkeypatch.setattr(queries, "load_digests", lambda _folder: Digests({("base", "model.safetensors"): "another"}))
    assert kept.of_run(second) is None
    monkeypatch.undo()
    kept.adopt(second)
    assert kept.read(kept.own_file(second)) == _rounded(found)
    kept.own_file(second).write_text('{"format": 1}')
    assert kept.read(kept.own_file(second)) is None


def test_the_command_for_people_and_for_programs(
    home: Path, found: Redundancy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert found.examples == 24
    arguments = ["redundancy", str(home / "run.yaml"), "--runs", str(home / "runs"), "--examples", "24"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "A search may pay: " in said and "layer  kept base" in said
    assert main([*arguments, "--json"]) == 0
    result = read_events(capsys.readouterr().out)[-1].result
    assert result is not None and result["found"]["models"]["base"]["copies"] == {"5": 4}
    assert json.loads(json.dumps(result))["verdict"] == "mixed"
    for option, message in {"--examples=-1": "--examples -1: give 0 or more", "--set=remove=0": "remove"}.items():
        assert main([*arguments, option]) == 2
        assert message in capsys.readouterr().err


# --- what it promises -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "ahead", "verdict"),
    [
        ([0.5, 0.99, 0.98, 0.97], 0.1, Verdict.PROMISING),
        ([0.5, 0.99, 0.98, 0.97], 0.0, Verdict.MIXED),  # room, and nothing to lend
        ([0.5, 0.99, 0.6, 0.6], 0.1, Verdict.MIXED),  # half the room
        ([0.5, 0.9, 0.6, 0.6], 0.1, Verdict.DOUBTFUL),
        ([0.5, 0.99, 0.6, 0.6], 0.0, Verdict.DOUBTFUL),
    ],
)
def test_the_verdict_weighs_room_and_what_candidates_add(
    spec: RunSpec, shares: list[float], ahead: float, verdict: Verdict
) -> None:
    found = family_of(model_of(shares), model_of(shares, 0.75 + ahead))
    assert outlook(found, 2, spec.operations).verdict is verdict


def test_a_base_that_guesses_tells_nothing(spec: RunSpec) -> None:
    guessing = model_of([1.0] * 4, dense=0.26)
    seen = outlook(family_of(guessing, guessing), 2, spec.operations)
    assert seen.verdict is Verdict.UNKNOWN and guessing.kept(1) is None
    assert "Not clearly better than guessing on words/acc: all models" in seen.text


def test_shares_are_above_guessing_and_errors_go_with_them() -> None:
    found = model_of([0.9, 1.0]).kept(0)
    assert found is not None and (found.share, found.error) == (pytest.approx(0.9), pytest.approx(0.01))
    scored = Scored("word_perplexity", False, None, 10.0, None, 0.5, [Without(12.5, 0.5)])
    model = replace(model_of([1.0]), scores={"texts/word_perplexity": scored})
    lost = model.kept(0)
    assert lost is not None and (lost.share, lost.error) == (pytest.approx(0.8), pytest.approx(0.032))


def test_agreement_in_every_layer_is_said(spec: RunSpec) -> None:
    words = {0.3: "a and b agree in every layer", -0.3: "a and b conflict in every layer", 0.05: "Candidates neither"}
    for cosine, said in words.items():
        assert said in outlook(family_of(model_of([1.0] * 4), model_of([1.0] * 4), cosine), 2, spec.operations).text


def _rounded(found: Redundancy) -> Redundancy:
    return kept._from_json(json.loads(json.dumps(kept.to_json(found))))
