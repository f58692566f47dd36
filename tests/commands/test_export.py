"""From a saved run to a folder and to answers: real tiny models, opened from the run's own run file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hub import hub_for_uploads
from helpers.run_tables import SPEC, run_tables
from helpers.tiny_run import CONFIG, PLAN, make_tiny_run
from safetensors.torch import load_file

from gptailor.__main__ import main
from gptailor.commands.export import MAX_PROMPT, export_model, generate, scores_of
from gptailor.errors import UserError
from gptailor.launch.events import Event
from gptailor.plan import StitchPlan
from gptailor.scoring.provenance import OLD
from gptailor.store.folder import RunFolder
from gptailor.trial import REPAIRED


@pytest.fixture(scope="module")
def run(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_tiny_run(tmp_path_factory.mktemp("runs"), tiny_family)


@pytest.fixture(scope="module")
def exported(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    out, said = tmp_path_factory.mktemp("exports") / "model", []  # type: ignore[var-annotated]
    export_model(run, CONFIG, out, said.append)
    return out, said


def test_an_export_is_the_plan(exported: tuple[Path, list[Event]]) -> None:
    out, said = exported
    assert json.loads((out / "gptailor_plan.json").read_text()) == PLAN.to_json()
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 4
    assert said[0].text == OLD, "this run's store has no digests"
    assert str(said[1]) == "  0% opening the family" and str(said[-2]) == "100% done"
    assert "4 layers" in said[-1].text and "logits differ" in said[-1].text
    assert said[-1].result["folder"] == str(out) and said[-1].result["n_layers"] == 4  # type: ignore[index]


def test_the_card_tells_scores_and_how_it_was_found(exported: tuple[Path, list[Event]]) -> None:
    card = (exported[0] / "README.md").read_text()
    assert "| words | acc | 0.5000 | 0.1600 | 10 | yes |" in card
    assert "| words \\(test\\) | acc | 0.4000 | 0.1200 | 16 | no |" in card
    assert "configuration 7, seed 0" in card and "Trials: 1, of which 1 succeeded" in card
    assert "Dense base on words \\(validation\\)/acc: 0.6000 ± 0.1500 \\(10 examples\\)" in card
    assert "Dense base on words \\(test\\)/acc: 0.8000 ± 0.1000 \\(16 examples\\)" in card


def test_the_card_says_of_every_score_whether_it_had_a_part_in_the_choice() -> None:
    spec = SPEC | {"objectives": SPEC["objectives"][:1], "held_out": [{"benchmark": "arc", "metric": "acc"}]}
    spec["selection"] = [{"benchmark": "piqa", "metric": "acc", "split": "validation[900:]"}]
    names = (("arc/acc", "test"), ("piqa/acc", "validation"), ("piqa/acc", "validation[900:]"))
    rows = [
        {"subject": f"config:{one}", "name": name, "score": 0.5, "n_samples": 900, "split": split}
        for one in (1, REPAIRED + 1)
        for name, split in names
    ]
    plan = StitchPlan.without([2], 4)
    trials = [{"config_id": 1, "budget": 900, "scores": {"piqa/acc": 0.5}}]
    tables = run_tables(trials, {1: plan, REPAIRED + 1: plan}, rows, spec=spec)
    used = {one: [(s.benchmark, s.is_objective) for s in scores_of(tables, one)] for one in (1, REPAIRED + 1)}
    judged = [("piqa (validation[900:])", True), ("arc (test)", False)]
    assert used[1] == [("piqa", True), *judged], "a score that a trial has is not listed twice"
    assert used[REPAIRED + 1] == [("piqa (validation)", True), *judged]
    unjudged = run_tables(trials, {1: plan}, spec=spec)
    assert [score.benchmark for score in scores_of(unjudged, 1)] == ["piqa"]


def test_a_configuration_that_is_not_there(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="configuration 8: run tiny-run has none of this number; it has 7"):
        export_model(run, 8, tmp_path / "out", print)
    assert not (tmp_path / "out").exists()


def test_mergekit_builds_the_same_model_from_its_file(
    run: RunFolder, exported: tuple[Path, list[str]], tmp_path: Path
) -> None:
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    file = tmp_path / "plan.yaml"
    command = ["export", run.run_id, str(CONFIG), str(file), "--runs", str(run.root)]
    assert main([*command, "--as", "mergekit"]) == 0
    config = MergeConfiguration.model_validate(yaml.safe_load(file.read_text()))
    run_merge(config, str(tmp_path / "built"), options=MergeOptions(copy_tokenizer=False))
    parts = map(load_file, (tmp_path / "built").glob("*.safetensors"))
    built = {key: value for part in parts for key, value in part.items()}
    wanted = load_file(exported[0] / "model.safetensors")
    assert built.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(built[key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert main([*command, "--as", "mergekit"]) == 2, "a file that is there is left alone"


def test_an_export_goes_to_the_hub(run: RunFolder, tmp_path: Path) -> None:
    """Listed, refused for another's token, and sent.

    In a process of its own, as the hub's library reads the address when it is imported.
    """
    out = tmp_path / "model"
    command = ["export", run.run_id, str(CONFIG), str(out), "--runs", str(run.root), "--push", "ada/short"]
    code = (
        "import os, sys\n"
        "from gptailor.__main__ import main\n"
        "for token, options in (('', ['--dry-run']), ('stolen', []), ('secret', [])):\n"
        "    os.environ['HF_TOKEN'] = token\n"
        "    print(f'status {main([*sys.argv[1:], *options])}', flush=True)\n"
    )
    with hub_for_uploads("secret") as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=300, env=environment
        )
    assert done.returncode == 0, done.stderr
    listed, refused, sent, _ = re.split(r"(?<=status \d)\n", done.stdout)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    for name, content in files.items():
        assert f"would send {name} ({len(content):,} bytes)" in listed
    assert listed.endswith("nothing was sent to ada/short\nstatus 0") and "100% done" in listed
    assert refused.endswith("status 2") and "ada/short could not be sent to the hub" in done.stderr
    assert sent.endswith("/ada/short/commit/1\nstatus 0") and "opening the family" not in sent, "it is there already"
    assert hub.files == files
    assert [(new["organization"], new["name"], new["visibility"]) for new in hub.created] == [
        ("ada", "short", "private")
    ]


def test_what_does_not_go_together_is_refused(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", run.run_id, str(CONFIG), str(tmp_path / "out"), "--runs", str(run.root)]
    for options, sentence in {
        ("--dry-run",): "--dry-run lists what --push would send; add --push OWNER/NAME",
        ("--push", "a/b", "--as", "mergekit"): "--push sends a model's folder; leave --as mergekit out",
        ("--push", "../b/c"): "'../b/c' is no name on the hub; expected OWNER/NAME",
    }.items():
        assert main([*command, *options]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def answers(run: RunFolder, prompt: str = "the cat sat", **options: object) -> dict[str, dict[Any, Any]]:
    said: list[Event] = []
    generate(run, CONFIG, prompt, said.append, max_tokens=6, **options)  # type: ignore[arg-type]
    assert [event.text for event in said if event.result is None] == [
        OLD,
        "opening the models",
        "the dense base writes",
        f"plan {CONFIG} writes",
    ]
    return {event.result["subject"]: event.result for event in said if event.result}


def test_answers_are_those_of_plain_transformers(
    run: RunFolder, tiny_family: Path, exported: tuple[Path, list[Event]]
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
        generate(run, CONFIG, prompt, lambda _line: None, max_tokens=tokens)
