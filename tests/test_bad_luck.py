"""F6-F8: what goes wrong inside a trial is that trial's status and cause; the search goes on without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import kills
import pytest
import yaml
from test_search import write_benchmark
from warm_engines import WarmEngines, shared

from gptailor import launch
from gptailor.plan import StitchPlan
from gptailor.search import FAILURES_AFTER_A_SUCCESS
from gptailor.spec import RunSpec, load_spec
from gptailor.store import RunFolder, queries
from gptailor.trial import RunStatus, TrialStatus

# A run in this process, whose scoring meets trouble: it sees the tokens of a pack and how many trials began and ended.
SEARCH = """
import threading
import torch
import gptailor.watch
from gptailor import launch
from gptailor.evaluate.evaluator import Evaluator
from gptailor.progress import Report
from gptailor.search import search
from gptailor.store import RunFolder
gptailor.watch.LATE_SECONDS = 0.5
folder = RunFolder(__import__("pathlib").Path(arguments[0]))
score = Evaluator._score
def troubled(self, model, benchmark, pack):
    begun, ended = (folder.journal.read_bytes().count(b'"event":"trial_%s"' % e) for e in (b"started", b"finished"))
    trouble(len(pack.tokens), begun, ended)
    return score(self, model, benchmark, pack)
Evaluator._score = troubled
def trouble(tokens, begun, ended):
    TROUBLE
