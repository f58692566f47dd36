"""More trials or hours for a run that has used up what it was given."""

from __future__ import annotations

from pathlib import Path

from gptailor.errors import UserError
from gptailor.launch.engine import EngineLock, start
from gptailor.spec.files import build_spec, load_spec
from gptailor.spec.run import RunSpec
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.store.writer import RunWriter


def extend(folder: RunFolder, trials: int | None, walltime: str | None) -> str:
    """Raise the run's trials and walltime (both in all, not in addition) and start its engine. Returns what was done.

    Raises UserError where nothing is given, less is given than before, the models are not those of the run, or it is at
    work.
    """
    from gptailor.family.sameness import refuse_other_files  # the hub's library, which pages can do without

    spec = load_spec(folder.spec)
    changes = {key: value for key, value in (("trials", trials), ("walltime", walltime)) if value is not None}
    if not changes:
        raise UserError("extend: give --trials N or --walltime TIME, each in all")
    longer = build_spec(spec.model_dump(mode="json") | changes, "extend")
    if longer.trials < spec.trials:
        raise UserError(f"extend: --trials {longer.trials} is less than the {spec.trials} the run already has")
    before, after = spec.walltime_seconds, longer.walltime_seconds
    if walltime is not None and before is not None and after is not None and after < before:
        raise UserError(f"extend: --walltime {walltime} is less than the {spec.walltime} the run already has")
    with EngineLock(folder):
        writer = RunWriter.open(folder)
        refuse_other_files(
            _from_home(longer, folder.started_in), queries.load_digests(folder), f"run {folder.run_id}"
        )  # before anything is changed
        writer.change_spec(longer.model_dump(mode="json"), longer.to_yaml())
    pid = start(folder)
    return (
        f"{longer.trials} trials, {longer.walltime or 'any'} time; its engine runs as process {pid}; log: {folder.log}"
    )


def _from_home(spec: RunSpec, home: Path | None) -> RunSpec:
    """The run file with its folders seen from where the run was started: a server may be elsewhere."""
    if home is None:
        return spec

    def found(location: str) -> str:
        return str(home / location) if (home / location).is_dir() else location

    candidates = {name: found(location) for name, location in spec.candidates.items()}
    return spec.model_copy(update={"base_model": found(spec.base_model), "candidates": candidates})
