"""What runs of one folder share: the same answers to the last bit, and none of other models, texts or ways."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.changes import change_one_number, correct
from helpers.own_files import spec_of_own_files

from gptailor.commands.evaluate import evaluate
from gptailor.errors import UserError
from gptailor.evaluate.evaluator import Evaluator
from gptailor.family import preflight
from gptailor.launch.engine import prepare
from gptailor.plan import StitchPlan
from gptailor.scoring import plan_scorer as scoring
from gptailor.scoring import shared
from gptailor.scoring.plan_scorer import PlanScorer
from gptailor.scoring.provenance import digests_of
from gptailor.scoring.shared import FOLDER, Shared
from gptailor.search.engine import run_engine
from gptailor.search.progress import Report
from gptailor.spec.run import RunSpec
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.trial import Digests, RunStatus

DENSE, CPU = StitchPlan.dense(6), torch.device("cpu")


@pytest.fixture
def spec(tiny_family: Path, tmp_path: Path) -> RunSpec:
    """All four trials are of the initial design, and so references as well."""
    return spec_of_own_files(
        tiny_family,
        tmp_path,
        20,
        name="shared",
        objectives=[{"benchmark": "learnt", "metric": "closeness"}, {"benchmark": "learnt", "metric": "acc"}],
        selection=[{"benchmark": "chosen", "metric": "choice_prob"}],
        held_out=[{"benchmark": "judged", "metric": "choice_prob"}],
        trials=4,
    )


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What really was: the benchmarks of each pass of the evaluator, and models whose influence was taken."""
    found: list[str] = []
    items_of, influence = Evaluator.items_of, scoring.block_influence

    def counted(self: Evaluator, model: Any, asked: Any, should_stop: Any = None) -> Any:
        found.extend(benchmark.spec.benchmark for benchmark, _, _ in asked)
        return items_of(self, model, asked, should_stop)

    def looked(*arguments: Any) -> Any:
        found.append("influence")
        return influence(*arguments)

    monkeypatch.setattr(Evaluator, "items_of", counted)
    monkeypatch.setattr(scoring, "block_influence", looked)
    yield found


def run(spec: RunSpec, root: Path) -> RunFolder:
    folder = prepare(root, spec)
    assert run_engine(folder, Report()) is RunStatus.FINISHED
    return folder


def found_by(folder: RunFolder) -> list[Any]:
    """All that a run says, to the last bit, but for times."""
    tables = queries.read_run(folder)
    numbers = [tables.scores.drop(columns="run_id"), tables.evaluations.drop(columns=["run_id", "evaluated_at"])]
    plans = json.loads((folder.path / "initial.json").read_text())
    return [queries.load_examples(folder), plans, *(frame.to_json(double_precision=15) for frame in numbers)]


def look(spec: RunSpec, root: Path) -> list[Any]:
    """What a process finds out that scores the dense base and a cut of each model, and shares it."""
    opened = PlanScorer.open(spec, spec.objectives, 20)
    opened.shared = Shared(RunFolder(root / "run"), digests_of(spec), opened.family.device)
    orders = opened.influence_orders()
    plans = [DENSE, *(StitchPlan.without(set(order[:2]), 6, name) for name, order in orders)]
    scores = [opened.score(plan, 20, share=True).scores for plan in plans]
    opened.shared.publish()
    return [orders, scores, opened.known, opened.evaluator.path]


