"""What a run would take, before it is started: does the family fit, in which memory, how many trials, how long.

Of models, headers are read, and a small base is tried. The benchmarks are opened as the search opens them, so that
what it would refuse is refused here; nothing is scored. Opening the family's library brings torch, so
the dashboard asks a process of its own (`python -m gptailor check RUN.yaml --json`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptailor import shipped
from gptailor.errors import UserError
from gptailor.heal.asked import HealAsked, count_text
from gptailor.heal.cost import Sizes, heal_bytes, heal_operations, lora_parameters
from gptailor.results import redundancy as kept
from gptailor.results.outlook import outlook
from gptailor.schedule import Rung, n_examples, schedule
from gptailor.scoring.device_speed import matmul_speed, type_advice
from gptailor.scoring.memory import ELSEWHERE, Memory, costs_of_edits, local_workers, predict_memory
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Removal, SpaceOperation
from gptailor.store.folder import runs_root
from gptailor.wording import duration, gigabytes, size

if TYPE_CHECKING:
    from gptailor.family.models import Reader
    from gptailor.family.preflight import Preflight
    from gptailor.store.queries import RunTables

TOKENS_PER_EXAMPLE = 120
"""Tokens computed for an example with all its options, where nothing was measured yet: short multiple choice."""
EFFICIENCY = 0.4
"""Share of a matrix product's speed that a whole forward pass reaches."""
SECONDS_PER_TRIAL = 0.5
"""To suggest, stitch and record a trial."""
JUDGED = 200
"""Examples that are looked at of benchmarks that the search does not read."""
ENOUGH_TRIALS = 5
RECENT_RUNS = 12


@dataclass(frozen=True)
class Estimate:
    """Time of the whole search in seconds, and how it was arrived at."""

    seconds: float
    how: str


@dataclass(frozen=True)
class Fit:
    """The family, and how much of it is removed.

    asked: the measure that `remove` says, where it is another than layers. n_removed, kept: layers that go, and the
    share of the base's parameters that stays; None where that is measured when the run begins. Of a range, of the
    shortest plans; fewest_removed and most_kept are of the longest.
    """

    architecture: str
    dtype: str
    n_parameters: int
    n_layers: int
    n_removed: int | None
    kept: float | None
    licences: Mapping[str, str]
    asked: str = ""
    fewest_removed: int | None = None
    most_kept: float | None = None

    @property
    def longest(self) -> float:
        """The share of the parameters that the longest plan keeps, as far as that is known."""
        return self.most_kept or self.kept or 1.0

    @property
    def removal(self) -> str:
        """What goes, in words."""
        if self.n_removed is None or self.kept is None:
            return f"{self.n_layers} layers; how many go for {self.asked} is measured when the run begins"
        if self.fewest_removed is not None and self.most_kept is not None:
            return (
                f"{self.fewest_removed} to {self.n_removed} of {self.n_layers} layers go, {self.kept:.1%} to "
                f"{self.most_kept:.1%} of the parameters stay; size is an objective"
            )
        measure = f"{self.asked}: " if self.asked else ""
        return f"{measure}{self.n_removed} of {self.n_layers} layers go, {self.kept:.1%} of the parameters stay"


@dataclass(frozen=True)
class Check:
    """All that is known before the start. `problems` hinder the run; `notes` are worth knowing.

    n_examples: scored in the whole search, at most. family: None where the models do not fit. later: what may be done
    with a plan afterwards, and what it takes. redundancy: whether a search looks promising, where that was measured,
    else what measuring it takes.
    """

    rungs: tuple[Rung, ...]
    n_examples: int
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    family: Fit | None = None
    memory: Memory | None = None
    estimate: Estimate | None = None
    later: tuple[str, ...] = ()
    redundancy: str = ""


def check(spec: RunSpec, runs: str | Path | None = None) -> Check:
    """Look at a run that is asked for.

    runs: the folder of saved runs, whose pace is taken where one has the same base model; by default runs_root().
    """
    from gptailor.family.models import try_family

    planned = Check(schedule(spec.budget, spec.trials), n_examples(spec))
    problems = [*_benchmark_problems(spec), *_merge_problems(spec), *_text_problems(spec)]
    try:
        found, reader = try_family(spec)
        found, family = _fit(spec, found)
        memory = predict_memory(spec, found)
    except UserError as error:
        lines = str(error).splitlines()  # several problems stand under a heading
        return dataclasses.replace(planned, problems=(*problems, *(lines[1:] or lines)))
    opened = Opened() if reader is None or problems else _open(spec, reader)
    return dataclasses.replace(
        planned,
        problems=(*problems, *opened.problems),
        notes=(
            *found.notes,
            *opened.notes,
            *_rung_notes(spec, planned),
            *_worker_notes(spec),
            *_type_notes(memory.device, found),
            *_edit_notes(spec, found, memory.device),
        ),
        family=family,
        memory=memory,
        estimate=_estimate(spec, planned, found, memory.device, family.longest, Path(runs or runs_root())),
        later=tuple(_later(found, memory.device)),
        redundancy=_redundancy(spec, found, memory.device, Path(runs or runs_root())),
    )


