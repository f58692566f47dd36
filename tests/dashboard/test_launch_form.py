"""From the Launch page's fields to a run file and back, on values."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from gptailor.dashboard import form
from gptailor.spec.files import build_spec, load_spec, parse_spec

DEMO = next(preset for preset in form.presets() if preset.path.stem == "demo")


def draft(**changes: Any) -> form.Draft:
    return form.draft(form.values_of(DEMO.spec) | changes, DEMO.spec)


def test_fields_are_read() -> None:
    spec = draft(
        candidates=" a : models/a \n\n b: owner/name:tag ",
        remove="12.5 %",
        objectives="piqa acc_norm train 5-shot\nmmlu",
        held_out="piqa\nboolq acc validation",
        walltime=" 2h ",
        batch_size="16",
        scaled=True,
        scale_low=0.9,
        scale_high=1.1,
    ).spec
    assert spec is not None
    assert spec.candidates == {"a": "models/a", "b": "owner/name:tag"}
    assert spec.remove == 0.125 and spec.walltime == "2h" and spec.batch_size == 16 and spec.output_scale == (0.9, 1.1)
    assert [(o.benchmark, o.metric, o.split, o.num_fewshot) for o in spec.objectives] == [
        ("piqa", "acc_norm", "train", 5),
        ("mmlu", "acc", "validation", None),
    ]
    assert [(o.benchmark, o.split) for o in spec.held_out] == [("piqa", "test"), ("boolq", "validation")]
    assert draft(workers=" 2 ").spec.workers.local == 2  # type: ignore[union-attr]
    assert draft(workers="auto").spec.workers.local == "auto"  # type: ignore[union-attr]
    assert draft(workers="").spec.workers is None  # type: ignore[union-attr]
    assert draft(remove="3").spec.remove == 3  # type: ignore[union-attr]
    assert draft(remove="0,25").spec.remove == 0.25  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"name": ""}, "name", "should have at least 1 character"),
        ({"candidates": "models/a"}, "candidates", "write one a line as name: folder or hub id"),
        ({"candidates": "a: x\na: y"}, "candidates", "the name 'a' is given twice"),
        ({"candidates": "base: x"}, "candidates", "'base' cannot name a candidate"),
        ({"candidates": "a: x"}, "operations", "merge needs two or more candidates"),
        ({"candidates": ""}, "candidates", "selecting or merging needs at least one"),
        ({"remove": "a few"}, "remove", "write a number of layers such as 8, or a share such as 25 %"),
        ({"remove": "250 %"}, "remove", "must be a whole number of layers"),
        ({"remove_by": "speed", "remove": "fast"}, "remove", "write how many times as fast, such as 1.3; got 'fast'"),
        ({"remove_by": "range", "remove": "4-12"}, "remove", "write from how many layers to how many, such as 4 to 12"),
        ({"remove_by": "range", "remove": "4 to 2"}, "remove", "must go from fewer layers to more"),
        ({"remove_by": "memory", "remove": "9"}, "remove", "memory: must be an amount such as 9GB"),
        ({"remove_by": "parameters", "remove": "20"}, "remove", "parameters: must be a share such as 20% or 0.2"),
        ({"remove": "0"}, "remove", "is 0, but operations lists remove"),
        ({"operations": []}, "operations", "must list each of remove, select, merge"),
        ({"objectives": ""}, "objectives", "at least 1 item"),
        ({"workers": "tcp://somewhere:8786"}, "workers", "write auto or a number of workers on this machine"),
        ({"workers": "0"}, "workers", "local: must be auto, or a number of processes from 1 to 256"),
        ({"objectives": "piqa acc train twice"}, "objectives", "write one a line as benchmark metric split"),
        ({"objectives": "piqa acc dev"}, "objectives", "0.split: must be train, validation or test, or a part"),
        ({"held_out": "demo_sums acc validation"}, "held_out", "is an objective of the search"),
        ({"budget_min": 500}, "budget", "min (500) must not be above max (270)"),
        ({"walltime": "soon"}, "walltime", "must be a duration such as 90s"),
        ({"batch_size": "big"}, "batch_size", "must be auto, or a number of rows"),
        ({"factor_low": 2.0, "factor_high": 1.0}, "merge", "factor: must be [low, high]"),
        ({"scaled": True, "scale_low": 2.0, "scale_high": 1.0}, "output_scale", "must be [low, high]"),
    ],
)
def test_what_is_wrong_is_said_at_its_field(changes: dict[str, Any], field: str, message: str) -> None:
    found = draft(**changes)
    assert found.spec is None
    assert any(message in line for line in found.errors.get(field, ())), found.errors


def test_several_fields_at_once() -> None:
    assert set(draft(remove="x", candidates="y", objectives="a b c d").errors) == {"remove", "candidates", "objectives"}


def test_remote_code_cannot_be_asked_for() -> None:
    trusting = DEMO.spec.model_copy(update={"trust_remote_code": True})
    found = form.draft(form.values_of(trusting) | {"trust_remote_code": True}, trusting)
    assert found.spec is not None and not found.spec.trust_remote_code


def test_what_has_no_widget_stays_as_in_the_preset() -> None:
    merge = DEMO.spec.merge.model_copy(update={"method": "ties", "parameters": {"density": 0.5}})
    preset = DEMO.spec.model_copy(update={"merge": merge})
    found = form.draft(form.values_of(preset), preset)
    assert found.spec is not None and found.spec.merge.parameters == {"density": 0.5}


def test_how_to_repair_stays_as_in_the_preset_and_goes_with_the_operation() -> None:
    asked = {
        "operations": ("remove", "repair"),
        "selection": [{"benchmark": "demo_prose", "split": "test"}],
        "repair": {"method": "rcpu"},
    }
    preset = build_spec(DEMO.spec.model_dump(mode="json") | asked | {"held_out": []})
    values = form.values_of(preset)
    assert form.draft(values, preset).spec == preset
    without = form.draft(values | {"operations": ["remove"]}, preset).spec
    assert without is not None and without.repair is None


@pytest.mark.parametrize(
    ("measure", "text", "asked"),
    [
        ("parameters", "20 %", {"parameters": 0.2}),
        ("memory", "1.5 GB", {"memory": "1.5GB"}),
        ("speed", "1,3", {"speed": 1.3}),
        ("range", "4 to 12", {"from": 4, "to": 12}),
        ("range", "10% to 50 %", {"from": 0.1, "to": 0.5}),
    ],
)
def test_how_much_goes_in_other_measures(measure: str, text: str, asked: dict[str, object]) -> None:
    spec = draft(remove_by=measure, remove=text).spec
    assert spec is not None and spec == build_spec(DEMO.spec.model_dump(mode="json") | {"remove": asked})
    preset = form.Preset(DEMO.path, DEMO.title, DEMO.about, spec)
    assert form.draft(form.values_of(spec), preset.spec).spec == spec
    words = shlex.split(form.command_line(spec, DEMO, Path("data/runs")).replace("\\\n", " "))
    assert load_spec(words[4], [words[at + 1] for at, word in enumerate(words) if word == "--set"]) == spec


def test_run_file_and_command_say_the_same() -> None:
    spec = draft(
        name="it's: mine",
        remove="2",
        trials=9,
        budget_max=90,
        factor_high=0.5,
        walltime="1h",
        candidates="a: x y\nb: z",
        objectives="demo_sums acc validation 2-shot",
    ).spec
    assert spec is not None
    assert parse_spec(form.run_file(spec)) == spec
    command = form.command_line(spec, DEMO, Path("elsewhere/runs"))
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:4] == ["python", "-m", "gptailor", "search"]
    changes = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    assert load_spec(words[4], changes) == spec
    assert words[-2:] == ["--runs", "elsewhere/runs"]
    assert "--set" not in form.command_line(DEMO.spec, DEMO, Path("data/runs"))


def test_a_broken_preset_closes_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("name: [")
    (tmp_path / "good.yaml").write_text("# Good\n# It is.\n#\n# Not this.\n" + DEMO.spec.to_yaml())
    assert [(preset.title, preset.about) for preset in form.presets(tmp_path)] == [("Good", "It is.")]


def test_a_scheduler_is_taken_from_a_run_file_alone() -> None:
    preset = DEMO.spec.model_validate(DEMO.spec.model_dump() | {"workers": {"scheduler": "tcp://head:8786"}})
    kept = form.draft(form.values_of(preset), preset).spec
    assert kept is not None and kept.workers == preset.workers
    assert form.draft(form.values_of(preset) | {"workers": "tcp://other:8786"}, preset).spec is None