def test_a_second_run_reads_nothing_again_and_says_the_same(
    spec: RunSpec, tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inspect, looks = preflight._inspect, []

    def looked(*asked: Any) -> Any:
        looks.append(asked)
        return inspect(*asked)

    monkeypatch.setattr(preflight, "_inspect", looked)
    first = run(spec, tmp_path / "runs")
    assert len(looks) == 2, "as the run begins and as the family is opened; later looks find the same headers"
    assert set(computed) == {"influence", "learnt", "chosen"} and computed.count("influence") == 2
    computed.clear()
    second = run(spec, tmp_path / "runs")
    assert not computed
    assert found_by(second) == found_by(first)
    evaluate(first, print, ["dense"])
    evaluate(second, print, ["dense"])
    assert computed == ["judged"], "for the first of them"
    assert found_by(second) == found_by(first)


def test_what_is_taken_is_what_would_be_computed(
    spec: RunSpec, tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    first = look(spec, here)
    whole = computed[:]
    assert whole and first[-1] == "direct"
    computed.clear()
    assert look(spec, here) == first and not computed
    small = spec.model_copy(update={"candidates": {}, "operations": spec.operations[:1]})
    assert look(small, here)[1] == first[1][:2] and not computed, "the base and its cut are the same without others"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    look(spec, here)
    assert computed == whole, "other arithmetic"
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    for file in (here / FOLDER).iterdir():
        file.write_text(file.read_text().replace('"value": ', '"value": [1], "was": ', 1))
    computed.clear()
    assert look(spec, here) == first and computed == whole, "files that are not whole are not believed"

    change_one_number(tmp_path / "m" / "math" / "model.safetensors")
    computed.clear()
    changed = look(spec, here)
    assert computed.count("influence") == 1 < len(computed) < len(whole), "the base is the same"
    assert changed == look(spec, elsewhere) != first
    correct(tmp_path, "learnt")
    computed.clear()
    assert look(spec, here) == look(spec, tmp_path / "nowhere")
    assert computed == whole * 2, "with other right answers nothing is known"


def test_nothing_is_kept_of_models_that_were_replaced_meanwhile(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items_of = Evaluator.items_of

    def replaced(self: Evaluator, *arguments: Any) -> Any:
        monkeypatch.setattr(Evaluator, "items_of", items_of)
        change_one_number(tmp_path / "m" / "base" / "model.safetensors")
        return items_of(self, *arguments)

    monkeypatch.setattr(Evaluator, "items_of", replaced)
    folder = prepare(tmp_path / "runs", spec)
    with pytest.raises(UserError, match=r"base_model: model.safetensors is not what it was"):
        run_engine(folder, Report())
    assert not (tmp_path / "runs" / FOLDER).exists()


def test_calibration_texts_are_the_seeds_whatever_is_read_first(spec: RunSpec) -> None:
    opened = PlanScorer.open(spec, spec.objectives, 20)
    before = [batch["input_ids"].tolist() for batch in opened.calibration()]
    reading = opened.benchmarks[0].spec.reading
    opened.reorder({reading: list(reversed(range(20)))})
    assert [batch["input_ids"].tolist() for batch in opened.calibration()] == before


def test_names_tell_all_apart_and_old_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    weights = {("base", "w"): "b", ("math", "w"): "m", ("code", "w"): "c"}
    plan = StitchPlan.dense(6, "math")

    def name(plan: StitchPlan = plan, of: object = 1, weights: Any = weights, **settings: str) -> str:
        return Shared(folder, Digests(weights, settings), CPU).key("answers", plan, of)

    names = [
        name(),
        name(DENSE),
        name(of=2),
        name(dtype="float32"),
        name(weights=weights | {("math", "w"): "n"}),
        name(weights=weights | {("base", "w"): "n"}),
        Shared(folder, Digests(weights, {}), torch.device("mps")).key("answers", plan, 1),
    ]
    assert len(set(names)) == len(names)
    assert name(weights=weights | {("code", "w"): "n"}) == names[0], "a candidate that lends nothing"
    one = Shared(folder, Digests(weights), CPU)
    one.offer("a", [1.5, None])
    assert one.take("a") is None, "not yet"
    one.publish()
    assert Shared(folder, Digests(), CPU).take("a") == [1.5, None]
    monkeypatch.setattr(shared, "MOST_BYTES", 200)
    for number, key in enumerate("bcd"):
        one.offer(key, [number] * 9)
        one.publish()
    assert one.take("a") is None and one.take("d") == [2] * 9
