"""Text is written once: what a key or an option means stands in the code, and every page that says it is made of it."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from docs import write_reference
from gptailor.dashboard import form
from gptailor.spec.files import describe
from gptailor.spec.run import RunSpec

ROOT = Path(__file__).resolve().parents[1]
RUN_FILES = [*(ROOT / "data" / "presets").glob("*.yaml"), *(ROOT / "data" / "experiments" / "families").glob("*.yaml")]


@pytest.mark.parametrize("key", list(write_reference.keys()))
def test_every_key_of_the_run_file_says_what_it_means(key: str) -> None:
    text = describe(key)
    assert len(text) > 10 and text.endswith("."), f"a sentence is missing below {key} in gptailor/spec/"
    assert text in write_reference.files()["run-file.md"]


@pytest.mark.parametrize("name", list(write_reference.commands()))
def test_every_command_and_option_says_what_it_means(name: str) -> None:
    parser, page = write_reference.commands()[name], write_reference.files()["command-line.md"]
    assert parser.description and f"\n## {name}\n" in page
    for action in write_reference.arguments(parser):
        assert action.help, f"gptailor {name}: {write_reference.written(action)} has no help"


@pytest.mark.parametrize("name", list(write_reference.files()))
def test_the_reference_is_up_to_date(name: str) -> None:
    there = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert there == write_reference.files()[name], "run `make reference`"


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_the_schema_accepts_the_shipped_run_files(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), write_reference.json_schema())


@pytest.mark.parametrize(
    "change", [{"trials": "60"}, {"trails": 60}, {"budget": {"eta": 1}}, {"objectives": []}, {"dtype": "int8"}]
)
def test_the_schema_refuses_what_the_run_file_refuses(change: dict[str, object]) -> None:
    demo = yaml.safe_load((ROOT / "data" / "presets" / "demo.yaml").read_text(encoding="utf-8"))
    with pytest.raises(ValueError):
        RunSpec.model_validate(demo | change)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(demo | change, write_reference.json_schema())


def test_the_launch_form_names_keys_that_are_there() -> None:
    widgets = form.values_of(form.presets()[0].spec)
    assert set(form.KEYS) <= set(widgets)
    assert all(describe(form.KEYS.get(name, name)) for name in widgets)
