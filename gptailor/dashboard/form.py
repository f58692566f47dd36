"""From what a person types on the Launch page to a run file, and back: plain values in, a checked `RunSpec` out.

The browser never sets trust_remote_code: whether a stranger's code may run is decided by who can write a run file on
the machine.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gptailor import shipped
from gptailor.errors import UserError
from gptailor.spec.files import build_spec, load_spec
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Benchmark, Removal

PRESETS = (shipped.ROOT / shipped.PRESETS, shipped.PRESETS)
"""Folders of run files that are offered to begin with: those shipped, and those in the folder that the dashboard was
started in."""
LONG_TITLE = 60

KEYS = {
    "remove_by": "remove",
    "merge_method": "merge.method",
    "factor_low": "merge.factor",
    "factor_high": "merge.factor",
    "scaled": "output_scale",
    "scale_low": "output_scale",
    "scale_high": "output_scale",
    "budget_min": "budget.min",
    "budget_max": "budget.max",
    "eta": "budget.eta",
    "workers": "workers.local",
}
"""Keys of the run file for widgets that do not bear their name."""

Values = Mapping[str, Any]
"""What the widgets hold, by field. Lists are text, one entry a line."""


@dataclass(frozen=True)
class Preset:
    """A run file to begin with.

    title: its first comment line, or that line up to a colon where it is long; about: what follows it.
    """

    path: Path
    title: str
    about: str
    spec: RunSpec


def presets(*folders: Path) -> list[Preset]:
    """All presets of these folders (of PRESETS) that can be read, the demo first; of two namesakes the latter."""
    paths = {path.stem: path.resolve() for folder in folders or PRESETS for path in folder.glob("*.yaml")}
    found = []
    for _, path in sorted(paths.items(), key=lambda item: (item[0] != "demo", item[0])):
        try:
            spec = load_spec(path)
        except UserError:
            continue  # somebody's half-written file must not close the page
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = [line.lstrip("# ").strip() for line in lines[: _first_key(lines)] if line.startswith("#")]
        paragraph = comments[: comments.index("")] if "" in comments else comments
        title, *about = paragraph or [path.stem]
        if len(title) > LONG_TITLE and ": " in title:
            title, _, rest = title.partition(": ")
            about = [rest[0].upper() + rest[1:], *about]
        found.append(Preset(path, title, " ".join(about), spec))
    return found


def _first_key(lines: list[str]) -> int:
    return next((at for at, line in enumerate(lines) if line and not line.startswith("#")), len(lines))


# --- run file to widgets ----------------------------------------------------------------------------------------------


def values_of(spec: RunSpec) -> dict[str, Any]:
    """What the widgets show for a run file."""
    low, high = spec.output_scale or (0.8, 1.2)
    return {
        "name": spec.name,
        "base_model": spec.base_model,
        "candidates": "\n".join(f"{name}: {location}" for name, location in spec.candidates.items()),
        "remove_by": _measure(spec),
        "remove": _removal_text(spec),
        "operations": [str(operation) for operation in spec.operations],
        "baselines": [str(name) for name in spec.baselines],
        "merge_method": spec.merge.method,
        "factor_low": spec.merge.factor[0],
        "factor_high": spec.merge.factor[1],
        "scaled": spec.output_scale is not None,
        "scale_low": low,
        "scale_high": high,
        "objectives": "\n".join(map(_benchmark_line, spec.objectives)),
        "held_out": "\n".join(map(_benchmark_line, spec.held_out)),
        "selection": "\n".join(map(_benchmark_line, spec.selection)),
        "aim": spec.aim,
        "include_path": "\n".join(spec.include_path),
        "budget_min": spec.budget.min,
        "budget_max": spec.budget.max,
        "eta": spec.budget.eta,
        "trials": spec.trials,
        "walltime": spec.walltime or "",
        "seed": spec.seed,
        "device": spec.device,
        "dtype": spec.dtype,
        "batch_size": str(spec.batch_size),
        "workers": _workers_text(spec),
        "chat_template": spec.chat_template,
    }


def _benchmark_line(benchmark: Benchmark) -> str:
    shots = "" if benchmark.num_fewshot is None else f" {benchmark.num_fewshot}-shot"
    return f"{benchmark.benchmark} {benchmark.metric} {benchmark.split}{shots}"


# --- widgets to run file ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draft:
    """A run file in the making: `spec` where it is right, else what is wrong by field ('' for the whole)."""

    spec: RunSpec | None
    errors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


AS_THEY_ARE = (
    *("name", "base_model", "operations", "baselines", "aim"),
    *("trials", "seed", "device", "dtype", "chat_template"),
)
"""Keys whose widget holds what the run file does."""


def draft(values: Values, preset: RunSpec) -> Draft:
    """Read the widgets. What has no widget (a merge's further parameters) stays as the preset has it."""
    errors: dict[str, list[str]] = {}
    data = preset.model_dump(mode="json") | {"trust_remote_code": False}
    for name in AS_THEY_ARE:
        data[name] = values[name]
    if "repair" not in values["operations"]:
        data["repair"] = None  # which says how, and has no widget
    data["merge"] |= {
        "method": values["merge_method"].strip(),
        "factor": [values["factor_low"], values["factor_high"]],
    }
    data["output_scale"] = [values["scale_low"], values["scale_high"]] if values["scaled"] else None
    data["budget"] = {"min": values["budget_min"], "max": values["budget_max"], "eta": values["eta"]}
    data["walltime"] = values["walltime"].strip() or None
    data["include_path"] = _lines(values["include_path"])

    def workers(text: str) -> Any:
        return _workers(text, preset)

    def remove(text: str) -> Any:
        return _remove(text, values["remove_by"])

    for name, read in (
        ("candidates", _candidates),
        ("remove", remove),
        ("objectives", _benchmarks),
        ("held_out", _benchmarks),
        ("selection", _benchmarks),
        ("batch_size", _batch_size),
        ("workers", workers),
    ):
        try:
            data[name] = read(values[name])
        except ValueError as error:
            errors[name] = [str(error)]
    if errors:
        return Draft(None, {name: tuple(lines) for name, lines in errors.items()})
    for benchmark in data["held_out"]:
        benchmark.setdefault("split", "test")
    try:
        return Draft(build_spec(data))
    except UserError as error:
        return Draft(None, _by_field(str(error)))


def _by_field(message: str) -> dict[str, tuple[str, ...]]:
    """build_spec's text, a problem a line, put where the widgets are."""
    errors: dict[str, list[str]] = {}
    for line in message.splitlines()[1:]:
        found = re.match(r"\s*([a-z_]+)((?:\.[\w-]+)*): (.*)", line)
        name, rest = (found[1], found[3]) if found and found[1] in RunSpec.model_fields else ("", line.strip())
        place = found[2].lstrip(".") if found and name else ""
        errors.setdefault(name, []).append(f"{place}: {rest}" if place else rest)
    return {name: tuple(lines) for name, lines in errors.items()}


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _candidates(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in _lines(text):
        name, separator, location = (part.strip() for part in line.partition(":"))
        if not separator or not name or not location:
            raise ValueError(f"write one a line as name: folder or hub id, such as math: models/math; got {line!r}")
        if name in found:
            raise ValueError(f"the name {name!r} is given twice")
        found[name] = location
    return found


LAYERS, RANGE = "layers", "range"
MEASURES = {
    LAYERS: "a number of layers such as 8, or a share such as 25 %",
    "parameters": "a share of the parameters such as 20 %",
    "memory": "what the weights may take, such as 9GB",
    "speed": "how many times as fast, such as 1.3",
    RANGE: "from how many layers to how many, such as 4 to 12",
}
"""What `remove` may be given in, with how it is written."""


def _measure(spec: RunSpec) -> str:
    if not isinstance(spec.remove, Removal):
        return LAYERS
    if spec.has_range:
        return RANGE
    return next(key for key, value in spec.remove.model_dump().items() if value is not None)


def _removal_text(spec: RunSpec) -> str:
    asked = spec.remove
    if not isinstance(asked, Removal):
        return _count_text(asked)
    if asked.fewest is not None and asked.most is not None:
        return f"{_count_text(asked.fewest)} to {_count_text(asked.most)}"
    return f"{100 * asked.parameters:g} %" if asked.parameters else asked.memory or f"{asked.speed:g}"


def _count_text(asked: int | float) -> str:
    return str(asked) if isinstance(asked, int) else f"{100 * asked:g} %"


def _remove(text: str, measure: str) -> Any:
    """The value of `remove`; a memory is text in the run file too."""
    cleaned = text.replace(" ", "").replace(",", ".")
    if measure == "memory":
        return {measure: cleaned}
    try:
        if measure == RANGE:
            fewest, most = map(_number, cleaned.split("to"))
            return {"from": fewest, "to": most}
        number = _number(cleaned)
    except ValueError:
        raise ValueError(f"write {MEASURES[measure]}; got {text!r}") from None
    return number if measure == LAYERS else {measure: number}


def _number(text: str) -> int | float:
    """Of '8', '1.3' or '25%'. Raises ValueError."""
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return int(text) if text.isdecimal() else float(text)


def _benchmarks(text: str) -> list[dict[str, Any]]:
    found = []
    for line in _lines(text):
        name, *rest = line.split()
        entry: dict[str, Any] = {"benchmark": name}
        if rest and (shots := re.fullmatch(r"(\d{1,3})-shot", rest[-1])):
            entry["num_fewshot"] = int(shots[1])
            rest.pop()
        if len(rest) > 2:
            raise ValueError(f"write one a line as benchmark metric split, such as piqa acc validation; got {line!r}")
        entry |= dict(zip(("metric", "split"), rest, strict=False))
        found.append(entry)
    return found


def _batch_size(text: str) -> int | str:
    cleaned = text.strip()
    return int(cleaned) if cleaned.isdecimal() else cleaned


def _workers_text(spec: RunSpec) -> str:
    workers = spec.workers
    if workers is None:
        return ""
    return workers.scheduler or ("slurm" if workers.slurm else str(workers.local))


def _workers(text: str, preset: RunSpec) -> dict[str, Any] | None:
    """Workers of this machine alone, unless the run file to begin with names others.

    Who can reach a scheduler, or is one, may run code in the engine, and that is not for a browser to say.
    """
    cleaned = text.strip()
    if preset.workers is not None and cleaned == _workers_text(preset):
        return preset.workers.model_dump(mode="json")
    if not cleaned:
        return None
    if cleaned != "auto" and not cleaned.isdecimal():
        raise ValueError(
            "write auto or a number of workers on this machine; a scheduler or SLURM is named in a run file of "
            f"data/presets/; got {cleaned!r}"
        )
    return {"local": cleaned if cleaned == "auto" else int(cleaned)}


# --- the same for a terminal ------------------------------------------------------------------------------------------


def run_file(spec: RunSpec) -> str:
    """The run as YAML: what was asked, without the defaults."""
    data = spec.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)


def command_line(spec: RunSpec, preset: Preset, runs: Path) -> str:
    """The command that starts the same search: the preset's run file, and what was changed."""
    before, after = preset.spec.model_dump(mode="json"), spec.model_dump(mode="json")
    parts = ["python -m gptailor search", shlex.quote(os.path.relpath(shipped.name_of(preset.path)))]
    for key, value in after.items():
        if value == before[key]:
            continue
        if key in ("budget", "merge"):
            parts += [_set(f"{key}.{name}", v) for name, v in value.items() if v != before[key].get(name)]
        else:
            parts.append(_set(key, value))
    if runs != Path("data/runs"):
        parts.append(f"--runs {shlex.quote(str(runs))}")
    return " \\\n  ".join([" ".join(parts[:2]), *parts[2:]])


def _set(key: str, value: Any) -> str:
    if isinstance(value, dict):
        value = {name: one for name, one in value.items() if one is not None}
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value) and yaml.safe_load(value) == value
    return f"--set {shlex.quote(f'{key}={value if plain else json.dumps(value, ensure_ascii=False)}')}"
