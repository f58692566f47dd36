"""What a search writes down besides scores: the run as it begins, what its results depend on, trials and their ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from gptailor.errors import UserError
from gptailor.family.preflight import preflight
from gptailor.family.residence import pick_device
from gptailor.launch.supervisor import DEATHS_AT_A_TRIAL
from gptailor.plan import StitchPlan
from gptailor.results.summary import summarise
from gptailor.scoring.scorer import Ended
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import SpaceOperation
from gptailor.stitch.merging import merge_method_problem
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.writer import RunWriter
from gptailor.trial import Origin, Outcome, RunRecord, RunStatus, Trial, TrialStatus, now
from gptailor.versions import installed_versions


class Asked(Protocol):
    """What a trial is to try."""

    @property
    def config_id(self) -> int: ...
    @property
    def plan(self) -> StitchPlan: ...
    @property
    def budget(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def origin(self) -> Origin: ...
    @property
    def configuration(self) -> dict[str, Any]: ...


def open_writer(folder: RunFolder, spec: RunSpec) -> RunWriter:
    """The run's writer; a new run gets its database here, once its family is known to fit. Raises UserError."""
    if folder.exists():
        writer = RunWriter.open(folder, summarise=summarise)
        if queries.read_run(folder).runs["n_layers"].iloc[0] == 0:  # its first start failed before this was known
            try:
                writer.record_run(_known_by_preflight(spec, installed_versions()))
            except UserError as problem:
                writer.set_status(RunStatus.FAILED, str(problem))
                raise
        return writer
    record = RunRecord(
        folder.run_id,
        spec.name,
        spec.model_dump(mode="json"),
        spec.base_model,
        0,
        0,
        spec.seed,
        now(),
        installed_versions(),
    )
    try:
        record = replace(record, **_known_by_preflight(spec, record.versions))
    except UserError as problem:
        RunWriter.create(folder, record, spec.to_yaml(), summarise=summarise).set_status(RunStatus.FAILED, str(problem))
        raise
    return RunWriter.create(folder, record, spec.to_yaml(), summarise=summarise)


def _known_by_preflight(spec: RunSpec, versions: Mapping[str, str]) -> dict[str, Any]:
    """Columns of `runs`. Raises UserError for a family or a merge that does not fit."""
    found = preflight(spec)
    if SpaceOperation.MERGE in spec.operations:
        _refuse_merge(spec)
    device = "workers" if spec.workers else str(pick_device(spec.device))
    noted = {**versions, "device": device, "dtype": found.dtype}
    return {"n_layers": found.n_layers, "n_removed": found.n_removed or 0, "versions": noted}


def _refuse_merge(spec: RunSpec) -> None:
    """Raise UserError for a merge method that does not exist or does not fit the run."""
    if problem := merge_method_problem(spec.merge.method, spec.merge.parameters, len(spec.candidates)):
        raise UserError(problem)


def trial_record(trial_id: int, suggestion: Asked, suggest_seconds: float, asked_after: int | None = None) -> Trial:
    return Trial(
        trial_id,
        suggestion.config_id,
        suggestion.budget,
        suggestion.seed,
        suggestion.origin,
        suggestion.configuration,
        now(),
        suggest_seconds,
        asked_after,
    )


def outcome_of(ended: Ended, told_as: int | None) -> Outcome:
    """A trial's end as it is stored. told_as: its place among those that SMAC is told of."""
    if ended.is_given_up:
        return Outcome(TrialStatus.CANCELLED, now(), error="stopped while it ran", worker=ended.worker)
    if ended.result is None:
        return Outcome(TrialStatus.CRASHED, now(), error=ended.error, told_as=told_as, worker=ended.worker)
    result = ended.result
    return Outcome(
        TrialStatus.SUCCESS,
        now(),
        result.scores,
        result.stitch_seconds,
        result.evaluate_seconds,
        told_as=told_as,
        worker=ended.worker,
    )


def blame_the_trial(folder: RunFolder, writer: RunWriter, cause: str) -> None:
    """Record the trial at which the engine died again and again as crashed. Raises UserError where there is none."""
    trials = queries.read_run(folder).trials
    if not (open_trials := trials.trial_id[trials.status == TrialStatus.RUNNING].tolist()):
        when = "before a trial began" if trials.empty else "between trials"
        raise UserError(f"the engine's process died again and again {when}: {cause}")
    error = f"Died: the engine's process died {DEATHS_AT_A_TRIAL} times while it ran this trial ({cause})"
    n_told = int(trials.status.isin([TrialStatus.SUCCESS, TrialStatus.CRASHED]).sum())
    writer.finish_trial(open_trials[-1], Outcome(TrialStatus.CRASHED, now(), error=error, told_as=n_told))
