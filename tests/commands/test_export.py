"""From a saved run to a folder and to answers: real tiny models, opened from the run's own run file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny_run import CONFIG, PLAN, make_tiny_run

from gptailor.commands.export import MAX_PROMPT, export_model, generate
from gptailor.errors import UserError
from gptailor.store.folder import RunFolder


@pytest.fixture(scope="module")
def run(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_tiny_run(tmp_path_factory.mktemp("runs"), tiny_family)


@pytest.fixture(scope="module")
def exported(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    out, said = tmp_path_factory.mktemp("exports") / "model", []
    export_model(run, CONFIG, out, said.append)
    return out, said


def test_an_export_is_the_plan(exported: tuple[Path, list[str]]) -> None:
    out, said = exported
    assert json.loads((out / "gptailor_plan.json").read_text()) == PLAN.to_json()
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 4
    assert said[0] == "  0% opening the family" and said[-2] == "100% done"
    assert "4 layers" in said[-1] and "logits differ" in said[-1]


def test_the_card_tells_scores_and_how_it_was_found(exported: tuple[Path, list[str]]) -> None:
    card = (exported[0] / "README.md").read_text()
    assert "| words | acc | 0.5000 | 0.1600 | 10 | yes |" in card
    assert "| words \\(test\\) | acc | 0.4000 | 0.1200 | 16 | no |" in card
    assert "configuration 7, seed 0" in card and "Trials: 1, of which 1 succeeded" in card
    assert "Dense base on words \\(validation\\)/acc: 0.6000 ± 0.1500 \\(10 examples\\)" in card
    assert "Dense base on words \\(test\\)/acc: 0.8000 ± 0.1000 \\(16 examples\\)" in card


def test_a_configuration_that_is_not_there(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="configuration 8: run tiny-run has none of this number; it has 7"):
        export_model(run, 8, tmp_path / "out", print)
    assert not (tmp_path / "out").exists()


def answers(run: RunFolder, prompt: str = "the cat sat", **options: object) -> dict[str, dict]:
    said: list[str] = []
    generate(run, CONFIG, prompt, said.append, max_tokens=6, **options)  # type: ignore[arg-type]
    events = [json.loads(line) for line in said]
    assert [event["step"] for event in events if "step" in event][0] == "opening the family"
    return {event["subject"]: event for event in events if "subject" in event}


def test_answers_are_those_of_plain_transformers(
    run: RunFolder, tiny_family: Path, exported: tuple[Path, list[str]]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = answers(run, chat=False)
    for subject, folder, layers in (("dense", tiny_family / "base", 6), ("config:7", exported[0], 4)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = tokenizer("the cat sat", return_tensors="pt")["input_ids"]
        written = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        answer = found[subject]
        assert answer["text"] == tokenizer.decode(written, skip_special_tokens=True)
        assert answer["n_tokens"] == len(written) and answer["n_layers"] == layers
        assert answer["n_parameters"] == sum(p.numel() for p in model.parameters())
        cache = 2 * layers * 2 * 8 * (ids.shape[1] + len(written) - 1) * 4  # keys and values, 2 heads of 8, float32
        assert answer["memory"] == 4 * answer["n_parameters"] + cache
        assert answer["tokens_per_second"] == pytest.approx(len(written) / answer["seconds"], rel=0.01)


def test_the_chat_template_is_used_where_there_is_one(run: RunFolder) -> None:
    assert answers(run)["dense"]["prompt"] == "user: the cat sat\nassistant:"
    assert answers(run, chat=False)["dense"]["prompt"] == "the cat sat"


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [
        ("  ", 8, "prompt: must have 1 to"),
        ("x" * (MAX_PROMPT + 1), 8, "prompt: must have 1 to"),
        ("the cat", 0, "tokens: must be 1 to"),
        ("the cat sat on a mat " * 30, 200, "exceed the model's 256"),
    ],
)
def test_what_cannot_be_asked(run: RunFolder, prompt: str, tokens: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(run, CONFIG, prompt, lambda line: None, max_tokens=tokens)