def _redundancy(spec: RunSpec, found: Preflight, device: str, runs: Path) -> str:
    """What was measured of the family, as long as its models are the same, else what it takes to measure it."""
    from gptailor.commands.redundancy import n_texts_read
    from gptailor.redundancy.states import SAMPLED, n_bytes
    from gptailor.scoring.provenance import digests_of

    known = kept.read(kept.shared_file(runs, spec))
    if known is not None and known.is_of(digests_of(spec).weights):
        return outlook(known, found.n_removed, spec.operations).headline
    speed = None if device == ELSEWHERE else matmul_speed(device, found.hidden_size, found.dtype)
    n_tokens = TOKENS_PER_EXAMPLE * n_texts_read(len(found.model_bytes), found.n_layers, len(spec.objectives))
    seconds = None if speed is None else 2 * n_tokens * found.n_parameters / (EFFICIENCY * speed)
    time = "" if seconds is None else f" about {duration(seconds)} and"
    held = gigabytes(n_bytes(found.n_layers, found.hidden_size, SAMPLED))
    why = "not measured yet" if known is None else "measured of models that have changed since"
    return f"{why}; `python -m gptailor redundancy` takes{time} {held} beside the models"


def _rung_notes(spec: RunSpec, planned: Check) -> Iterator[str]:
    """A search that ends before its first trial at the full budget has no front."""
    if planned.rungs[-1].trials:
        return
    enough = next(n for n in count(spec.trials + 1) if schedule(spec.budget, n)[-1].trials)
    yield (
        f"trials: {spec.trials} end before one reaches {spec.budget.max} examples, so that there will be no front; "
        f"the first does with {enough}"
    )


def _worker_notes(spec: RunSpec) -> Iterator[str]:
    if names := local_workers(spec):
        yield f"workers: {len(names)} on this machine ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"


def _type_notes(device: str, found: Preflight) -> Iterator[str]:
    if device != ELSEWHERE and (advice := type_advice(device, found.hidden_size, found.dtype)):
        yield advice


def _edit_notes(spec: RunSpec, found: Preflight, device: str) -> Iterator[str]:
    """What edits take: the memory of the greatest is among the parts, their time is not in the estimate."""
    repairs, cuts = costs_of_edits(spec, found)
    for what, cost in (repairs | cuts).items():
        yield f"{what} {_taken(cost.operations, cost.n_bytes, found, device, found.dtype)} beside the models"


def _later(found: Preflight, device: str) -> Iterator[str]:
    """What the heal of a plan takes, as the command does it by default."""
    if device == ELSEWHERE or not found.n_removed:
        return
    import torch

    from gptailor.commands.heal import computes_faster_in_bfloat16

    asked = HealAsked()
    in_bfloat16 = computes_faster_in_bfloat16(torch.device(device))
    each, kept = sum(found.layer_parameters) // found.n_layers, found.n_layers - found.n_removed
    trained = kept * lora_parameters(asked.lora, found.hidden_size, found.inner_size)
    frozen = found.n_parameters - found.n_removed * each
    sizes = Sizes(kept, found.hidden_size, found.inner_size, found.vocab_size, frozen, trained)
    operations = heal_operations(sizes, asked.tokens, asked.text_tokens, each, found.n_layers, is_lora=True)
    number = "bfloat16" if in_bfloat16 else "float32"
    taken = _taken(operations, heal_bytes(sizes, in_bfloat16), found, device, number)
    yield f"heal of a plan on {count_text(asked.tokens)} tokens: {taken} beside the models"


def _taken(operations: float, n_bytes: int, found: Preflight, device: str, dtype: str) -> str:
    speed = None if device == ELSEWHERE else matmul_speed(device, found.hidden_size, dtype)
    time = "" if speed is None else f"about {duration(operations / (EFFICIENCY * speed))} and "
    return f"{time}{gigabytes(n_bytes)}"


def _text_problems(spec: RunSpec) -> Iterator[str]:
    """Files of texts that are not there."""
    for source in spec.repairs.texts.split("+") if spec.repairs is not None else ():
        kind, _, name = source.partition(":")
        if kind == "file" and not Path(name).expanduser().is_file():
            yield f"repair.texts: {name}: no such file"


