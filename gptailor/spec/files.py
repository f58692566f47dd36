"""Run files: YAML in, every field validated, every refusal names its field; and what each key means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from gptailor.errors import UserError
from gptailor.runfile import apply_change, explain, kind, load_yaml, read_text
from gptailor.spec.records import fields_of, record_of
from gptailor.spec.run import KEYED, PLAIN, RunSpec


def load_spec(path: str | Path, changes: list[str] | None = None) -> RunSpec:
    """Read a run file and apply `key=value` changes (dotted keys, YAML values). Raises UserError."""
    return parse_spec(read_text(Path(path), "run file"), changes, where=f"run file {path}")


def parse_spec(text: str, changes: list[str] | None = None, where: str = "run file") -> RunSpec:
    """Like load_spec, from text."""
    data = load_yaml(text, where)
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected keys such as 'name' and 'base_model', got {kind(data)}")
    for change in changes or []:
        apply_change(data, change)
    return build_spec(data, where)


def build_spec(data: dict[str, Any], where: str = "run file") -> RunSpec:
    """Validate plain data. Raises UserError that lists every wrong field: path, value, and what would be accepted."""
    try:
        return RunSpec.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False)
        if len(found) > 1:  # a list whose one entry is wrong is too short as well, says pydantic
            found = [problem for problem in found if problem["type"] != "too_short" or not problem["input"]]
        for problem in found:
            problem["loc"] = tuple(part for part in problem["loc"] if part not in (PLAIN, KEYED))
        lines = [explain(dict(problem), keys_at) for problem in found]
        raise UserError("\n".join([f"{where}: {len(lines)} problem{'s' * (len(lines) > 1)}", *lines])) from error


def describe(key: str) -> str:
    """What a key of the run file means, as its field says: `budget.min`, `workers.slurm.jobs`. Raises KeyError."""
    record: type[BaseModel] = RunSpec
    for part in key.split("."):
        field = fields_of(record)[part]
        record = record_of(field.annotation) or record
    return " ".join((field.description or "").split())


def keys_at(path: Sequence[str]) -> tuple[str, ...]:
    """The keys that are accepted below a path into a run file, such as `selection.0` or `workers.slurm`.

    None below a plain value. List indices and names of candidates count for nothing.
    """
    record: type[BaseModel] = RunSpec
    for part in path:
        if part in fields_of(record):
            below = record_of(fields_of(record)[part].annotation)
            if below is None:
                return ()
            record = below
    return tuple(fields_of(record))
