"""The run files that are offered to begin with."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gptailor.commands.check import _benchmark_problems, check
from gptailor.dashboard import form
from gptailor.evaluate.safety import check_task_file
from gptailor.spec.files import load_spec
from gptailor.spec.sections import SpaceOperation

ROOT = Path(__file__).resolve().parents[1]
PRESETS = sorted((ROOT / "data" / "presets").glob("*.yaml"))
SWEEP = [path for path in PRESETS if path.stem.startswith("ratio-")]


def names() -> set[str]:
    return {path.stem for path in PRESETS}


def test_what_is_asked_for_is_there() -> None:
    assert names() >= {
        "demo",
        "llama-2-7b",
        "llama-2-13b",
        "llama-3-8b",
        "removal-only",
        "selection-only",
        "two-objectives",
        "perplexity",
        "mmlu-only",
        *(f"ratio-{percent}" for percent in (10, 20, 30, 40, 50)),
    }


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_each_can_be_asked_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    spec = load_spec(path)
    assert spec.name == path.stem and not spec.trust_remote_code
    assert list(_benchmark_problems(spec)) == []


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_each_is_sound_up_to_the_weights(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, all that can be wrong is that the models are not here: one line a model, and what to do."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(ROOT / "nowhere"))
    spec = load_spec(path)
    models = {"base_model": spec.base_model} | {f"candidates.{name}": at for name, at in spec.candidates.items()}
    expected = [
        f"{where}: {model}: no such folder, not in the local hub cache, and the hub could not be asked "
        "(HF_HUB_OFFLINE is set); download it first or give a folder"
        for where, model in models.items()
        if not Path(model).is_dir()
    ]
    assert list(check(spec).problems) == expected and bool(expected) == (path.stem != "demo")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_each_survives_the_form(path: Path) -> None:
    preset = next(found for found in form.presets() if found.path == path)
    assert preset.title and len(preset.title) <= 80 and preset.about
    assert form.draft(form.values_of(preset.spec), preset.spec).spec == preset.spec


def test_the_papers_settings() -> None:
    specs = {path.stem: load_spec(path) for path in PRESETS}
    for name, removed, candidates in (("llama-2-7b", 9, 3), ("llama-2-13b", 10, 3), ("llama-3-8b", 9, 2)):
        spec = specs[name]
        assert (spec.remove, len(spec.candidates), spec.trials) == (removed, candidates, 500)
        assert spec.budget.rungs == (111, 333, 1000) and len(spec.objectives) == 4
    assert specs["removal-only"].operations == (SpaceOperation.REMOVE,)
    assert specs["selection-only"].operations == (SpaceOperation.REMOVE, SpaceOperation.SELECT)
    assert specs["two-objectives"].trials == 100 and len(specs["two-objectives"].objectives) == 2
    assert [o.metric for o in specs["perplexity"].objectives] == ["word_perplexity"]
    assert [o.benchmark for o in specs["mmlu-only"].objectives] == ["mmlu_validation"]


def test_the_sweep_differs_in_its_ratio_alone() -> None:
    specs = [load_spec(path) for path in SWEEP]
    assert [spec.remove for spec in specs] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert len({spec.model_copy(update={"name": "x", "remove": 0}).to_yaml() for spec in specs}) == 1


def test_our_own_task_runs_no_code() -> None:
    task = ROOT / "data" / "presets" / "tasks" / "mmlu_validation.yaml"
    check_task_file(task, ROOT / "nowhere")
    content = yaml.safe_load(task.read_text())
    assert content["validation_split"] == "validation" and "test_split" not in content
