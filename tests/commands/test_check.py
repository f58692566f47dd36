"""The check before a run: real headers, real task files; every message that a person may meet."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.command_line import write_benchmark
from helpers.make_runs import make_run

from gptailor.commands.check import Memory, _benchmark_problems, check, check_json, check_text
from gptailor.errors import UserError
from gptailor.scoring import device_speed
from gptailor.spec.files import build_spec
from gptailor.spec.run import RunSpec

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def home(tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models/ (the tiny family) and benchmarks/ (a task and a group of it), to work in."""
    (tmp_path / "models").symlink_to(tiny_family)
    tasks = tmp_path / "benchmarks"
    tasks.mkdir()
    write_benchmark(tasks, "piqa_local", 100, 0)
    (tasks / "two.yaml").write_text(
        "group: both\ntask:\n  - piqa_local\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spec_of(**changes: Any) -> RunSpec:
    data: dict[str, Any] = {
        "name": "tiny",
        "base_model": "models/base",
        "candidates": {"math": "models/math", "code": "models/code"},
        "remove": 2,
        "objectives": [{"benchmark": "piqa_local"}, {"benchmark": "both"}],
        "include_path": ["benchmarks"],
        "budget": {"min": 10, "max": 90},
        "trials": 22,
        "device": "cpu",
    }
    return build_spec(data | changes)


def test_a_family_that_fits(home: Path) -> None:
    found = check(spec_of())
    assert found.problems == ()
    assert found.family is not None and found.memory is not None and found.estimate is not None
    assert (found.family.n_layers, found.family.n_removed, found.family.dtype) == (6, 2, "float32")
    weights = sum(path.stat().st_size for path in (home / "models" / "base").glob("*.safetensors"))
    assert found.memory.parts["base"] == pytest.approx(weights, rel=0.05)
    assert found.memory.needed == sum(found.memory.parts.values()) and found.memory.verdict.startswith("fits")
    assert found.redundancy.startswith("not measured yet; `python -m gptailor redundancy` takes about")
    assert found.redundancy.endswith(" kB beside the models") or found.redundancy.endswith(" MB beside the models")
    assert [(rung.budget, rung.trials) for rung in found.rungs] == [(10, 9), (30, 8), (90, 5)]
    # 9 x 10 + 3 x 20 + 5 x 30 + 2 x 60 + 3 x 90 of the trials, 5 x 90 of the references, on two benchmarks.
    assert found.n_examples == 2 * (90 + 60 + 150 + 120 + 270 + 450)
    assert found.estimate.seconds > 0 and "guess" in found.estimate.how


@pytest.mark.usefixtures("home")
def test_text_and_json_say_the_same() -> None:
    text = check_text(spec_of())
    assert "tiny: the models fit together" in text and "2 of 6 layers go" in text
    assert "    9 trials of 10 examples a benchmark" in text and "2,280 examples to score" in text
    data = json.loads(json.dumps(check_json(spec_of())))
    assert data["problems"] == [] and data["rungs"][0] == {"budget": 10, "trials": 9, "examples": 90}
    assert data["memory"]["needed"] == sum(data["memory"]["parts"].values()) and data["n_examples"] == 2280


@pytest.mark.usefixtures("home")
def test_what_a_repair_takes_is_said() -> None:
    changes = {"operations": ["remove", "repair"], "selection": [{"benchmark": "piqa_local", "split": "train"}]}
    found = check(spec_of(**changes, repair={"method": "rcpu", "tokens": 2000}))
    assert found.memory is not None and found.memory.parts["repair"] > 2000 * 32 * 4
    (note,) = [note for note in found.notes if note.startswith("repair: ")]
    assert note.startswith("repair: rcpu on 2,000 tokens of objectives takes about ") and "beside the models" in note
    (later,) = found.later
    assert re.fullmatch(r"heal of a plan on 1M tokens: about .+ and .+B beside the models", later)
    missing = check(spec_of(**changes, repair={"texts": "base+file:nowhere.txt"}))
    assert missing.problems == ("repair.texts: nowhere.txt: no such file",)


@pytest.mark.usefixtures("home")
def test_what_baselines_that_edit_weights_take_is_said() -> None:
    names = ["last", "slimgpt", "llm_pruner", "besa", "angular_replaceme"]
    found = check(spec_of(baselines=names, operations=["remove"]))
    said = [note for note in found.notes if note.endswith("beside the models")]
    assert [note.partition(":")[0] for note in said] == names[1:]
    assert all(re.fullmatch(r"\w+: about .+ and .+B beside the models", note) for note in said)
    assert found.memory is not None and found.memory.parts["baselines"] > 16_384 * 32 * 4


@pytest.mark.usefixtures("home")
def test_a_type_that_the_processor_is_slow_at_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"float32": 100e9, "bfloat16": 20e9}
    monkeypatch.setattr(device_speed, "matmul_speed", lambda _device, _width, dtype: speeds[dtype])
    (note,) = check(spec_of(dtype="bfloat16")).notes
    assert "float32 5.0 times as fast as bfloat16" in note and "`dtype: float32`" in note
    speeds["bfloat16"] = 90e9
    assert check(spec_of(dtype="bfloat16")).notes == ()
    assert device_speed.type_advice("cuda:0", 64, "bfloat16") is None  # not even measured: there is no such device here


