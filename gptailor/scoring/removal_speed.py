"""How many layers have to go for a speed: measured, with as few numbers of layers tried as halving takes.

The base and what is left of it are timed in turns in a process of its own (`python -m gptailor.scoring.removal_speed`):
the weights are the base's, and which layers go makes no difference to time where layers are alike, so no plan is
exported. What was found is kept in the user's cache folder for a configuration, number type and device, so that the
check and the run agree; a run keeps the number that came of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

from gptailor.errors import UserError
from gptailor.spec.files import build_spec
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Removal, SpaceOperation

PROMPT, NEW = 32, 24
"""Tokens that are read and then written each time."""

LOOK_SECONDS = 0.2
"""Between two looks at whether it is to stop."""

Ratios = dict[int, float]
"""Layers that are gone -> how many times as fast as the dense base new tokens are written."""


def counted_here(spec: RunSpec) -> RunSpec:
    """The run file with a number of layers for `remove`: counted from headers, or measured here. Raises UserError."""
    from gptailor.family.preflight import preflight

    if not isinstance(spec.remove, Removal):
        return spec
    found = preflight(spec).n_removed
    return spec.removing(layers_for_speed(spec) if found is None else found)


def layers_for_speed(
    spec: RunSpec, say: Callable[[str], None] = lambda _text: None, should_stop: Callable[[], bool] = lambda: False
) -> int:
    """The fewest layers without which the speed is reached that `remove` asks for. Raises UserError where none is.

    say: told of each number that is measured. should_stop: asked while it is measured; then Stopped is raised.
    """
    assert isinstance(spec.remove, Removal) and spec.remove.speed is not None
    known = known_ratios(spec)
    if (number := answer_of(known, spec.remove.speed)) is not None:
        return number
    found, most = _measured(spec, known, say, should_stop)
    if (number := _fewest(found, spec.remove.speed)) is None:
        raise UserError(
            f"remove.speed: {spec.remove.speed:g} times the speed of the dense base cannot be reached here: without "
            f"{most} layers it is {found[most]:.2f} times as fast"
        )
    return number


def known_ratios(spec: RunSpec) -> Ratios:
    """What was measured of this base, type and device."""
    try:
        stored = json.loads(_cache_file(spec).read_text(encoding="utf-8"))
        return {int(number): float(ratio) for number, ratio in stored.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def answer_of(ratios: Mapping[int, float], speed: float) -> int | None:
    """The number of layers, where what is known says that one fewer is too slow."""
    number = _fewest(ratios, speed)
    return number if number is not None and (number == 1 or number - 1 in ratios) else None


def next_to_try(ratios: Mapping[int, float], speed: float, most: int) -> int | None:
    """The number of layers to measure next, at most `most`; None where nothing more has to be known."""
    enough = _fewest(ratios, speed)
    if enough is None:
        return None if most in ratios else most
    too_few = max((number for number in ratios if number < enough), default=0)
    return None if enough - too_few == 1 else (enough + too_few) // 2


def _fewest(ratios: Mapping[int, float], speed: float) -> int | None:
    return min((number for number, ratio in ratios.items() if ratio >= speed), default=None)


def _measured(
    spec: RunSpec, known: Ratios, say: Callable[[str], None], should_stop: Callable[[], bool]
) -> tuple[Ratios, int]:
    """All ratios that are known now, and the most layers that can go. Raises UserError, Stopped.

    The process that measures is no member of our group: a signal to all of it asks us alone, and we end it.
    """
    command = [sys.executable, "-m", "gptailor.scoring.removal_speed"]
    found, most, file = dict(known), None, _cache_file(spec)
    with tempfile.TemporaryFile("w+") as errors:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        with (
            subprocess.Popen(command, text=True, start_new_session=True, **pipes) as process,
            _ended_when(should_stop, process),
        ):
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError), process.stdin as asked:  # it has died, and its errors say of what
                json.dump({"spec": spec.model_dump(mode="json"), "known": known}, asked)
            for line in process.stdout:
                told = json.loads(line) if line.startswith("{") else {}
                most = told.get("most", most)
                if "removed" in told:
                    found[int(told["removed"])] = float(told["ratio"])
                    say(f"remove.speed: without {told['removed']} layers {told['ratio']:.2f} times as fast as the base")
                    _keep(file, found)
        errors.seek(0)
        cause = (errors.read().strip().splitlines() or [f"it ended with {process.returncode}"])[-1]
    if should_stop():
        from gptailor.evaluate.evaluator import Stopped  # torch comes with it

        raise Stopped
    if most is None:
        raise UserError(f"remove.speed: the base could not be measured on {spec.device}: {cause}")
    return found, int(most)


@contextmanager
def _ended_when(should_stop: Callable[[], bool], process: subprocess.Popen[str]) -> Iterator[None]:
    """Kill the process as soon as it is to stop, and when this is left before its end."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_SECONDS):
            if should_stop():
                process.kill()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except BaseException:
        process.kill()
        raise
    finally:
        over.set()
        watcher.join()