def _fit(spec: RunSpec, found: Preflight) -> tuple[Preflight, Fit]:
    """The family, and the preflight with the number of layers that go, as far as that is known. Raises UserError."""
    removed = found.n_removed
    if removed is None and isinstance(spec.remove, Removal):
        removed = _for_speed(spec, found)
        found = dataclasses.replace(found, n_removed=removed)
    fewest = spec.removals(found.n_layers)[0] if spec.has_range else None
    asked = str(spec.remove) if isinstance(spec.remove, Removal) and not spec.has_range else ""
    fit = Fit(
        found.architecture,
        found.dtype,
        found.n_parameters,
        found.n_layers,
        removed,
        _kept(found, removed),
        dict(found.licences),
        asked,
        fewest,
        _kept(found, fewest),
    )
    return found, fit


def _kept(found: Preflight, n_removed: int | None) -> float | None:
    """The share of the base's parameters that stays without so many layers of the mean size."""
    if n_removed is None:
        return None
    return 1 - n_removed * sum(found.layer_parameters) / found.n_layers / found.n_parameters


def _for_speed(spec: RunSpec, found: Preflight) -> int | None:
    """Layers that go for the speed that is asked for: measured where the base is small, else where it was before."""
    from gptailor.family.models import SMALL
    from gptailor.scoring.removal_speed import answer_of, known_ratios, layers_for_speed

    assert isinstance(spec.remove, Removal) and spec.remove.speed is not None
    if found.n_parameters <= SMALL:
        return layers_for_speed(spec)
    return answer_of(known_ratios(spec), spec.remove.speed)


def check_text(spec: RunSpec, runs: str | Path | None = None) -> str:
    """The check for a terminal. Raises UserError with all problems where the run could not begin."""
    found = check(spec, runs)
    if found.problems or found.family is None:
        n = len(found.problems)
        raise UserError("\n".join([f"{spec.name} cannot run: {n} problem{'s' * (n > 1)}", *found.problems]))
    family = found.family
    lines = [
        f"{spec.name}: the models fit together",
        f"  {family.architecture}, {size(family.n_parameters)} parameters in {family.dtype}",
        f"  {family.removal}",
    ]
    lines += [f"  note: {note}" for note in found.notes]
    if found.memory is not None:
        lines.append(f"  memory {found.memory.verdict}")
        lines += [f"    {part:<14} {gigabytes(held)}" for part, held in found.memory.parts.items()]
    lines.append(f"  {spec.trials} trials on {len(found.rungs)} rung{'s' * (len(found.rungs) > 1)}:")
    for rung in found.rungs:
        lines.append(f"    {rung.trials:>5} trials of {rung.budget} examples a benchmark")
    lines.append(
        f"  {found.n_examples:,} examples to score at most, over {len(spec.objectives)} "
        f"benchmark{'s' * (len(spec.objectives) > 1)}"
    )
    if found.estimate is not None:
        lines.append(f"  about {duration(found.estimate.seconds)} ({found.estimate.how})")
    lines.append(f"  redundancy: {found.redundancy}")
    lines += [f"  afterwards, if you want it: {what}" for what in found.later]
    return "\n".join(lines)


def check_json(spec: RunSpec, runs: str | Path | None = None) -> dict[str, Any]:
    """The check as plain data, problems included."""
    found = check(spec, runs)
    data = dataclasses.asdict(found)
    if found.family is not None:
        data["family"]["removal"] = found.family.removal
    if found.memory is not None:
        data["memory"] |= {"needed": found.memory.needed, "verdict": found.memory.verdict}
    return data


# --- benchmarks and merging -------------------------------------------------------------------------------------------

_NAME = re.compile(rb"^(?:task|group|tag):[ \t]*[\"']?([^\s\"'#\[]+)", re.MULTILINE)
_LISTED = re.compile(rb"^tag:[ \t]*\n((?:[ \t]*-[ \t]*\S+[ \t]*\n)+)", re.MULTILINE)


def _benchmark_problems(spec: RunSpec) -> Iterator[str]:
    """Names that neither the run's folders nor lm-eval's own tasks define, found by reading files as text."""
    wanted = {benchmark.benchmark for benchmark in spec.benchmarks}
    for folder in spec.include_path:
        if not shipped.find(folder).is_dir():
            yield f"include_path: {folder} is not a folder; it must hold lm-eval task files (*.yaml)"
        else:
            wanted -= _defined_names(shipped.find(folder))
    if not wanted:
        return
    import importlib.util

    package = importlib.util.find_spec("lm_eval")
    for place in (package.submodule_search_locations or ()) if package else ():
        known = _defined_names(Path(place) / "tasks")
        import difflib

        for name in sorted(wanted - known):
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            where = f"in {', '.join(spec.include_path)} nor " if spec.include_path else ""
            yield f"benchmark {name}: found {'neither ' + where if where else 'not '}among lm-eval's own tasks{hint}"


