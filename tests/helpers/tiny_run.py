"""A finished run of the tiny family with one scored plan, as the engine writes it, for whatever opens models."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gptailor.plan import LayerChoice, StitchPlan
from gptailor.results.summary import summarise
from gptailor.spec.files import build_spec
from gptailor.spec.run import RunSpec
from gptailor.store.folder import RunFolder
from gptailor.store.writer import RunWriter
from gptailor.trial import (
    DENSE,
    Evaluation,
    Origin,
    Outcome,
    RunRecord,
    RunStatus,
    Score,
    Subject,
    Trial,
    TrialStatus,
)

CONFIG = 7
PLAN = StitchPlan(
    6,
    (
        LayerChoice(0),
        LayerChoice(1, ("math",)),
        LayerChoice(3, ("math", "code"), "task_arithmetic", 0.5),
        LayerChoice(5, ("code",), output_scale=1.1),
    ),
)
NOW = datetime(2026, 11, 1, 8, 0, tzinfo=UTC)


def tiny_spec(family: Path, **changes: Any) -> RunSpec:
    data: dict[str, Any] = {
        "name": "tiny",
        "base_model": str(family / "base"),
        "candidates": {name: str(family / name) for name in ("math", "code")},
        "remove": 2,
        "output_scale": [0.9, 1.2],
        "objectives": [{"benchmark": "words", "metric": "acc"}],
        "held_out": [{"benchmark": "words", "metric": "acc"}],
        "budget": {"min": 10, "max": 10},
        "trials": 1,
        "device": "cpu",
    }
    return build_spec(data | changes)


def make_tiny_run(root: Path, family: Path, run_id: str = "tiny-run", dense_is_judged: bool = True) -> RunFolder:
    spec = tiny_spec(family)
    folder = RunFolder.of(root, run_id)
    folder.root.mkdir(parents=True, exist_ok=True)
    record = RunRecord(run_id, spec.name, spec.model_dump(mode="json"), spec.base_model, 6, 2, 0, NOW, {"torch": "2"})
    writer = RunWriter.create(folder, record, spec.to_yaml(), clock=lambda: NOW, summarise=summarise)
    with writer.batch():
        writer.set_status(RunStatus.RUNNING)
        dense = Score("words", "acc", 0.6, 0.15, 10, True)
        writer.record_evaluation(Evaluation(DENSE, None, "validation", dense, NOW))
        if dense_is_judged:
            writer.record_evaluation(Evaluation(DENSE, None, "test", Score("words", "acc", 0.8, 0.1, 16, True), NOW))
        writer.record_plan(CONFIG, PLAN, 41_000)
        writer.start_trial(Trial(0, CONFIG, 10, 0, Origin.INITIAL, {}, NOW, 0.1))
        score = Score("words", "acc", 0.5, 0.16, 10, True)
        writer.finish_trial(0, Outcome(TrialStatus.SUCCESS, NOW, (score,), 0.1, 0.2))
        held_out = Score("words", "acc", 0.4, 0.12, 16, True)
        writer.record_evaluation(Evaluation(Subject.config(CONFIG), CONFIG, "test", held_out, NOW))
        writer.set_status(RunStatus.FINISHED)
    return folder
