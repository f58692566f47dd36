"""A set of runs that differ in a few keys, one after another, and one table at the end: the paper's ablations.

Each run is an ordinary run with an engine process of its own. Runs are recognised by what was asked of them, so that an
experiment that was stopped goes on where it was, and one that is started again only shows its table.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import yaml

from gptailor.commands.findings import findings
from gptailor.errors import UserError
from gptailor.launch.engine import prepare, state
from gptailor.launch.series import Series
from gptailor.results import redundancy, scores
from gptailor.results.fronts import QUALITIES, attained, volume
from gptailor.runfile import load_yaml, read_text
from gptailor.spec.files import load_spec
from gptailor.spec.run import RunSpec
from gptailor.store import queries
from gptailor.store.folder import RunFolder
from gptailor.trial import RunStatus
from gptailor.wording import as_table

if TYPE_CHECKING:
    import pandas as pd

KEYS = ("name", "run", "seeds", "runs", "evaluate", "fronts", "redundancy")
SHORT = ("first_candidates", "first_objectives", "metric", "model")
"""The run file's first so many candidates or objectives; one metric for all objectives; one model by itself, as if it
were the base and had no candidates: 0 is the base, 1 the first candidate."""
MOST_SEEDS = 100
SHARES = {"retention": "{:.1%}", "gap": "{:+.1%}"}
"""Columns that need the dense base to be judged too."""


@dataclass(frozen=True)
class Experiment:
    """runs: label -> what is asked. evaluate: subjects that each run judges on its held-out benchmarks, if any.

    fronts: name -> labels of the runs that make one front of quality against size together. redundancy: labels of the
    runs whose family's redundancy is measured before they begin.
    """

    name: str
    runs: Mapping[str, RunSpec]
    evaluate: tuple[str, ...]
    fronts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    redundancy: tuple[str, ...] = ()


def load_experiment(path: str | Path, run_file: str | None = None, changes: Sequence[str] = ()) -> Experiment:
    """Read an experiment.

    `name`, `run` (a run file), `seeds`, `runs` (label -> changed keys), `evaluate` (subjects), `fronts` (name ->
    labels), `redundancy` (labels).

    seeds: how many of each run, from seed 0 on. Among a run's changed keys, those of SHORT stand for others that depend
    on the run file, so that one experiment fits any family. run_file: another run file to start from, for another
    family or size; changes: `key=value` for every run, of which keys of SHORT then take the first so many. Raises
    UserError.
    """
    path = Path(path)
    data = load_yaml(read_text(path, "experiment"), f"experiment {path}")
    if not isinstance(data, Mapping) or not isinstance(data.get("runs"), Mapping) or not data["runs"]:
        raise UserError(f"experiment {path}: expected the keys {', '.join(KEYS)}, with at least one entry under runs")
    if unknown := [key for key in data if key not in KEYS]:
        raise UserError(f"experiment {path}: unknown key {unknown[0]!r}; accepted here: {', '.join(KEYS)}")
    start = run_file or data.get("run")
    if not isinstance(start, str):
        raise UserError(f"experiment {path}: run: name the run file to start from, here or with --run")
    name = str(data.get("name") or path.stem)
    seeds = data.get("seeds", 1)
    if type(seeds) is not int or not 1 <= seeds <= MOST_SEEDS:
        raise UserError(f"experiment {path}: seeds: expected a number from 1 to {MOST_SEEDS}; got {seeds!r}")
    runs = {}
    for label, changed in _over_seeds(data["runs"], seeds):
        if not isinstance(changed, Mapping):
            raise UserError(f"experiment {path}: runs.{label}: expected keys of a run file and their values")
        plain = {key: value for key, value in changed.items() if key not in SHORT}
        short = {key: value for key, value in changed.items() if key in SHORT}
        keys = [*_settings(plain), *changes]
        if short:
            keys += _settings(_spelled_out(short, load_spec(start, [*changes]), f"experiment {path}: runs.{label}"))
        runs[str(label)] = load_spec(start, [*keys, *_settings({"name": f"{name}: {label}"[:80]})])
    fronts = _fronts(data.get("fronts") or {}, runs, seeds, f"experiment {path}: fronts")
    measured = _labels(data.get("redundancy") or [], runs, seeds, f"experiment {path}: redundancy")
    return Experiment(name, runs, tuple(data.get("evaluate") or ()), fronts, measured)


def _fronts(asked: Any, runs: Mapping[str, RunSpec], seeds: int, where: str) -> dict[str, tuple[str, ...]]:
    """Groups of runs by their names, each once a seed. Raises UserError for a label that no run has."""
    if not isinstance(asked, Mapping) or not all(isinstance(labels, list) for labels in asked.values()):
        raise UserError(f"{where}: expected names, each with a list of labels of runs")
    return {
        f"{name}{end}": tuple(f"{label}{end}" for label in _known(labels, runs, end, f"{where}.{name}"))
        for end in _ends(seeds)
        for name, labels in asked.items()
    }


def _labels(asked: Any, runs: Mapping[str, RunSpec], seeds: int, where: str) -> tuple[str, ...]:
    """Runs by their labels, each once a seed. Raises UserError for a label that no run has."""
    if not isinstance(asked, list):
        raise UserError(f"{where}: expected a list of labels of runs")
    return tuple(f"{label}{end}" for end in _ends(seeds) for label in _known(asked, runs, end, where))


def _ends(seeds: int) -> list[str]:
    """What the labels of runs end with, by seed."""
    return [f", seed {seed}" for seed in range(seeds)] if seeds > 1 else [""]


def _known(labels: list[Any], runs: Mapping[str, RunSpec], end: str, where: str) -> list[Any]:
    if unknown := [f"{label}{end}" for label in labels if f"{label}{end}" not in runs]:
        raise UserError(f"{where}: there is no run {unknown[0]!r}; the runs are {', '.join(runs)}")
    return labels


def _over_seeds(runs: Mapping[Any, Any], seeds: int) -> Iterator[tuple[str, Any]]:
    """Each run once a seed, all of one seed before the next: what is stopped half-way has every run once."""
    for seed in range(seeds):
        for label, changed in runs.items():
            several = seeds > 1 and isinstance(changed, Mapping)
            yield (f"{label}, seed {seed}", changed | {"seed": seed}) if several else (str(label), changed)


def _settings(keys: Mapping[str, Any]) -> list[str]:
    return [f"{key}={yaml.safe_dump(value, default_flow_style=True).strip()}" for key, value in keys.items()]


def _spelled_out(short: Mapping[str, Any], spec: RunSpec, where: str) -> dict[str, Any]:
    """Keys of SHORT as those of a run file that they stand for, in terms of `spec`. Raises UserError."""
    found: dict[str, Any] = {}
    for key, kind in (("first_candidates", "candidates"), ("first_objectives", "objectives")):
        count, most = short.get(key), len(getattr(spec, kind))
        if key in short and (type(count) is not int or not 1 <= count <= most):
            raise UserError(f"{where}.{key}: expected a number from 1 to {most}, the {kind} there are; got {count!r}")
    if "model" in short:
        models = [spec.base_model, *spec.candidates.values()]
        number = short["model"]
        if type(number) is not int or not 0 <= number < len(models):
            raise UserError(
                f"{where}.model: expected a number from 0, the base, to {len(models) - 1}, the last candidate; "
                f"got {number!r}"
            )
        found |= {"base_model": models[number], "candidates": {}}
    if "first_candidates" in short:
        found["candidates"] = dict(list(spec.candidates.items())[: short["first_candidates"]])
    if "first_objectives" in short or "metric" in short:
        objectives = [o.model_dump(mode="json") for o in spec.objectives[: short.get("first_objectives")]]
        metric = {"metric": short["metric"]} if "metric" in short else {}
        found["objectives"] = [objective | metric for objective in objectives]
    return found


def run_experiment(experiment: Experiment, root: str | Path, say: Callable[[str], None]) -> dict[str, RunFolder]:
    """Run, or go on with, every run, judge it, and say the table. The runs by their labels."""
    folders: dict[str, RunFolder] = {}
    with Series() as series:
        for label, spec in experiment.runs.items():
            token = hashlib.sha256(spec.to_yaml().encode()).hexdigest()
            folders[label] = folder = prepare(root, spec, token=token)
            say(f"{label}: run {folder.run_id}")
            of_it = (folder.run_id, "--runs", str(folder.root.resolve()))
            if label in experiment.redundancy and redundancy.of_run(folder) is None:
                series.run("redundancy", *of_it)
            if not is_finished(folder):
                series.run("engine", *of_it)
            if not is_finished(folder) or not spec.held_out or not experiment.evaluate:
                continue
            if not _is_judged(folder, experiment.fronts):
                asked = dict.fromkeys([*experiment.evaluate, "best"])  # which the table shows
                series.run("evaluate", *of_it, "--subjects", ",".join(asked))
    say("")
    say(as_table(table(folders)))
    for told in fronts(experiment, folders):
        say("")
        say(as_table(told))
    if len(seeds := over_seeds(folders)) > 1:
        say("")
        say(as_table(seeds))
    for text in findings(folders):
        say("")
        say(text)
    say(f"Side by side: the dashboard's Compare page, ?runs={','.join(f.run_id for f in folders.values())}")
    return folders


def is_finished(folder: RunFolder) -> bool:
    return _status(folder) is RunStatus.FINISHED


def table(folders: Mapping[str, RunFolder]) -> list[tuple[str, ...]]:
    """A row a run.

    Its best plan (the selection's choice, else the best by the search's own scores) and what that keeps on the
    calibration and on the held-out benchmarks.
    """
    rows: list[tuple[str, ...]] = [
        ("run", "state", "trials", "plan", "calibration", "held-out average", "retention", "gap")
    ]
    for label, folder in folders.items():
        if not folder.exists():
            rows.append((label, "not started", "", "", "", "", "", ""))
            continue
        tables = queries.read_run(folder)
        best = scores.best(tables)
        believed = scores.calibration(tables).get(best) if best else None
        judged = _judged(folder, tables)
        rows.append(
            (
                label,
                str(state(folder, RunStatus(tables.runs["status"].iloc[0]))),
                str(len(scores.ended(tables.trials))),
                "" if best is None else str(best.config_id),
                "" if believed is None else f"{believed:.1%}",
                "" if judged is None or math.isnan(judged["average"]) else _with_error(judged),
                *(
                    "" if judged is None or math.isnan(judged[k]) else form.format(judged[k])
                    for k, form in SHARES.items()
                ),
            )
        )
    return rows


def _with_error(judged: Any) -> str:
    return f"{judged['average']:.4f} ±{judged['stderr']:.4f}"


def over_seeds(folders: Mapping[str, RunFolder]) -> list[tuple[str, ...]]:
    """Runs that differ in their seed alone as one row.

    The mean of what their best plans get on the held-out benchmarks, and its standard deviation over the runs. The
    heading alone where no two such runs are judged.
    """
    alike: dict[str, dict[str, float]] = {}
    for label, folder in folders.items():
        if folder.exists():
            judged = _judged(folder, queries.read_run(folder))
            if judged is not None and not math.isnan(judged["average"]):
                asked = load_spec(folder.spec).model_copy(update={"seed": 0, "name": ""}).to_yaml()
                alike.setdefault(asked, {})[label] = float(judged["average"])
    return [
        ("seeds together", "runs", "held-out average", "deviation"),
        *(
            (_common(found), str(len(found)), f"{mean(found.values()):.4f}", f"{stdev(found.values()):.4f}")
            for found in alike.values()
            if len(found) > 1
        ),
    ]


def fronts(experiment: Experiment, folders: Mapping[str, RunFolder]) -> list[list[tuple[str, ...]]]:
    """Quality against size of each group of runs: how much it covers, then what it attains at each size.

    Nothing where the experiment has no groups. See results/fronts.py; the gain in size is the share of the layers that
    is gone.
    """
    groups = {
        name: [attained(queries.read_run(folders[label])) for label in labels if folders[label].exists()]
        for name, labels in experiment.fronts.items()
    }
    if not groups:
        return []
    covers: list[tuple[str, ...]] = [("quality x size", "runs", "trials", "hypervolume, calibration", "held-out")]
    heads = (f"{name}: {quality}" for name in groups for quality in ("calibration", "held-out"))
    sizes: list[tuple[str, ...]] = [("layers kept", *heads)]
    for name, runs in groups.items():
        trials = sum(experiment.runs[label].trials for label in experiment.fronts[name])
        volumes = (volume(runs, quality) for quality in QUALITIES)
        covers.append((name, str(len(runs)), str(trials), *("" if v is None else f"{v:.4f}" for v in volumes)))
    reached = {int(kept) for runs in groups.values() for run in runs for kept in run["kept_layers"]}
    sizes += [
        (str(kept), *(_at(runs, kept, quality) for runs in groups.values() for quality in QUALITIES))
        for kept in sorted(reached, reverse=True)
    ]
    return [covers, sizes]


def _at(runs: Sequence[pd.DataFrame], kept: int, quality: str) -> str:
    """The best quality that these runs attain at a size."""
    there = [value for run in runs for value in run.loc[run["kept_layers"] == kept, quality].dropna()]
    form = "{:.1%}" if quality == "calibration" else "{:.4f}"
    return form.format(max(there)) if there else ""


def _common(labels: Iterable[str]) -> str:
    """`search` of `search, seed 0` and `search, seed 1`."""
    labels = list(labels)
    common = commonprefix(labels)  # noqa: RUF071 (labels are no paths)
    return common.rstrip(" ,-_:").removesuffix("seed").rstrip(" ,-_:") or ", ".join(labels)


def _judged(folder: RunFolder, tables: queries.RunTables) -> pd.Series | None:
    """The best plan's row of averages over all held-out benchmarks; None as long as some are missing."""
    judges = {(judge.key, judge.metric, judge.split) for judge in load_spec(folder.spec).held_out}
    found = scores.averages(scores.judged(tables), scores.calibration(tables))
    own = found[(found["subject"] == str(scores.best(tables))) & (found["benchmarks"] == len(judges))]
    return own.iloc[0] if len(own) else None


def _status(folder: RunFolder) -> RunStatus | None:
    return RunStatus(queries.read_run(folder).runs["status"].iloc[0]) if folder.exists() else None


def _is_judged(folder: RunFolder, groups: Mapping[str, Sequence[str]]) -> bool:
    """Whether its best plan is, which the table shows, and with groups of runs the best of each size."""
    tables = queries.read_run(folder)
    is_whole = not groups or bool(attained(tables)["held_out"].notna().all())
    return is_whole and _judged(folder, tables) is not None