def _keep(file: Path, found: Ratios) -> None:
    from gptailor.store.folder import write_atomically

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(found))
    except OSError:
        return  # it is measured again where it is asked for


def _cache_file(spec: RunSpec) -> Path:
    """Where the ratios of this configuration, type and device are kept. Raises UserError for a device."""
    import torch
    import transformers

    from gptailor.family.preflight import inspect_family
    from gptailor.family.residence import pick_devices

    found = inspect_family(_base_alone(spec))
    device = str(pick_devices(spec.device)[0])
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{device} {torch.get_num_threads()}"
    of = [found.skeleton.config.to_json_string(), found.preflight.dtype, name, torch.__version__]
    key = hashlib.blake2b(json.dumps([*of, transformers.__version__]).encode(), digest_size=16).hexdigest()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "gptailor" / "speeds" / f"{key}.json"


def _base_alone(spec: RunSpec) -> RunSpec:
    changes: dict[str, Any] = {"candidates": {}, "operations": [SpaceOperation.REMOVE], "remove": 1}
    changes |= {"repair": None, "output_scale": None, "baselines": [], "baselines_on": []}
    return build_spec(spec.model_dump(mode="json") | changes)


# --- in the process that measures -------------------------------------------------------------------------------------


def ratios(spec: RunSpec, known: Mapping[int, float]) -> Iterator[tuple[int, float]]:
    """Numbers of layers and their ratios, as they are measured. Raises UserError."""
    assert isinstance(spec.remove, Removal) and spec.remove.speed is not None
    timed, free = _stopwatch(spec)
    found = dict(known)
    while (number := next_to_try(found, spec.remove.speed, len(free) - 1)) is not None:
        found[number] = timed(number)
        yield number, found[number]


def _stopwatch(spec: RunSpec) -> tuple[Callable[[int], float], Sequence[int]]:
    """What times the base without so many layers, in turns with all of it; and the layers that can go."""
    from gptailor.evaluate import speed
    from gptailor.family.models import open_family
    from gptailor.plan import StitchPlan
    from gptailor.stitch.stitcher import Stitcher

    family = open_family(_base_alone(spec))
    stitcher, setting = Stitcher(family), speed.Setting(str(family.device), prompt=PROMPT, new=NEW)
    free = sorted(set(range(family.n_layers)) - family.renumbering.fixed)

    def seconds(plan: StitchPlan) -> float:
        return speed.write(speed.ready(stitcher.stitch(plan)), 1, setting)[1]

    def timed(number: int) -> float:
        plans = [StitchPlan.dense(family.n_layers), StitchPlan.without(free[-number:], family.n_layers)]
        rounds = []
        for turn in range(-1, setting.rounds):  # the first warms up
            taken = {index: seconds(plans[index]) for index in ((0, 1) if turn % 2 else (1, 0))}
            rounds.append(taken[0] / taken[1])
        return median(rounds[1:])

    return timed, free


def main() -> None:
    """Read {"spec", "known"} as JSON; print a JSON line for each number measured, then the most that can go."""
    asked = json.load(sys.stdin)
    spec = build_spec(asked["spec"])
    for number, ratio in ratios(spec, {int(key): value for key, value in asked["known"].items()}):
        print(json.dumps({"removed": number, "ratio": ratio}), flush=True)
    from gptailor.family.preflight import inspect_family

    found = inspect_family(_base_alone(spec)).preflight
    print(json.dumps({"most": found.n_layers - len(found.fixed) - 1}), flush=True)


if __name__ == "__main__":
    main()
