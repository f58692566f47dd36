"""A run's story for the command line: state, trials, references, the front, as data and as text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pandas as pd

from gptailor.launch.engine import state
from gptailor.plan import StitchPlan
from gptailor.results import scores, statistics
from gptailor.results.frames import held_out
from gptailor.results.frames.seconds import seconds
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.trial import BenchmarkKey, Subject, SubjectKind, TrialStatus, is_repaired


def run_json(folder: RunFolder) -> dict[str, Any]:
    """The story as data. Raises StoreError where the database cannot be read."""
    tables = queries.read_run(folder)
    run = tables.runs.iloc[0]
    spec = json.loads(run.spec)
    objectives = [one.name for one in tables.spec.objectives]
    found = scores.searched(tables)
    named = scores.best(tables, found)
    best = None if named is None else named.config_id
    describe = _describer(tables, found)
    trials = tables.trials
    done = trials[trials.status == TrialStatus.SUCCESS]
    searched = {one.key for one in tables.spec.objectives}
    references = _references(tables.evaluations, searched)
    chosen = scores.choice(tables, found)
    return {
        "run_id": run.run_id,
        "name": run["name"],
        "status": str(state(folder, run.status)),
        "error": _or_none(run.error),
        "base_model": run.base_model,
        "candidates": spec["candidates"],
        "layers": int(run.n_layers),
        "removed": int(run.n_removed),
        "removed_from": tables.spec.fewest_removed(int(run.n_layers), int(run.n_removed)),
        "objectives": objectives,
        "trials": {
            "asked": tables.n_asked,
            "done": len(scores.ended(trials)),
            "by_status": {str(k): int(v) for k, v in trials.status.value_counts().items()},
            "by_rung": {str(k): int(v) for k, v in trials.budget.value_counts().sort_index().items()},
            "by_origin": {str(k): int(v) for k, v in trials.origin.value_counts().items()},
        },
        "seconds_per_trial": {
            part: round(float(done[f"{part}_seconds"].mean()), 4) if len(done) else None
            for part in ("suggest", "stitch", "evaluate")
        },
        "seconds": _or_none((_last(trials.ended_at) - run.started_at).total_seconds()) if len(done) else None,
        "seconds_by_part": {row.part: round(row.seconds, 3) for row in seconds(tables.seconds).itertuples()},
        "references": references,
        "best": None if best is None else describe(best),
        "front": [describe(config_id) for config_id in found.front],
        "sizes": _sizes(tables, found, describe),
        "hypervolume": found.hypervolume,
        "held_out": _held_out(folder, tables, found, named),
        "selection": _selection(chosen) if chosen else None,
        "repairs": [asdict(one) | {"text": one.text} for one in _repairs(folder, tables)],
        "failures": [
            {"trial": int(row.trial_id), "error": (row.error or "").strip().splitlines()[-1]}
            for row in trials[trials.status == TrialStatus.CRASHED].itertuples()
        ],
        "versions": json.loads(run.versions or "{}"),
    }


def _sizes(
    tables: queries.RunTables, found: scores.Searched, describe: Callable[[int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The best plan of each size where the run asks for a range of sizes (scores.best_of_sizes), as `describe` has it.

    With `kept` (layers) and `selection` (retention there, None where it was not used).
    """
    best = scores.best_of_sizes(tables, found)
    return [
        describe(row.config_id) | {"kept": row.kept_layers, "selection": _or_none(row.selection)}
        for row in best.itertuples()
    ]


def _repairs(folder: RunFolder, tables: queries.RunTables) -> list[statistics.Repaired]:
    if not tables.evaluations["config_id"].dropna().map(is_repaired).any():
        return []
    frame = scores.judged(tables, "selection")
    return statistics.repairs(frame, queries.answers_of(folder, frame["plan_hash"].dropna()))


def _held_out(
    folder: RunFolder, tables: queries.RunTables, found: scores.Searched, best: Subject | None
) -> dict[str, Any]:
    """Averages of every subject that was judged on all that is held out, and two of them compared.

    How the best plan does against the best one-shot cut, the best candidate's included, on the same examples. best: the
    run's best plan, which may not be judged.
    """
    frame = scores.judged(tables)
    table = scores.averages(frame, scores.calibration(tables, found))
    plan, control = scores.judged_best(table, best), scores.strongest(table, SubjectKind.BASELINE)
    tests = []
    if plan is not None and control is not None:
        hashes = table.loc[table.subject.isin([str(plan), str(control)]), "plan_hash"].dropna()
        tests = _records(statistics.paired(frame, queries.answers_of(folder, hashes), plan, control))
    return {
        "averages": _records(table),
        "best": plan and str(plan),
        "control": control and str(control),
        "tests": tests,
        "changes": _changes(folder, tables, frame),
    }


def _changes(folder: RunFolder, tables: queries.RunTables, frame: pd.DataFrame) -> list[str]:
    if not any(Subject.parse(str(subject)).before for subject in frame["subject"].unique()):
        return []
    return held_out.changes(tables, queries.answers_of(folder, frame["plan_hash"].dropna()))


def _selection(chosen: scores.Choice) -> dict[str, Any]:
    names = {"subject": str(chosen.subject), "by_search": str(chosen.by_search)}
    return asdict(chosen) | names | {"text": scores.choice_text(chosen)}


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): None if pd.isna(v) else v for k, v in row.items()} for row in frame.to_dict("records")]


def _describer(tables: queries.RunTables, found: scores.Searched) -> Callable[[int], dict[str, Any]]:
    """What says of a configuration: its plan, its scores on the objectives at the full budget, what it keeps."""
    plans = dict(zip(tables.plans.config_id, tables.plans.plan, strict=True))
    rows = found.rows.groupby("config_id")
    front, knee, believed = set(found.front), found.knee, scores.calibration(tables, found)

    def describe(config_id: int) -> dict[str, Any]:
        if config_id in found.scores.index:
            scored = rows.get_group(config_id)
        else:  # the selection chose it repaired: it has no trial
            scored = scores.on_objectives(tables, Subject.config(config_id))
        own = {row.name: _score(row) for row in scored.itertuples(index=False)}
        return {
            "config_id": config_id,
            "plan": StitchPlan.from_json(json.loads(plans[config_id])).describe(),
            "scores": {name: own[name] for name in found.scores.columns if name in own},
            "retention": believed.get(Subject.config(config_id)) if found.is_share else None,
            "on_front": config_id in front,
            "knee": config_id == knee,
        }

    return describe


def _references(evaluations: pd.DataFrame, searched: set[BenchmarkKey]) -> dict[str, dict[str, Any]]:
    """Scores on the objectives' own splits of every subject outside the search, from the most examples there are."""
    found: dict[str, dict[str, Any]] = {}
    for row in evaluations.sort_values(["subject", "n_samples"]).itertuples():
        if (row.benchmark, row.metric, row.split) in searched and Subject.parse(str(row.subject)).config_id is None:
            found.setdefault(str(row.subject), {})[f"{row.benchmark}/{row.metric}"] = _score(row)
    return found


def _score(row: Any) -> dict[str, Any]:
    return {
        "score": float(row.score),
        "stderr": _or_none(row.stderr),
        "n": int(row.n_samples),
        "higher_is_better": bool(row.higher_is_better),
    }


def _last(times: pd.Series) -> Any:
    return times.dropna().max()


def _or_none(value: Any) -> Any:
    return None if value is None or (isinstance(value, float) and math.isnan(value)) else value