def _defined_names(folder: Path) -> set[str]:
    """Names of tasks, groups and tags that the task files under a folder define."""
    names: set[str] = set()
    for path in folder.rglob("*.y*ml"):
        try:
            text = path.read_bytes()
        except OSError:
            continue  # it vanished, or is not ours to read; a benchmark that needs it is reported as missing
        names |= {found.decode("utf-8", "replace") for found in _NAME.findall(text)}
        for block in _LISTED.findall(text):
            names |= {line.strip(b" \t-").decode("utf-8", "replace") for line in block.splitlines()}
    return names


@dataclass(frozen=True)
class Opened:
    """What came of opening the benchmarks."""

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _open(spec: RunSpec, reader: Reader) -> Opened:
    """Open every benchmark as the search does, each metric of one on its own where something is wrong with them."""
    from gptailor.scoring.plan_scorer import open_run_benchmarks

    problems: dict[str, None] = {}
    notes: dict[str, None] = {}
    for asked, most in ((spec.objectives, spec.budget.max), (spec.selection, JUDGED), (spec.held_out, JUDGED)):
        for benchmarks in {one.reading: [b for b in asked if b.reading == one.reading] for one in asked}.values():
            try:
                opened = open_run_benchmarks(reader, spec, benchmarks, most)
            except UserError as error:
                problems |= dict.fromkeys(str(error).splitlines())
            else:
                notes |= dict.fromkeys(filter(None, (benchmark.cut_note for benchmark in opened)))
    return Opened(tuple(problems), tuple(notes))


def _merge_problems(spec: RunSpec) -> Iterator[str]:
    if SpaceOperation.MERGE not in spec.operations:
        return
    from gptailor.stitch.merging import merge_method_problem

    problem = merge_method_problem(spec.merge.method, spec.merge.parameters, len(spec.candidates))
    if problem is not None:
        yield problem


# --- time -------------------------------------------------------------------------------------------------------------


def _estimate(
    spec: RunSpec, planned: Check, family: Preflight, device: str, kept: float, runs: Path
) -> Estimate | None:
    """From a saved run's pace where one has the same base model on the same kind of device, else from a speed test.

    None where it is computed elsewhere, by nobody knows how many.
    """
    if device == ELSEWHERE:
        return None
    measured = _measured_pace(spec, device, runs)
    at_once = max(1, len(local_workers(spec)))
    if measured is not None:
        pace, run_id = measured
        seconds = planned.n_examples * pace / at_once + spec.trials * SECONDS_PER_TRIAL
        return Estimate(seconds, f"{1000 * pace:.3g} ms an example, as in run {run_id}")
    speed = matmul_speed(device, family.hidden_size, family.dtype)
    if speed is None:
        return None
    pace = TOKENS_PER_EXAMPLE * 2 * kept * family.n_parameters / (EFFICIENCY * speed)
    seconds = planned.n_examples * pace / at_once + spec.trials * SECONDS_PER_TRIAL
    how = (
        f"a guess within a factor of three: this device multiplies matrices of this model's size at "
        f"{speed / 1e9:,.0f} GFLOP/s, and {TOKENS_PER_EXAMPLE} tokens an example are assumed"
    )
    return Estimate(seconds, how)


def _measured_pace(spec: RunSpec, device: str, runs: Path) -> tuple[float, str] | None:
    """Seconds per example of the newest run that is like this one, same benchmarks preferred."""
    from gptailor.results.summary import list_runs
    from gptailor.store import queries
    from gptailor.store.connection import StoreError

    objectives = {objective.name for objective in spec.objectives}
    alike = [
        summary
        for summary in list_runs(runs)
        if summary.base_model == spec.base_model
        and summary.device.partition(":")[0] == device.partition(":")[0]
        and summary.n_done >= ENOUGH_TRIALS
    ]
    alike.sort(key=lambda summary: set(summary.objectives) != objectives)
    for summary in alike[:RECENT_RUNS]:
        try:
            tables = queries.read_run(queries.RunFolder.of(runs, summary.run_id))
        except StoreError:
            continue  # a run that cannot be read just now tells nothing; the next one may
        pace = _pace(tables)
        if pace is not None:
            return pace, summary.run_id
    return None


def _pace(tables: RunTables) -> float | None:
    """Seconds per example newly scored: what a configuration scored on lower rungs was not scored again."""
    trials = tables.trials[tables.trials.status == "success"]
    scored = tables.scores.groupby("trial_id").n_samples.sum()
    trials = trials.assign(scored=trials.trial_id.map(scored)).dropna(subset=["scored"]).sort_values("budget")
    before = trials.groupby("config_id").scored.shift(fill_value=0)
    trials = trials.assign(fresh=trials.scored - before)[trials.stitch_seconds > 0]  # else the references had it
    examples, seconds = float(trials.fresh.sum()), float(trials.evaluate_seconds.sum())
    return seconds / examples if examples > 0 and seconds > 0 else None
