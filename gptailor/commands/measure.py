"""What plans are worth in use: tokens a second, time to the first one, memory and bytes on disk, beside the dense base.

A plan is exported into the run's folder, measured in plain transformers in processes of their own (see
evaluate/speed.py), and taken away again. What was found is stored in the run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptailor.commands.export import location, write_model
from gptailor.commands.subjects import find_subjects
from gptailor.errors import UserError
from gptailor.family.checkpoint import weight_files
from gptailor.launch.engine import EngineLock
from gptailor.launch.events import Event, Say
from gptailor.plan import StitchPlan
from gptailor.results.summary import summarise
from gptailor.results.worth import line
from gptailor.spec.run import RunSpec
from gptailor.store.asked import spec_of
from gptailor.store.folder import RunFolder
from gptailor.store.writer import RunWriter
from gptailor.trial import DENSE, Measurement, Quantity, Subject, now

if TYPE_CHECKING:
    from gptailor.evaluate.speed import Setting

DEFAULT_SUBJECTS = ("best",)
PLACE = "measure-"
"""How the folders begin that exports are measured in, in the run's own."""


def measure(folder: RunFolder, say: Say, subjects: Sequence[str] = DEFAULT_SUBJECTS, device: str | None = None) -> None:
    """Measure subjects that have a plan, and store what was found.

    device: another than the run's. Raises UserError: no such subject, nothing to measure, the run's engine is at work,
    or a model that plain transformers cannot open or that does not fit.
    """
    spec = spec_of(folder, [f"device={device}"] if device is not None else [])
    asked = [(one, one.plan) for one in find_subjects(folder, subjects) if one.subject != DENSE]
    if not asked:
        raise UserError("measure: the run has no plan yet that was scored at the full budget")
    for one, plan in asked:
        if plan is None:
            raise UserError(f"--subjects {one.subject}: has no plan in this run; `baseline` and `evaluate` make one")
    with EngineLock(folder):
        for left in folder.path.glob(f"{PLACE}*"):  # by one that was killed
            shutil.rmtree(left, ignore_errors=True)
        writer = RunWriter.open(folder, summarise=summarise)
        for one, plan in asked:
            found = _measured(folder, spec, one.subject, one.config_id, plan, say) if plan is not None else []
            with writer.batch():
                for measurement in found:
                    writer.record_measurement(measurement)
            for measurement in found:
                say(Event(f"{one.subject}  {line(measurement)}", result=_told(measurement)))


def _measured(
    folder: RunFolder, spec: RunSpec, subject: Subject, config_id: int | None, plan: StitchPlan, say: Say
) -> list[Measurement]:
    setting, device = _setting(spec)
    dense = location(spec.base_model)
    with tempfile.TemporaryDirectory(prefix=PLACE, dir=folder.path) as place:
        out = Path(place) / "model"
        write_model(spec, plan, out, say, folder=folder)
        say(Event("measuring memory"))
        memory = [float(_asked("memory", [where], setting)[0]["bytes"]) for where in (dense, str(out))]
        say(Event(f"measuring speed, in turns with the dense base, {setting.rounds} rounds"))
        found = quantities(_asked("speed", [dense, str(out)], setting))
        found[Quantity.MEMORY, max(setting.batches)] = np.array([memory])
        if Path(dense).is_dir():
            found[Quantity.DISK, 1] = np.array([[bytes_of(Path(dense)), bytes_of(out)]], dtype=float)
    at = now()
    return [
        Measurement(subject, config_id, plan.hash, device, quantity, batch, *_summary(rounds), at)
        for (quantity, batch), rounds in found.items()
    ]


def quantities(timings: Sequence[dict[str, Any]]) -> dict[tuple[Quantity, int], np.ndarray]:
    """(quantity, batch) -> [rounds, 2]: the dense base's and the plan's value in each round.

    timings: as evaluate/speed.py prints them, model 0 being the dense base, a round's two in either order.
    """
    by_model: dict[tuple[Quantity, int], dict[int, list[float]]] = defaultdict(lambda: {0: [], 1: []})
    for timing in timings:
        batch, first, rest = int(timing["batch"]), float(timing["first"]), float(timing["rest"])
        read, written = batch * int(timing["prompt"]), batch * (int(timing["new"]) - 1)
        values = {Quantity.PREFILL: read / first, Quantity.DECODE: written / rest}
        for quantity, value in (values | {Quantity.FIRST_TOKEN: first}).items():
            by_model[quantity, batch][int(timing["model"])].append(value)
    return {key: np.array([found[0], found[1]]).T for key, found in by_model.items()}


def _summary(rounds: np.ndarray) -> tuple[float, float, float, float, float]:
    """[rounds, 2] -> value, spread, dense, ratio, ratio_spread (see Measurement)."""
    dense, plan = rounds.T
    ratio = plan / dense
    return (
        float(np.median(plan)),
        _half_width(plan),
        float(np.median(dense)),
        float(np.median(ratio)),
        _half_width(ratio),
    )


def _half_width(values: np.ndarray) -> float:
    low, high = np.percentile(values, [25, 75])
    return float(high - low) / 2


def bytes_of(folder: Path) -> int:
    """Of a model's weights on disk, in the files that transformers reads."""
    return sum((folder / name).stat().st_size for name in weight_files(folder))


def _setting(spec: RunSpec) -> tuple[Setting, str]:
    """What is measured, on the run's device in the run's numbers; and the device's name."""
    import torch

    from gptailor.evaluate.speed import Setting
    from gptailor.family.preflight import inspect_family
    from gptailor.family.residence import pick_devices

    device = str(pick_devices(spec.device)[0])
    dtype = inspect_family(spec, download=True).preflight.dtype
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return Setting(device, dtype), f"{name}, {dtype}"


def _asked(what: str, folders: Sequence[str], setting: Setting) -> list[dict[str, Any]]:
    """What a process that measures printed. Raises UserError with its last word where it failed."""
    command = [
        sys.executable,
        "-m",
        "gptailor.evaluate.speed",
        what,
        *folders,
        "--setting",
        json.dumps(asdict(setting)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise UserError(f"measure: {' and '.join(folders)} could not be measured on {setting.device}: {cause}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _told(measurement: Measurement) -> dict[str, Any]:
    return asdict(measurement) | {
        "subject": str(measurement.subject),
        "measured_at": measurement.measured_at.isoformat(),
    }
