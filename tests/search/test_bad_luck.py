"""F6-F8: what goes wrong inside a trial is that trial's status and cause; the search goes on without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers import kills
from helpers.trouble import search_with, small_search, troubled
from helpers.warm_engines import WarmEngines, shared

from gptailor.commands.evaluate import evaluate
from gptailor.commands.subjects import find_subjects
from gptailor.errors import UserError
from gptailor.launch.engine import LOST, prepare
from gptailor.launch.supervisor import DEATHS
from gptailor.plan import StitchPlan
from gptailor.results.summary import run_summary
from gptailor.scoring.local import LocalScorer
from gptailor.search.loop import FAILURES_AFTER_A_SUCCESS
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import HeldOut
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.trial import RunStatus, TrialStatus


@pytest.fixture(scope="module")
def warm() -> WarmEngines:
    return shared()


@pytest.fixture(scope="module")
def spec(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    return small_search(tiny_family, tmp_path_factory.mktemp("benchmarks"))


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
    assert run_summary(bad).status is RunStatus.FAILED


def test_what_torch_dies_of_outside_a_trial_is_a_sentence(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finalist of the selection, or its repair: left out, as on workers."""
    scorer = LocalScorer(spec, {}, lambda: False, lambda _trial, _why: None)
    plan = StitchPlan.dense(scorer.n_layers)
    for method, call, problem in (
        ("score", lambda: scorer.score(plan, 6), torch.OutOfMemoryError("Tried to allocate 1 GiB")),
        ("repaired", lambda: scorer.repaired(plan), torch.linalg.LinAlgError("svd did not converge")),
    ):
        monkeypatch.setattr(scorer.plan_scorer, method, Mock(side_effect=problem))
        with pytest.raises(UserError, match=rf"cannot be {method[:5]}.*Error: {problem}"):
            call()


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
    assert kills.status_of(folder) == LOST
    again = warm.run(search_with("pass"), folder.path)
    assert "6 trials are stored" in again and "ended: finished" in again
    assert crashed(folder) == {5: "TookTooLong: longer than 0.5s, and it never came back"}
    assert len(kills.trials(folder)) == 12 and kills.scored_twice(folder) == []


def test_the_engine_died_at_one_trial_again_and_again(warm: WarmEngines, spec: RunSpec, tmp_path: Path) -> None:
    folder, said = troubled(warm, tmp_path, spec, "if ended == 5: import os, signal; os.kill(os.getpid(), 9)")
    assert "trial 5/12" in said and kills.status_of(folder) == LOST
    told = f"import os\nos.environ['{DEATHS}'] = 'SIGKILL: killed'\n"
    assert "ended: finished" in warm.run(told + search_with("pass"), folder.path)
    assert crashed(folder) == {5: "Died: the engine's process died 3 times while it ran this trial (SIGKILL: killed)"}
    assert len(kills.trials(folder)) == 12


def test_dying_before_any_trial_fails_the_run(warm: WarmEngines, spec: RunSpec, tmp_path: Path) -> None:
    folder = prepare(tmp_path, spec)
    told = f"import os\nos.environ['{DEATHS}'] = 'SIGSEGV: crashed'\n"
    assert "died again and again before a trial began: SIGSEGV" in warm.run(told + search_with("pass"), folder.path)
    assert run_summary(folder).status is RunStatus.FAILED


def test_a_run_whose_models_came_later(warm: WarmEngines, spec: RunSpec, tiny_family: Path, tmp_path: Path) -> None:
    """What its first start could not know of the family is known once it goes on."""
    base = tmp_path / "base"
    folder = prepare(tmp_path / "runs", spec.model_copy(update={"base_model": str(base)}))
    for _ in range(2):
        assert "ended:" not in warm.run(search_with("pass"), folder.path).replace("ended: failed", "")
        assert run_summary(folder).status is RunStatus.FAILED
    shutil.copytree(tiny_family / "base", base)
    assert "ended: finished" in warm.run(search_with("pass"), folder.path)
    known = queries.read_run(folder).runs.iloc[0]
    assert (known["n_layers"], known["n_removed"], known["status"]) == (6, spec.n_removed(6), RunStatus.FINISHED)
    assert find_subjects(folder, ["baselines"]), "one-shot cuts of so many layers"


def test_one_layer_of_a_candidate_that_is_not_a_number(
    warm: WarmEngines, spec: RunSpec, tiny_family: Path, tmp_path: Path
) -> None:
    """F6: one NaN in one weight. The trials with that layer are failures; the others make the front."""
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny_family / "math", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.4.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, broken / "model.safetensors")
    held_out = (HeldOut.model_validate(spec.objectives[0].model_dump() | {"split": "test"}),)
    more = {"candidates": spec.candidates | {"math": str(broken)}, "trials": 16, "held_out": held_out}
    unlucky = spec.model_copy(update=more)
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
    judged: list[str] = []
    evaluate(folder, lambda event: judged.append(event.text), ["candidate:math", "dense"])
    assert any("infinities or NaN" in text or "not finite" in text for text in judged), judged
    assert judged[-1].startswith("dense"), "who comes after it is judged all the same"