def test_speeds_are_measured() -> None:
    half, single = (device_speed.matmul_speed("cpu", 256, dtype, 0.05) for dtype in ("bfloat16", "float32"))
    assert half and single and half > 1e8 and single > 1e8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model": "models/none"}, "models/none"),
        ({"candidates": {"math": "models/math", "code": "nowhere"}}, "candidates.code: nowhere: no such folder"),
        ({"remove": 6}, "remove: 6 takes 6 of 6 layers; at least one must stay"),
        ({"merge": {"method": "blend"}}, "merge.method: 'blend' is not known; mergekit has"),
        ({"merge": {"method": "slerp", "parameters": {"t": 1}}}, "merge.parameters.t: is what merge.factor sets"),
        (
            {"objectives": [{"benchmark": "piqua"}]},
            "benchmark piqua: found neither in benchmarks nor among lm-eval's own tasks; did you mean piqa",
        ),
        (
            {"selection": [{"benchmark": "boolqq"}]},
            "benchmark boolqq: found neither in benchmarks nor among lm-eval's own tasks; did you mean boolq",
        ),
        (
            {"include_path": ["benchmarks", "tasks"]},
            "include_path: tasks is not a folder; it must hold lm-eval task files",
        ),
        ({"device": "cuda:7"}, "device: cuda:7 is not here"),
    ],
)
@pytest.mark.usefixtures("home")
def test_what_would_stop_the_run_is_said(changes: dict[str, Any], message: str) -> None:
    found = check(spec_of(**changes))
    assert any(message in problem for problem in found.problems), found.problems
    with pytest.raises(UserError, match="tiny cannot run: 1 problem"):
        check_text(spec_of(**changes))


@pytest.mark.usefixtures("home")
def test_a_search_without_a_front_is_noted() -> None:
    note = "trials: 12 end before one reaches 90 examples, so that there will be no front; the first does with 13"
    assert note in check(spec_of(trials=12)).notes and note in check_text(spec_of(trials=12))
    assert not check(spec_of(trials=13)).notes


@pytest.mark.usefixtures("home")
def test_all_problems_at_once() -> None:
    wrong = spec_of(
        candidates={"math": "a", "code": "b"}, objectives=[{"benchmark": "zzz_none"}], merge={"method": "blend"}
    )
    assert len(check(wrong).problems) == 4


def test_benchmarks_are_opened_as_the_search_opens_them(home: Path) -> None:
    """What it would refuse is refused here, for each benchmark, whatever it is for; what is cut is counted."""
    tasks = home / "benchmarks"
    for name, change in (("code", {"doc_to_text": "!function code.py"}), ("gone", {"dataset_kwargs": {"data_files": {
        "validation": str(tasks / "gone.jsonl")}}}), ("long", {"doc_to_text": "{{(query ~ ' ') * 200}}"})):  # fmt: skip
        text = yaml.safe_load((tasks / "piqa_local.yaml").read_text()) | {"task": name} | change
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump(text).replace("'!function code.py'", "!function code.py"))
    asked = {"objectives": [{"benchmark": "code"}, {"benchmark": "piqa_local", "metric": "f1"}, {"benchmark": "both"}]}
    held_out = [{"benchmark": "gone", "split": "validation"}, {"benchmark": "piqa_local", "split": "train"}]
    problems = check(spec_of(**asked, held_out=held_out)).problems
    for said in (
        "code.yaml: it names `!function`",
        "benchmark piqa_local: has no metric 'f1'; it has acc, acc_norm",
        "benchmark gone: lm-eval cannot load it: FileNotFoundError",
        "benchmark piqa_local: task piqa_local has no train split; it has validation, test",
    ):
        assert any(said in problem for problem in problems), (said, problems)
    assert len(problems) == 4
    notes = check(spec_of(objectives=[{"benchmark": "long", "metric": "acc"}, {"benchmark": "both"}])).notes
    (note,) = [note for note in notes if "window" in note]
    assert "long on its validation split: " in note and "of 90 examples are longer than the model's window" in note


@pytest.mark.usefixtures("home")
def test_lm_evals_own_tasks_groups_and_tags_are_known() -> None:
    names = ("piqa", "mmlu", "wikitext", "super-glue-lm-eval-v1")
    asked = spec_of(objectives=[{"benchmark": name} for name in names], include_path=[])
    assert list(_benchmark_problems(asked)) == []


def test_the_pace_of_a_saved_run_is_taken(home: Path) -> None:
    folder = make_run(home / "runs", n_trials=30, benchmarks=("piqa_local",), rungs=(111, 333, 1000))
    found = check(spec_of(), home / "runs").estimate
    assert found is not None and folder.run_id in found.how
    # make_runs computes at 10 ms an example, all examples of a trial; here those of lower rungs count once.
    pace = (found.seconds - 22 * 0.5) / 2280
    assert 0.01 < pace < 0.02


@pytest.mark.parametrize(
    ("free", "verdict"),
    [
        (20_000_000_000, "fits: 16.00 GB needed on cuda:0, 20.00 GB free"),
        (10_000_000_000, "fits, with candidates kept in host memory"),
        (1_000_000_000, "does not fit: 16.00 GB needed on cuda:0, 1.00 GB free; choose another device"),
        (None, "what is free there cannot be read"),
    ],
)
def test_memory_verdicts(free: int | None, verdict: str) -> None:
    parts = {"base": 4_000_000_000, "candidates": 10_000_000_000, "working memory": 2_000_000_000}
    assert verdict in Memory("cuda:0", parts, free).verdict


def test_the_command(home: Path) -> None:
    (home / "run.yaml").write_text(spec_of().to_yaml())
    command = [sys.executable, "-m", "gptailor", "check", "run.yaml"]
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"}
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=home, env=environment)
    assert json.loads(done.stdout)["family"]["n_layers"] == 6
    done = subprocess.run([*command, "--set", "remove=9"], capture_output=True, text=True, cwd=home, env=environment)
    assert done.returncode == 2 and "remove: 9 takes 9 of 6 layers" in done.stderr and "Traceback" not in done.stderr
