"""The command line as a shell user meets it: forms of output, exit codes, and one sentence for every mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.tiny_run import CONFIG, make_tiny_run, tiny_spec

from gptailor.__main__ import main
from gptailor.store.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_tiny_run(tmp_path_factory.mktemp("runs"), tiny_family)


@pytest.fixture
def places(run: RunFolder, tiny_family: Path, tmp_path: Path) -> dict[str, str]:
    """What the words in capitals stand for: a sound run file, runs, a file, a full folder, damaged runs."""
    (tmp_path / "run.yaml").write_text(tiny_spec(tiny_family).to_yaml())
    (tmp_path / "file").write_text("text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    damaged = tmp_path / "damaged"
    for name in ("empty", "broken"):
        (damaged / name).mkdir(parents=True)
    (damaged / "broken" / "run.yaml").write_text((tmp_path / "run.yaml").read_text())
    (damaged / "broken" / "run.duckdb").write_text("no database")
    (damaged / "plain").write_text("no run")
    names = {"FILE": "file", "FULL": "full", "DAMAGED": "damaged", "NEW": "new", "HERE": "."}
    return {"RUN.yaml": str(tmp_path / "run.yaml"), "RUNS": str(run.root), "RUN": run.run_id} | {
        word: str(tmp_path / name) for word, name in names.items()
    }


MISTAKES = {
    "check none.yaml": "run file none.yaml: no such file",
    "check HERE": "is a folder; name a YAML file",
    "check RUN.yaml --set trials": "--set trials: expected key=value, such as --set trials=60",
    "check RUN.yaml --set budget.max=1": "budget: min (10) must not be above max (1)",
    "check RUN.yaml --set trails=3": "trails: unknown key; did you mean 'trials'?",
    "check RUN.yaml --set base_model=no/such": "base_model: no/such: no such folder, not in the local hub cache, and",
    "runs --runs FILE": "not a directory",
    "show RUN --runs FILE": "not a directory",
    "show nothing --runs RUNS": "run nothing: there is none in",
    "show ../up --runs RUNS": "run id '../up': must be 1-96 lower-case letters",
    "show empty --runs DAMAGED": "run empty: it has no database yet",
    "show broken --runs DAMAGED": "run broken: its database",
    "show plain --runs DAMAGED": "run plain: is not a folder of its own",
    "export RUN 99 NEW --runs RUNS": "configuration 99: run tiny-run has none of this number; it has 7",
    "export RUN 7 FULL --runs RUNS": "holds other things already; name a folder that is new or empty",
    "export RUN 7 FILE --runs RUNS": "is a file; name a folder that does not exist yet",
    "export RUN 7 FILE/new --runs RUNS": "export: ",
    "export empty 7 NEW --runs DAMAGED": "run empty: it has no database yet",
    "generate RUN 7 --prompt hello --device tpu --runs RUNS": "device: must be auto, cpu, mps, cuda or a certain GPU",
    "generate RUN 7 --prompt hello --tokens 0 --runs RUNS": "tokens: must be 1 to 2048, got 0",
    "evaluate RUN --subjects worst --runs RUNS": "--subjects worst: expected dense, candidates, baselines, best,",
    "evaluate RUN --benchmarks none --runs RUNS": "--benchmarks none: not held out in this run; it has words",
    "evaluate RUN --examples 0 --runs RUNS": "--examples 0: give 1 or more, or leave it out for all",
    "extend RUN --runs RUNS": "extend: give --trials N or --walltime TIME",
    "extend RUN --walltime soon --runs RUNS": "walltime: must be a duration such as 90s",
    "pause RUN --runs RUNS": "no engine is at work on it, so there is nothing to pause",
    "repair empty --runs DAMAGED": "there is no journal at",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_sentence(
    command: str, places: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = [
        next((word.replace(key, place, 1) for key, place in places.items() if word.split("/")[0] == key), word)
        for word in command.split()
    ]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("gptailor: ") and MISTAKES[command] in captured.err
    assert not Path(places["NEW"]).exists() and sorted(os.listdir(places["FULL"])) == ["thesis.txt"]


@pytest.mark.parametrize("command", ["", "frobnicate", "show", "export run seven out", "check"])
def test_misuse_shows_the_usage(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 2 and "usage: python -m gptailor" in capsys.readouterr().err


def test_a_repeated_key_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nname: b\n")
    assert main(["check", str(path)]) == 2
    assert "not valid YAML at line 2, column 1: 'name' is given twice" in capsys.readouterr().err


def test_runs_and_show_in_both_forms(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    def output(*words: str) -> str:
        assert main([*words, "--runs", str(run.root)]) == 0
        return capsys.readouterr().out

    (listed,) = json.loads(output("runs", "--json"))
    assert (listed["run_id"], listed["status"], listed["trials"], listed["removed"]) == ("tiny-run", "finished", 1, 2)
    assert listed["held_out"] == 0.5
    header, row = output("runs").splitlines()
    assert header.split() == ["run", "state", "trials", "layers", "retention", "held", "out"]
    assert row.split() == ["tiny-run", "finished", "1/1", "-2", "of", "6", "83.3%", "50.0%"]

    story = json.loads(output("show", "tiny-run", "--json"))
    assert story["trials"] == {
        "asked": 1, "done": 1, "by_status": {"success": 1}, "by_rung": {"10": 1}, "by_origin": {"initial": 1}
    }  # fmt: skip
    (best,) = story["front"]
    assert best["config_id"] == CONFIG and best["scores"]["words/acc"]["score"] == 0.5
    assert best["plan"] == "0 base | 1 math | 3 math+code x0.50 | 5 code scale 1.10 | removed 2 4"
    text = output("show", "tiny-run")
    assert "1 of 1 trials: 1 at 10 examples" in text and best["plan"] in text and "0.5000 ±0.1600" in text


def test_the_dashboards_folder_of_runs_is_the_command_lines(run: RunFolder) -> None:
    command, environment = [sys.executable, "-m", "gptailor", "runs"], {**os.environ, "GPTAILOR_RUNS": str(run.root)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
    assert run.run_id in done.stdout, done.stderr


def test_a_reader_that_leaves_is_no_fault(run: RunFolder) -> None:
    command = f"'{sys.executable}' -m gptailor show tiny-run --runs '{run.root}' | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_interrupted_is_130(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gptailor.results.story_text.runs_text", pressed)
    assert main(["runs", "--runs", str(run.root)]) == 130
    assert capsys.readouterr().err == "gptailor: interrupted\n"


def test_a_folder_that_can_hold_no_runs_is_told(
    places: dict[str, str],
) -> None:
    """`search` starts itself anew under a fixed hash seed, so it runs in a process of its own."""
    for runs in (places["FILE"], places["FILE"] + "/runs"):
        command = [sys.executable, "-m", "gptailor", "search", places["RUN.yaml"], "--runs", runs]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "no run can be made in it" in done.stderr, done.stderr


def test_paths_of_a_run_started_elsewhere_are_found(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run file's paths start where the run was started, those of a command where the command is given."""
    (tmp_path / "models").symlink_to(tiny_family)
    folder = make_tiny_run(tmp_path / "runs", Path("models"))
    (tmp_path / "other" / "models").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "other")
    export = ["export", "tiny-run", str(CONFIG), "out", "--runs", "../runs"]
    assert main(export) == 2, "a run of an older version does not say where it was started"
    (folder.path / "started_in").write_text(str(tmp_path))
    assert main(export) == 0 and (tmp_path / "other" / "out" / "config.json").is_file()
    monkeypatch.chdir(tmp_path / "other")
    heal = ["heal", "tiny-run", str(CONFIG), "healed", "--texts", "objectives+file:mine.jsonl", "--runs", "../runs"]
    asked: list[tuple[Path, str]] = []
    monkeypatch.setattr("gptailor.commands.heal.heal", lambda _, __, out, given, *___: asked.append((out, given.texts)))
    main(heal)
    here = tmp_path / "other"
    assert asked == [(here / "healed", f"objectives+file:{here / 'mine.jsonl'}")]