print("ended:", search(folder, Report()))
"""


@pytest.fixture(scope="module")
def warm() -> WarmEngines:
    return shared()


@pytest.fixture(scope="module")
def spec(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    return small_search(tiny_family, tmp_path_factory.mktemp("benchmarks"))


def small_search(family: Path, folder: Path) -> RunSpec:
    """Twelve trials of two packs or more each; its benchmarks are written into the folder."""
    write_benchmark(folder, "first_words", 60, 0)
    write_benchmark(folder, "few_words", 60, 5)
    asked = {
        "name": "bad luck",
        "base_model": str(family / "base"),
        "candidates": {name: str(family / name) for name in ("math", "code")},
        "operations": ["remove", "select"],
        "remove": 2,
        "objectives": [{"benchmark": name, "metric": "acc"} for name in ("first_words", "few_words")],
        "include_path": [str(folder)],
        "budget": {"min": 6, "max": 54},
        "trials": 12,
        "device": "cpu",
        "batch_size": 2,  # so that a trial has several packs
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(asked))
    return load_spec(path)


def search_with(trouble: str) -> str:
    return SEARCH.replace("TROUBLE", trouble)


def troubled(warm: WarmEngines, root: Path, spec: RunSpec, trouble: str) -> tuple[RunFolder, str]:
    folder = launch.prepare(root, spec)
    return folder, warm.run(search_with(trouble), folder.path)


def crashed(folder: RunFolder) -> dict[int, str]:
    trials = queries.read_run(folder).trials
    return dict(trials[trials.status == TrialStatus.CRASHED][["trial_id", "error"]].itertuples(index=False))


def test_out_of_memory(warm: WarmEngines, spec: RunSpec, tmp_path: Path) -> None:
    """F7: refused by the real allocator. Packs are halved once, for good; what still does not fit is one crash."""
    folder, said = troubled(warm, tmp_path / "halved", spec, "if tokens > 128: torch.empty(2**46)")
    assert "packs are halved to 128 tokens" in said and "ended: finished" in said, said[-2000:]
    assert crashed(folder) == {}
    unhurt, _ = troubled(warm, tmp_path / "unhurt", spec, "pass")
    assert kills.trials(folder) == kills.trials(unhurt)

    hungry, said = troubled(warm, tmp_path / "hungry", spec, "if ended in (4, 7): torch.empty(2**46)")
    assert "ended: finished" in said and said.count("packs are halved") == 1
    assert {trial: error.splitlines()[-1].split(":")[0] for trial, error in crashed(hungry).items()} == {
        4: "OutOfMemory",
        7: "OutOfMemory",
    }
    assert len(kills.trials(hungry)) == 12, "and the search went on, its costs finite"

    long = spec.model_copy(update={"trials": 40})
    bad, said = troubled(warm, tmp_path / "bad", long, "if begun: torch.empty(2**46 + 2**40 * ended)")
    said_at_last = f"{FAILURES_AFTER_A_SUCCESS} trials in a row failed alike: OutOfMemory"  # its references succeeded
    assert len(crashed(bad)) == FAILURES_AFTER_A_SUCCESS and said_at_last in said
    assert queries.run_summary(bad).status is RunStatus.FAILED


def test_python_out_of_memory(warm: WarmEngines, spec: RunSpec, tmp_path: Path) -> None:
    trouble = "if ended == 4: bytearray(2**46)"
    folder, said = troubled(warm, tmp_path, spec, trouble)
    assert "ended: finished" in said and crashed(folder)[4].splitlines()[-1].startswith("OutOfMemory")


def test_slower_than_a_trial_may_be(warm: WarmEngines, spec: RunSpec, tmp_path: Path) -> None:
    hurried = spec.model_copy(update={"trial_walltime": "0.5s"})
    folder, said = troubled(warm, tmp_path, hurried, "if ended == 10: threading.Event().wait(0.6)")
    assert "ended: finished" in said
    assert crashed(folder) == {10: "TookTooLong: longer than the 0.5 s that a trial may take"}


def test_a_hang_ends_the_process_and_its_trial_alone(warm: WarmEngines, spec: RunSpec, tmp_path: Path) -> None:
    """What never comes back cannot be interrupted: the trial is recorded, the process left, another one goes on."""
    hurried = spec.model_copy(update={"trial_walltime": "0.5s"})
    folder, said = troubled(warm, tmp_path, hurried, "if ended == 5: threading.Event().wait()")
    assert "trial 5/12" in said and "ended" not in said
    assert kills.status_of(folder) == launch.LOST
    again = warm.run(search_with("pass"), folder.path)
    assert "6 trials are stored" in again and "ended: finished" in again
    assert crashed(folder) == {5: "TookTooLong: longer than 0.5s, and it never came back"}
    assert len(kills.trials(folder)) == 12 and kills.scored_twice(folder) == []


def test_the_engine_died_at_one_trial_again_and_again(warm: WarmEngines, spec: RunSpec, tmp_path: Path) -> None:
    folder, said = troubled(warm, tmp_path, spec, "if ended == 5: import os, signal; os.kill(os.getpid(), 9)")
    assert "trial 5/12" in said and kills.status_of(folder) == launch.LOST
    told = f"import os\nos.environ['{launch.DEATHS}'] = 'SIGKILL: killed'\n"
    assert "ended: finished" in warm.run(told + search_with("pass"), folder.path)
    assert crashed(folder) == {5: "Died: the engine's process died 3 times while it ran this trial (SIGKILL: killed)"}
    assert len(kills.trials(folder)) == 12


def test_dying_before_any_trial_fails_the_run(warm: WarmEngines, spec: RunSpec, tmp_path: Path) -> None:
    folder = launch.prepare(tmp_path, spec)
    told = f"import os\nos.environ['{launch.DEATHS}'] = 'SIGSEGV: crashed'\n"
    assert "died again and again before a trial began: SIGSEGV" in warm.run(told + search_with("pass"), folder.path)
    assert queries.run_summary(folder).status is RunStatus.FAILED


def test_one_layer_of_a_candidate_that_is_not_a_number(
    warm: WarmEngines, spec: RunSpec, tiny_family: Path, tmp_path: Path
) -> None:
    """F6: one NaN in one weight. The trials with that layer are failures; the others make the front."""
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny_family / "math", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.4.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, broken / "model.safetensors")
    unlucky = spec.model_copy(update={"candidates": spec.candidates | {"math": str(broken)}, "trials": 16})
    folder, said = troubled(warm, tmp_path / "runs", unlucky, "pass")
    assert "ended: finished" in said, said[-2000:]
    plans = {
        row.config_id: StitchPlan.from_json(json.loads(row.plan)) for row in queries.read_run(folder).plans.itertuples()
    }
    uses = {config for config, plan in plans.items() if any(c.layer == 4 and "math" in c.sources for c in plan.kept)}
    trials = queries.read_run(folder).trials
    failed = trials[trials.status == TrialStatus.CRASHED]
    assert len(failed) and failed.error.str.startswith("NonFinite").all()
    assert set(failed.config_id) == uses & set(trials.config_id) and len(trials) == 16
    assert not {config for config, _ in kills.front(folder)} & uses
