"""What scripts and notebooks ask for, each in one call.

`import gptailor` gives these names and imports them when they are first used (docs/notebooks.md).

A family's model is one live object that every call stitches anew: use what `stitch_model` gave before the next call.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from gptailor.errors import UserError
from gptailor.launch.engine import prepare
from gptailor.launch.process import python, python_path
from gptailor.measures import retention
from gptailor.plan import BASE, LayerChoice, StitchPlan
from gptailor.results import scores
from gptailor.results.subjects import stored_plans
from gptailor.spec.files import load_spec
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Benchmark
from gptailor.store.folder import RunFolder, runs_root
from gptailor.store.queries import RunTables, read_run
from gptailor.trial import Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptailor.family.models import Family

METHOD = "task_arithmetic"
"""How `make_plan` merges."""
BENCHMARKS = ("objectives", "held_out", "selection")


def make_plan(
    n_layers: int,
    remove: Iterable[int] = (),
    sources: Mapping[int, str | Sequence[str]] | None = None,
    factor: float = 0.5,
) -> StitchPlan:
    """A plan by hand for a base of `n_layers`.

    remove: layers to leave out, from 0. sources: of other layers than the base's own: a candidate, or several that are
    merged by task arithmetic with `factor`. Raises UserError.
    """
    gone, taken = set(remove), dict(sources or {})
    if unknown := (gone | set(taken)) - set(range(n_layers)):
        raise UserError(f"plan: layer {min(unknown)} is none of the base's {n_layers}, which count from 0")
    if both := gone & set(taken):
        raise UserError(f"plan: layer {min(both)} is removed and taken from {taken[min(both)]} at once")
    return StitchPlan(n_layers, tuple(_choice(i, taken.get(i, ()), factor) for i in range(n_layers) if i not in gone))


def _choice(layer: int, source: str | Sequence[str], factor: float) -> LayerChoice:
    names = (source,) if isinstance(source, str) else tuple(source)
    if len(names) > 1:
        return LayerChoice(layer, names, METHOD, factor)
    return LayerChoice(layer, tuple(name for name in names if name != BASE))


def stitch_model(family: Family, plan: StitchPlan) -> PreTrainedModel:
    """The plan's model, live, in evaluation mode; it stands until the family stitches another. Raises UserError."""
    from gptailor.stitch.stitcher import Stitcher

    return Stitcher(family).stitch(plan)


def score_plans(
    family: Family, plans: Mapping[str, StitchPlan], on: str = "objectives", examples: int = 100
) -> pd.DataFrame:
    """Score the dense base and plans as a search does: a row a plan and benchmark.

    plans: by what to call them. on: the run file's key whose benchmarks are read: objectives, held_out or selection.
    examples: of each benchmark, as far as there are so many. Columns: plan, benchmark, metric, split, score, stderr, n,
    retention (of the dense base's score). Raises UserError.
    """
    from gptailor.scoring.plan_scorer import PlanScorer

    benchmarks = _benchmarks(family.spec, on)
    scorer = PlanScorer.of(family, benchmarks, examples)
    rows: list[dict[str, Any]] = []
    dense: Sequence[Score] = ()
    for name, plan in {"dense": StitchPlan.dense(family.n_layers), **plans}.items():
        scorer.stitcher.check(plan)
        found = scorer.score(plan, examples).scores
        dense = dense or found
        rows += [_row(name, *one) for one in zip(benchmarks, found, dense, strict=True)]
    return pd.DataFrame(rows)


def _benchmarks(spec: RunSpec, on: str) -> tuple[Benchmark, ...]:
    if on not in BENCHMARKS:
        raise UserError(f"on: expected one of {', '.join(BENCHMARKS)}, got {on!r}")
    if not (found := getattr(spec, on)):
        raise UserError(f"on: the run file lists nothing under {on}")
    return tuple(found)


def _row(name: str, asked: Benchmark, score: Score, dense: Score) -> dict[str, Any]:
    return {
        "plan": name,
        "benchmark": score.benchmark,
        "metric": score.metric,
        "split": asked.split,
        "score": score.score,
        "stderr": score.stderr,
        "n": score.n_samples,
        "retention": retention(score.score, dense.score, score.higher_is_better),
    }


def export_model(family: Family, plan: StitchPlan, out: str | Path) -> Path:
    """Write the plan's model as a plain Hugging Face folder, which transformers opens without gptailor; the folder.

    It is reloaded and its logits are compared before it appears. Raises UserError.
    """
    from gptailor.formats.huggingface import export_hf

    return export_hf(family, plan, out).folder


@dataclass(frozen=True)
class SavedRun:
    """A run as it was read: `tables` holds data frames called as the store's tables (docs/store.md)."""

    folder: RunFolder
    tables: RunTables

    @cached_property
    def spec(self) -> RunSpec:
        """What was asked."""
        return load_spec(self.folder.spec)

    @cached_property
    def plans(self) -> dict[int, StitchPlan]:
        """Every configuration's plan, by its number."""
        return stored_plans(self.tables)

    @property
    def front(self) -> list[int]:
        """Numbers of the best trade-offs at the full budget."""
        return scores.searched(self.tables).front

    @property
    def best(self) -> int | None:
        """The number of the plan that the run calls its best; None before one was scored at the full budget."""
        found = scores.best(self.tables)
        return None if found is None else found.config_id

    def judged(self) -> pd.DataFrame:
        """Held-out scores: a row a subject and benchmark (`gptailor evaluate` makes them)."""
        return scores.judged(self.tables)


def open_run(run: str | Path, runs: str | Path | None = None) -> SavedRun:
    """A saved run by its id (under `runs`, by default the command line's folder) or its folder. Raises UserError."""
    path = Path(run)
    folder = RunFolder.of(path.parent, path.name) if path.is_dir() else RunFolder.of(runs or runs_root(), str(run))
    return SavedRun(folder, read_run(folder))


def run_search(spec: RunSpec, runs: str | Path | None = None) -> SavedRun:
    """Search as `gptailor search` does, in a process of its own, and wait for its end; its words go where ours go.

    Raises UserError where the run failed.
    """
    folder = prepare(runs or runs_root(), spec)
    command = python("engine", folder.run_id, "--runs", str(folder.root.resolve()))
    ended = subprocess.run(command, env=os.environ | python_path(os.environ), check=False)
    if ended.returncode:
        raise UserError(f"run {folder.run_id}: it ended with exit code {ended.returncode}; its log: {folder.log}")
    return open_run(folder.path)