def test_bytes_that_are_no_text_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "tiny-run", "--out", "caf\udce9.html"]) == 2
    assert capsys.readouterr().err == "gptailor: argument 'caf\\udce9.html': is not UTF-8 text; rename the file\n"


def test_a_benchmark_may_be_held_out_on_several_metrics(tiny_family: Path) -> None:
    from gptailor.commands.evaluate import _chosen

    judges = [{"benchmark": "words", "metric": metric} for metric in ("acc", "acc_norm")]
    spec = tiny_spec(tiny_family, held_out=[*judges, {"benchmark": "other"}])
    assert [judge.name for judge in _chosen(spec, [])] == ["words/acc", "words/acc_norm", "other/acc"]
    assert [judge.name for judge in _chosen(spec, ["words"])] == ["words/acc", "words/acc_norm"]


def test_the_issues_own_run_file_is_understood(tmp_path: Path) -> None:
    """Every key that a run file may have, as they are documented."""
    from gptailor.spec.files import load_spec
    from gptailor.spec.run import RunSpec

    text = """
name: smollm2-27pct
base_model: models/base
candidates: {math: models/math, code: models/code, language: models/language}
remove: 8
operations: [remove, select, merge]
merge: {method: task_arithmetic, factor: [0.0, 1.0]}
output_scale: null
objectives:
  - {benchmark: piqa_local, metric: acc_norm, split: validation}
  - {benchmark: commonsenseqa_local, metric: acc_norm, split: validation}
held_out:
  - {benchmark: arc_easy_local, metric: acc_norm}
include_path: [benchmarks]
budget: {min: 100, max: 1000, eta: 3}
trials: 500
walltime: null
seed: 0
device: auto
dtype: auto
batch_size: auto
trust_remote_code: false
"""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    spec = load_spec(path)
    assert set(yaml.safe_load(text)) <= set(RunSpec.model_fields)
    assert spec == load_spec(path, ["walltime=null"]) and spec.held_out[0].split == "test"
    assert spec.budget.rungs == (111, 333, 1000)
